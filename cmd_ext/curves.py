"""Error curves of a network's layers: what each of them loses at every size, and what the network makes of it.

With calibration data a layer's error is that of its outputs after a data-aware fit, the kind that it gets in the end: a
path of fits over a grid of budgets and sparse coefficients, and between its points interpolation. Without data, and for
layers that are fitted to their weights in the end, it is that of the weight, from weight_curves.py. With data, each
layer alone is compressed at a few budgets, and the divergence of the network's outputs takes the place of the error.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from . import distributed, weight_curves
from .allocation import Candidate, Layer, dense_of, removed
from .calibrate import Batch, divergence, outputs
from .cost import kept_parameters
from .decompose import Decomposition
from .moments import MAX_FEATURES, output_error, row_energies, row_gains, second_moments
from .path import Point, decompose_path_batch
from .refit import MEMORY, memory_groups
from .tables import Table, Tables
from .weight_curves import interpolate, loss_at

GRID = (0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
COEFFICIENTS = (1.0, 0.85, 0.6, 0.0)
# Wide layers, whose fits take minutes, get fewer: m n^2 and the grid of both limits.
WIDE, WIDE_GRID, WIDE_COEFFICIENTS = 1 << 32, (0.03, 0.08, 0.2, 0.4, 0.65), (1.0, 0.85, 0.0)
# Budgets at which the loss is measured. Below the least it is a guess: without 3 % wide layers starve at a tenth.
LOSS_BUDGETS = (0.03, 0.08, 0.2, 0.4)
STEPS = len(LOSS_BUDGETS) + 1  # losses a layer: at these budgets, and without it
SAMPLES = 256  # of the calibration data: enough to rank layers by what they do to the outputs

Curves = dict[str, list[Candidate]]
Grid = dict[tuple[float, float], Point]  # (budget, sparse coefficient) -> (rank, nnz)
Step = Callable[[], None]

_log = distributed.logger(__name__)


def network_curves(
    model: nn.Module,
    layers: list[Layer],
    batches: list[Batch],
    reference: list[Tensor],
    *,
    data_aware: bool = True,
    round_to: int = 1,
    memory: int = MEMORY,
    seed: int = 0,
    step: Step = lambda: None,
    tables: Tables | None = None,
) -> Curves:
    """The candidates of every layer, with the divergence of the network's outputs as their loss if there are data.

    With an initialised process group every rank must call it: the moments are those of all data, the divergence is
    measured on the first rank.

    Args:
        model: holds the layers; weights are changed while it is measured, and restored.
        layers: those to compress; their `forms` tell whether they will be fitted to data (the channel form alone).
        batches: calibration data, this rank's share; may be empty.
        reference: outputs of `model` on them.
        data_aware: whether the layers will be fitted to data at all.
        round_to: ranks are multiples of this.
        memory: bytes of second moments held at once, as in fit_layers.
        seed: of the choice of rows of the data.
        step: called STEPS times a layer, once without data.
        tables: where the fits to data are kept, and taken from if they are there; candidates of layers with such fits
            are then these alone, without others between them.

    Returns:
        name -> candidates, the first one dense, in the order of `layers`.

    Raises:
        ValueError: NaN or Inf in the data.
    """
    curves: Curves = {}
    meter = Meter(model, batches, reference, step)
    by_name = {layer.name: layer for layer in layers if batches and data_aware and layer.forms == ("channel",)}
    modules = {name: model.get_submodule(name) for name in by_name}
    max_features = min(MAX_FEATURES, math.isqrt(max(memory // 8, 1)))
    for names in memory_groups([*by_name], modules, memory, max_features):
        grid = {name: _points(by_name[name], round_to) for name in names}
        kept = distributed.first_rank_does(partial(_kept, [by_name[name] for name in names], grid, tables))
        if kept is not None:
            curves |= kept
            for _ in range(STEPS * len(names)):
                step()
            continue
        moments = second_moments(model, batches, names, max_features=max_features, seed=seed)
        reached = [by_name[name] for name in names if name in moments]
        curves |= distributed.first_rank_does(partial(_aware_curves, reached, moments, meter, grid, round_to, tables))
    rest = [layer for layer in layers if layer.name not in curves]
    if rest:
        curves |= distributed.first_rank_does(partial(_plain_curves, rest, meter, round_to, step))
    _log.info(
        "error curves: %d layers, %d of them by %d fits to data in %.1f CPU s; %d losses measured in %.1f CPU s",
        len(layers), len(layers) - len(rest), meter.fits, meter.fit_seconds, meter.losses, meter.loss_seconds,
    )  # fmt: skip
    return {layer.name: curves[layer.name] for layer in layers}


def sizes(layers: list[Layer], round_to: int = 1) -> Curves:
    """Candidates of every size that curves can have, without errors: what is reachable, before any fit."""
    curves = {}
    for layer in layers:
        curves[layer.name] = [dense_of(layer), *removed(layer)]
        pairs = [(budget, coefficient) for coefficient in COEFFICIENTS for budget in weight_curves.BUDGETS]
        for form in layer.forms:
            offered = dict.fromkeys(_size(layer, *pair, round_to, form) for pair in pairs)
            curves[layer.name] += [
                Candidate(*size, 1.0, 1.0, layer.costs(*size, form), form) for size in offered if size is not None
            ]
    return curves


class Meter:
    """Measures the divergence of the network's outputs, and counts what the search takes."""

    def __init__(self, model: nn.Module, batches: list[Batch], reference: list[Tensor], step: Step) -> None:
        used = count = 0
        while used < len(reference) and count < SAMPLES:
            count += len(reference[used])
            used += 1
        self.model, self.sample, self.reference, self.step = model, batches[:used], reference[:used], step
        self.fits = self.losses = 0
        self.fit_seconds = self.loss_seconds = 0.0

    def loss(self) -> float:
        """Of the model as it is now."""
        start = time.process_time()
        value = divergence(self.reference, outputs(self.model, self.sample))
        self.losses, self.loss_seconds = self.losses + 1, self.loss_seconds + time.process_time() - start
        return value

    def losses_of(self, name: str, weights: list[Tensor]) -> list[float]:
        """With one layer's weight replaced by each of some; it is as before afterwards."""
        weight = self.model.get_submodule(name).weight
        dense, found = weight.detach().clone(), []
        try:
            for other in weights:
                with torch.no_grad():
                    weight.copy_(other.view_as(weight))
                found.append(self.loss())
                self.step()
        finally:
            with torch.no_grad():
                weight.copy_(dense)
        return found


