"""Fine-tuning with the structure fixed: one process or torchrun, distillation, checkpoints that resume bit for bit."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint as checkpoints
from . import distributed

_STEPS_PER_CHECK = 16  # reading every loss back would stall the device at every step


class History(list):
    """One dict per epoch: epoch (from 1), lr (of its last step), train_loss, score (or None), seconds.

    Attributes:
        initial_score: score before training, None without `evaluate`.
        best_epoch: epoch whose state the model has in the end; 0 is the state before training.
        best_score: its score, None without `evaluate`.
    """

    initial_score: float | None = None
    best_epoch: int = 0
    best_score: float | None = None


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

    Under torchrun each rank trains on its share of the data (the batch size counts per rank), rank 0 evaluates, reports
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
        evaluate: score of the network, higher is better; called before training and after each epoch, in eval mode
            and without gradients. The best state, that before training included, is the final one.
        amp_dtype: torch.bfloat16 or torch.float16 for autocast, None for none. float16 on CUDA scales the loss.
        checkpoint: file written before training and after each epoch. If it exists, the run continues from it to the
            same weights and history (seconds aside) as an uninterrupted run, as far as the operations are repeatable.
        progress: one line per epoch on stderr, and a bar if tqdm is installed and stderr is a terminal.
        momentum: of the default optimizer.
        weight_decay: of the default optimizer; parameters with fewer than two dimensions get none.
        warmup: share of all steps in which the learning rate rises, 0 to 1.
        label_smoothing: of the cross entropy, 0 to 1.
        clip_norm: largest gradient norm, above 0; None for no clipping.
        seed: seeds torch, numpy and random (plus the rank); None leaves them as they are.
        device: where to train; None: where the model is. Under torchrun "cuda" is the rank's own GPU.

    Returns:
        The history, one row per epoch.

    Raises:
        ValueError: a bad value, or a checkpoint that is unreadable, of another model or of other settings.
        TypeError: a train_loader without length, or one that cannot be divided among ranks.
        OSError: the checkpoint cannot be written (found before training).
        FloatingPointError: a loss or parameter is not finite; the model then has the state of its last complete epoch.
    """
    options = _Options(
        epochs, teacher, distill_weight, temperature, evaluate, amp_dtype, warmup, label_smoothing, clip_norm, seed
    )
    options.check()
    _check_arguments(model, train_loader, optimizer, lr, teacher)
    device = distributed.training_device(model, device)
    distributed.start(device)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        distributed.first_rank_does(lambda: checkpoints.check_writable(path))
    model.to(device)
    if seed is not None:
        checkpoints.seed_everything(seed + distributed.rank())
    if optimizer is None:
        optimizer = _default_optimizer(model, 0.01 if lr is None else lr, momentum, weight_decay)
    run = _Run(model, distributed.shard(train_loader, seed), optimizer, device, options)
    with _modes_kept(model, teacher), _Progress(progress and distributed.rank() == 0, run.total_steps) as report:
        run.train(path, report)
    return run.history


