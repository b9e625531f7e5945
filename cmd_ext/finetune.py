"""Fine-tuning with the structure fixed: one process or torchrun, distillation, checkpoints that resume bit for bit."""

from __future__ import annotations

import contextlib
import copy
import atexit
import hashlib
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

_FORMAT = "cmd_ext.finetune 1"
_STEPS_PER_CHECK = 16
"""Losses are read back this many steps at a time: reading each one would stall the device at every step."""


class History(list):
    """One dict per epoch: epoch, lr (of its last step), train_loss, score (None without `evaluate`), seconds.

    Attributes:
        initial_score: score before training, None without `evaluate`.
        best_epoch: epoch whose state the model has in the end; 0 is the state before training.
        best_score: its score, None without `evaluate`.
    """

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        super().__init__(rows or [])
        self.initial_score: float | None = None
        self.best_epoch = 0
        self.best_score: float | None = None


def finetune(
    model: nn.Module,
    train_loader: Any,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    teacher: nn.Module | None = None,
    distill_weight: float = 0.5,
    temperature: float = 2.0,
    evaluate: Callable[[nn.Module], float] | None = None,
    amp_dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup: float = 0.05,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> History:
    """Train `model` in place; parameters with `requires_grad=False` stay as they are.

    The loss is (1 - w) CE + w T^2 KL(teacher || student) with w = distill_weight and T = temperature, or CE alone
    without a teacher. The learning rate rises linearly over the first steps, then falls as a half cosine to 0.

    Under torchrun each rank trains on its share of the data (`batch_size` counts per rank), rank 0 evaluates, reports
    and writes the checkpoint, and all ranks end with the same weights.

    Args:
        model: returns logits [b, classes, ...].
        train_loader: has a length and yields (inputs, targets); a DataLoader under torchrun.
        epochs: passes over train_loader, at least 0.
        optimizer: over parameters of `model`; None: SGD with Nesterov momentum.
        lr: peak learning rate of the default optimizer, 0.01 if None.
        teacher: network to distil from, moved to the device of training.
        distill_weight: share of the distillation term, 0 to 1.
        temperature: softens both outputs of the distillation term, above 0.
        evaluate: score of the network, higher is better, called before training and after each epoch in eval mode
            without gradients. The best state, that before training included, is the final one.
        amp_dtype: torch.bfloat16 or torch.float16 for autocast, None for none. float16 on CUDA scales the loss.
        checkpoint: file written after each epoch. If it exists the run continues from it, to the same final weights and
            history (seconds aside) as a run without interruption, wherever the operations themselves are repeatable.
        progress: one line per epoch on stderr, and a bar if tqdm is installed and stderr is a terminal.
        momentum: of the default optimizer.
        weight_decay: of the default optimizer; parameters with fewer than two dimensions get none.
        warmup: share of all steps in which the learning rate rises, 0 to 1.
        label_smoothing: of the cross entropy, 0 to 1.
        clip_norm: largest gradient norm, None for no clipping.
        seed: seeds torch, numpy and random (plus the rank); None leaves them as they are.
        device: where to train; None: where the model is. "cuda" means the rank's own GPU under torchrun.

    Returns:
        The history, one row per epoch.

    Raises:
        ValueError: a bad argument, or a checkpoint that is unreadable or of another model or other settings.
        OSError: the checkpoint cannot be written (found before training).
        FloatingPointError: the loss is not finite; the model then has the state of its last complete epoch.
    """
    _check_arguments(model, train_loader, epochs, optimizer, lr, teacher, amp_dtype)
    _check_range(distill_weight=distill_weight, warmup=warmup, label_smoothing=label_smoothing)
    _check_positive(temperature=temperature, clip_norm=clip_norm)
    path = None if checkpoint is None else Path(checkpoint)
    _start_distributed(model, device)
    _first_rank_does(lambda: _check_writable(path))
    device = _training_device(model, device)
    model.to(device)
    if seed is not None:
        _seed_everything(seed + _rank())
    train_loader = _shard(train_loader, seed)
    if optimizer is None:
        optimizer = _default_optimizer(model, 0.01 if lr is None else lr, momentum, weight_decay)
    loss = _Loss(teacher, distill_weight, temperature, label_smoothing)
    run = _Run(model, train_loader, optimizer, loss, device, epochs, warmup, amp_dtype, clip_norm, evaluate)
    run.settings = {
        "model": _signature(model),
        "epochs": epochs,
        "steps per epoch": run.steps,
        "optimizer": _describe(optimizer),
        "teacher": teacher is not None and [distill_weight, temperature],
        "evaluate": evaluate is not None,
        "amp_dtype": str(amp_dtype),
        "warmup": warmup,
        "label_smoothing": label_smoothing,
        "clip_norm": clip_norm,
        "seed": seed,
        "ranks": _world_size(),
    }
    with _modes_kept(model, teacher):
        if teacher is not None:
            teacher.to(device).eval()
        run.train(path, progress and _rank() == 0)
    return run.history


@dataclass
class _Loss:
    teacher: nn.Module | None
    distill_weight: float
    temperature: float
    label_smoothing: float

    def __call__(self, logits: Tensor, inputs: Tensor, targets: Tensor, autocast: contextlib.AbstractContextManager) -> Tensor:
        logits = _full_precision(logits)
        if self.teacher is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        with torch.no_grad(), autocast:
            wanted = _full_precision(self.teacher(inputs))
        wanted = F.log_softmax(wanted / self.temperature, 1)
        got = F.log_softmax(logits / self.temperature, 1)
        divergence = (wanted.exp() * (wanted - got)).sum(1).mean() * self.temperature**2
        entropy = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return (1 - self.distill_weight) * entropy + self.distill_weight * divergence