def _plain_curves(layers: list[Layer], meter: Meter, round_to: int, step: Step) -> Curves:
    """Of fits to the weights."""
    curves = weight_curves.error_curves(layers, round_to=round_to, step=step)
    if meter.sample:
        modules = {layer.name: meter.model.get_submodule(layer.name) for layer in layers}
        weight_curves.measure_losses(layers, curves, modules, meter.loss, step)
    return curves


def _aware_curves(
    layers: list[Layer],
    moments: dict[str, Tensor],
    meter: Meter,
    grid: dict[str, Grid],
    round_to: int,
    tables: Tables | None,
) -> Curves:
    """Of fits to the outputs; layers of one shape in one batch."""
    alike = defaultdict(list)
    for layer in layers:
        kind = layer.weight.shape, layer.groups, layer.weight.dtype, moments[layer.name].dim()
        alike[kind].append(layer)
    curves = {}
    for group in alike.values():
        start, first = time.process_time(), group[0]
        points = grid[first.name]
        sizes = _sizes(points)
        paths = decompose_path_batch(
            [layer.weight for layer in group],
            sizes,
            second_moments=[moments[layer.name] for layer in group],
            groups=first.groups,
        )
        meter.fits, meter.fit_seconds = (
            meter.fits + len(group) * len(sizes),
            meter.fit_seconds + time.process_time() - start,
        )
        for layer, path in zip(group, paths, strict=True):
            how = moments[layer.name], layer.groups
            energies = row_energies(layer.weight, *how)
            for fit in path:  # as fit_layers does in the end
                fit.scale_rows(row_gains(energies, fit.to_dense(), *how))
                fit.output_error = output_error(layer.weight, fit.to_dense(), *how)
            losses = _measured(layer, points, dict(zip(sizes, path, strict=True)), meter)
            if tables is not None:
                curves[layer.name] = _exact_curve(layer, tables.keep(layer, sizes, path, losses))
            else:
                errors = {size: fit.output_error for size, fit in zip(sizes, path, strict=True)}
                curves[layer.name] = _with_losses(_curve(layer, points, errors, round_to), losses)
    return curves


def _kept(layers: list[Layer], grid: dict[str, Grid], tables: Tables | None) -> Curves | None:
    """The candidates of layers that all have tables already."""
    if tables is None or not all(tables.find(layer, _sizes(grid[layer.name])) for layer in layers):
        return None
    return {layer.name: _exact_curve(layer, tables.tables[layer.name]) for layer in layers}


def finer(layers: list[Layer], curves: Curves, tables: Tables, round_to: int = 1) -> Curves:
    """The candidates that layers with tables have without them: with others between the fits."""
    found = dict(curves)
    for layer in layers:
        if layer.name in tables.tables:
            table = tables.tables[layer.name]
            found[layer.name] = _with_losses(
                _curve(layer, _points(layer, round_to), table.errors, round_to), table.losses
            )
    return found


