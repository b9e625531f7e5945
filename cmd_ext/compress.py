"""compress(): a network in, a smaller one and the report of what was done out."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from . import curves, distributed, fingerprints, forms, report, targets, trials
from .allocation import Candidate, Choice, Layer, UnsatisfiableError, front, total_costs, unsatisfiable
from .batchnorm import Norms, recalibrate_if_better
from .calibrate import Batch, batches_of, outputs
from .candidates import MIN_SIZE, bypassed, candidates
from .cost import CMD_LAYERS, Profile, profile_together
from .modules import replace as put_in_place
from .plan import Plan, apply_plan, fit_plan, plan_of
from .refit import MEMORY
from .search import Assembly, Correction, Outcome, distance, scores, start_limits
from .search import search as run_search
from .stats import Stats, stats_of
from .tables import Tables, folder_of
from .targets import Goal, Network, Problem

SEARCHES = ("cmd", "allocate", "uniform")

ROOM = 1.25  # times the least time: below that, layers may go even where no data tell which
PASSES = 18  # over the calibration data, of a sequential fit that nobody asked for

_log = distributed.logger(__name__)

__all__ = ["SEARCHES", "Plan", "Result", "Stats", "apply_plan", "compress", "to_dense"]


@dataclass
class Result:
    """compress()'s result.

    Attributes:
        model: the compressed network.
        plan: what its layers became.
        stats: before and after.
        front: the trade-off, ascending in cost: rows {"params", "macs", "bytes", perhaps "latency", "share" of dense,
            "loss"}. For "cmd" networks that were measured, which no other one undercuts in loss and a cost, with their
            top-1 "accuracy" on the calibration data if it has class targets; for "allocate" predictions.
        search: what was done: "cmd", "allocate" or "uniform".
        trials: of "cmd", all of them: {"trial", "loss" (None if it was stopped early), "accuracy", "costs",
            "correction"}.
    """

    model: nn.Module
    plan: Plan
    stats: Stats
    front: list[dict]
    search: str = "allocate"
    trials: list[dict] = field(default_factory=list)
    _plan_at: Callable[[dict], Plan] | None = field(default=None, repr=False)

    def at(self, **constraints: str | float) -> Plan:
        """The plan for other constraints, at no further search.

        Args:
            constraints: as of compress, e.g. params="20%", or several. A "latency" is that of the model of the device,
                corrected by what was measured. "score_drop", alone: the smallest network of `front` whose accuracy on
                the calibration data is at most so far below the dense network's.

        Returns:
            A plan for apply_plan.

        Raises:
            UnsatisfiableError: it cannot be met; `closest` is the nearest reachable value.
            ValueError: an unknown constraint or a value out of range; a score_drop where `front` has no accuracies.
        """
        return self._plan_at(constraints)


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    constraints: dict[str, str | float],
    calibration: Iterable | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    search: str = "cmd",
    n_trials: int = 50,
    checkpoint: str | os.PathLike | None = None,
    sparse_coefficient: float | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    overrides: dict[str, dict | str] | None = None,
    round_to: int = 1,
    min_size: int = MIN_SIZE,
    form: str = "auto",
    n_iter: int = 20,
    data_aware: bool = True,
    sequential: int | None = None,
    memory: int = MEMORY,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Replaces the layers of a trained network by U V + S under a constraint on the whole network.

    Args:
        model: any module; never changed. Its nn.Conv2d and nn.Linear layers are candidates.
        example_inputs: one call's inputs (tensor, tuple of arguments or dict), for MACs and milliseconds.
        constraints: upper limits, each "x%" of the dense network or a number: "params" (a sparse entry counts as one),
            "macs" (of one call on example_inputs), "bytes" (all tensors of the saved file, with the supports of S),
            "latency" (measured time of one call on example_inputs, or milliseconds > 0). All must hold, the latency to
            10 % of what is measured or as near as a few corrections of the predicted times come, which the statistics
            tell; layers that are slower than dense, by the prediction or when timed, then stay dense, except by
            overrides. "score_drop", a number: the smallest network, in the units of the other limits or else in
            parameters, whose score is at most so far below the dense one: bisection, at most 8 networks. The score is
            that of `evaluate`, else top-1 accuracy on the calibration data.
        calibration: batches of inputs or (inputs, targets): a few hundred samples steer the allocation by the
            network's own outputs, the chosen sizes are fitted to the layers' outputs on them, and batch-norm
            statistics are recalibrated where that lowers the loss on them.
        evaluate: score of a model, higher is better; reported before and after, decisive for "score_drop".
        search: "cmd": the allocation of "allocate", then trials that correct it, measured on the calibration data;
            needs Optuna and calibration data; without them it is "allocate", which the log tells. "allocate":
            per-layer error curves, with calibration data those of the fits to them, and least predicted loss.
            "uniform": one budget for all layers; a share of their bytes where "bytes" is the only constraint, of their
            parameters otherwise. "cmd" returns the network of "allocate" where that has the smaller loss.
        n_trials: of "cmd".
        checkpoint: of "cmd": a SQLite file, a journal file (.log, .journal, .jsonl) or the URL of a database, for
            Optuna; the fits are kept beside it (for a URL in the user's cache folder). What was killed goes on where it
            was, several processes share the trials, another constraint starts with the fits.
        sparse_coefficient: of "uniform"; 0.7 if None. The other searches choose it per layer.
        filter_fn: (name, module) -> compress this layer?
        overrides: name -> {"rank", "density"} or {"rank", "nnz"} or {"budget", "sparse_coefficient", "budget_unit"} or
            "dense"; beside these a "form", "channel" if there is none.
        round_to: ranks are multiples of this.
        min_size: layers with fewer weights stay dense.
        form: of the low-rank branch of k x k convolutions: "channel", "spatial" (1 x k, then k x 1; fitted to the
            weight alone), or "auto": the better one of each layer under the constraints for these searches without
            data-aware fits, else "channel".
        n_iter: passes of the final fit.
        data_aware: with calibration data, keep for each layer whichever fit has the smaller output error: to its
            weight, or to its outputs. False: to the weights only.
        sequential: fit layer after layer, each to inputs from the compressed layers before it and to the outputs of the
            dense network, which mends a part of their error. It is the number of layers that share a pass over the
            calibration data through both networks: 1 is best and slowest; 4 takes a quarter of the passes; 0 is no such
            fit. None: 0, but "cmd" refits its network in at most 18 passes, unless a score_drop is sought, and keeps
            what has the smaller loss.
        memory: bytes of second moments that the error curves and the final fit hold at once.
        seed: of the random choices, such as the rows of calibration images; the result is reproducible.
        progress: show a bar (with tqdm) or lines.

    With an initialised process group every rank must call it, with its own share of the calibration data: all fits,
    also those of the curves, use all of it; the losses that a search measures and the batch-norm statistics use that of
    the first rank. All ranks get the same network.

    Returns:
        A Result; print(result.stats) shows what happened to every layer and why.

    Raises:
        UnsatisfiableError: a constraint that cannot be met; its `closest` is the nearest reachable value.
        ValueError: an unknown constraint, search, form or layer name, a value out of range, a latency on a device
            without a model of times, a score_drop without evaluate or calibration targets.

    Source: Zhang et al., Machine Learning 2022; allocation by a Lagrangian on measured loss curves.
    """
    if search not in SEARCHES:
        raise ValueError(f"compress: search must be one of {', '.join(SEARCHES)}, got {search!r}")
    if form not in ("auto", *forms.FORMS):
        raise ValueError(f"compress: form must be one of auto, {', '.join(forms.FORMS)}, got {form!r}")
    for name, value, least in (("round_to", round_to, 1), ("n_trials", n_trials, 1)):
        if value < least:
            raise ValueError(f"compress: {name} must be >= {least}, got {value}")
    if sequential is not None and sequential < 0:
        raise ValueError(f"compress: sequential must be a number of layers, 0 for none, got {sequential}")
    torch_rng = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        overrides = overrides or {}
        batches = batches_of(calibration) if calibration is not None else []
        chosen, skipped = candidates(model, filter_fn, overrides, min_size)
        dense = copy.deepcopy(model)
        timed = "latency" in constraints
        profile = distributed.first_rank_does(
            lambda: profile_together([dense], example_inputs, repeats=targets.REPEATS if timed else 1)[0]
        )
        goal = targets.goal_of(constraints, profile)
        targets.log_profile(profile, len(chosen))
        search = _possible(search, batches)
        reference = outputs(dense, batches)
        if form == "auto" and (search == "uniform" or (batches and data_aware)):
            form = "channel"
        layers, pinned = layers_of(dense, chosen, overrides, profile, form, timed)
        facts = {"layers": layers, "pinned": pinned, "skipped": skipped, "goal": goal, "profile": profile}
        facts |= {"constraints": constraints}
        facts |= {"batches": batches, "reference": reference, "evaluate": evaluate, "example_inputs": example_inputs}
        facts |= {"n_iter": n_iter, "data_aware": data_aware, "sequential": sequential, "memory": memory}
        job = _Job(model, dense, **facts, seed=seed, progress=progress)
        if search == "cmd":
            distributed.first_rank_does(lambda: trials.check_storage(checkpoint))  # before fits that take their time
            job.tables = Tables(checkpoint and folder_of(checkpoint), *job.facts(round_to))
        problem, front = job.problem(search, sparse_coefficient, round_to)
        if search == "cmd" and problem.layers:
            outcome, network, probes, final = job.search(problem, n_trials, checkpoint)
            found = {"front": outcome.front, "trials": outcome.trials}
        else:
            (network, probes), final = job.solve(problem), problem
            found = {"front": front}
        stats = job.stats(network, probes)
        at = partial(job.plan_at, final, problem, found["front"])
        return Result(network.model, network.plan, stats, search=search, _plan_at=at, **found)
    finally:
        torch.random.set_rng_state(torch_rng)


