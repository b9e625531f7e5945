"""Batch norms of a compressed network: running statistics that fit what its layers feed them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import distributed
from .calibrate import Batch, batches_of, call, class_targets, device_of, loss, loss_of, outputs, share_right, to_device

# Of the data's own statistics in new ones, by the loss of the dense network with them. All of it is a poor estimate: a
# dense ResNet-56 loses 1.6 points by them on images that are unlike those of its training, and gains by a half.
SHARES = 0.25, 0.5, 0.75  # beside 0
GAINS = 1 / 20, 20.0  # of variances, at most: a channel that compression made constant has none

_log = distributed.logger(__name__)

Moments = tuple[Tensor, Tensor]  # mean and variance of each channel, float32


@dataclass
class Norms:
    """What the batch norms of a network expect of their inputs, and what they see on some data.

    Attributes:
        running: name -> running statistics.
        seen: for each batch, name -> moments of the inputs, one pair a call.
        share: of what is seen, in new statistics.
    """

    running: dict[str, Moments]
    seen: list[dict[str, list[Moments]]]
    share: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, batches: list[Batch], share: float = 0.0) -> Norms:
        norms = named_norms(model)
        running = {name: (norm.running_mean.float(), norm.running_var.float()) for name, norm in norms.items()}
        seen: list[dict[str, list[Moments]]] = []

        def note(name: str, x: Tensor) -> None:
            seen[-1][name].append(_moments(x, running[name][0]))

        for inputs, _ in batches if norms else []:
            seen.append(defaultdict(list))
            _watched(model, norms, inputs, note)
        return cls({name: (mean.clone(), var.clone()) for name, (mean, var) in running.items()}, seen, share)

    @classmethod
    def suited(cls, model: nn.Module, batches: list[Batch], reference: list[Tensor]) -> Norms:
        """With the share that suits the dense network: least loss, and no fewer images right than with its own.

        Without class targets it is 0.
        """
        norms, targets = cls.of(model, batches), class_targets(batches, reference)
        if not norms.running or targets is None:
            return norms
        twin, least = copy.deepcopy(model), share_right(reference, targets)
        losses = {0.0: loss_of(reference, batches, reference)}
        for norms.share in SHARES:
            got = outputs(recalibrate(twin, batches, norms), batches)
            if share_right(got, targets) >= least:
                losses[norms.share] = loss_of(got, batches, reference)
        norms.share = min(losses, key=losses.get)
        _log.info(
            "batch norms: a share of %g of the data's own statistics; the dense network's loss %.4f > %.4f",
            norms.share, losses[0.0], losses[norms.share],
        )  # fmt: skip
        return norms


def recalibrate_batchnorm(
    model: nn.Module,
    loader: Iterable,
    n_batches: int | None = None,
    *,
    reference: nn.Module | None = None,
    share: float = 0.0,
) -> nn.Module:
    """Estimates the running statistics of every batch norm anew, as an average over batches.

    A compressed layer shifts the statistics of what it feeds. Without a reference the new ones are those of the data,
    which can hurt where these are few, or unlike the training data. With the dense network as `reference` they are its
    running statistics, moved by what compression changed on the same data, and perhaps a share of the data's own:
    `compress` does that, where the calibration loss falls. Modes and momenta are as before afterwards.

    Args:
        model: changed in place.
        loader: iterable of inputs or (inputs, targets).
        n_batches: at most this many batches; all if None.
        reference: the network that model was made from, with batch norms of the same names.
        share: of the data's own statistics beside a reference, 0 to 1; 1 is as without one. `compress` takes the one
            with which the dense network has the least loss on the calibration data.

    Returns:
        model.

    Raises:
        ValueError: no batch, a share out of range, a batch norm that the reference lacks.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"recalibrate_batchnorm: share must lie in [0, 1], got {share}")
    norms, batches = named_norms(model), batches_of(loader, n_batches)
    if reference is None:
        return _averaged(model, batches, [*norms.values()])
    missing = [name for name in norms if name not in named_norms(reference)]
    if missing:
        raise ValueError(f"recalibrate_batchnorm: reference must have the batch norms of model, got no {missing[0]!r}")
    return recalibrate(model, batches, Norms.of(reference, batches, share))


