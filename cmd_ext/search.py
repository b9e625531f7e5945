"""The decomposition-searching algorithm: one search over rank and sparse coefficient of all layers together.

The problem. Every layer l is dense or U V + S with one (r_l, nnz_l) of its decomposition table. Sought is the choice of
least loss (how far the outputs are from the dense network's on the calibration data) among those whose costs, summed
over the network, meet every limit: params, macs, bytes, latency. Limits on measured latency and on the fall of the
score are met around this, by targets.py.

The way.
1. Tables (curves.py, tables.py): per layer the fits at budgets times sparse coefficients with their output errors, and
   the loss of the network with that layer alone compressed to a few sizes.
2. Start: the Lagrangian allocation by these losses (allocation.py). It sums them, as if layers did not meet.
3. Trials (trials.py): a trial corrects the predicted losses, the allocation under the same limits follows, the network
   is assembled from the tables, its batch norms recalibrated, its loss measured. Optuna's tree-structured Parzen
   estimator proposes corrections of few dimensions: a shift of the log losses for each stage of the network, one in
   proportion to the share of S, and a common power, which tells how much more the worst layers get. Trials that look
   bad on a part of the data stop there.
4. Moves: from the best trial, the losses of single layers are shifted, one after another and up or down, while it pays.

The first trial is the uncorrected start, so that the best one is no worse.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import distributed, fingerprints, report
from .allocation import Candidate, Choice, Layer, total_costs
from .batchnorm import Norms, batch_norms, recalibrate, recalibrate_if_better
from .calibrate import Batch, class_targets, divergence, outputs, share_right
from .curves import Curves
from .decompose import decompose
from .tables import Tables
from .targets import Problem, sizes
from .trials import Pruned, Study, Trial

VERSION = 4  # of the trials: those of another one are not found
SAMPLES = 1024  # of the calibration data, that a trial is measured on
# Of the KL divergence. Confident mistakes rule it at 1; at 2 it followed the accuracy of unseen images better, over
# random corrections of a ResNet-20 at a tenth of its values.
TEMPERATURE = 2.0
GUIDED = 0.6  # share of the trials that the estimator proposes; the rest are moves
STAGES = 6  # at most so many parts of the network have shifts of their own
SPACE = {"stage": (-1.0, 1.0), "coefficient": (-1.0, 1.0), "power": (0.7, 1.3)}
STEPS = 0.3, 0.15, 0.6  # of moves, in log loss
SWEEP = (0.02, 0.05, 0.1, 0.17, 0.27, 0.4, 0.6, 0.85)  # of the way from the smallest network to the mildest

Report = Callable[[int, float], None]

_log = distributed.logger(__name__)


@dataclass(frozen=True)
class Correction:
    """How predicted losses are changed before they are summed.

    Attributes:
        shifts: layer -> added to the logarithm of its losses.
        coefficient: added to it too, times the share of S in a candidate.
        power: of the losses.
    """

    shifts: dict[str, float] = field(default_factory=dict)
    coefficient: float = 0.0
    power: float = 1.0

    def apply(self, curves: Curves) -> Curves:
        """The candidates with corrected losses."""
        return {name: [self._corrected(name, c) for c in curve] for name, curve in curves.items()}

    def _corrected(self, name: str, candidate: Candidate) -> Candidate:
        if candidate.rank is None or candidate.loss <= 0:
            return candidate
        share = candidate.nnz / max(1.0, candidate.costs["params"])
        shift = self.shifts.get(name, 0.0) + self.coefficient * (share - 1)
        return replace(candidate, loss=candidate.loss**self.power * math.exp(shift))

    def moved(self, name: str, step: float) -> Correction:
        return replace(self, shifts={**self.shifts, name: round(self.shifts.get(name, 0.0) + step, 6)})

    def to_dict(self) -> dict:
        return {"shifts": self.shifts, "coefficient": self.coefficient, "power": self.power}

    def __str__(self) -> str:
        low, high = min(self.shifts.values(), default=0.0), max(self.shifts.values(), default=0.0)
        shifts = f"{len(self.shifts)} layers shifted by {low:.2f} to {high:.2f}"
        return f"{shifts}, coefficient {self.coefficient:.2f}, power {self.power:.2f}"


def stages(layers: list[Layer], most: int = STAGES) -> list[list[str]]:
    """The layers in the order of the network, in parts that look at maps of one size.

    A network that has one size throughout is cut into runs of about as many weights each.
    """
    if not layers:
        return []
    by_size: dict[int, list[Layer]] = {}
    for layer in layers:
        by_size.setdefault(layer.positions, []).append(layer)
    parts = [*by_size.values()]
    if len(parts) == 1:
        parts = _runs(layers, min(4, max(1, len(layers) // 2)))
    while len(parts) > most:
        weights = [sum(layer.size for layer in part) for part in parts]
        i = min(range(len(parts) - 1), key=lambda i: weights[i] + weights[i + 1])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [[layer.name for layer in part] for part in parts]


def _runs(layers: list[Layer], count: int) -> list[list[Layer]]:
    total, seen, runs = sum(layer.size for layer in layers), 0, [[] for _ in range(count)]
    for layer in layers:
        runs[min(count - 1, int(count * (seen + layer.size / 2) / total))].append(layer)
        seen += layer.size
    return [run for run in runs if run]


class Assembly:
    """Puts choices into a copy of the network, from the tables, and measures them."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        tables: Tables,
        batches: list[Batch],
        reference: list[Tensor],
        norms: Norms,
    ) -> None:
        self.model, self.tables = copy.deepcopy(model).eval(), tables
        self.layers = {layer.name: layer for layer in layers}
        self.buffers = [(buffer, buffer.clone()) for norm in batch_norms(self.model) for buffer in norm.buffers(False)]
        self.others: dict[tuple, Tensor] = {}  # weights of sizes that no table has
        self.use(batches, reference, norms)

    def use(self, batches: list[Batch], reference: list[Tensor], norms: Norms) -> None:
        """Measures on the first ones of these batches from now on, `norms` being the dense network's on them."""
        used = count = 0
        while used < len(reference) and count < SAMPLES:
            count += len(reference[used])
            used += 1
        self.batches, self.reference = batches[:used], reference[:used]
        self.norms = norms

    def put(self, choice: Choice) -> None:
        """The network of a choice, with the dense network's batch norms."""
        with torch.no_grad():
            for name, candidate in choice.items():
                weight = self.model.get_submodule(name).weight
                weight.copy_(self._weight(name, candidate).view_as(weight))
            for buffer, saved in self.buffers:
                buffer.copy_(saved)

    def measure(self, choice: Choice, report: Report = lambda step, loss: None) -> dict[str, float]:
        """The loss of a choice's network, and what else its outputs tell.

        Args:
            report: called with the loss on the first quarter of the data, before the rest.

        Returns:
            "loss", and "accuracy" where the targets are classes, with batch norms recalibrated.
        """
        self.put(choice)
        quarter = len(self.batches) // 4
        if quarter:
            report(0, self._measured(quarter)["loss"])
        return self._measured(len(self.batches))

    def score(self, choice: Choice, score: Callable[[nn.Module], float]) -> float:
        """`score` of a choice's network, recalibrated if that is better."""
        self.put(choice)
        recalibrate_if_better(self.model, self.batches, self.reference, self.norms)
        return score(self.model)

    def _measured(self, count: int) -> dict[str, float]:
        batches, reference = self.batches[:count], self.reference[:count]
        recalibrate(self.model, batches, self.norms)
        return scores(reference, outputs(self.model, batches), batches)

    def _weight(self, name: str, candidate: Candidate) -> Tensor:
        layer, size = self.layers[name], (candidate.rank, candidate.nnz)
        if candidate.rank is None:
            return layer.weight.detach()
        table = self.tables.tables.get(name)
        if table is not None and candidate.form == "channel" and size in table.errors:
            return table.dense(size)
        key = name, *size, candidate.form
        if key not in self.others:
            fit = decompose(layer.weight, rank=size[0], nnz=size[1], groups=layer.groups, form=candidate.form, n_iter=8)
            self.others[key] = fit.to_dense()
        return self.others[key]


