"""compress(): a network in, a smaller one and the report of what was done out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import curves, distributed, forms, report, targets
from .allocation import Candidate, Choice, Layer, check_reachable, front
from .calibrate import batches_of, outputs, recalibrate_if_better
from .candidates import MIN_SIZE, candidates
from .cost import CMD_LAYERS, Profile, profile_together
from .modules import replace
from .plan import Plan, apply_plan, fit_plan, plan_of
from .refit import MEMORY
from .stats import Stats, stats_of
from .targets import Goal, Network, Problem

SEARCHES = ("allocate", "uniform")

__all__ = ["SEARCHES", "Plan", "Result", "Stats", "apply_plan", "compress", "to_dense"]


@dataclass
class Result:
    """compress()'s result: the compressed model, its plan, the before/after statistics and the predicted front.

    `front` lists, for search="allocate", the predicted trade-off as rows {constraint, "share", "loss"}.
    """

    model: nn.Module
    plan: Plan
    stats: Stats
    front: list[dict]


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    constraints: dict[str, str | float],
    calibration: Iterable | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    search: str = "allocate",
    sparse_coefficient: float | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    overrides: dict[str, dict | str] | None = None,
    round_to: int = 1,
    min_size: int = MIN_SIZE,
    form: str = "auto",
    n_iter: int = 20,
    data_aware: bool = True,
    sequential: int = False,
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
        search: "allocate" (per-layer error curves, with calibration data those of the fits to them, and least predicted
            loss) or "uniform" (one budget for all layers; a
            share of their bytes where "bytes" is the only constraint, of their parameters otherwise).
        sparse_coefficient: of "uniform"; 0.7 if None. "allocate" chooses it per layer.
        filter_fn: (name, module) -> compress this layer?
        overrides: name -> {"rank", "density"} or {"rank", "nnz"} or {"budget", "sparse_coefficient", "budget_unit"} or
            "dense"; beside these a "form", "channel" if there is none.
        round_to: ranks are multiples of this.
        min_size: layers with fewer weights stay dense.
        form: of the low-rank branch of k x k convolutions: "channel", "spatial" (1 x k, then k x 1; fitted to the
            weight alone), or "auto": the better one of each layer under the constraints for "allocate" without
            data-aware fits, else "channel".
        n_iter: passes of the final fit.
        data_aware: with calibration data, keep for each layer whichever fit has the smaller output error: to its
            weight, or to its outputs. False: to the weights only.
        sequential: fit layer after layer, each to inputs from the compressed layers before it and to the outputs of the
            dense network, which mends a part of their error. It is the number of layers that share a pass over the
            calibration data through both networks: True is 1, best and slowest; 4 takes a quarter of the passes.
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
    if round_to < 1:
        raise ValueError(f"compress: round_to must be >= 1, got {round_to}")
    if sequential < 0:
        raise ValueError(f"compress: sequential must be a number of layers, 0 for none, got {sequential}")
    torch_rng = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        overrides = overrides or {}
        batches = batches_of(calibration) if calibration is not None else []
        chosen, skipped = candidates(model, filter_fn, overrides, min_size)
        dense = copy.deepcopy(model)
        timed = "latency" in constraints
        dense_profile = distributed.first_rank_does(
            lambda: profile_together([dense], example_inputs, repeats=targets.REPEATS if timed else 1)[0]
        )
        goal = targets.goal_of(constraints, dense_profile)
        reference = outputs(dense, batches)
        score = evaluate if goal.score_drop is None else targets.scorer(evaluate, batches, reference)
        if form == "auto" and (search == "uniform" or (batches and data_aware)):
            form = "channel"
        layers, pinned = _layers(dense, chosen, overrides, dense_profile, form, timed)
        targets.log_profile(dense_profile, len(layers))
        options = {"coefficient": sparse_coefficient, "round_to": round_to}
        options |= {"data_aware": data_aware, "memory": memory, "seed": seed}
        problem, trade_off = _problem(
            search, dense, layers, pinned, batches, reference, goal, dense_profile, progress, **options
        )
        fitted_to = batches if data_aware else []
        several = timed or goal.score_drop is not None

        def build(choice: Choice, reasons: dict[str, str]) -> Network:
            plan = plan_of(layers, pinned, choice, {**skipped, **reasons}, n_iter)
            plan.data_aware, plan.sequential = bool(fitted_to), int(sequential) if fitted_to else 0
            fresh = copy.deepcopy(dense) if several else dense
            compressed, fits = fit_plan(fresh, plan, fitted_to, memory, seed, progress)
            losses = None
            if batches:
                losses = distributed.first_rank_does(lambda: recalibrate_if_better(compressed, batches, reference))
            if distributed.world_size() > 1:
                distributed.copy_from_first_rank(compressed)
            return Network(compressed, plan, choice, fits, losses)

        def solve(goal: Goal) -> Network:
            if timed:
                return targets.meet_latency(problem, goal, build, model, example_inputs)
            return build(problem.choose(goal.limits), problem.reasons)

        scores, probes = (None, None), []
        if goal.score_drop is not None:
            dense_score = score(model)
            network, probes = targets.meet_score(problem, goal, solve, score, dense_score)
            scores = dense_score, network.score
        else:
            network = solve(goal)
            if evaluate:
                scores = evaluate(model), evaluate(network.model)
        profiles = network.profiles or profile_together([model, network.model], example_inputs)
        stats = stats_of(*profiles, network, layers, pinned, scores, probes)
        return Result(network.model, network.plan, stats, trade_off)
    finally:
        torch.random.set_rng_state(torch_rng)


def _layers(
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


def _problem(
    kind, model, layers, pinned, batches, reference, goal: Goal, dense, progress, *, coefficient, round_to, **fit
) -> tuple[Problem, list[dict]]:
    """The candidates of every layer that is not pinned, with what they lose, and the predicted trade-off.

    `fit` holds options of network_curves.
    """
    free = [layer for layer in layers if layer.name not in pinned]
    kinds = (*targets.COSTS, "latency") if "latency" in goal.limits else targets.COSTS
    fixed = {c: float(dense.total.ms if c == "latency" else getattr(dense.total, c)) for c in kinds}
    for layer in layers:
        costs = layer.costs(*pinned[layer.name]) if layer.name in pinned else dict.fromkeys(kinds, 0.0)
        for c, whole in layer.costs(None, None).items():
            fixed[c] += costs[c] - whole
    problem = Problem(free, None, fixed, coefficient, round_to)
    if kind == "uniform":
        targets.log_limits(goal, problem)
        return problem, []
    problem.curves = curves.sizes(free, round_to)
    targets.log_limits(goal, problem)
    if batches and fit["data_aware"]:  # before fits that take their time
        distributed.first_rank_does(lambda: check_reachable(problem.curves, fixed, goal.limits))
    with report.Bar((4 if batches else 1) * len(free), "error curves", progress) as bar:
        found = curves.network_curves(model, free, batches, reference, round_to=round_to, step=bar.step, **fit)

    def prepared() -> tuple[dict[str, list[Candidate]], dict[str, str], list[dict]]:
        problem.curves = dict(found)
        if "latency" in goal.limits:
            problem.drop_slower()
        check_reachable(problem.curves, fixed, goal.limits)
        shown = next(iter(goal.limits), "params")
        return problem.curves, problem.reasons, front(problem.curves, fixed, shown)

    problem.curves, problem.reasons, trade_off = distributed.first_rank_does(prepared)
    return problem, trade_off


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of the model with plain nn.Conv2d and nn.Linear layers in place of the compressed ones."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, CMD_LAYERS):
            dense = replace(dense, name, module.to_dense())
    return dense
