"""What a few batches of data tell about a model: its loss, and its distance from another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Any, Tensor | None]  # inputs, targets


def call(model: nn.Module, inputs: Any) -> Any:
    """model(inputs): a tensor as the only argument, a tuple or list as positional, a mapping as keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def batches_of(calibration: Iterable, limit: int | None = None) -> list[Batch]:
    """Reads an iterable of inputs or (inputs, targets) pairs.

    Raises:
        ValueError: it holds no batch.
    """
    batches = [batch_of(item) for item in islice(calibration, limit)]
    if not batches:
        raise ValueError("calibration: want an iterable of inputs or (inputs, targets), got an empty one")
    return batches


def batch_of(item: Any) -> Batch:
    """One item of an iterable of inputs or (inputs, targets); a mapping's "labels" are its targets."""
    inputs, targets = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    if isinstance(inputs, Mapping) and "labels" in inputs and targets is None:
        inputs = dict(inputs)
        targets = inputs.pop("labels")
    return inputs, targets


def to_device(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs.to(device) if isinstance(inputs, Tensor) else inputs


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def outputs(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    """The model's output per batch, in eval mode without gradients; the logits of a structured output."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    with torch.no_grad():
        results = [_tensor(call(model, to_device(inputs, device_of(model)))) for inputs, _ in batches]
    for module in training:
        module.training = True
    return results


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output:
        return _tensor(output[0])
    if isinstance(output, Mapping) and output:
        return _tensor(next(iter(output.values())))
    raise TypeError(
        f"calibration: the model must return a tensor or hold one (logits, tuple, dict), got {type(output)}"
    )


def divergence(reference: list[Tensor], got: list[Tensor]) -> float:
    """Mean KL(reference || got) of logits [batch, classes]; for other outputs the relative squared error."""
    if reference[0].dim() == 2:
        total = sum(
            F.kl_div(F.log_softmax(b.float(), 1), F.log_softmax(a.float(), 1), reduction="sum", log_target=True).item()
            for a, b in zip(reference, got, strict=True)
        )
        return max(0.0, total / sum(len(a) for a in reference))
    error = sum((a.double() - b.double()).square().sum().item() for a, b in zip(reference, got, strict=True))
    return error / max(sum(a.double().square().sum().item() for a in reference), 1e-300)


def loss(model: nn.Module, batches: list[Batch], reference: list[Tensor]) -> float:
    """Cross entropy where every batch has class targets, else the divergence from the reference outputs."""
    return loss_of(outputs(model, batches), batches, reference)


def loss_of(got: list[Tensor], batches: list[Batch], reference: list[Tensor]) -> float:
    """loss, of outputs."""
    targets = class_targets(batches, got)
    if targets is None:
        return divergence(reference, got)
    total = sum(
        F.cross_entropy(o.float(), t.to(o.device), reduction="sum").item() for o, t in zip(got, targets, strict=True)
    )
    return total / sum(len(t) for t in targets)


def class_targets(batches: list[Batch], got: list[Tensor]) -> list[Tensor] | None:
    """The targets of the batches where all are classes and the outputs logits of classes."""
    targets = [target for _, target in batches]
    classes = all(isinstance(t, Tensor) and t.dim() == 1 and not t.is_floating_point() for t in targets)
    return targets if classes and got[0].dim() == 2 else None


def share_right(got: list[Tensor], targets: list[Tensor]) -> float:
    """Top-1 accuracy of outputs."""
    right = sum((o.argmax(1) == y.to(o.device)).sum().item() for o, y in zip(got, targets, strict=True))
    return right / sum(len(y) for y in targets)


def accuracy(model: nn.Module, loader: Iterable) -> float:
    """Top-1 accuracy, 0 to 1, over batches of (inputs, class targets)."""
    right = total = 0
    for batch in loader:
        (logits,) = outputs(model, batches_of([batch]))
        right += (logits.argmax(1).cpu() == batch[1].cpu()).sum().item()
        total += len(batch[1])
    if not total:
        raise ValueError("accuracy: want batches of (inputs, targets), got an empty loader")
    return right / total