def recalibrate(model: nn.Module, batches: list[Batch], dense: Norms) -> nn.Module:
    """New running statistics (1 - share) (M, V) + share (m, v), averaged over the batches.

    m and v are the moments of the inputs; with M and V a batch norm's outputs would have the moments that those of the
    dense network have on the same batch. Each batch is normalised by its own statistics on the way, as in training.

    Args:
        dense: of the dense network on as many batches, or more.
    """
    norms = named_norms(model)
    sums = {
        name: [torch.zeros_like(norm.running_mean, dtype=torch.float64) for _ in range(2)]
        for name, norm in norms.items()
    }
    calls, expected = dict.fromkeys(norms, 0), {}

    def replace(name: str, x: Tensor) -> None:
        if not x.numel():
            return
        norm, twins = norms[name], expected[name]
        mean, var = _moments(x, norm.running_mean.float())
        new = mean, var
        if twins:  # none: the dense network does not call it on this batch
            kept = _moved(dense.running[name], twins.pop(0) if len(twins) > 1 else twins[0], new, norm.eps)
            new = tuple(torch.lerp(a, b, dense.share) for a, b in zip(kept, new, strict=True))
        calls[name] += len(x)
        for buffer, total, value in zip((norm.running_mean, norm.running_var), sums[name], new, strict=True):
            total += len(x) * value
            buffer.copy_(value)

    for (inputs, _), seen in zip(batches, dense.seen, strict=False):
        expected = {name: [*seen.get(name, ())] for name in norms}
        _watched(model, norms, inputs, replace)
    for name, norm in norms.items():
        values = [total / calls[name] for total in sums[name]] if calls[name] else dense.running[name]
        for buffer, value in zip((norm.running_mean, norm.running_var), values, strict=True):
            buffer.copy_(value)
    return model


def recalibrate_if_better(
    model: nn.Module, batches: list[Batch], reference: list[Tensor], dense: Norms
) -> tuple[float, float] | None:
    """recalibrate, undone unless the loss on the batches falls. Returns the loss (before, after)."""
    norms = batch_norms(model)
    if not norms:
        return None
    saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    before = loss(model, batches, reference)
    recalibrate(model, batches, dense)
    after = loss(model, batches, reference)
    if not after < before:
        for buffer, old in saved:
            buffer.copy_(old)
    return before, after


def named_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> batch norm, of those that have running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and m.track_running_stats}


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [*named_norms(model).values()]


def _averaged(model: nn.Module, batches: list[Batch], norms: list[nn.Module]) -> nn.Module:
    """The plain average; only the batch norms run in training mode meanwhile."""
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    try:
        with torch.no_grad():
            for inputs, _ in batches if norms else []:
                call(model, to_device(inputs, device_of(model)))
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    return model


def _moments(x: Tensor, near: Tensor) -> Moments:
    """Of x [batch, channels, ...]; `near` is about its mean, so that float32 keeps the digits of the variance."""
    x = x.detach().to(torch.float32).movedim(1, -1) - near
    others = [*range(x.dim() - 1)]
    mean = x.mean(others)
    return mean + near, (x.square().mean(others) - mean.square()).clamp_min_(0)


def _moved(running: Moments, dense: Moments, ours: Moments, eps: float) -> Moments:
    """Statistics by which our inputs come out with the moments that the dense ones have by the running statistics."""
    gain = ((ours[1] + eps) / (dense[1] + eps)).clamp(*GAINS)
    mean = ours[0] - (dense[0] - running[0]) * gain.sqrt()
    return mean, ((running[1] + eps) * gain - eps).clamp_min(0)


def _watched(
    model: nn.Module, norms: dict[str, nn.Module], inputs: object, note: Callable[[str, Tensor], None]
) -> None:
    """One call of the model in eval mode; `note` gets the input of each batch norm before it is used."""
    with _evaluated(model), _hooked(norms, note):
        call(model, to_device(inputs, device_of(model)))


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooked(norms: dict[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [
        norm.register_forward_pre_hook(lambda _module, args, name=name: note(name, args[0]))
        for name, norm in norms.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
