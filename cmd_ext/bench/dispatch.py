"""The automatic backend beside the dense twin, for every layer of four networks: no layer may be much slower."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from cmd_ext import CMDConv2d, CMDLinear
from cmd_ext.bench import conv, linear
from cmd_ext.bench.shapes import Conv, Matrix, Shape, networks, with_batch
from cmd_ext.bench.timing import Case, Goal, Row, Run, error_of

BATCHES = (1, 8, 64)
POINTS = ((0.0, 0.01), (1 / 8, 0.02), (1 / 4, 0.1), (1 / 2, 0.3), (1.0, 1.0))  # (rank / full rank, density)
SLOWEST = 1.05  # of the dense twin's time
MOST_ELEMENTS, MOST_NNZ = 3e8, 3e7  # of x and y, of S: what is larger does not fit beside its rivals
QUICK = ("ResNet-56 at 32", "AlexNet at 32")


def layers(run: Run) -> Iterator[Shape]:
    if run.shapes:
        yield from run.shapes
        return
    chosen = {name: shapes for name, shapes in networks().items() if not run.quick or name in QUICK}
    distinct = list(dict.fromkeys(shape for shapes in chosen.values() for shape in shapes))
    for batch in BATCHES[:2] if run.quick else BATCHES:
        yield from with_batch(distinct[::3] if run.quick else distinct, batch)


def bench_dispatch(run: Run) -> Iterator[Row]:
    todo = [(shape, *point) for shape in layers(run) for point in (POINTS[1:4:2] if run.quick else POINTS)]
    brief = Run(run.dtype, run.device, run.seconds / 4, run.quick)
    for done, (shape, share, density) in enumerate(todo):
        if shape.elements > MOST_ELEMENTS or density * shape.m * shape.n > MOST_NNZ:
            print(f"dispatch: left out for its size: {shape}, {conv.percent(density)}", file=sys.stderr)
            continue
        if done % 20 == 0:
            print(f"dispatch: {done} of {len(todo)}", file=sys.stderr)
        case = dispatch_case(run, shape, int(share * min(shape.m, shape.n)), density)
        row = brief.measure(case)
        if row.ratio < 1 / SLOWEST:  # measured anew, for longer: a short measurement alone would list the noise
            row = run.measure(case)
        yield row


def dispatch_case(run: Run, shape: Shape, rank: int, density: float) -> Case:
    kind = conv if isinstance(shape, Conv) else linear
    layer: CMDConv2d | CMDLinear = kind.layer_of(run, shape, rank, density)
    layer.backend = "auto"
    dense = layer.to_dense().requires_grad_(False)
    size = (shape.channels, shape.side, shape.side) if isinstance(shape, Conv) else (shape.n,)
    x = run.randn(shape.batch, *size)
    some = [0, shape.batch - 1]  # samples that are checked: all would take longer than the row
    want = kind.exact(layer, x[some])

    def check(y: Tensor) -> float:
        return error_of(y[some], want) if len(y) == len(x) else float("inf")

    sizes = f"linear {shape}, batch {shape.batch}" if isinstance(shape, Matrix) else f"{shape}"
    name = f"auto: {sizes}, r {rank}, {conv.percent(density)}"
    goal = Goal("e", "time of backend auto over the dense twin", SLOWEST, lambda row: 1 / row.ratio, at_most=True)
    rivals = {type(dense).__name__: lambda: dense(x)}
    with torch.no_grad():
        layer(x)
    return Case(
        name, {"": lambda: layer(x)}, check, run.tolerance, rivals, goals=(goal,), note=lambda *_: layer.backend
    )
