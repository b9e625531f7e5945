"""One budget for the larger convolutions of a network, without fine-tuning: how good fits and allocation are."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .batchnorm import Norms, recalibrate, recalibrate_if_better
from .calibrate import Batch, batches_of, loss, outputs
from .candidates import candidates
from .compress import SEARCHES, compress
from .cost import kept_parameters
from .decompose import split_budget
from .moments import call_order
from .plan import Plan, apply_fits
from .refit import MEMORY, fit_layers

RECALIBRATE = ("auto", "never", "always")


@dataclass
class Trial:
    """What became of a network at one budget.

    Attributes:
        model: the compressed network, recalibrated or not.
        values: (kept, all) values of the larger convolutions; a sparse entry counts as one.
        output_errors: name -> relative error of the layer's outputs on the calibration data.
        to_weights: layers whose kept fit is that to the weight alone.
        losses: calibration loss (before, after) batch-norm recalibration; None where there is none to decide on.
        recalibrated: whether it was kept.
        scores: of the compressed network (as fitted, in the end).
        fit_seconds, total_seconds: CPU time of the fits, and with their passes over the calibration data.
        search_seconds: CPU time of the search before them.
    """

    model: nn.Module
    values: tuple[int, int]
    output_errors: dict[str, float]
    to_weights: list[str]
    losses: tuple[float, float] | None
    recalibrated: bool
    scores: tuple[float, float]
    fit_seconds: float
    total_seconds: float
    search_seconds: float = 0.0


def uniform_plan(model: nn.Module, inputs: object, budget: float, sparse_coefficient: float | None = None) -> Plan:
    """The same share of the values for every convolution of 3x3 and more but the first; all other layers stay dense.

    The rank is rounded down; what that leaves of the budget goes to S, unless the coefficient is 0.

    Args:
        model: the network.
        inputs: one call's inputs, to find the first convolution.
        budget: kept values / values of each layer, above 0, to 1.
        sparse_coefficient: share of S, 0 to 1; 0.7 if None.

    Raises:
        ValueError: a value out of range, or no convolution to compress.
    """
    chosen, skipped = _larger_convolutions(model, inputs, budget)
    layers = {}
    for name in chosen:
        conv = model.get_submodule(name)
        m, n, groups = len(conv.weight), conv.weight[0].numel(), conv.groups
        rank, nnz = split_budget(m, n, budget, sparse_coefficient, groups)
        if nnz:
            nnz = int(budget * m * n + 1e-9) - kept_parameters(m, n, groups, rank, 0)
        layers[name] = {"rank": rank, "nnz": nnz, "shape": [m, n], "groups": groups}
    return Plan(layers, skipped)


def _larger_convolutions(model: nn.Module, inputs: object, budget: float) -> tuple[list[str], dict[str, str]]:
    """The names of those to compress, and why the other layers stay dense."""
    if not 0 < budget <= 1:
        raise ValueError(f"uniform: budget must lie in (0, 1], got {budget}")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    first = next(iter(call_order(model, inputs, convolutions)), None)

    def wanted(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and min(module.kernel_size) >= 3 and name != first

    chosen, skipped = candidates(model, wanted, min_size=0)
    if not chosen:
        raise ValueError("uniform: model must have a convolution of 3x3 or more after its first one, got none")
    return chosen, skipped


def searched_plan(
    model: nn.Module, calibration: list[Batch], budget: float, search: str = "allocate", **options: Any
) -> Plan:
    """As many values of the same convolutions as uniform_plan keeps, divided among them by a search.

    Args:
        model: the network; unchanged.
        calibration: with inputs on which the first convolution is found.
        budget: kept values / values of all these convolutions, above 0, to 1.
        search, options: as in compress.

    Raises:
        ValueError: a value out of range, or no convolution to compress.
        UnsatisfiableError: a budget below the smallest candidates.
    """
    chosen, skipped = _larger_convolutions(model, calibration[0][0], budget)
    whole = sum(model.get_submodule(name).weight.numel() for name in chosen)
    rest = sum(parameter.numel() for parameter in model.parameters()) - whole
    how = {"calibration": calibration, "filter_fn": lambda name, module: name in chosen, "min_size": 0, **options}
    limit = {"params": rest + budget * whole}
    plan = compress(model, calibration[0][0], constraints=limit, search=search, **how).plan
    return replace(plan, skipped={**plan.skipped, **skipped})


def budget_trial(
    model: nn.Module,
    calibration: Iterable,
    evaluate: Callable[[nn.Module], float],
    *,
    budget: float,
    search: str = "uniform",
    sparse_coefficient: float | None = None,
    data_aware: bool = True,
    sequential: int | None = None,
    recalibrate: str = "auto",
    memory: int = MEMORY,
    seed: int = 0,
    **trials: Any,
) -> Trial:
    """Compresses a copy of a network by uniform_plan or searched_plan, without fine-tuning, and scores it.

    Args:
        model: the dense network; unchanged.
        calibration: batches of (inputs, targets).
        evaluate: score of a model.
        budget: as in uniform_plan.
        search: "uniform", or "allocate" or "cmd" of compress.
        sparse_coefficient: as in uniform_plan; None for the others, which choose it per layer.
        data_aware, sequential, memory, seed: as in compress.
        trials: n_trials, checkpoint and progress, as in compress.
        recalibrate: batch-norm recalibration: "auto" keeps it where the calibration loss falls, "never", "always".

    Raises:
        ValueError: a value out of range, no convolution to compress, no batch, NaN or Inf in the data.
    """
    if recalibrate not in RECALIBRATE:
        raise ValueError(f"uniform: recalibrate must be one of {', '.join(RECALIBRATE)}, got {recalibrate!r}")
    if search not in SEARCHES:
        raise ValueError(f"uniform: search must be one of {', '.join(SEARCHES)}, got {search!r}")
    if search != "uniform" and sparse_coefficient is not None:
        raise ValueError(
            f"uniform: sparse_coefficient is for search='uniform', got {sparse_coefficient} for {search!r}"
        )
    batches, compressed = batches_of(calibration), copy.deepcopy(model)
    reference, start = outputs(compressed, batches), time.process_time()
    options = {"data_aware": data_aware, "memory": memory, "seed": seed}
    if search == "uniform":
        plan = uniform_plan(compressed, batches[0][0], budget, sparse_coefficient)
        plan.sequential = sequential or 0
    else:
        plan = searched_plan(compressed, batches, budget, search, sequential=sequential, **options, **trials)
    search_seconds, start = time.process_time() - start, time.process_time()
    fits = fit_layers(compressed, plan.layers, batches, n_iter=plan.n_iter, sequential=plan.sequential, **options)
    total_seconds = time.process_time() - start
    compressed = apply_fits(compressed, fits)
    score = final = evaluate(compressed)
    losses, kept = _recalibrated(compressed, model, batches, reference, recalibrate)
    if kept:
        final = evaluate(compressed)
    return Trial(
        compressed,
        _values(model, plan, batches[0][0], budget),
        {name: fit.output_error for name, fit in fits.items() if fit.output_error is not None},
        [name for name, fit in fits.items() if not fit.data_aware],
        losses,
        kept,
        (score, final),
        sum(fit.cpu_seconds for fit in fits.values()),
        total_seconds,
        search_seconds,
    )


def _values(model: nn.Module, plan: Plan, inputs: object, budget: float) -> tuple[int, int]:
    """(kept, all) values of the larger convolutions; those that an allocation leaves dense keep theirs."""
    kept = whole = 0
    for name in _larger_convolutions(model, inputs, budget)[0]:
        size, entry = model.get_submodule(name).weight.numel(), plan.layers.get(name)
        whole += size
        kept += kept_parameters(*entry["shape"], entry["groups"], entry["rank"], entry["nnz"]) if entry else size
    return kept, whole


def _recalibrated(
    compressed: nn.Module, model: nn.Module, batches: list[Batch], reference: list[Tensor], how: str
) -> tuple[tuple[float, float] | None, bool]:
    """Calibration loss (before, after) and whether the recalibration was kept."""
    if how == "never":
        return None, False
    norms = Norms.suited(model, batches, reference)
    if how == "auto":
        losses = recalibrate_if_better(compressed, batches, reference, norms)
        return losses, losses is not None and losses[1] < losses[0]
    before = loss(compressed, batches, reference)
    recalibrate(compressed, batches, norms)
    return (before, loss(compressed, batches, reference)), True
