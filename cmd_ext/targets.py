"""What compress() must reach: limits on costs, on the measured time of a call, on the fall of the score.

Costs add up, so one allocation meets a limit on them. A time is predicted by the model of the device and then
measured: the limit that the allocation gets is corrected by measured / predicted until the measurement meets the wanted
one; where the prediction says that it cannot be met, the fastest network is timed before that is believed. A score is
only known of a finished network: the budget is bisected along the allocation, network by network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from . import allocation, dispatch, distributed, report
from .allocation import Candidate, Choice, Layer, UnsatisfiableError, in_units, total_costs, unsatisfiable
from .calibrate import Batch, accuracy
from .cost import LayerCost, Profile, profile_together
from .refit import Fit
from .work import Work

COSTS = ("params", "macs", "bytes")
CONSTRAINTS = (*COSTS, "latency", "score_drop")
TOLERANCE = 0.1  # how far from its target a measured time may be,
AIM = 0.05  # and how near it the corrections stop: another measurement differs by a few percent
ROUNDS = 4  # corrections of the limit on predicted time
REPEATS, SECONDS = 11, 1.0  # timed calls of a network, of which the median counts: at least so many, and for so long
MARGIN = 0.95  # once a layer is slower than dense, those above this share of dense go back with it
PROBES = 8  # networks that the bisection by score fits

_log = distributed.logger(__name__)


@dataclass
class Goal:
    """What is asked for.

    Attributes:
        limits: params, macs, bytes and latency (milliseconds) -> upper limit.
        dense_ms: time of the dense network that a latency in percent refers to; None for milliseconds.
        score_drop: how far the score may fall; None if it does not matter.
    """

    limits: dict[str, float]
    dense_ms: float | None = None
    score_drop: float | None = None


@dataclass
class Network:
    """A compressed network and how it came about.

    Attributes:
        profiles: (dense, compressed), measured together; None where nobody measured yet.
        latency: "target", "predicted", "measured" and "dense" milliseconds, whether it was "met", "networks" timed.
        distance: of its outputs on the calibration data from the dense network's.
    """

    model: nn.Module
    plan: Any
    choice: Choice
    fits: dict[str, Fit]
    recalibration: tuple[float, float] | None
    profiles: tuple[Profile, Profile] | None = None
    latency: dict | None = None
    score: float | None = None
    distance: float = 0.0


def goal_of(constraints: dict[str, str | float], dense: Profile) -> Goal:
    """Reads compress's constraints.

    Raises:
        ValueError: none, an unknown one, or a value out of range.
    """
    if not constraints:
        raise ValueError(f"compress: constraints must name at least one of {', '.join(CONSTRAINTS)}, got none")
    goal = Goal({})
    for kind, value in constraints.items():
        if kind not in CONSTRAINTS:
            raise ValueError(f"compress: constraint must be one of {', '.join(CONSTRAINTS)}, got {kind!r}")
        if kind == "score_drop":
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"compress: score_drop must be a number >= 0, got {value!r}")
            goal.score_drop = float(value)
        else:
            whole = dense.total.ms if kind == "latency" else getattr(dense.total, kind)
            goal.limits[kind] = _limit(kind, value, whole)
            if kind == "latency" and isinstance(value, str):
                goal.dense_ms = whole
    return goal


def _limit(kind: str, value: str | float, whole: float) -> float:
    if isinstance(value, str):
        try:
            share = float(value.rstrip().removesuffix("%")) / 100
        except ValueError:
            share = -1.0
        if not value.rstrip().endswith("%") or not 0 < share <= 1:
            number = "milliseconds" if kind == "latency" else "a number"
            raise ValueError(f"compress: {kind} must be '1%' to '100%' or {number}, got {value!r}")
        return share * whole
    if kind == "latency" and not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"compress: latency must be milliseconds > 0 or a share like '25%', got {value!r}")
    if kind != "latency" and not (isinstance(value, (int, float)) and value >= 1):
        raise ValueError(f"compress: {kind} must be a number >= 1 or a share like '25%', got {value!r}")
    return float(value)


def repeats(dense_ms: float) -> int:
    """Timed calls of networks like one that takes so long: many of short calls, which noise hits harder."""
    return max(REPEATS, min(101, math.ceil(1e3 * SECONDS / max(dense_ms, 1e-3))))


# Time -----------------------------------------------------------------------------------------------------------------


def with_latency(layer: Layer, row: LayerCost) -> Layer:
    """The layer with predicted milliseconds in the costs of its candidates.

    Args:
        row: its line of the dense profile: the size of its calls, and the time that counts for the dense layer.

    Raises:
        ValueError: the device has no model of times.
    """
    device, dense = layer.weight.device, row.ms or 0.0

    def times(rank: int, nnz: int, form: str) -> dict[str, float]:
        taps = layer.taps(form) if rank else 1
        sizes = layer.m, layer.n, layer.groups, rank, nnz, row.positions, row.inputs, row.positions * layer.m
        kind = layer.weight.dtype, layer.weight.dim() == 4
        return dispatch.predicted(Work(*sizes, *kind, taps, row.between if taps > 1 else 0), device, False)

    def latency(rank: int | None, nnz: int | None, form: str) -> float:
        if rank is None:
            return dense
        if row.positions == 0:  # never called
            return 0.0
        seconds = times(rank, nnz, form)
        way = min(seconds, key=seconds.get)
        return max(dense, 1e3 * seconds[way]) if way == "dense" else 1e3 * seconds[way]

    if not times(1, 0, "channel"):
        raise ValueError(
            "compress: latency needs a device with a model of its times (cpu, or cuda in a build with CUDA kernels), "
            f"got {device}"
        )
    return replace(layer, latency=latency)


@dataclass
class Problem:
    """The layers to decide, their candidates, and what the rest of the network costs.

    Attributes:
        layers: those to decide.
        curves: name -> candidates; None for one budget for all layers.
        fixed: costs of everything else; has "latency" where time counts.
        coefficient, round_to: of the uniform choice.
        reasons: name -> why a layer stays dense, where the time decided.
        ratio: measured / predicted time of the latest network.
        smaller: name -> how slow it was, for layers of which only the candidates that may be faster are left.
    """

    layers: list[Layer]
    curves: dict[str, list[Candidate]] | None
    fixed: dict[str, float]
    coefficient: float | None = None
    round_to: int = 1
    reasons: dict[str, str] = field(default_factory=dict)
    ratio: float = 1.0
    smaller: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Problem:
        """One that may lose candidates on its own."""
        curves = None if self.curves is None else dict(self.curves)
        return replace(self, reasons=dict(self.reasons), curves=curves, smaller=dict(self.smaller))

    def send_back(self, slower: dict[str, tuple[float, float]], choice: Choice) -> None:
        """Makes layers dense that were timed as slow, (dense, compressed) ms.

        Each has one more chance: with the candidates that are faster if the model is as wrong about them.
        """
        for name, (old, new) in slower.items():
            how = "slower" if new > old else "no faster"
            reason = f"{how} than dense when timed: {new:.3f} ms, dense {old:.3f} ms"
            if self.curves is not None and name not in self.smaller:
                most = MARGIN * old * choice[name].costs["latency"] / new
                left = [c for c in self.curves[name] if c.rank is not None and c.costs["latency"] < most]
                if left:
                    self.curves[name] = [self.curves[name][0], *left]
                    self.smaller[name] = reason
                    continue
            self.reasons[name] = reason

    def drop_slower(self) -> None:
        """Leaves out the candidates that are predicted to take no less time than the dense layer."""
        for name, curve in self.curves.items():
            dense = curve[0].costs["latency"]
            self.curves[name] = [c for c in curve if c.rank is None or c.costs["latency"] < dense]
            if len(self.curves[name]) == 1:
                self.reasons[name] = f"no candidate is predicted to be faster than dense ({dense:.3f} ms)"

    def choose(self, limits: dict[str, float]) -> Choice:
        """The best choice within the limits; layers with a reason stay dense.

        Raises:
            UnsatisfiableError: there is none.
        """
        choice, failure = distributed.first_rank_does(lambda: self.attempt(limits))
        if failure is not None:
            raise failure
        return choice

    def attempt(self, limits: dict[str, float]) -> tuple[Choice | None, UnsatisfiableError | None]:
        """The best choice within the limits, or why there is none; on this rank alone."""
        try:
            if self.curves is None:
                choice = self._uniform(limits)
            else:
                curves = {name: curve[:1] if name in self.reasons else curve for name, curve in self.curves.items()}
                choice = allocation.allocate(curves, self.fixed, limits)
            totals = total_costs(choice, self.fixed)
            for kind, limit in limits.items():  # each may be within reach, and not all together
                if totals[kind] > limit * (1 + 1e-9):
                    raise unsatisfiable(kind, limit, totals[kind])
        except UnsatisfiableError as error:
            return None, self._explained(error)
        return choice, None

    def _uniform(self, limits: dict[str, float]) -> Choice:
        dense = {layer.name: allocation.dense_of(layer) for layer in self.layers if layer.name in self.reasons}
        free = [layer for layer in self.layers if layer.name not in dense]
        fixed = total_costs(dense, self.fixed)
        return {**dense, **allocation.uniform(free, self.coefficient, fixed, limits, self.round_to)}

    def check(self, limits: dict[str, float]) -> None:
        """Raises UnsatisfiableError where the cheapest candidates exceed a limit, a time by more than TOLERANCE."""
        for kind, limit in limits.items():
            closest, most = self.smallest(kind), limit
            if kind == "latency":
                closest, most = closest * self.ratio, limit * (1 + TOLERANCE)
            if closest > most:
                raise self._explained(unsatisfiable(kind, limit, closest))

    def predicted(self, limits: dict[str, float]) -> dict[str, float]:
        """The limits for predicted costs: of the time, corrected, or else the least, which `check` lets pass."""
        if "latency" not in limits:
            return limits
        return {**limits, "latency": max(limits["latency"] / self.ratio, self.smallest("latency") * (1 + 1e-9))}

    def fastest(self) -> Choice:
        """The network of the least predicted time."""
        return {name: min(curve, key=lambda c: c.costs["latency"]) for name, curve in self._curves().items()}

    def _explained(self, error: UnsatisfiableError) -> UnsatisfiableError:
        if self.reasons:
            error.args = (f"{error} ({len(self.reasons)} layers stay dense, which is faster)",)
        return error

    def smallest(self, kind: str) -> float:
        """The least cost of the network that any choice reaches."""
        return self.fixed[kind] + sum(min(c.costs[kind] for c in curve) for curve in self._curves().values())

    def mildest(self, kind: str) -> float:
        """The cost of the network of which least is taken."""
        dense = self.fixed[kind] + sum(layer.costs(None, None)[kind] for layer in self.layers)
        savings = [curve[0].costs[kind] - c.costs[kind] for curve in self._curves().values() for c in curve[1:]]
        return dense - min((saving for saving in savings if saving > 0), default=0.0)

    def _curves(self) -> dict[str, list[Candidate]]:
        """The candidates; for one budget for all layers the dense layer and the least and the most of it."""
        if self.curves is not None:
            return self.curves
        curves = {}
        for layer in self.layers:
            dense = layer.costs(None, None)
            curves[layer.name] = [allocation.dense_of(layer)]
            for rank, nnz in ((0, 1), (0, layer.size - 1)):
                costs = layer.costs(rank, nnz, layer.forms[-1])
                if all(costs[kind] < dense[kind] for kind in self.fixed):
                    curves[layer.name].append(Candidate(rank, nnz, 0.0, 0.0, costs))
        return curves


def log_profile(dense: Profile, layers: int) -> None:
    """Tells what is to be compressed."""
    total = dense.total
    costs = ", ".join(f"{report.count(getattr(total, kind))} {allocation.UNITS[kind]}" for kind in COSTS)
    _log.info("compress: %d of %d layers may be compressed; %s, %.3f ms", layers, len(dense), costs, total.ms)


def log_limits(goal: Goal, problem: Problem) -> None:
    """Tells of every constraint whether it can be met."""
    for kind, limit in goal.limits.items():
        closest = problem.smallest(kind) * (problem.ratio if kind == "latency" else 1)
        near = limit * (1 + TOLERANCE) if kind == "latency" else limit
        verdict = "can be met" if closest <= near else "cannot be met"
        words = in_units(kind, limit), verdict, in_units(kind, closest)
        _log.info("compress: %s <= %s %s; the least is %s", kind, *words)
    if goal.score_drop is not None:
        _log.info("compress: score_drop <= %g is decided by at most %d trials", goal.score_drop, PROBES)


Build = Callable[[Choice, dict[str, str]], Network]


def meet_latency(problem: Problem, goal: Goal, build: Build, dense: nn.Module, example_inputs: Any) -> Network:
    """The network whose measured time comes nearest to its limit, and in which no layer is slower than dense.

    Args:
        problem: its `ratio` is updated by what was measured.
        goal: all limits must hold.
        build: fits the network of a choice; the other argument tells why layers stay dense.
        dense, example_inputs: what is timed beside it.

    Returns:
        The network nearest to the target among those within 10 % of it or below, else the fastest; corrections stop
        within 5 % or after ROUNDS of them.

    Raises:
        UnsatisfiableError: a limit more than 10 % below what is predicted, or below what is left without the layers
            that are slower.
    """
    best, tried, rounds, networks = None, set(), 0, 0
    count = repeats(goal.dense_ms or goal.limits["latency"])
    whole, problem = problem, problem.copy()  # what is slower is so at this target
    distributed.first_rank_does(lambda: problem.check({"latency": goal.limits["latency"]}))
    limit, low, high = problem.predicted(goal.limits)["latency"], 0.0, math.inf
    while True:
        choice = _within(problem, goal.limits, limit, best, networks)
        if choice is None or sizes(choice) in tried:
            break
        tried.add(sizes(choice))
        given_up = {name: why for name, why in problem.smaller.items() if choice[name].rank is None}
        network = build(choice, given_up | problem.reasons)
        before, after = distributed.first_rank_does(
            lambda network=network: profile_together([dense, network.model], example_inputs, repeats=count)
        )
        networks += 1
        drift = 1.0 if goal.dense_ms is None else before.total.ms / goal.dense_ms
        target, predicted = goal.limits["latency"] * drift, total_costs(choice, problem.fixed)["latency"]
        whole.ratio = after.total.ms / predicted
        low, high = (max(low, limit), high) if after.total.ms <= target else (low, min(high, limit))
        limit = target / whole.ratio
        slower = _slower(choice, before, after)
        if slower:
            problem.send_back(slower, choice)
            low, high = 0.0, math.inf
            continue
        if not low < limit < high:  # where the ratio depends much on the size, it leads from one side to the other
            limit = (low + high) / 2 if high < math.inf else limit
        network.profiles = before, after
        met = after.total.ms <= (1 + TOLERANCE) * target
        times = {"target": target, "predicted": predicted, "measured": after.total.ms, "dense": before.total.ms}
        network.latency = {**times, "met": met}
        if best is None or _distance(network) < _distance(best):
            best = network
        if abs(after.total.ms / target - 1) <= AIM or rounds == ROUNDS:
            break
        rounds += 1
    if not best.latency["met"] and not any(c.rank is not None for c in best.choice.values()):
        raise unsatisfiable("latency", best.latency["target"], best.latency["measured"])
    best.latency["networks"] = networks
    if not best.latency["met"]:
        _log.warning("compress: latency: %s", latency_text(best.latency))
    return best


def _within(problem: Problem, limits: dict, limit: float, best: Network | None, networks: int) -> Choice | None:
    """The choice for a limit on the predicted time, or for the least one; None where no other network can be had."""
    try:
        return problem.choose({**limits, "latency": limit})
    except UnsatisfiableError as error:
        if networks == 0 or (best is None and error.kind != "latency"):
            raise
        if error.kind != "latency":
            return None
        try:
            return problem.choose({**limits, "latency": error.closest * (1 + 1e-9)})
        except UnsatisfiableError:
            if best is None:
                raise
            return None


def _distance(network: Network) -> tuple[bool, float]:
    times = network.latency
    return not times["met"], abs(times["measured"] / times["target"] - 1)


def _slower(choice: Choice, before: Profile, after: Profile) -> dict[str, tuple[float, float]]:
    """The compressed layers that took longer than dense, with both times.

    With them come those that gain next to nothing: else noise would call for another network, layer by layer.
    """
    times = {}
    for old, new in zip(before, after, strict=True):
        name = old.name if old.name in choice or len(before) > 1 else ""
        if name in choice and choice[name].rank is not None and old.ms is not None and new.ms is not None:
            times[name] = old.ms, new.ms
    if all(new <= old for old, new in times.values()):
        return {}
    return {name: (old, new) for name, (old, new) in times.items() if new > MARGIN * old}


def latency_text(times: dict) -> str:
    """One line of Network.latency."""
    off = 100 * (times["measured"] / times["target"] - 1)
    count = times["networks"]
    verdict = f"; {count} timed" if times["met"] else f": not met, the closest of {count} networks is kept"
    return (
        f"target {times['target']:.3f} ms, predicted {times['predicted']:.3f} ms, measured {times['measured']:.3f} ms "
        f"({off:+.1f} %), dense {times['dense']:.3f} ms{verdict}"
    )


def sizes(choice: Choice) -> tuple:
    """What tells one choice from another."""
    return tuple((name, c.rank, c.nnz, c.form) for name, c in sorted(choice.items()))


# Score ----------------------------------------------------------------------------------------------------------------


def scorer(
    evaluate: Callable[[nn.Module], float] | None, batches: list[Batch], reference: list[Tensor]
) -> Callable[[nn.Module], float]:
    """`evaluate`, or top-1 accuracy on the calibration data; the first rank's where there are several.

    Raises:
        ValueError: neither is there.
    """
    if evaluate is None:
        targets = [y for _, y in batches]
        classes = all(isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point() for y in targets)
        if not batches or not classes or reference[0].dim() != 2:
            got = "no calibration" if not batches else "calibration without class targets"
            raise ValueError(
                f"compress: score_drop needs evaluate, or calibration batches of (inputs, class targets), got {got}"
            )

    def score(model: nn.Module) -> float:
        value = evaluate(model) if evaluate else accuracy(model, batches)
        return distributed.first_rank_does(lambda: float(value))

    return score


def meet_score(
    problem: Problem,
    goal: Goal,
    solve: Callable[[Goal], Network],
    score: Callable[[nn.Module], float],
    dense_score: float,
) -> tuple[Network, list[dict]]:
    """The smallest network, by bisection over the limits, whose score is at most `goal.score_drop` below the dense one.

    Args:
        problem: what is chosen from.
        goal: its limits are the mildest ones tried; without limits parameters are counted.
        solve: makes the network for a goal.
        score: of a network, higher is better.
        dense_score: of the dense network.

    Returns:
        The network, and a row for every one that was tried: {constraint: limit, "score", "drop", "kept"}.

    Raises:
        UnsatisfiableError: even the mildest one loses more; `closest` is its drop.
    """
    kinds = list(goal.limits) or ["params"]
    highest = {kind: min(goal.limits.get(kind, math.inf), problem.mildest(kind)) for kind in kinds}
    lowest = {kind: min(problem.smallest(kind), highest[kind]) for kind in kinds}
    rows: list[dict] = []
    known: dict[tuple, bool] = {}
    best, low, high, share = None, 0.0, 1.0, 1.0
    for _ in range(PROBES):
        limits = {kind: lowest[kind] + share * (highest[kind] - lowest[kind]) for kind in kinds}
        try:
            kept = None if "latency" in kinds else known.get(sizes(problem.choose(limits)))
            network = solve(replace(goal, limits=limits)) if kept is None else None
        except UnsatisfiableError:
            if share == 1:
                raise
            kept, network = False, None
        if network is not None:
            network.score = score(network.model)
            drop = dense_score - network.score
            known[sizes(network.choice)] = kept = drop <= goal.score_drop
            rows.append({**limits, "score": network.score, "drop": drop, "kept": kept})
            _log.info("compress: score %.4f, a drop of %.4f, at %s", network.score, drop, _limits_text(limits))
        if share == 1 and not kept:
            raise unsatisfiable("score_drop", goal.score_drop, drop)
        low, high = (low, share) if kept else (share, high)
        best = network if kept and network is not None else best
        share = (low + high) / 2
    return best, rows


def _limits_text(limits: dict[str, float]) -> str:
    return ", ".join(f"{kind} <= {in_units(kind, limit)}" for kind, limit in limits.items())


def probes_text(rows: list[dict]) -> list[str]:
    """A line for every network that meet_score tried."""
    lines = []
    for row in rows:
        limits = {kind: row[kind] for kind in CONSTRAINTS if kind in row}
        verdict = "within the drop" if row["kept"] else "too low"
        lines.append(f"  {_limits_text(limits)}: score {row['score']:.4f}, drop {row['drop']:.4f}, {verdict}")
    return lines
