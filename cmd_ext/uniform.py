"""One budget for every larger convolution of a network, without fine-tuning: how good the fits themselves are."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from .calibrate import batches_of, loss, outputs, recalibrate_batchnorm, recalibrate_if_better
from .candidates import candidates
from .compress import Plan, apply_fits
from .cost import kept_parameters
from .decompose import split_budget
from .moments import call_order
from .refit import MEMORY, fit_layers

RECALIBRATE = ("auto", "never", "always")


@dataclass
class Trial:
    """What became of a network at one budget.

    Attributes:
        model: the compressed network, recalibrated or not.
        values: (kept, all) values of the compressed convolutions; a sparse entry counts as one.
        output_errors: name -> relative error of the layer's outputs on the calibration data.
        to_weights: layers whose kept fit is that to the weight alone.
        losses: calibration loss (before, after) batch-norm recalibration; None where there is none to decide on.
        recalibrated: whether it was kept.
        scores: of the compressed network (as fitted, in the end).
        fit_seconds, total_seconds: CPU time of the fits, and with their passes over the calibration data.
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
    if not 0 < budget <= 1:
        raise ValueError(f"uniform: budget must lie in (0, 1], got {budget}")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    first = next(iter(call_order(model, inputs, convolutions)), None)

    def wanted(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and min(module.kernel_size) >= 3 and name != first

    chosen, skipped = candidates(model, wanted, min_size=0)
    if not chosen:
        raise ValueError("uniform: model must have a convolution of 3x3 or more after its first one, got none")
    layers = {}
    for name in chosen:
        conv = model.get_submodule(name)
        m, n, groups = len(conv.weight), conv.weight[0].numel(), conv.groups
        rank, nnz = split_budget(m, n, budget, sparse_coefficient, groups)
        if nnz:
            nnz = int(budget * m * n + 1e-9) - kept_parameters(m, n, groups, rank, 0)
        layers[name] = {"rank": rank, "nnz": nnz, "shape": [m, n], "groups": groups}
    return Plan(layers, skipped)


def uniform_trial(
    model: nn.Module,
    calibration: Iterable,
    evaluate: Callable[[nn.Module], float],
    *,
    budget: float,
    sparse_coefficient: float | None = None,
    data_aware: bool = True,
    sequential: int = False,
    recalibrate: str = "auto",
    memory: int = MEMORY,
    seed: int = 0,
) -> Trial:
    """Compresses a copy of a network by uniform_plan, without fine-tuning, and scores it.

    Args:
        model: the dense network; unchanged.
        calibration: batches of (inputs, targets).
        evaluate: score of a model.
        budget, sparse_coefficient: as in uniform_plan.
        data_aware, sequential, memory, seed: as in compress.
        recalibrate: batch-norm recalibration: "auto" keeps it where the calibration loss falls, "never", "always".

    Raises:
        ValueError: a value out of range, no convolution to compress, no batch, NaN or Inf in the data.
    """
    if recalibrate not in RECALIBRATE:
        raise ValueError(f"uniform: recalibrate must be one of {', '.join(RECALIBRATE)}, got {recalibrate!r}")
    batches, compressed = batches_of(calibration), copy.deepcopy(model)
    plan = uniform_plan(compressed, batches[0][0], budget, sparse_coefficient)
    start = time.process_time()
    options = {"n_iter": plan.n_iter, "sequential": sequential, "memory": memory, "seed": seed}
    fits = fit_layers(compressed, plan.layers, batches, data_aware=data_aware, **options)
    total_seconds = time.process_time() - start
    compressed = apply_fits(compressed, fits)
    score = final = evaluate(compressed)
    losses, kept = _recalibrate(compressed, batches, outputs(model, batches), recalibrate)
    if kept:
        final = evaluate(compressed)
    sizes = [(entry["shape"], entry["groups"], entry["rank"], entry["nnz"]) for entry in plan.layers.values()]
    values = (sum(kept_parameters(*s, g, r, k) for s, g, r, k in sizes), sum(m * n for (m, n), *_ in sizes))
    return Trial(
        compressed,
        values,
        {name: fit.output_error for name, fit in fits.items() if fit.output_error is not None},
        [name for name, fit in fits.items() if not fit.data_aware],
        losses,
        kept,
        (score, final),
        sum(fit.cpu_seconds for fit in fits.values()),
        total_seconds,
    )


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
