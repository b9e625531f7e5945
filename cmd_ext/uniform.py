"""One budget for the larger convolutions of a network, without fine-tuning: how good fits and allocation are."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from . import curves
from .allocation import Layer, allocate, check_reachable
from .calibrate import Batch, batches_of, loss, outputs, recalibrate_batchnorm, recalibrate_if_better
from .candidates import candidates
from .compress import SEARCHES
from .cost import kept_parameters
from .decompose import split_budget
from .moments import call_order
from .plan import Plan, apply_fits, plan_of
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


def allocated_plan(
    model: nn.Module,
    batches: list[Batch],
    reference: list[Tensor],
    budget: float,
    *,
    data_aware: bool = True,
    memory: int = MEMORY,
    seed: int = 0,
) -> Plan:
    """As many values of the same convolutions as uniform_plan keeps, divided among them by search="allocate".

    Args:
        model: the network; unchanged.
        batches: calibration data, with inputs on which the first convolution is found.
        reference: outputs of the network on them.
        budget: kept values / values of all these convolutions, above 0, to 1.
        data_aware, memory, seed: as in compress.

    Raises:
        ValueError: a value out of range, or no convolution to compress.
        UnsatisfiableError: a budget below the smallest candidates.
    """
    chosen, skipped = _larger_convolutions(model, batches[0][0], budget)
    layers = []
    for name in chosen:
        conv = model.get_submodule(name)
        layers.append(Layer(name, conv.weight, len(conv.weight), conv.weight[0].numel(), conv.groups, 0))
    fixed, limits = {"params": 0.0}, {"params": budget * sum(layer.size for layer in layers)}
    options = {"data_aware": data_aware, "memory": memory, "seed": seed}
    check_reachable(curves.sizes(layers), fixed, limits)
    found = curves.network_curves(model, layers, batches, reference, **options)
    return plan_of(layers, {}, allocate(found, fixed, limits), skipped)


def budget_trial(
    model: nn.Module,
    calibration: Iterable,
    evaluate: Callable[[nn.Module], float],
    *,
    budget: float,
    search: str = "uniform",
    sparse_coefficient: float | None = None,
    data_aware: bool = True,
    sequential: int = False,
    recalibrate: str = "auto",
    memory: int = MEMORY,
    seed: int = 0,
) -> Trial:
    """Compresses a copy of a network by uniform_plan or allocated_plan, without fine-tuning, and scores it.

    Args:
        model: the dense network; unchanged.
        calibration: batches of (inputs, targets).
        evaluate: score of a model.
        budget: as in uniform_plan.
        search: "uniform" or "allocate".
        sparse_coefficient: as in uniform_plan; None for "allocate", which chooses it per layer.
        data_aware, sequential, memory, seed: as in compress.
        recalibrate: batch-norm recalibration: "auto" keeps it where the calibration loss falls, "never", "always".

    Raises:
        ValueError: a value out of range, no convolution to compress, no batch, NaN or Inf in the data.
    """
    if recalibrate not in RECALIBRATE:
        raise ValueError(f"uniform: recalibrate must be one of {', '.join(RECALIBRATE)}, got {recalibrate!r}")
    if search not in SEARCHES:
        raise ValueError(f"uniform: search must be one of {', '.join(SEARCHES)}, got {search!r}")
    if search == "allocate" and sparse_coefficient is not None:
        raise ValueError(
            f"uniform: sparse_coefficient is for search='uniform', got {sparse_coefficient} for 'allocate'"
        )
    batches, compressed = batches_of(calibration), copy.deepcopy(model)
    reference, start = outputs(compressed, batches), time.process_time()
    options = {"data_aware": data_aware, "memory": memory, "seed": seed}
    if search == "uniform":
        plan = uniform_plan(compressed, batches[0][0], budget, sparse_coefficient)
    else:
        plan = allocated_plan(compressed, batches, reference, budget, **options)
    search_seconds, start = time.process_time() - start, time.process_time()
    fits = fit_layers(compressed, plan.layers, batches, n_iter=plan.n_iter, sequential=sequential, **options)
    total_seconds = time.process_time() - start
    compressed = apply_fits(compressed, fits)
    score = final = evaluate(compressed)
    losses, kept = _recalibrate(compressed, batches, reference, recalibrate)
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


def _recalibrate(model, batches, reference, how: str) -> tuple[tuple[float, float] | None, bool]:
    """Calibration loss (before, after) and whether the recalibration was kept."""
    if how == "never":
        return None, False
    if how == "auto":
        losses = recalibrate_if_better(model, batches, reference)
        return losses, losses is not None and losses[1] < losses[0]
    before = loss(model, batches, reference)
    recalibrate_batchnorm(model, batches)
    return (before, loss(model, batches, reference)), True