def _size(layer: Layer, budget: float, coefficient: float, round_to: int, form: str = "channel") -> Point | None:
    """(rank, nnz) of a budget, the rank rounded down and what that leaves to S; None where a branch would be empty."""
    rank, nnz = layer.split(budget, coefficient, form)
    rank -= rank % round_to
    if (rank == 0 and coefficient < 1) or (nnz == 0 and coefficient > 0):
        return None
    if nnz and form == "channel":
        nnz = int(budget * layer.size + 1e-9) - kept_parameters(layer.m, layer.n, layer.groups, rank, 0)
    return rank, nnz


def _points(layer: Layer, round_to: int) -> Grid:
    """(budget, coefficient) -> (rank, nnz)."""
    wide = layer.m * layer.n**2 > WIDE
    budgets, coefficients = (WIDE_GRID, WIDE_COEFFICIENTS) if wide else (GRID, COEFFICIENTS)
    pairs = ((budget, coefficient) for budget in budgets for coefficient in coefficients)
    found = {pair: _size(layer, *pair, round_to) for pair in pairs}
    return {pair: size for pair, size in found.items() if size is not None}


def _sizes(points: Grid) -> list[Point]:
    return [*dict.fromkeys(points.values())]


def _share(layer: Layer, size: Point) -> float:
    return kept_parameters(layer.m, layer.n, layer.groups, *size) / layer.size


def _curve(layer: Layer, points: Grid, fitted: dict[Point, float], round_to: int) -> list[Candidate]:
    """The candidates of a layer over a finer grid than that of the fits; their errors are squared."""
    known: dict[float, dict[float, float]] = defaultdict(dict)  # coefficient -> share -> error
    for (_, coefficient), size in points.items():
        known[coefficient][_share(layer, size)] = fitted[size] ** 2
    found = [dense_of(layer), *removed(layer)]
    for budget in weight_curves.BUDGETS:
        for coefficient, errors in known.items():
            size = _size(layer, budget, coefficient, round_to)
            if size is not None and _share(layer, size) < 1:
                error = interpolate(sorted(errors.items()), _share(layer, size))
                found.append(Candidate(*size, error, error, layer.costs(*size)))
    return _undominated(found)


def _exact_curve(layer: Layer, table: Table) -> list[Candidate]:
    """The fits of a table as candidates."""
    found = [dense_of(layer), *removed(layer)]
    for size, error in table.errors.items():
        if _share(layer, size) < 1:
            found.append(Candidate(*size, error**2, error**2, layer.costs(*size)))
    return _with_losses(_undominated(found), table.losses)


def _undominated(candidates: list[Candidate]) -> list[Candidate]:
    """The first one, dense, and those that no other one undercuts, or equals earlier, in error and every cost.

    A layer that sees few directions has fits without an error; dense remains a choice beside them.
    """
    values = np.array([[c.error, *c.costs.values()] for c in candidates])
    no_worse = (values[:, None] <= values[None]).all(2)  # [i, j]: i is no worse than j
    equal = no_worse & no_worse.T
    beats = no_worse & (~equal | np.triu(np.ones_like(equal), 1))
    beaten = beats.any(0)
    return [c for i, c in enumerate(candidates) if i == 0 or not beaten[i]]


def _measured(layer: Layer, points: Grid, fits: dict[Point, Decomposition], meter: Meter) -> list[tuple[float, float]]:
    """(squared error, loss of the network) with the best fits of the layer at a few budgets, and without the layer."""
    chosen = []
    for wanted in LOSS_BUDGETS:
        sizes = [size for (budget, _), size in points.items() if budget == wanted]
        if sizes:
            chosen.append(min((fits[size] for size in sizes), key=lambda fit: fit.output_error))
    errors = [max(fit.output_error**2, 1e-12) for fit in chosen]
    weights = [fit.to_dense() for fit in chosen]
    if layer.removable:
        errors.append(1.0)
        weights.append(torch.zeros_like(layer.weight))
    losses = meter.losses_of(layer.name, weights)
    for _ in range(STEPS - len(weights)):
        meter.step()
    return sorted(zip(errors, (max(loss, 1e-9) for loss in losses), strict=True))


def _with_losses(curve: list[Candidate], losses: list[tuple[float, float]]) -> list[Candidate]:
    """The candidates with the network's loss in the place of their own error."""
    for candidate in curve[1:]:
        candidate.loss = loss_at(losses, candidate.error)
    return curve
