"""The model of the CPU's time beside measurements, for layers that its constants were not fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cmd_ext.bench import conv, linear
from cmd_ext.bench.shapes import Conv, Matrix, Shape, networks, with_batch
from cmd_ext.bench.timing import Case, Goal, Row, Run, Times, error_of
from cmd_ext.cpu_model import CONVOLUTIONS, LINEARS

POINTS = ((1 / 8, 0.05), (0.0, 0.1), (1 / 5, 0.0))  # (rank / full rank, density); none of them is fitted
BATCHES = {"ResNet-18 at 224": 1, "VGG-16 at 224": 1, "ResNet-56 at 32": 64}
GOAL = Goal("f", "median error of predicted milliseconds, held-out layers", 0.25, lambda row: row.ours.p50, True)


def is_fitted(shape: Shape) -> bool:
    if isinstance(shape, Matrix):
        return (shape.n, shape.m, shape.batch) in LINEARS
    return (shape.channels, shape.m, shape.kernel, shape.side, shape.stride, shape.batch) in CONVOLUTIONS


def layers(run: Run) -> Iterator[Shape]:
    if run.shapes:
        yield from run.shapes
        return
    known = networks()
    for name in BATCHES if not run.quick else ("ResNet-56 at 32",):
        distinct = list(dict.fromkeys(known[name]))
        yield from (shape for shape in with_batch(distinct, BATCHES[name]) if not is_fitted(shape))


def bench_model(run: Run) -> Iterator[Row]:
    brief, errors = Run(run.dtype, run.device, run.seconds / 4, run.quick), []
    for shape in layers(run):
        for share, density in POINTS:
            if density * shape.m * shape.n > 3e6:  # VGG's first linear layer: seconds of preparation
                continue
            if density == 0 and isinstance(shape, Matrix):  # without S no kernel of ours
                continue
            case, predicted = model_case(run, shape, int(share * min(shape.m, shape.n)), density)
            row = brief.measure(case)
            measured = {"fused": row.ours.p50, "dense": row.theirs}
            off = {way: predicted[way] / measured[way] for way in measured}
            row.note = ", ".join(f"predicted {way} {predicted[way]:.3g} ms = {off[way]:.2f}x" for way in measured)
            errors += [abs(ratio - 1) for ratio in off.values()]
            yield row
    yield summary(errors)


def summary(errors: Sequence[float]) -> Row:
    name = f"model: relative error of {len(errors)} predictions"
    return Row(name, "", Times.of(errors), {}, errors={"ours": 0.0}, goals=(GOAL,))


def model_case(run: Run, shape: Shape, rank: int, density: float) -> tuple[Case, dict[str, float]]:
    kind = conv if isinstance(shape, Conv) else linear
    layer = kind.layer_of(run, shape, rank, density)
    layer.backend = "fused"
    dense = layer.to_dense().requires_grad_(False)
    x = run.randn(shape.batch, *((shape.channels, shape.side, shape.side) if isinstance(shape, Conv) else (shape.n,)))
    some = [0, shape.batch - 1]
    want = kind.exact(layer, x[some])
    with torch.no_grad():
        layer(x)
        predicted = layer.predicted_ms
    name = f"model: {'' if isinstance(shape, Conv) else 'linear '}{shape}, r {rank}, {conv.percent(density)}"

    def check(y: torch.Tensor) -> float:
        return error_of(y[some], want) if len(y) == len(x) else float("inf")

    return Case(name, {"": lambda: layer(x)}, check, run.tolerance, {"dense": lambda: dense(x)}), predicted
