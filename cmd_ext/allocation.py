"""How a network's budget is shared between its layers.

Every layer has a list of candidates (rank, nnz) with their cost and predicted loss, among them pure low rank, pure
sparse and dense. `allocate` minimises the summed loss under the constraints by Lagrange multipliers and fills what is
left greedily; `uniform` gives every layer the same budget. Both are fast once the candidates are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from . import forms
from .cost import kept_bytes, kept_macs, kept_parameters
from .decompose import split_budget

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
    `latency`, where time counts, gives the milliseconds of (rank, nnz, form). `removable` says whether the network can
    do without the layer (bypassed in candidates.py): then rank 0 with an empty S is one of its candidates.
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
    removable: bool = False

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

    rank None is dense, rank 0 with nnz 0 leaves nothing but the bias; error is the squared relative one of the weight
    or of the outputs, loss what is minimised.
    """

    rank: int | None
    nnz: int | None
    error: float
    loss: float
    costs: dict[str, float]
    form: str = "channel"


Choice = dict[str, Candidate]


def dense_of(layer: Layer) -> Candidate:
    """The layer as it is."""
    return Candidate(None, None, 0.0, 0.0, layer.costs(None, None))


def removed(layer: Layer) -> list[Candidate]:
    """The candidate without U V and S, if the network can do without the layer."""
    return [Candidate(0, 0, 1.0, 1.0, layer.costs(0, 0))] if layer.removable else []


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
        Rows {every cost, "share": of dense in `kind`, "loss": predicted}, ascending in cost, without dominated points.
    """
    dense = fixed[kind] + sum(curve[0].costs[kind] for curve in curves.values())
    rows: list[dict] = []
    for share in np.geomspace(1.0, 0.02, points):
        limits = {kind: share * dense}
        try:
            choice = allocate(curves, fixed, limits)
        except UnsatisfiableError:
            break
        costs = total_costs(choice, fixed)
        if not rows or costs[kind] < rows[-1][kind]:
            rows.append({**costs, "share": costs[kind] / dense, "loss": _summed(choice)})
    return rows[::-1]