def _possible(search: str, batches: list[Batch]) -> str:
    """ "allocate" in the place of "cmd" where that has nothing to measure, or no Optuna."""
    if search != "cmd":
        return search
    if not batches:
        _log.info("compress: search='cmd' measures its trials on calibration data; without: 'allocate'")
        return "allocate"
    if not trials.available():
        _log.warning("compress: search='cmd' needs Optuna, `pip install 'cmd_ext[search]'`; without it: 'allocate'")
        return "allocate"
    return search


@dataclass
class _Job:
    """One call of compress: what its steps share, and these steps."""

    model: nn.Module
    dense: nn.Module
    layers: list[Layer]
    pinned: dict[str, tuple[int, int, str]]
    skipped: dict[str, str]
    constraints: dict[str, str | float]
    goal: Goal
    profile: Profile
    batches: list[Batch]
    reference: list[Tensor]
    evaluate: Callable[[nn.Module], float] | None
    example_inputs: Any
    n_iter: int
    data_aware: bool
    sequential: int | None
    memory: int
    seed: int
    progress: bool
    tables: Tables | None = None

    def __post_init__(self) -> None:
        goal, evaluate = self.goal, self.evaluate
        self.score = evaluate if goal.score_drop is None else targets.scorer(evaluate, self.batches, self.reference)
        self.dense_score = None if goal.score_drop is None else self.score(self.model)
        self.fingerprints = {"weights": fingerprints.of_model(self.dense)}
        if self.batches:
            self.fingerprints["data"] = fingerprints.of_facts(
                distributed.all_ranks_say(fingerprints.of_data(self.batches))
            )

    @cached_property
    def norms(self) -> Norms:
        """The dense network's, on the data of the first rank."""
        return distributed.first_rank_does(lambda: Norms.suited(self.dense, self.batches, self.reference))

    def facts(self, round_to: int) -> tuple:
        """What decomposition tables follow from."""
        return *self.fingerprints.values(), self.data_aware, round_to, self.memory, self.seed

    def problem(self, search: str, coefficient: float | None, round_to: int) -> tuple[Problem, list[dict]]:
        """The candidates of every layer that is not pinned, with what they lose, and the predicted trade-off."""
        goal, total = self.goal, self.profile.total
        free = [layer for layer in self.layers if layer.name not in self.pinned]
        kinds = (*targets.COSTS, "latency") if "latency" in goal.limits else targets.COSTS
        fixed = {kind: float(total.ms if kind == "latency" else getattr(total, kind)) for kind in kinds}
        for layer in self.layers:
            pinned = layer.name in self.pinned
            costs = layer.costs(*self.pinned[layer.name]) if pinned else dict.fromkeys(kinds, 0.0)
            for kind, whole in layer.costs(None, None).items():
                fixed[kind] += costs[kind] - whole
        problem = Problem(free, None, fixed, coefficient, round_to)
        if search != "uniform":
            problem.curves = curves.sizes(free, round_to)
            if "latency" in goal.limits:
                spare = distributed.first_rank_does(lambda: self.removable(problem))
                problem.layers = free = [replace(layer, removable=layer.name in spare) for layer in free]
                problem.curves = curves.sizes(free, round_to)
        if "latency" in goal.limits:
            problem.ratio = distributed.first_rank_does(lambda: self.ratio(problem))
        targets.log_limits(goal, problem)
        if search == "uniform":
            return problem, []
        if self.batches and self.data_aware:  # before fits that take their time
            distributed.first_rank_does(lambda: problem.check(goal.limits))
        how = {"round_to": round_to, "data_aware": self.data_aware, "memory": self.memory, "seed": self.seed}
        with report.Bar((curves.STEPS if self.batches else 1) * len(free), "error curves", self.progress) as bar:
            how |= {"step": bar.step, "tables": self.tables}
            found = curves.network_curves(self.dense, free, self.batches, self.reference, **how)

        def prepared() -> tuple[dict[str, list[Candidate]], dict[str, str], list[dict]]:
            problem.curves = dict(found)
            if "latency" in goal.limits:
                problem.drop_slower()
            problem.check(goal.limits)
            shown = next(iter(goal.limits), "params")
            return problem.curves, problem.reasons, front(problem.curves, fixed, shown)

        problem.curves, problem.reasons, trade_off = distributed.first_rank_does(prepared)
        return problem, trade_off

    def removable(self, problem: Problem) -> set[str]:
        """The layers that may go altogether under a limit on time: what a call takes at least is no matter of ranks.

        Without data nothing tells what the network makes of that; so then there are none, unless the limit is so near
        the least time that next to nothing would be left of any layer.
        """
        limit, least = self.goal.limits["latency"], ROOM * problem.smallest("latency")
        if not self.batches and limit > least:
            return set()
        inputs = self.batches[0][0] if self.batches else self.example_inputs
        found = bypassed(self.dense, [layer.name for layer in problem.layers], inputs)
        if found and not self.batches and limit > least * self.measured_ratio(problem):
            return set()
        return found

    def ratio(self, problem: Problem) -> float:
        """Measured / predicted time of the fastest network, if by prediction it is too slow; else 1."""
        within = problem.smallest("latency") <= self.goal.limits["latency"]
        return 1.0 if within else self.measured_ratio(problem)

    def measured_ratio(self, problem: Problem) -> float:
        """Measured / predicted time of the fastest network."""
        choice = problem.fastest()
        plan = replace(self.plan(choice, {}), n_iter=1, sequential=0)  # however it is fitted, it takes the same time
        network, _ = fit_plan(copy.deepcopy(self.dense), plan, [], self.memory, self.seed, False)
        repeats = targets.repeats(self.profile.total.ms)
        before, after = profile_together([self.dense, network], self.example_inputs, repeats=repeats)
        drift = before.total.ms / self.profile.total.ms
        return after.total.ms / drift / total_costs(choice, problem.fixed)["latency"]

    def search(
        self, problem: Problem, n_trials: int, checkpoint: str | os.PathLike | None
    ) -> tuple[Outcome, Network, list[dict], Problem]:
        """The search, and the better one of the networks with and without its corrections."""
        assembly = Assembly(self.dense, problem.layers, self.tables, self.batches, self.reference, self.norms)
        goal = self.goal
        limits = problem.predicted(goal.limits) or distributed.first_rank_does(
            lambda: start_limits(problem, assembly, self.score, self.dense_score - goal.score_drop)
        )
        facts = *self.facts(problem.round_to), self.constraints, [layer.name for layer in problem.layers], self.pinned
        how = {"seed": self.seed, "progress": self.progress, "facts": facts}
        outcome = run_search(problem, limits, assembly, n_trials=n_trials, checkpoint=checkpoint, **how)
        plain = problem.copy()  # with candidates between the fits, which fill the limits better
        finer = partial(curves.finer, problem.layers, problem.curves, self.tables, problem.round_to)
        plain.curves = distributed.first_rank_does(finer)
        if "latency" in limits:
            plain.drop_slower()
        corrected = plain.copy()
        corrected.curves = outcome.correction.apply(plain.curves)
        found = self._solved(corrected, plain)
        kind = next(iter(limits))
        values = [self._badness(network, kind) for network, *_ in found]
        if len(found) == 2:
            _log.info("compress: loss %.4f with the search, %.4f without", values[0][-1], values[1][-1])
        network, probes, final = found[values.index(min(values))]
        if self.sequential is None and network.plan.data_aware and network.plan.layers and goal.score_drop is None:
            network = self.refitted(network)
        return outcome, network, probes, final

    def _solved(self, *problems: Problem) -> list[tuple[Network, list[dict], Problem]]:
        """The networks of those that meet the goal: a latency is only known when it is measured."""
        found, failure = [], None
        for problem in problems:
            try:
                found.append((*self.solve(problem), problem))
            except UnsatisfiableError as error:
                failure = error
        if not found:
            raise failure
        return found

    def _badness(self, network: Network, kind: str) -> tuple[bool, float, float]:
        """Whether it misses a latency, its cost where that is what is sought, and its loss."""
        missed = network.latency is not None and not network.latency["met"]
        size = 0.0
        if self.goal.score_drop is not None:
            size = sum(candidate.costs[kind] for candidate in network.choice.values())
        return missed, size, network.distance

    def _distance(self, model: nn.Module) -> float:
        """What trials minimise, on all calibration data; 0 where there are none."""
        if self.tables is None:
            return 0.0
        return distributed.first_rank_does(lambda: distance(self.reference, outputs(model, self.batches)))

    def solve(self, problem: Problem) -> tuple[Network, list[dict]]:
        """The network that meets the goal, and what a search for a score tried."""

        def at(goal: Goal) -> Network:
            if "latency" in goal.limits:
                return targets.meet_latency(problem, goal, self.build, self.model, self.example_inputs)
            return self.build(problem.choose(goal.limits), problem.reasons)

        if self.goal.score_drop is None:
            return at(self.goal), []
        return targets.meet_score(problem, self.goal, at, self.score, self.dense_score)

    def plan(self, choice: Choice, reasons: dict[str, str]) -> Plan:
        plan = plan_of(self.layers, self.pinned, choice, {**self.skipped, **reasons}, self.n_iter)
        plan.data_aware = bool(self.batches) and self.data_aware
        plan.sequential = int(self.sequential or 0) if plan.data_aware else 0
        plan.fingerprints = dict(self.fingerprints)
        return plan

    def build(self, choice: Choice, reasons: dict[str, str]) -> Network:
        """The fitted network of a choice, recalibrated where that is better."""
        return self.fitted(self.plan(choice, reasons), choice)

    def fitted(self, plan: Plan, choice: Choice) -> Network:
        """The network of a plan."""
        fitted_to = self.batches if self.data_aware else []
        model, fits = fit_plan(copy.deepcopy(self.dense), plan, fitted_to, self.memory, self.seed, self.progress)
        losses = None
        if self.batches:
            with_norms = self.batches, self.reference, self.norms
            losses = distributed.first_rank_does(lambda: recalibrate_if_better(model, *with_norms))
        if distributed.world_size() > 1:
            distributed.copy_from_first_rank(model)
        return Network(model, plan, choice, fits, losses, distance=self._distance(model))

    def refitted(self, network: Network) -> Network:
        """The same sizes fitted sequentially, if that is better."""
        plan = replace(network.plan, sequential=math.ceil(len(network.plan.layers) / PASSES))
        other = self.fitted(plan, network.choice)
        other.profiles, other.latency = network.profiles, network.latency
        _log.info("compress: loss %.4f fitted in parallel, %.4f sequentially", network.distance, other.distance)
        return other if other.distance < network.distance else network

    def stats(self, network: Network, probes: list[dict]) -> Stats:
        scores = (None, None)
        if self.goal.score_drop is not None:
            scores = self.dense_score, network.score
        elif self.evaluate:
            scores = self.evaluate(self.model), self.evaluate(network.model)
        profiles = network.profiles or profile_together([self.model, network.model], self.example_inputs)
        return stats_of(*profiles, network, self.layers, self.pinned, scores, probes)

    def plan_at(self, final: Problem, measured: Problem, front: list[dict], constraints: dict) -> Plan:
        """Result.at: from the candidates of the network that was returned, or from a row of the front."""
        goal = targets.goal_of(constraints, self.profile)
        if goal.score_drop is None:
            limits = {kind: limit / final.ratio if kind == "latency" else limit for kind, limit in goal.limits.items()}
            return self.plan(final.choose(limits), final.reasons)
        rows = [row for row in front if "accuracy" in row]
        if goal.limits or not rows:
            raise ValueError(
                "compress: at(score_drop=...) stands alone and needs search='cmd' with class targets in the "
                f"calibration data, got {', '.join(constraints)} and {len(rows)} networks with an accuracy"
            )
        whole = scores(self.reference, self.reference, self.batches)["accuracy"]
        row = next((row for row in rows if whole - row["accuracy"] <= goal.score_drop), None)
        if row is None:
            raise unsatisfiable("score_drop", goal.score_drop, whole - max(row["accuracy"] for row in rows))
        corrected = replace(measured, curves=Correction(**row["correction"]).apply(measured.curves))
        return self.plan(corrected.choose(row["limits"]), measured.reasons)