def scores(reference: list[Tensor], got: list[Tensor], batches: list[Batch]) -> dict[str, float]:
    """How far outputs are from the reference, and the top-1 accuracy where the targets are classes."""
    found = {"loss": distance(reference, got)}
    targets = class_targets(batches, got)
    if targets is not None:
        found["accuracy"] = share_right(got, targets)
    return found


def distance(reference: list[Tensor], got: list[Tensor]) -> float:
    """Mean KL divergence of the class distributions at a temperature; for other outputs the relative squared error."""
    if reference[0].dim() != 2:
        return divergence(reference, got)
    return divergence([y / TEMPERATURE for y in reference], [y / TEMPERATURE for y in got])


class Search:
    """Trials of corrections to the losses of a problem, under fixed limits.

    Attributes:
        best: the trial of least loss so far.
    """

    def __init__(
        self,
        problem: Problem,
        limits: dict[str, float],
        assembly: Assembly,
        study: Study,
        n_trials: int,
        step: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`step` is called after every trial, with the best loss so far."""
        self.problem, self.limits, self.assembly, self.study = problem, limits, assembly, study
        self.n_trials, self.guided, self.step = n_trials, max(1, math.ceil(GUIDED * n_trials)), step
        self.parts = stages(problem.layers)
        kind = next(iter(limits))
        self.order = sorted(  # of the moves: the largest layers first
            (layer.name for layer in problem.layers), key=lambda name: -problem.curves[name][0].costs[kind]
        )
        self.trials: list[Trial] = []

    def run(self) -> Correction:
        """Makes all trials; returns the correction of the best one."""
        self.trials = self.study.run(self.n_trials, self._propose, self._evaluate, self._done)
        return Correction(**self.best.proposal["correction"])

    @property
    def best(self) -> Trial:
        return best_of(self.trials)

    def rows(self) -> list[dict]:
        """Every trial: "trial", "loss" (None if it was pruned), "accuracy", costs and correction."""
        return [
            {"trial": t.index, "loss": t.loss, **t.result, "limits": self.limits, **t.proposal} for t in self.trials
        ]

    def _propose(self, index: int, trials: list[Trial]) -> tuple[dict[str, float], dict]:
        if index == 0:
            params = {name: 1.0 if name == "power" else 0.0 for name in self.study.space}
        else:
            move = self._next_move(trials) if index >= self.guided else None
            if move is not None:
                return {}, move
            params = self.study.suggest(index)
        correction = self._correction(params)
        proposal = {"correction": correction.to_dict(), "sizes": self._key(correction)}
        same = next((t.index for t in trials if t.finished and t.proposal["sizes"] == proposal["sizes"]), None)
        return params, proposal if same is None else {**proposal, "same as": same}

    def _choice(self, correction: Correction) -> Choice:
        choice, failure = replace(self.problem, curves=correction.apply(self.problem.curves)).attempt(self.limits)
        if failure is not None:
            raise failure
        return choice

    def _key(self, correction: Correction) -> str:
        """What tells the networks of two corrections apart."""
        return fingerprints.of_facts(sizes(self._choice(correction)))[:16]

    def _correction(self, params: dict[str, float]) -> Correction:
        shifts = {
            name: round(params[f"stage {i}"], 6)
            for i, part in enumerate(self.parts)
            if f"stage {i}" in params
            for name in part
        }
        return Correction(shifts, round(params["coefficient"], 6), round(params["power"], 6))

    def _next_move(self, trials: list[Trial]) -> dict | None:
        """A layer and a shift from the best trial so far that give a new network; the move that led there first."""
        base, seen = best_of(trials), {trial.proposal["sizes"] for trial in trials}
        last = base.proposal.get("move")
        start = self.order.index(last[0]) if last else 0
        order = self.order[start:] + self.order[:start]
        moves = [tuple(last)] if last else []
        moves += [(name, sign * size) for size in STEPS for name in order for sign in (1, -1)]
        for name, step in moves:
            correction = Correction(**base.proposal["correction"]).moved(name, step)
            key = self._key(correction)
            if key not in seen:
                return {"correction": correction.to_dict(), "sizes": key, "base": base.index, "move": [name, step]}
        return None

    def _evaluate(self, proposal: dict, report: Report) -> tuple[float, dict]:
        if "same as" in proposal:  # another correction, the same network
            trial = next(trial for trial in self.study.trials() if trial.index == proposal["same as"])
            if trial.loss is None:
                raise Pruned
            return trial.loss, {**trial.result, "seconds": 0.0}
        start, choice = time.perf_counter(), self._choice(Correction(**proposal["correction"]))
        result = self.assembly.measure(choice, report)
        costs = {"costs": total_costs(choice, self.problem.fixed), "seconds": round(time.perf_counter() - start, 3)}
        return result.pop("loss"), {**result, **costs}

    def _done(self, trial: Trial) -> None:
        self.trials = [*self.trials, trial]
        if trial.loss is not None:
            self.step(f"best loss {self.best.loss:.4f}")
        else:
            self.step("")


def best_of(trials: list[Trial]) -> Trial:
    """The trial of least loss, the first one of several."""
    return min((t for t in trials if t.loss is not None), key=lambda t: (t.loss, t.index))


def space_of(layers: list[Layer]) -> dict[str, tuple[float, float]]:
    """Parameter -> (lowest, highest): the first stage is what the others are shifted against."""
    shifts = {f"stage {i}": SPACE["stage"] for i in range(1, len(stages(layers)))}
    return {**shifts, "coefficient": SPACE["coefficient"], "power": SPACE["power"]}


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        correction: of the best trial.
        trials: rows of all trials: "trial", "loss" (None if pruned), "accuracy", "costs", "correction".
        front: rows of the networks that no other one undercuts in loss and a cost: the costs, "share" of the dense
            network in the first limited one, "loss", "accuracy", and "limits" and "correction" that lead to them.
    """

    correction: Correction
    trials: list[dict]
    front: list[dict]


def search(
    problem: Problem,
    limits: dict[str, float],
    assembly: Assembly,
    *,
    checkpoint: str | os.PathLike | None = None,
    facts: tuple = (),
    n_trials: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> Outcome:
    """Corrections of the predicted losses of `problem`, and the front of what was measured.

    With an initialised process group every rank must call it with the same arguments; with a checkpoint that all ranks
    see they share the trials, else the first one makes them.

    Args:
        problem: its candidates are those of the tables.
        limits: what every trial must meet.
        checkpoint: Optuna's storage, as in compress.
        facts: what the study follows from besides the seed, for its name: weights, data, layers, constraints.
        n_trials: trials in all, with those of an earlier run on the same checkpoint.
        seed: of the proposals.
        progress: show a bar.
    """
    how = {"checkpoint": checkpoint, "facts": facts, "n_trials": n_trials, "seed": seed, "progress": progress}
    if distributed.world_size() == 1:
        return _search(problem, limits, assembly, **how)
    joins = distributed.rank() == 0
    if checkpoint is not None:
        files = distributed.first_rank_does(assembly.tables.files)
        joins |= assembly.tables.open(files)
        assembly.use(*distributed.first_rank_does(lambda: (assembly.batches, assembly.reference, assembly.norms)))
    outcome = _search(problem, limits, assembly, **how) if joins else None
    return distributed.first_rank_does(lambda: outcome)


def _search(problem, limits, assembly, *, checkpoint, facts, n_trials, seed, progress) -> Outcome:
    """search, of this process."""
    measured = VERSION, SAMPLES, TEMPERATURE, assembly.norms.share
    name = fingerprints.of_facts(measured, facts, seed, space_of(problem.layers))[:16]
    start = time.perf_counter()
    with report.Bar(n_trials, "trials", progress) as bar:
        study = Study(checkpoint, f"cmd_ext {name}", space_of(problem.layers), seed)
        found = Search(problem, limits, assembly, study, n_trials, bar.step)
        correction = found.run()
    middle = time.perf_counter()
    first = found.trials[0].loss
    _log.info(
        "compress: %d trials in %.1f s, %d of them stopped early: loss %.4f > %.4f by %s",
        n_trials, middle - start, sum(t.loss is None for t in found.trials), first, found.best.loss, correction,
    )  # fmt: skip
    study = Study(checkpoint, f"cmd_ext {name} front {fingerprints.of_facts(correction.to_dict())[:16]}", {}, seed)
    sweep = Sweep(problem, limits, assembly, study, correction)
    with report.Bar(len(sweep.limits), "front", progress) as bar:
        others = sweep.run(bar.step)
    _log.info("compress: %d networks of the front in %.1f s", len(others), time.perf_counter() - middle)
    front = front_of([*found.rows(), *others], problem, next(iter(limits)))
    return Outcome(correction, found.rows(), front)


class Sweep:
    """The networks of one correction at other limits."""

    def __init__(
        self, problem: Problem, limits: dict, assembly: Assembly, study: Study, correction: Correction
    ) -> None:
        self.assembly, self.study, self.correction = assembly, study, correction
        self.problem = replace(problem, curves=correction.apply(problem.curves))
        kind = next(iter(limits))
        low, high = problem.smallest(kind), problem.mildest(kind)
        self.limits = [
            {kind: low + (high - low) * share}
            for share in SWEEP
            if abs(low + (high - low) * share - limits[kind]) > 1e-9
        ]

    def run(self, step: Callable[[], None]) -> list[dict]:
        def propose(index: int, trials: list[Trial]) -> tuple[dict, dict]:
            return {}, {"limits": self.limits[index], "correction": self.correction.to_dict()}

        def evaluate(proposal: dict, report: Report) -> tuple[float, dict]:
            choice, failure = self.problem.attempt(proposal["limits"])
            if failure is not None:  # layers are coarse: next to the least nothing may fit
                raise failure
            result = self.assembly.measure(choice)
            return result.pop("loss"), {**result, "costs": total_costs(choice, self.problem.fixed)}

        trials = self.study.run(len(self.limits), propose, evaluate, lambda trial: step())
        return [{"trial": None, "loss": t.loss, **t.result, **t.proposal} for t in trials]


def front_of(rows: list[dict], problem: Problem, kind: str) -> list[dict]:
    """The rows that no other one undercuts in loss and some cost, ascending in the cost `kind`."""
    rows = [row for row in rows if row["loss"] is not None]
    dense = problem.fixed[kind] + sum(curve[0].costs[kind] for curve in problem.curves.values())
    kept: dict[tuple, dict] = {}
    for row in rows:
        for cost in row["costs"]:
            if not any(
                other["loss"] <= row["loss"] and other["costs"][cost] <= row["costs"][cost]
                and (other["loss"], other["costs"][cost]) != (row["loss"], row["costs"][cost])
                for other in rows
            ):  # fmt: skip
                what = {**row["costs"], "share": row["costs"][kind] / dense, "loss": row["loss"]}
                more = {key: row[key] for key in ("accuracy", "trial", "limits", "correction") if key in row}
                kept.setdefault((row["loss"], *row["costs"].values()), {**what, **more})
                break
    return sorted(kept.values(), key=lambda row: (row[kind], row["loss"]))


def start_limits(
    problem: Problem, assembly: Assembly, score: Callable[[nn.Module], float], least: float
) -> dict[str, float]:
    """The parameters at which the uncorrected allocation is about as good as `least`: where to search for more."""
    low, high = problem.smallest("params"), problem.mildest("params")
    for _ in range(6):
        middle = (low + high) / 2
        choice, failure = problem.attempt({"params": middle})
        if failure is None and assembly.score(choice, score) >= least:
            high = middle
        else:
            low = middle
    return {"params": high}
