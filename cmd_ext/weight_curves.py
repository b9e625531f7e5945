"""Error curves of fits to the weights: what a layer loses at every size.

Pure sparse errors come exactly from one sort, pure low-rank errors from one spectrum; mixed ones are fitted at a few
budgets. With calibration data, `measure_losses` makes losses of the network's outputs of them. curves.py has the curves
of fits to data.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .allocation import Candidate, Layer, dense_of, removed
from .decompose import decompose_batch

BUDGETS = np.geomspace(0.01, 0.8, 40)
MIXED_COEFFICIENTS = (0.85, 0.6)
ANCHORS = (0.05, 0.1, 0.2, 0.4, 0.65)  # budgets at which mixed coefficients are fitted; between them: interpolation
KL_BUDGETS = (0.08, 0.2, 0.4)  # budgets at which the loss of compressing one layer alone is measured
LARGE = 1 << 22  # entries from which on a curve gets fewer fits


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

    candidates = [dense_of(layer), *removed(layer)]
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


def measure_losses(
    layers: list[Layer],
    curves: dict[str, list[Candidate]],
    modules: dict[str, nn.Module],
    loss_of_model: Callable[[], float],
    step: Callable[[], None] = lambda: None,
) -> None:
    """Replaces the candidates' loss by the network's: each layer alone is compressed at three budgets, or taken out.

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
        tried = [(1.0, torch.zeros_like(dense))] if layer.removable else []
        for budget in KL_BUDGETS:
            candidate = min(curves[layer.name][1:], key=lambda c: abs(c.costs["params"] / layer.size - budget))
            sizes = {"rank": candidate.rank, "nnz": candidate.nnz, "groups": layer.groups, "form": candidate.form}
            fit = decompose_batch([dense], n_iter=8, **sizes)[0]
            tried.append((max(fit.relative_error**2, 1e-12), fit.to_dense().view_as(weight)))
        for error, other in tried:
            with torch.no_grad():
                weight.copy_(other)
            points.append((error, max(loss_of_model(), 1e-9)))
            with torch.no_grad():
                weight.copy_(dense)
            step()
        for _ in range(len(KL_BUDGETS) + 1 - len(tried)):
            step()
        for candidate in curves[layer.name][1:]:
            candidate.loss = loss_at(sorted(points), candidate.error)


def loss_at(points: list[tuple[float, float]], error: float) -> float:
    """log loss over log error; outside the measured range in proportion to the error."""
    xs, ys = np.log([e for e, _ in points]), np.maximum.accumulate(np.log([v for _, v in points]))
    x = math.log(max(error, 1e-12))
    return float(np.exp(np.interp(x, xs, ys) + min(0.0, x - xs[0]) + max(0.0, x - xs[-1])))