def layers_of(
    model, chosen, overrides, dense: Profile, form: str, timed: bool
) -> tuple[list[Layer], dict[str, tuple[int, int, str]]]:
    """The layers to decide, all of `chosen`, and (rank, nnz, form) of those that overrides decide."""
    layers, pinned = [], {}
    for name in chosen:
        module = model.get_submodule(name)
        weight, groups = module.weight, getattr(module, "groups", 1)
        row = dense[name or type(model).__name__]
        kinds = forms.FORMS if form == "auto" else (form,)
        kinds = kinds if forms.has_two_forms(weight.shape[2:]) else ("channel",)
        sizes = len(weight), weight[0].numel(), groups, row.positions
        layer = Layer(name, weight, *sizes, kinds, row.between)
        layers.append(targets.with_latency(layer, row) if timed else layer)
        if name in overrides:
            pinned[name] = _override_sizes(name, overrides[name], layers[-1])
    return layers, pinned


def _override_sizes(name: str, entry: Any, layer: Layer) -> tuple[int, int, str]:
    known = {"rank", "density", "nnz", "budget", "sparse_coefficient", "budget_unit", "form"}
    if not isinstance(entry, dict) or not entry.keys() - {"form"} or entry.keys() - known:
        raise ValueError(
            f"compress: overrides[{name!r}] must be 'dense' or a dict of {', '.join(sorted(known))}, got {entry!r}"
        )
    form = entry.get("form", "channel")
    forms.check_form(f"compress: overrides[{name!r}]", form, layer.weight.shape[2:])
    if "budget" in entry:
        unit = entry.get("budget_unit", "params")
        return *layer.split(entry["budget"], entry.get("sparse_coefficient"), form, unit), form
    rank, nnz = entry.get("rank", 0), entry.get("nnz", round(entry.get("density", 0) * layer.size))
    full = min(layer.factored(form).shape[1:])
    if not 0 <= rank <= full or not 0 <= nnz <= layer.size:
        raise ValueError(
            f"compress: overrides[{name!r}] wants rank in [0, {full}] and nnz in [0, {layer.size}], "
            f"got rank {rank}, nnz {nnz}"
        )
    return rank, nnz, form


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of the model with plain nn.Conv2d and nn.Linear layers in place of the compressed ones."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, CMD_LAYERS):
            dense = put_in_place(dense, name, module.to_dense())
    return dense
