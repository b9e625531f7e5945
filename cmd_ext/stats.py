"""What compress() did: costs, errors and times before and after, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from . import report, targets
from .cost import Profile
from .targets import Network


@dataclass
class LayerStats:
    """One layer before and after: costs of one call on the example inputs."""

    name: str
    shape: str
    rank: int | None
    nnz: int | None
    params: tuple[int, int]
    bytes: tuple[int, int]
    macs: tuple[int, int]
    ms: tuple[float | None, float | None]
    note: str
    output_error: float | None = None  # ||Y - Y'|| / ||Y|| of its outputs on the calibration data
    fitted_to: str | None = None  # "data" or "weights"
    predicted_ms: float | None = None  # under a limit on latency


@dataclass
class Stats:
    """Before and after. `str()` gives the table; pairs are (dense, compressed)."""

    layers: list[LayerStats]
    skipped: dict[str, str]
    params: tuple[int, int]
    bytes: tuple[int, int]
    macs: tuple[int, int]
    ms: tuple[float, float]
    score: tuple[float | None, float | None]
    batchnorm: tuple[float, float] | None
    latency: dict | None = None  # "target", "predicted", "measured", "dense" ms, "networks" timed, whether it was "met"
    probes: list[dict] = field(default_factory=list)  # what score_drop tried: limits, "score", "drop", "kept"

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        def pair(values: tuple[int, int]) -> str:
            return f"{report.count(values[0])} > {report.count(values[1])}"

        def times(values: tuple[float | None, float | None]) -> str:
            return f"{report.milliseconds(values[0])} > {report.milliseconds(values[1])}"

        timed, rows = self.latency is not None, []
        for layer in self.layers:
            sizes = ["-" if v is None else str(v) for v in (layer.rank, layer.nnz)]
            costs = [pair(layer.params), pair(layer.bytes), pair(layer.macs), times(layer.ms)]
            costs += [report.milliseconds(layer.predicted_ms)] * timed
            error = "-" if layer.output_error is None else f"{layer.output_error:.4f}"
            rows.append([layer.name, layer.shape, *sizes, *costs, error])
        errors = [layer.output_error for layer in self.layers if layer.output_error is not None]
        mean = f"mean {sum(errors) / len(errors):.4f}" if errors else "-"
        costs = [pair(self.params), pair(self.bytes), pair(self.macs), times(self.ms)]
        total = [
            "total",
            "",
            "",
            "",
            *costs,
            *([report.milliseconds(self.latency["predicted"])] if timed else []),
            mean,
        ]
        gains = [report.ratio(*values) for values in (self.params, self.bytes, self.macs, self.ms)] + [""] * timed
        header = (
            "layer",
            "shape",
            "rank",
            "nnz",
            "params",
            "bytes",
            "MACs",
            "ms",
            *["predicted ms"] * timed,
            "output error",
        )
        lines = [report.table(header, rows, [total, ["smaller / faster by", "", "", "", *gains, ""]])]
        to_weights = [layer.name for layer in self.layers if layer.fitted_to == "weights"]
        if errors and to_weights:
            lines.append(f"fitted to their weights, which gave no larger output error: {', '.join(to_weights)}")
        gone = [layer.name for layer in self.layers if layer.rank == layer.nnz == 0]
        if gone:
            lines.append(f"without U V and S, as something leads past them: {', '.join(gone)}")
        if self.score[0] is not None:
            lines.append(f"score: {self.score[0]:.4f} dense, {self.score[1]:.4f} compressed")
        if self.probes:
            lines += ["networks tried for score_drop:", *targets.probes_text(self.probes)]
        if timed:
            lines.append(f"latency: {targets.latency_text(self.latency)}")
        if self.batchnorm is not None:
            before, after = self.batchnorm
            kept = "kept" if after < before else "undone"
            lines.append(f"batch-norm recalibration {kept}: calibration loss {before:.4f} > {after:.4f}")
        if self.skipped:
            lines.append("left dense:")
            lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def stats_of(before: Profile, after: Profile, network: Network, layers, pinned, scores, probes) -> Stats:
    rows, plan = [], network.plan
    costs = {layer.name: layer.costs(*pinned[layer.name]) for layer in layers if layer.name in pinned}
    costs |= {name: candidate.costs for name, candidate in network.choice.items()}
    for old, new in zip(before, after, strict=True):
        if old.macs == 0 and old.name not in plan.skipped:
            continue  # normalisations and the like: in the totals only
        pairs = {kind: (getattr(old, kind), getattr(new, kind)) for kind in ("params", "bytes", "macs", "ms")}
        name = "" if len(before) == 1 else old.name  # of a network of one layer
        fit = network.fits.get(old.name, network.fits.get(name))
        how = (fit.output_error, "data" if fit.data_aware else "weights") if fit else (None, None)
        predicted = costs.get(old.name, costs.get(name, {})).get("latency")
        note = plan.skipped.get(old.name, "")
        rows.append(LayerStats(old.name, new.shape, new.rank, new.nnz, *pairs.values(), note, *how, predicted))
    totals = [(getattr(before.total, kind), getattr(after.total, kind)) for kind in ("params", "bytes", "macs", "ms")]
    return Stats(rows, plan.skipped, *totals, tuple(scores), network.recalibration, network.latency, probes)