@dataclass(frozen=True)
class _Options:
    epochs: int
    teacher: nn.Module | None
    distill_weight: float
    temperature: float
    evaluate: Callable[[nn.Module], float] | None
    amp_dtype: torch.dtype | None
    warmup: float
    label_smoothing: float
    clip_norm: float | None
    seed: int | None

    def check(self) -> None:
        if not isinstance(self.epochs, int) or isinstance(self.epochs, bool) or self.epochs < 0:
            raise ValueError(f"finetune: epochs must be an integer of at least 0, got {self.epochs!r}")
        if self.amp_dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"finetune: amp_dtype must be torch.float16, torch.bfloat16 or None, got {self.amp_dtype}")
        for name in ("distill_weight", "warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"finetune: {name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("temperature", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"finetune: {name} must be above 0, got {value}")

    def described(self) -> dict[str, str]:
        """Values by name; networks and functions only as given or not."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: "given" if callable(value) else str(value) for name, value in values.items()}


class _Run:
    """State of one call: everything that a checkpoint holds, and how it moves from epoch to epoch."""

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        options: _Options,
    ) -> None:
        self.model, self.loader, self.optimizer, self.device, self.options = model, loader, optimizer, device, options
        self.epochs, self.steps = options.epochs, len(loader)
        self.total_steps = self.epochs * self.steps
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.settings = _settings(model, optimizer, self.steps, options)
        self.scaler = torch.amp.GradScaler(enabled=device.type == "cuda" and options.amp_dtype is torch.float16)
        self.sampler = distributed.sampler_of(loader)
        generators = (getattr(loader, "generator", None), getattr(self.sampler, "generator", None))
        self.generators = list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())
        self.history = History()
        self.epoch = 0
        self.state: dict[str, Any] = {}
        self.best_state: dict[str, Any] = {}
        self.parallel = model
        if distributed.world_size() > 1:
            self.parallel = DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
            )

    def train(self, path: Path | None, report: _Progress) -> None:
        """Run the epochs that are left and give the model its best state."""
        if self.options.teacher is not None:
            self.options.teacher.to(self.device).eval()
        saved = distributed.first_rank_does(lambda: checkpoints.read(path, self.settings)) if path is not None else None
        if saved is None:
            self.finish_epoch(path)
            if self.history.initial_score is not None:
                report.line(f"epoch 0/{self.epochs}  score {self.history.initial_score:.4f}")
        else:
            self.restore(saved)
            report.line(f"continuing after epoch {self.epoch}/{self.epochs} of {path}")
        report.step(self.epoch * self.steps)
        while self.epoch < self.epochs:
            self.run_epoch(report)
            self.finish_epoch(path)
            report.row(self.history[-1], self.epochs)
        self.model.load_state_dict(self.best_state)
        self.optimizer.zero_grad(set_to_none=True)

    def run_epoch(self, report: _Progress) -> None:
        """Train for one epoch and append its row to the history."""
        start = time.perf_counter()
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch)
        self.model.train()
        total, step, unread = 0.0, 0, []
        for step, batch in enumerate(self.loader, 1):
            unread.append(self.train_step(batch, self.epoch * self.steps + step - 1))
            report.step(1)
            if len(unread) == _STEPS_PER_CHECK or step == self.steps:
                total += self.read_losses(unread, step)
                unread = []
        if step != self.steps:
            raise ValueError(f"finetune: train_loader has length {self.steps}, got {step} batches from it")
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            self.fail("a parameter is not finite after the update", step)
        self.epoch += 1
        self.history.append(
            {
                "epoch": self.epoch,
                "lr": float(self.optimizer.param_groups[0]["lr"]),
                "train_loss": total / self.steps,
                "score": None,
                "seconds": time.perf_counter() - start,
            }
        )

    def train_step(self, batch: Any, step: int) -> Tensor:
        """One update; returns the loss, a scalar on the device."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"finetune: train_loader must yield (inputs, targets), got {type(batch).__name__}")
        inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
        factor = _lr_factor(step, self.total_steps, self.options.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.logits(self.parallel, inputs), inputs, targets)
        self.scaler.scale(loss).backward()
        if self.options.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def logits(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Outputs [b, classes, ...] under autocast, in float32 or wider."""
        amp_dtype = self.options.amp_dtype
        with torch.autocast(self.device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = network(inputs)
        if not isinstance(logits, Tensor):
            raise TypeError(f"finetune: a network must return its logits as a tensor, got {type(logits).__name__}")
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def loss(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, mixed with the divergence from the teacher if there is one."""
        entropy = F.cross_entropy(logits, targets, label_smoothing=self.options.label_smoothing)
        if self.options.teacher is None:
            return entropy
        weight, temperature = self.options.distill_weight, self.options.temperature
        with torch.no_grad():
            wanted = F.log_softmax(self.logits(self.options.teacher, inputs) / temperature, 1)
        got = F.log_softmax(logits / temperature, 1)
        divergence = F.kl_div(got, wanted, reduction="none", log_target=True).sum(1).mean()
        return (1 - weight) * entropy + weight * temperature**2 * divergence

    def read_losses(self, losses: list[Tensor], last_step: int) -> float:
        """Sum of the last steps' losses, averaged over ranks; every rank fails if the loss of one is not finite."""
        values = torch.stack(losses).float()
        if distributed.world_size() > 1:
            dist.all_reduce(values)
        values = (values / distributed.world_size()).tolist()
        for step, value in enumerate(values, last_step - len(values) + 1):
            if not math.isfinite(value):
                self.fail(f"loss is {value}", step)
        return sum(values)

    def fail(self, reason: str, step: int) -> NoReturn:
        """Go back to the last complete epoch and raise."""
        self.model.load_state_dict(self.state)
        raise FloatingPointError(
            f"finetune: {reason} in epoch {self.epoch + 1}, step {step} of {self.steps}; "
            f"the model has its state after epoch {self.epoch} again"
        )

    def finish_epoch(self, path: Path | None) -> None:
        """Score the model, keep its state if it is the best one, write the checkpoint."""
        if distributed.world_size() > 1:
            distributed.copy_from_first_rank(self.model)
        score = distributed.first_rank_does(self.score)
        self.state = {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in self.model.state_dict().items()
        }
        if self.epoch:
            self.history[-1]["score"] = score
        else:
            self.history.initial_score = score
        if not self.best_state or score is None or _order(score) > _order(self.history.best_score):
            self.history.best_epoch, self.history.best_score, self.best_state = self.epoch, score, self.state
        if path is not None:
            content = self.content()
            distributed.first_rank_does(lambda: checkpoints.write(path, content))

    def score(self) -> float | None:
        """What `evaluate` says of the model."""
        if self.options.evaluate is None:
            return None
        self.model.eval()
        with torch.no_grad():
            score = self.options.evaluate(self.model)
        try:
            return float(score)
        except (TypeError, ValueError) as error:
            raise TypeError(f"finetune: evaluate must return a number, got {type(score).__name__}") from error

    def content(self) -> dict[str, Any]:
        """What the checkpoint holds; plain containers, numbers, strings and tensors only."""
        random_states: list[Any] = [checkpoints.random_state(self.device, self.generators)]
        if distributed.world_size() > 1:
            random_states *= distributed.world_size()
            dist.all_gather_object(random_states, random_states[0])
        return {
            "format": checkpoints.FORMAT,
            "settings": self.settings,
            "epoch": self.epoch,
            "model": self.state,
            "best_model": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states,
            "history": list(self.history),
            "scores": [self.history.initial_score, self.history.best_epoch, self.history.best_score],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Undo `content`."""
        self.epoch, self.state, self.best_state = saved["epoch"], saved["model"], saved["best_model"]
        self.model.load_state_dict(self.state)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.history[:] = saved["history"]
        self.history.initial_score, self.history.best_epoch, self.history.best_score = saved["scores"]
        checkpoints.set_random_state(saved["random"][distributed.rank()], self.device, self.generators)


class _Progress:
    """A line per epoch on stderr, and a bar over all steps where tqdm is installed and stderr is a terminal."""

    def __init__(self, enabled: bool, steps: int) -> None:
        self.enabled = enabled
        self.bar = None
        if enabled:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=steps, desc="finetune", leave=False, disable=None)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)

    def line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(f"finetune: {text}", file=sys.stderr)
        elif self.enabled:
            print(f"finetune: {text}", file=sys.stderr, flush=True)

    def row(self, row: dict[str, Any], epochs: int) -> None:
        score = "" if row["score"] is None else f"  score {row['score']:.4f}"
        self.line(f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}{score}  {row['seconds']:.1f} s")


def _check_arguments(
    model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer | None, lr: float | None, teacher: nn.Module | None
) -> None:
    if not hasattr(loader, "__len__") or not hasattr(loader, "__iter__"):
        raise TypeError(f"finetune: train_loader must have a length and be iterable, got {type(loader).__name__}")
    if len(loader) == 0:
        raise ValueError("finetune: train_loader must yield at least one batch, got length 0")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("finetune: model must have a parameter with requires_grad=True, got none")
    if teacher is model:
        raise ValueError("finetune: teacher must be another network, got the model itself")
    if lr is not None and optimizer is not None:
        raise ValueError("finetune: lr is of the default optimizer; set it in the optimizer that you give")
    if lr is not None and not lr > 0:
        raise ValueError(f"finetune: lr must be above 0, got {lr}")
    own = {id(parameter) for parameter in model.parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    foreign = sum(id(parameter) not in own for group in groups for parameter in group["params"])
    if foreign:
        raise ValueError(f"finetune: optimizer must hold parameters of the model only, got {foreign} others")


def _default_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def _lr_factor(step: int, steps: int, warmup: float) -> float:
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def _order(score: float | None) -> float:
    """Scores as they compare: one that is not a number is below all others."""
    return -math.inf if score is None or math.isnan(score) else score


def _settings(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, options: _Options) -> dict[str, str]:
    """What must be equal for a run to be continued, by name. A sparse layer's support is part of the structure."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    settings = options.described() | {
        "steps per epoch": str(steps),
        "ranks": str(distributed.world_size()),
        "optimizer": f"{type(optimizer).__name__} {groups}",
    }
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            settings[name] = f"{value.dtype} {list(value.shape)}{' frozen' if name in frozen else ''}"
            if value.ndim and not value.is_floating_point():
                settings[name] += " " + hashlib.sha256(value.cpu().contiguous().numpy()).hexdigest()[:16]
    return settings


@contextlib.contextmanager
def _modes_kept(*networks: nn.Module | None) -> Iterator[None]:
    modes = [(module, module.training) for network in networks if network is not None for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
