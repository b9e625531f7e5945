"""sensitivity(): what every layer of a network loses at several sizes, before anything is compressed."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import curves, distributed, report, targets, weight_curves
from .allocation import Candidate, Layer
from .calibrate import Batch, batches_of, outputs
from .candidates import MIN_SIZE, candidates
from .compress import layers_of
from .cost import LayerCost, Profile, kept_parameters, profile_together
from .moments import call_order
from .plan import plan_of
from .refit import MEMORY, fit_layers

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
FORMATS = (".svg", ".png", ".pdf")

Point = tuple[float, str, str, Candidate]  # budget, who decided it, what the error is of, and the split

COLUMNS = (
    "layer", "kind", "shape", "form", "budget", "decided_by", "sparse_coefficient", "rank", "nnz",
    "params", "bytes", "macs", "predicted_ms", "dense_params", "dense_bytes", "dense_macs", "dense_ms",
    "output_error", "error_of", "loss",
)  # fmt: skip


class Sensitivity(list[dict]):
    """Rows of sensitivity(), a list of flat dicts with the keys COLUMNS. `str()` gives tables of layers x budgets.

    Attributes:
        profile: of the dense network.
        skipped: name -> why a layer has no rows and stays dense.
    """

    def __init__(self, rows: Iterable[dict], profile: Profile, skipped: dict[str, str]) -> None:
        super().__init__(rows)
        self.profile, self.skipped = profile, skipped

    def to_csv(self) -> str:
        """A header and a line for every row; None is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self)
        return text.getvalue()

    def __str__(self) -> str:
        error = "relative error of a layer's " + " or ".join(_kinds_of_error(self) or ["weight"])
        parts = [self._table(error, lambda row: f"{row['output_error']:.3f}")]
        if any(row["loss"] is not None for row in self):
            loss = "loss of the network with this layer alone compressed (KL divergence of its outputs)"
            parts.append(self._table(loss, lambda row: f"{row['loss']:.2e}"))
        if any(row["predicted_ms"] for row in self):
            times = "times as fast as dense, by the predicted time"
            parts.append(self._table(times, lambda row: report.ratio(row["dense_ms"] or 0, row["predicted_ms"] or 0)))
        if not self:
            parts = ["no layer may be compressed"]
        if self.skipped:
            parts.append("\n".join(["stay dense:", *(f"  {name}: {why}" for name, why in self.skipped.items())]))
        return "\n\n".join(parts)

    def _table(self, title: str, cell: Callable[[dict], str]) -> str:
        layers = _by_layer(self)
        budgets = _grid(self)
        lines = []
        for name, rows in layers.items():
            cells = {column: cell(row) for column, row in _columns(rows, budgets).items()}
            lines.append([name, rows[0]["shape"], report.count(rows[0]["dense_params"])])
            lines[-1] += [cells.get(column, "-") for column in range(len(budgets))]
        header = ["layer", "shape", "params", *(f"{100 * budget:g} %" for budget in budgets)]
        return f"{title}, at a share of its parameters:\n{report.table(header, lines)}"


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Iterable | None = None,
    budgets: Sequence[float] = BUDGETS,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    overrides: dict[str, dict | str] | None = None,
    round_to: int = 1,
    min_size: int = MIN_SIZE,
    data_aware: bool = True,
    memory: int = MEMORY,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """What every layer of a network loses if it alone is compressed, by the curves that compress's allocation goes by.

    Args:
        model: any module; never changed. Its nn.Conv2d and nn.Linear layers are candidates.
        example_inputs: one call's inputs (tensor, tuple of arguments or dict), for MACs and milliseconds.
        calibration: batches of inputs or (inputs, targets): with them the errors are those of the layers' outputs, and
            the loss of the network's outputs is measured.
        budgets: shares of a layer's parameters, each in [0.01, 0.8]. Quick fits are made at budgets of their own, and
            errors and losses between them interpolated: the final fit of compress mostly comes out a little better.
        filter_fn, overrides, round_to, min_size, data_aware, memory, seed, progress: as for compress. A layer of which
            `overrides` decide the size has one row, fitted and measured at that size.

    With an initialised process group every rank must call it, with its own share of the calibration data; all get the
    same rows.

    Returns:
        A list of dicts of scalars, one for each layer and budget with the split between U V and S of least error, so
        that pandas.DataFrame(rows) just works:

        * "layer", "kind" ("Conv2d"), "shape" ("mxn"), "form" of its low-rank branch ("channel" or "spatial")
        * "budget": the wanted share of the parameters; "decided_by": "budget", or "overrides"
        * "rank", "nnz", "sparse_coefficient": nnz / params
        * "params", "bytes", "macs" of the weight so held, and "dense_params", "dense_bytes", "dense_macs"
        * "predicted_ms" of a call on example_inputs, None where the device has no model of times; "dense_ms", measured
        * "output_error": ||Y - Y'|| / ||Y|| of the layer's outputs on the calibration data, or, where it is fitted to
          its weight, of that; "error_of" tells which: "outputs" or "weight"
        * "loss": KL divergence of the network's outputs, nats a sample, with this layer alone compressed; relative
          squared error where they are no logits; None without data

        A layer so small that a budget leaves it nothing has no row there. `rows.skipped` tells why other layers have
        none, `rows.profile` the costs of all layers, and print(rows) shows tables.

    Raises:
        ValueError: an unknown layer name, a value out of range, no batch, NaN or Inf in the data.

    Source: Zhang et al., Machine Learning 2022; losses of single layers as in compress.
    """
    budgets = sorted(set(budgets))
    if not budgets or not weight_curves.BUDGETS[0] <= budgets[0] or not budgets[-1] <= weight_curves.BUDGETS[-1]:
        least, most = weight_curves.BUDGETS[[0, -1]]
        raise ValueError(f"sensitivity: budgets must lie in [{least:g}, {most:g}], at least one, got {budgets}")
    if round_to < 1:
        raise ValueError(f"sensitivity: round_to must be >= 1, got {round_to}")
    torch_rng = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        batches = batches_of(calibration) if calibration is not None else []
        chosen, skipped = candidates(model, filter_fn, overrides, min_size)
        dense = copy.deepcopy(model)
        profile = distributed.first_rank_does(
            lambda: profile_together([dense], example_inputs, repeats=targets.REPEATS)[0]
        )
        form = "channel" if batches and data_aware else "auto"
        layers, pinned = layers_of(dense, chosen, overrides or {}, profile, form, False)
        free = [layer for layer in layers if layer.name not in pinned]
        reference, options = outputs(dense, batches), {"memory": memory, "seed": seed}
        fits = _fits(dense, pinned, layers, batches, reference, data_aware, options)
        with report.Bar((4 if batches else 1) * len(free), "sensitivity", progress) as bar:
            options |= {"data_aware": data_aware, "round_to": round_to, "step": bar.step}
            found = curves.network_curves(dense, free, batches, reference, **options)

        def rows() -> list[dict]:
            to_data = _reached(dense, chosen, batches) if data_aware else set()
            listed = []
            for layer in layers:
                how = "outputs" if layer.name in to_data else "weight"
                points = [
                    (budget, "budget", how, _at(layer, found[layer.name], budget, round_to))
                    for budget in (budgets if layer.name in found else ())
                ]
                points = [point for point in points if point[-1] is not None]
                cost = profile[layer.name or type(model).__name__]
                listed += _rows(layer, cost, fits.get(layer.name, points), bool(batches))
            return listed

        return Sensitivity(distributed.first_rank_does(rows), profile, skipped)
    finally:
        torch.random.set_rng_state(torch_rng)


