"""How a network's budget is shared between its layers.

Every layer gets a list of candidates (rank, nnz) with their cost and predicted loss, among them pure low rank, pure
sparse and dense. `allocate` minimises the summed loss under the constraints by Lagrange multipliers and fills what is
left greedily; `uniform` gives every layer the same budget. Both are fast once the curves are there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from . import forms
from .cost import kept_bytes, kept_macs, kept_parameters
from .decompose import decompose_batch, split_budget

BUDGETS = np.geomspace(0.01, 0.8, 40)
MIXED_COEFFICIENTS = (0.85, 0.6)
ANCHORS = (0.05, 0.1, 0.2, 0.4, 0.65)  # budgets at which mixed coefficients are fitted; between them: interpolation
KL_BUDGETS = (0.08, 0.2, 0.4)  # budgets at which the loss of compressing one layer alone is measured
LARGE = 1 << 22  # entries from which on a curve gets fewer fits


UNITS = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "latency": "ms"}


class UnsatisfiableError(ValueError):
    """A constraint below what the smallest candidates reach.

    Attributes:
        closest: the nearest reachable value, in the constraint's own units.
        kind: the constraint.
    """

    def __init__(self, message: str, closest: float, kind: str = "") -> None:
        super().__init__(message)
        self.closest, self.kind = closest, kind

    def __reduce__(self):
        return type(self), (*self.args, self.closest, self.kind)


def unsatisfiable(kind: str, limit: float, closest: float) -> UnsatisfiableError:
    """The error of a limit that cannot be met."""
    return UnsatisfiableError(
        f"compress: {kind} <= {in_units(kind, limit)} cannot be met; "
        f"the closest reachable value is {in_units(kind, closest)}",
        closest,
        kind,
    )


def in_units(kind: str, value: float) -> str:
    """12345 parameters as "12,345 parameters", milliseconds as "1.234 ms", a drop of the score as "0.0123"."""
    if kind == "score_drop":
        return f"{value:.4g}"
    return f"{value:.4g} ms" if kind == "latency" else f"{value:,.0f} {UNITS[kind]}"


@dataclass
class Layer:
    """A layer that may be compressed: its matrix [m, n] per `groups`, and MACs per weight.

    `forms` are those of a convolution that it may take, `between` the MACs per weight of V in the spatial form.
    `latency`, where time counts, gives the milliseconds of (rank, nnz, form).
    """

    name: str
    weight: Tensor
    m: int
    n: int
    groups: int
    positions: int
    forms: tuple[str, ...] = ("channel",)
    between: int = 0
    latency: Callable[[int | None, int | None, str], float] | None = None

    @property
    def size(self) -> int:
        return self.m * self.n

    def taps(self, form: str) -> int:
        """The matrix of this form is [m * taps, n / taps]."""
        return forms.taps_of(form, self.weight.shape[2:])

    def factored(self, form: str) -> Tensor:
        """The matrix of this form, [groups, m * taps / groups, n / taps]."""
        weight, taps = self.weight.detach(), self.taps(form)
        matrix = forms.arrange(weight) if form == "spatial" else weight
        return matrix.reshape(self.groups, self.m * taps // self.groups, self.n // taps)

    def split(self, budget: float, coefficient: float | None, form: str, unit: str = "params") -> tuple[int, int]:
        """(rank, nnz) of a budget."""
        element, taps = self.weight.element_size(), self.taps(form)
        return split_budget(self.m, self.n, budget, coefficient, self.groups, unit, element, taps)

    def costs(self, rank: int | None, nnz: int | None, form: str = "channel") -> dict[str, float]:
        """Parameters, MACs and bytes of the weight, and milliseconds where time counts; rank None is dense."""
        element = self.weight.element_size()
        time = {} if self.latency is None else {"latency": self.latency(rank, nnz, form)}
        if rank is None:
            return {"params": self.size, "macs": self.positions * self.size, "bytes": self.size * element, **time}
        sizes, taps = (self.m, self.n, self.groups, rank, nnz), self.taps(form)
        costs = {"params": kept_parameters(*sizes, taps), "macs": kept_macs(*sizes, self.positions, taps, self.between)}
        return {**costs, "bytes": kept_bytes(*sizes, element, taps), **time}


@dataclass
class Candidate:
    """One way to hold a layer.

    rank None is dense, error the squared relative one of the weight or of the outputs, loss what is minimised.
    """

    rank: int | None
    nnz: int | None
    error: float
    loss: float
    costs: dict[str, float]
    form: str = "channel"


# Error curves ---------------------------------------------------------------------------------------------------------


def error_curves(
    layers: list[Layer], *, n_iter: int = 8, round_to: int = 1, step: Callable[[], None] = lambda: None
) -> dict[str, list[Candidate]]:
    """Candidates of every layer over the grid of budgets, each with the best of the sparse coefficients.

    A layer that may take two forms has candidates of both at a budget where the second has the lower error: at equal
    parameters it may take more MACs. Pure sparse errors come exactly from one sort, pure low-rank errors from one
    spectrum; mixed ones are fitted at the anchor budgets (layers of one shape in one batch) and interpolated in log
    error.
    """
    mixed = defaultdict(list)
    by_shape = defaultdict(list)
    for layer in layers:
        by_shape[layer.weight.shape, layer.groups, layer.forms, layer.weight.dtype].append(layer)
    for (shape, groups, kinds, _), group in by_shape.items():
        large = shape.numel() > LARGE
        for form in kinds:
            for coefficient in MIXED_COEFFICIENTS[:1] if large else MIXED_COEFFICIENTS:
                for budget in ANCHORS[1::2] if large else ANCHORS:
                    if group[0].split(budget, coefficient, form)[0] == 0:
                        continue
                    fits = decompose_batch(
                        [layer.weight for layer in group],
                        budget=budget,
                        sparse_coefficient=coefficient,
                        n_iter=n_iter // 2 if large else n_iter,
                        groups=groups,
                        form=form,
                    )
                    for layer, fit in zip(group, fits, strict=True):
                        mixed[layer.name, coefficient, form].append((budget, fit.relative_error**2))
        for _ in group:
            step()
    return {layer.name: _curve(layer, mixed, round_to) for layer in layers}


def _curve(layer: Layer, mixed: dict, round_to: int) -> list[Candidate]:
    w = layer.weight.detach().float()
    total = max(w.double().square().sum().item(), 1e-300)
    magnitudes = w.flatten().square().sort(descending=True).values.double().cumsum(0)
    spectra = {form: _spectrum(layer.factored(form).float()) for form in layer.forms}

    def left(kept: Tensor, k: int) -> float:
        return 1.0 if k == 0 else max(0.0, 1 - kept[k - 1].item() / total)

    candidates = [Candidate(None, None, 0.0, 0.0, layer.costs(None, None))]
    for budget in BUDGETS:
        best = math.inf
        for form in layer.forms:
            options = []
            for coefficient in (1.0, *MIXED_COEFFICIENTS, 0.0):
                rank, nnz = layer.split(budget, coefficient, form)
                rank -= rank % round_to
                points = mixed[layer.name, coefficient, form]
                if coefficient == 1.0:
                    options.append((left(magnitudes, nnz), 0, nnz))
                elif coefficient == 0.0:
                    options.append((left(spectra[form], rank), rank, 0))
                elif rank > 0 and points:
                    options.append((interpolate(points, budget), rank, nnz))
            error, rank, nnz = min(options)
            costs = layer.costs(rank, nnz, form)
            if rank + nnz > 0 and costs["params"] < layer.size and error < best:
                candidates.append(Candidate(rank, nnz, error, error, costs, form))
                best = error
    return candidates


def _spectrum(w: Tensor) -> Tensor:
    """The squared singular values of [g, m, n], descending and summed over the groups, accumulated."""
    gram = torch.bmm(w, w.mT) if w.shape[1] <= w.shape[2] else torch.bmm(w.mT, w)
    return torch.linalg.eigvalsh(gram).clamp_min(0).sum(0).flip(0).double().cumsum(0)


def interpolate(points: list[tuple[float, float]], budget: float) -> float:
    """log error, linear in the budget, through (0, error 1) and the fitted points; beyond the last, its slope."""
    xs = np.array([0.0, *(b for b, _ in points)])
    ys = np.log(np.maximum([1.0, *(e for _, e in points)], 1e-12))
    if budget > xs[-1]:
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        return float(np.exp(ys[-1] + slope * (budget - xs[-1])))
    return float(np.exp(np.interp(budget, xs, ys)))


# Sensitivity ----------------------------------------------------------------------------------------------------------


def measure_losses(
    layers: list[Layer],
    curves: dict[str, list[Candidate]],
    modules: dict[str, nn.Module],
    loss_of_model: Callable[[], float],
    step: Callable[[], None] = lambda: None,
) -> None:
    """Replaces the candidates' loss by the network's: each layer alone is compressed at three budgets.

    The measured loss is interpolated in log loss over log error. One point a layer is not enough: loss per squared
    error drifts by a factor of two between mild and strong compression, which starves layers at small budgets.

    Args:
        layers, curves: from error_curves; the candidates' `loss` is overwritten.
        modules: the layers' modules in the model that `loss_of_model` evaluates; weights are restored.
        loss_of_model: divergence of the model, as it is now, from the dense one.
    """
    for layer in layers:
        weight, points = modules[layer.name].weight, []
        dense = weight.detach().clone()
        for budget in KL_BUDGETS:
            candidate = min(curves[layer.name][1:], key=lambda c: abs(c.costs["params"] / layer.size - budget))
            sizes = {"rank": candidate.rank, "nnz": candidate.nnz, "groups": layer.groups, "form": candidate.form}
            fit = decompose_batch([dense], n_iter=8, **sizes)[0]
            with torch.no_grad():
                weight.copy_(fit.to_dense().view_as(weight))
            points.append((max(fit.relative_error**2, 1e-12), max(loss_of_model(), 1e-9)))
            with torch.no_grad():
                weight.copy_(dense)
            step()
        for candidate in curves[layer.name][1:]:
            candidate.loss = loss_at(sorted(points), candidate.error)


def loss_at(points: list[tuple[float, float]], error: float) -> float:
    """log loss over log error; outside the measured range in proportion to the error."""
    xs, ys = np.log([e for e, _ in points]), np.maximum.accumulate(np.log([v for _, v in points]))
    x = math.log(max(error, 1e-12))
    return float(np.exp(np.interp(x, xs, ys) + min(0.0, x - xs[0]) + max(0.0, x - xs[-1])))


# Allocation -----------------------------------------------------------------------------------------------------------

Choice = dict[str, Candidate]


def total_costs(choice: Choice, fixed: dict[str, float]) -> dict[str, float]:
    """Costs of the whole network: `fixed` (everything that is not decided here) plus the chosen candidates."""
    return {kind: fixed[kind] + sum(c.costs[kind] for c in choice.values()) for kind in fixed}


def _excess(choice: Choice, fixed: dict[str, float], limits: dict[str, float]) -> float:
    """The largest cost / limit; <= 1 meets every constraint."""
    totals = total_costs(choice, fixed)
    return max((totals[kind] / limit if limit > 0 else math.inf) for kind, limit in limits.items())


def check_reachable(curves: dict[str, list[Candidate]], fixed: dict[str, float], limits: dict[str, float]) -> None:
    """Raises UnsatisfiableError where even the cheapest candidates exceed a limit."""
    for kind, limit in limits.items():
        closest = fixed[kind] + sum(min(c.costs[kind] for c in curve) for curve in curves.values())
        if closest > limit:
            raise unsatisfiable(kind, limit, closest)


def allocate(
    curves: dict[str, list[Candidate]], fixed: dict[str, float], limits: dict[str, float], rounds: int = 20
) -> Choice:
    """The candidates of least summed loss that meet every limit.

    For fixed multipliers each layer minimises loss + lambda * cost on its own; lambda is bisected. With several limits
    their weights in the cost are adapted over `rounds` (the most violated one grows). A greedy fill spends the rest.
    """
    check_reachable(curves, fixed, limits)
    weights = dict.fromkeys(limits, 1.0)
    best: Choice | None = None
    for _ in range(rounds if len(limits) > 1 else 1):
        choice = _bisect(curves, fixed, limits, weights)
        choice = _fill(choice, curves, fixed, limits)
        if best is None or _badness(choice, fixed, limits) < _badness(best, fixed, limits):
            best = choice
        totals = total_costs(choice, fixed)
        weights = {kind: w * (totals[kind] / limits[kind]) ** 4 for kind, w in weights.items()}
    return best


def _summed(choice: Choice) -> float:
    return sum(c.loss for c in choice.values())


def _badness(choice: Choice, fixed: dict[str, float], limits: dict[str, float]) -> tuple[float, float]:
    """The loss, but first of all what exceeds a limit: several may be within reach, and not all together."""
    return max(1.0, _excess(choice, fixed, limits)), _summed(choice)


def _pick(curves, weights, limits, multiplier) -> Choice:
    def price(c: Candidate) -> float:
        return c.loss + multiplier * sum(w * c.costs[kind] / limits[kind] for kind, w in weights.items())

    return {name: min(curve, key=price) for name, curve in curves.items()}


def _bisect(curves, fixed, limits, weights) -> Choice:
    low, high = -30.0, 30.0  # log of the multiplier; the high end takes the cheapest candidates
    choice = {
        name: min(curve, key=lambda c: sum(c.costs[k] / limits[k] for k in limits)) for name, curve in curves.items()
    }
    for _ in range(60):
        middle = (low + high) / 2
        trial = _pick(curves, weights, limits, math.exp(middle))
        if _excess(trial, fixed, limits) <= 1:
            choice, high = trial, middle
        else:
            low = middle
    return choice


def _fill(choice: Choice, curves, fixed, limits) -> Choice:
    """Takes upgrades that still fit, best loss per cost first."""
    choice, totals = dict(choice), total_costs(choice, fixed)
    while True:
        best = None
        for name, curve in curves.items():
            now = choice[name]
            for c in curve:
                gain = now.loss - c.loss
                if gain <= 0 or any(totals[k] + c.costs[k] - now.costs[k] > limits[k] for k in limits):
                    continue
                extra = sum(max(0.0, c.costs[k] - now.costs[k]) / limits[k] for k in limits)
                if best is None or gain > best[0] * extra:
                    best = (gain / max(extra, 1e-12), name, c)
        if best is None:
            return choice
        _, name, c = best
        totals = {k: totals[k] + c.costs[k] - choice[name].costs[k] for k in totals}
        choice[name] = c


def uniform(
    layers: list[Layer], coefficient: float | None, fixed: dict[str, float], limits: dict[str, float], round_to: int = 1
) -> Choice:
    """The same budget and sparse coefficient for every layer: the largest budget that meets the limits.

    The budget is a share of each layer's bytes where only bytes are limited, else of its parameters. Layers take the
    last of their forms.
    """
    unit = "bytes" if limits.keys() == {"bytes"} else "params"

    def at(budget: float) -> Choice:
        choice = {}
        for layer in layers:
            form = layer.forms[-1]
            rank, nnz = layer.split(budget, coefficient, form, unit)
            rank -= rank % round_to
            if rank + nnz == 0:
                nnz = 1
            costs = layer.costs(rank, nnz, form)
            dense = layer.costs(None, None)
            pays = all(costs[kind] < dense[kind] for kind in limits)
            choice[layer.name] = (
                Candidate(rank, nnz, 0.0, 0.0, costs, form) if pays else Candidate(None, None, 0.0, 0.0, dense)
            )
        return choice

    low, high = 0.0, 1.0
    smallest = at(low)
    check_reachable({name: [c] for name, c in smallest.items()}, fixed, limits)
    if _excess(at(high), fixed, limits) <= 1:
        return at(high)
    best = smallest
    for _ in range(40):
        middle = (low + high) / 2
        trial = at(middle)
        if _excess(trial, fixed, limits) <= 1:
            best, low = trial, middle
        else:
            high = middle
    return best


def front(curves: dict[str, list[Candidate]], fixed: dict[str, float], kind: str, points: int = 20) -> list[dict]:
    """The predicted trade-off: for shares of the dense cost, the least summed loss of an allocation.

    Returns:
        Rows {kind: cost, "share": of dense, "loss": predicted}, ascending in cost, without dominated points.
    """
    dense = fixed[kind] + sum(curve[0].costs[kind] for curve in curves.values())
    rows: list[dict] = []
    for share in np.geomspace(1.0, 0.02, points):
        limits = {kind: share * dense}
        try:
            choice = allocate(curves, fixed, limits)
        except UnsatisfiableError:
            break
        cost = total_costs(choice, fixed)[kind]
        if not rows or cost < rows[-1][kind]:
            rows.append({kind: cost, "share": cost / dense, "loss": _summed(choice)})
    return rows[::-1]
