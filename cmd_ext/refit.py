"""The final fit of a plan's layers: to their weights alone, or to their outputs on calibration data."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import distributed
from .calibrate import Batch
from .decompose import Decomposition, decompose_batch
from .moments import (
    MAX_FEATURES,
    Paired,
    call_order,
    moment_bytes,
    output_error,
    paired_moments,
    row_energies,
    row_gains,
    second_moments,
)

MEMORY = 1 << 30  # bytes of second moments that are held at once

_log = distributed.logger(__name__)


@dataclass
class Fit:
    """How a layer was fitted.

    Attributes:
        decomposition: the fit that was kept.
        output_error: its relative error on the calibration data; None without data.
        data_aware: whether it was made by the data, not by the weight alone.
        cpu_seconds: this layer's share of the time of both fits.
    """

    decomposition: Decomposition
    output_error: float | None = None
    data_aware: bool = False
    cpu_seconds: float = 0.0


def fit_layers(
    model: nn.Module,
    layers: dict[str, dict],
    batches: list[Batch],
    *,
    n_iter: int = 20,
    data_aware: bool = True,
    sequential: int = False,
    memory: int = MEMORY,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Fit]:
    """Fits the layers of a plan; the model is as before afterwards.

    Without batches every layer is fitted to its weight. With batches it is fitted to its weight and to its outputs
    (unless data_aware=False or in the spatial form), and the fit with the smaller measured output error is kept. One to
    the outputs gets their energy back row by row, which costs next to no error and moves the network's outputs less.
    Layers of one shape and size are fitted in one batch.

    Args:
        model: holds the dense layers.
        layers: name -> {"rank", "nnz", "shape", "groups"} and perhaps "form", as in Plan.
        batches: calibration data; with several ranks, this rank's share.
        n_iter: passes of the weight-only fit.
        data_aware: fit to the outputs too, not only measure them.
        sequential: take a layer's inputs x from the network with the earlier layers compressed, and fit its outputs to
            those of the dense network, W y: that mends a part of what the earlier layers did. The number of layers, in
            the order of their calls, that share a pass over the data: True is 1, which is best and slowest.
        memory: bytes of second moments held at once: more layers than fit take more passes over the data, and a layer
            that exceeds it alone gets the diagonal.
        seed: of the choice of positions.
        step: called after each layer.

    Returns:
        name -> Fit, in the order of `layers`.

    Raises:
        ValueError: NaN or Inf in the data, no memory.
    """
    if memory < 1:
        raise ValueError(f"fit_layers: memory must be at least 1 byte, got {memory}")
    modules = {name: model.get_submodule(name) for name in layers}
    options = {"n_iter": n_iter, "data_aware": data_aware, "step": step}
    if not batches:
        return _fit_group(modules, layers, {}, **options)
    if sequential:
        memory //= 2  # a pair of moments a layer
    max_features = min(MAX_FEATURES, math.isqrt(max(memory // 8, 1)))
    fits: dict[str, Fit] = {}
    calls = _called(model, layers, batches) if sequential else dict.fromkeys(layers, 0)
    compressed = copy.deepcopy(model) if sequential else model
    for names in memory_groups([*calls], modules, memory, max_features, int(sequential)):
        how = {"max_features": max_features, "seed": seed}
        if sequential:
            moments = paired_moments(compressed, model, batches, {name: calls[name] for name in names}, **how)
        else:
            moments = second_moments(model, batches, names, **how)
        fits |= _fit_group({name: modules[name] for name in names}, layers, moments, **options)
        if sequential:
            with torch.no_grad():
                for name in names:
                    weight = compressed.get_submodule(name).weight
                    weight.copy_(fits[name].decomposition.to_dense().view_as(weight))
    kept = [name for name, fit in fits.items() if data_aware and not fit.data_aware]
    if kept:
        _log.info("fit: the one to the weights alone was as good for %s", ", ".join(kept))
    return {name: fits[name] for name in layers}


def _fit_group(
    modules: dict[str, nn.Module],
    layers: dict[str, dict],
    moments: dict[str, Tensor | Paired],
    *,
    n_iter: int,
    data_aware: bool,
    step: Callable[[], None],
) -> dict[str, Fit]:
    """Fits some of the layers; those of one shape and size together."""
    alike = defaultdict(list)
    known = {name: _Known(moment, layers[name]["groups"]) for name, moment in moments.items()}
    for name, module in modules.items():
        sizes = {key: value for key, value in layers[name].items() if key != "shape"}
        dims = known[name].h.dim() if name in known else 0
        alike[module.weight.shape, module.weight.dtype, module.weight.device, dims, tuple(sizes.items())].append(name)
    fits = {}
    for (*_, dims, sizes), names in alike.items():
        start = time.process_time()
        weights, options = [modules[name].weight for name in names], {"n_iter": n_iter, **dict(sizes)}
        plain = decompose_batch(weights, **options)
        by_data = [None] * len(names)
        if data_aware and dims and dict(sizes).get("form", "channel") == "channel":
            targets = [known[name].target(weight) for name, weight in zip(names, weights, strict=True)]
            by_data = decompose_batch(targets, second_moments=[known[name].h for name in names], **options)
        for name, *pair in zip(names, plain, by_data, strict=True):
            fits[name] = _better(modules[name].weight, *pair, known.get(name))
            step()
        for name in names:
            fits[name].cpu_seconds = (time.process_time() - start) / len(names)
    return fits


class _Known:
    """What the data tell of a layer."""

    def __init__(self, moment: Tensor | Paired, groups: int) -> None:
        self.paired = moment if isinstance(moment, Paired) else None
        self.h, self.groups = moment.moment if self.paired else moment, groups

    def target(self, weight: Tensor) -> Tensor:
        """What a fit should come near to."""
        return self.paired.target(weight, self.groups) if self.paired else weight

    def energies(self, weight: Tensor) -> Tensor:
        """Of the dense layer's outputs."""
        return self.paired.energies if self.paired else row_energies(weight, self.h, self.groups)

    def error(self, weight: Tensor, fit: Decomposition) -> float:
        if self.paired:
            return self.paired.output_error(weight, fit.to_dense(), self.groups)
        return output_error(weight, fit.to_dense(), self.h, self.groups)


def _better(weight: Tensor, plain: Decomposition, by_data: Decomposition | None, known: _Known | None) -> Fit:
    if known is None:
        return Fit(plain)
    error = known.error(weight, plain)
    if by_data is not None:
        other = known.error(weight, by_data)
        if other < error:
            # A least-squares fit shrinks the outputs, E |A x|^2 = (1 - error^2) E |W x|^2, layer after layer, but batch
            # norms have the statistics of the dense network.
            by_data.scale_rows(row_gains(known.energies(weight), by_data.to_dense(), known.h, known.groups))
            other = known.error(weight, by_data)
            return Fit(by_data, other, True)
    return Fit(plain, error)


def memory_groups(
    names: list[str], modules: dict[str, nn.Module], memory: int, max_features: int, most: int = 0
) -> Iterator[list[str]]:
    """Runs of layers, at most `most` if that is not 0, whose second moments fit into `memory` bytes together."""
    group, held = [], 0
    for name in names:
        size = moment_bytes(modules[name], max_features)
        if group and (held + size > memory or len(group) == most):
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _called(model: nn.Module, layers: dict[str, dict], batches: list[Batch]) -> dict[str, int]:
    """Calls a batch of the layers, in the order of the first ones; then those that the first batch does not reach."""
    calls = call_order(model, batches[0][0], layers)
    return {name: calls.get(name, 0) for name in [*calls, *(name for name in layers if name not in calls)]}