def _reached(model: nn.Module, names: list[str], batches: list[Batch]) -> set[str]:
    """The layers that the data reach, which have second moments and so fits to the data."""
    reached: set[str] = set()
    for inputs, _ in batches:
        reached |= call_order(model, inputs, names).keys()
        if len(reached) == len(names):
            break
    return reached


def _at(layer: Layer, curve: list[Candidate], budget: float, round_to: int) -> Candidate | None:
    """The best split at a budget, between the points of a curve; None where there is none so small."""
    kept = []  # those of least error among all of their size or smaller
    for candidate in sorted(curve[1:], key=lambda c: (c.costs["params"], c.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    below = [c for c in kept if c.costs["params"] <= budget * layer.size + 1e-9]
    if not below:
        return None
    base = below[-1]
    rank, nnz = base.rank, base.nnz
    if nnz:  # S takes what the point below leaves
        taken = kept_parameters(layer.m, layer.n, layer.groups, rank, 0, layer.taps(base.form))
        nnz = int(budget * layer.size + 1e-9) - taken
    else:
        rank = layer.split(budget, 0.0, base.form)[0]
        rank -= rank % round_to
    costs = layer.costs(rank, nnz, base.form)
    sizes = [c.costs["params"] for c in kept]

    def between(values: list[float]) -> float:
        return float(np.exp(np.interp(costs["params"], sizes, np.log(np.maximum(values, 1e-12)))))

    error, loss = between([c.error for c in kept]), between([c.loss for c in kept])
    return Candidate(rank, nnz, error, loss, costs, base.form)


def _fits(
    model: nn.Module,
    sizes: dict[str, tuple[int, int, str]],
    layers: list[Layer],
    batches: list[Batch],
    reference: list[Tensor],
    data_aware: bool,
    options: dict,
) -> dict[str, list[Point]]:
    """The layers whose (rank, nnz, form) overrides decide, fitted and measured."""
    if not sizes:
        return {}
    shapes = {layer.name: layer for layer in layers if layer.name in sizes}
    choice = {name: Candidate(rank, nnz, 0.0, 0.0, shapes[name].costs(rank, nnz, form), form)
              for name, (rank, nnz, form) in sizes.items()}  # fmt: skip
    plan = plan_of(shapes.values(), {}, choice, {})
    fits = fit_layers(model, plan.layers, batches if data_aware else [], **options)
    meter = curves.Meter(model, batches, reference, lambda: None)

    def losses() -> dict[str, float]:
        return (
            {name: meter.losses_of(name, [fit.decomposition.to_dense()])[0] for name, fit in fits.items()}
            if batches
            else {}
        )

    measured = distributed.first_rank_does(losses)
    points = {}
    for name, fit in fits.items():
        how = "weight" if fit.output_error is None else "outputs"
        error = fit.decomposition.relative_error if fit.output_error is None else fit.output_error
        candidate = replace(choice[name], error=error**2, loss=measured.get(name, 0.0))
        points[name] = [(candidate.costs["params"] / shapes[name].size, "overrides", how, candidate)]
    return points


def _rows(layer: Layer, cost: LayerCost, points: list[Point], with_loss: bool) -> list[dict]:
    latency = _latency(layer, cost)
    whole = layer.costs(None, None)
    rows = []
    for budget, decided_by, error_of, c in points:
        params = c.costs["params"]
        values = (
            layer.name or cost.name, cost.kind, cost.shape, c.form, float(budget), decided_by,
            c.nnz / params if params else 0.0, c.rank, c.nnz, params, c.costs["bytes"], c.costs["macs"],
            latency(c.rank, c.nnz, c.form) if latency else None, whole["params"], whole["bytes"], whole["macs"],
            cost.ms, c.error**0.5, error_of, c.loss if with_loss else None,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _latency(layer: Layer, cost: LayerCost) -> Callable[[int, int, str], float] | None:
    """The predicted milliseconds of (rank, nnz, form); None on a device without a model, and for an uncalled layer."""
    if cost.ms is None:
        return None
    try:
        return targets.with_latency(layer, cost).latency
    except ValueError:
        return None


def _by_layer(rows: Sequence[dict]) -> dict[str, list[dict]]:
    layers: dict[str, list[dict]] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).append(row)
    return layers


def _grid(rows: Sequence[dict]) -> list[float]:
    """The budgets that make columns: those asked for, not those of single layers by overrides."""
    asked = {row["budget"] for row in rows if row["decided_by"] == "budget"}
    return sorted(asked or {row["budget"] for row in rows})


def _columns(rows: Sequence[dict], budgets: list[float]) -> dict[int, dict]:
    """Column -> row of one layer; a size by overrides stands in the nearest column."""
    return {min(range(len(budgets)), key=lambda i: abs(row["budget"] - budgets[i])): row for row in rows}


def _kinds_of_error(rows: Sequence[dict]) -> list[str]:
    return sorted({row["error_of"] for row in rows})


# Picture --------------------------------------------------------------------------------------------------------------


def check_picture(path: str | Path) -> None:
    """What plot_sensitivity needs, before the long part.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the name does not end in .svg, .png or .pdf.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"plot_sensitivity: path must end in {', '.join(FORMATS)}, got {path}")
    if not find_spec("matplotlib"):
        raise ImportError("plot_sensitivity: matplotlib is not installed; run `pip install matplotlib`")


def plot_sensitivity(rows: Sequence[dict], path: str | Path) -> None:
    """Draws heat maps of layers x budgets: the network's loss, where it was measured, and the layers' errors.

    Beside them stands what there is to save: each layer's share of the parameters and MACs of all that are shown.

    Args:
        rows: of sensitivity(), all or some of them.
        path: file to write, .svg, .png or .pdf; after an error it is as before.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no rows, or another kind of file.
        OSError: the file cannot be written.
    """
    check_picture(path)
    if not rows:
        raise ValueError("plot_sensitivity: rows must hold at least one layer, got none")
    from matplotlib.figure import Figure

    layers, budgets = _by_layer(rows), _grid(rows)
    panels = {"output_error": f"relative error of the layer's {' or '.join(_kinds_of_error(rows))}"}
    if any(row["loss"] is not None for row in rows):
        panels = {"loss": "loss of the network\n(KL, this layer alone compressed)", **panels}
    width = max(2.2, 0.42 * min(len(budgets), 10))
    labels = max(len(_label(of_layer[0])) for of_layer in layers.values())
    size = 0.8 + 0.055 * labels + (width + 0.5) * len(panels) + 1.6, 1.5 + 0.17 * len(layers)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels) + 1, sharey=True, width_ratios=[*[width] * len(panels), 1.6], squeeze=False)[
        0
    ]
    for axis, (key, title) in zip(axes, panels.items(), strict=False):
        _heat_map(figure, axis, [_columns(of_layer, budgets) for of_layer in layers.values()], budgets, key, title)
    _bars(axes[-1], [of_layer[0] for of_layer in layers.values()])
    axes[0].set_yticks(range(len(layers)), [_label(of_layer[0]) for of_layer in layers.values()], fontsize=6)
    axes[0].set_ylim(len(layers) - 0.5, -0.5)
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:].lower(), dpi=150)
    report.write(Path(path), picture.getvalue())


def _label(row: dict) -> str:
    return f"{row['layer']}  {row['shape']}"


def _heat_map(figure, axis, layers: list[dict[int, dict]], budgets: list[float], key: str, title: str) -> None:
    from matplotlib.colors import LogNorm

    values = np.full((len(layers), len(budgets)), np.nan)
    for i, columns in enumerate(layers):
        for j, row in columns.items():
            values[i, j] = np.nan if row[key] is None else row[key]
    most = max(float(np.nanmax(values)), 1e-9)
    least = min(max(float(np.nanmin(values)), 1e-5 * most), 0.5 * most)
    image = axis.imshow(np.maximum(values, least), cmap="YlOrRd", norm=LogNorm(least, most), aspect="auto")
    axis.set_facecolor("0.9")
    if len(budgets) > 10:  # no room for numbers
        bar = figure.colorbar(image, ax=axis, location="bottom", fraction=0.02, pad=0.01, aspect=30)
        bar.ax.tick_params(which="both", labelsize=6)
    else:
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                dark = np.log(max(value, least) / least) > 0.65 * np.log(most / least)
                text = f"{value:.2f}" if key == "output_error" else f"{value:.1e}".replace("e-0", "e-")
                axis.text(j, i, text, ha="center", va="center", fontsize=5, color="white" if dark else "black")
    every = -(-len(budgets) // 10)
    axis.set_xticks(range(0, len(budgets), every), [f"{100 * b:.3g}" for b in budgets[::every]], fontsize=6)
    axis.tick_params(length=2)
    axis.set_xlabel("% of its parameters kept", fontsize=7)
    axis.set_title(title, fontsize=7)


def _bars(axis, rows: list[dict]) -> None:
    places = np.arange(len(rows))
    for shift, key, name, colour in ((-0.2, "dense_params", "parameters", "0.45"), (0.2, "dense_macs", "MACs", "0.75")):
        costs = np.array([row[key] for row in rows], float)
        axis.barh(places + shift, 100 * costs / max(costs.sum(), 1), 0.4, color=colour, label=name)
    axis.tick_params(labelsize=6, length=2)
    axis.set_xlabel("% of all these layers", fontsize=7)
    axis.legend(fontsize=6, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, columnspacing=1)
