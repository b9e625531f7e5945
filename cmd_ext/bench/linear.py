"""Linear layers: S alone, U V + S, and what a call costs besides its work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cmd_ext import CMDLinear, ref
from cmd_ext.bench.machine import optional
from cmd_ext.bench.shapes import Matrix
from cmd_ext.bench.timing import Call, Case, Goal, Row, Run, error_of, over

SIZES, BATCHES, DENSITIES = (Matrix(1024, 4096), Matrix(4096, 4096)), (1, 16, 128, 1024), (0.02, 0.05, 0.1, 0.2)
FUSED = (Matrix(1024, 4096, 16), Matrix(1024, 4096, 128))
CSR = "torch CSR on x^T"
CALLS = 200  # of a tiny layer, in one measured call


def layer_of(run: Run, shape: Matrix, rank: int, density: float) -> CMDLinear:
    torch.manual_seed(0)
    layer = CMDLinear(shape.n, shape.m, device=run.device, dtype=run.dtype, rank=rank, density=density)
    layer.backend = "fused"
    return layer.requires_grad_(False)


def exact(layer: CMDLinear, x: Tensor) -> Tensor:
    """The layer by ref.py in float64."""
    weights = (layer.u.double(), layer.v.double(), layer.values.double())
    return ref.lrs_linear(x.double(), *weights, layer.pattern, layer.bias.double())


def rivals_of(layer: CMDLinear, x: Tensor) -> dict[str, Call]:
    dense, bias = layer.to_dense(), layer.bias
    rivals: dict[str, Call] = {"F.linear": lambda: F.linear(x, dense.weight, bias)}
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(dense.weight, len(x))
        rivals["oneDNN packed"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    s = torch.sparse_csr_tensor(layer.row_ptr, layer.col_idx, layer.values, layer.matrix_shape)
    x_transposed = x.t().contiguous()
    if layer.rank:
        low = low_rank(layer, x)
        rivals["composed with torch CSR"] = lambda: low() + (s @ x_transposed).t()
        return rivals
    # y^T = S x^T, which spares it both transpositions.
    rivals[CSR] = lambda: ((s @ x_transposed) + bias[:, None]).t()
    if x.device.type == "cpu" and optional("scipy") and x.dtype in (torch.float32, torch.float64):
        import scipy.sparse

        parts = (t.numpy() for t in (layer.values, layer.col_idx, layer.row_ptr))
        matrix, columns, shift = scipy.sparse.csr_matrix(tuple(parts)), x_transposed.numpy(), bias.numpy()[:, None]
        rivals["scipy csr on x^T"] = lambda: torch.from_numpy(matrix @ columns + shift).t()
    return rivals


def low_rank(layer: CMDLinear, x: Tensor) -> Call:
    return lambda: F.linear(F.linear(x, layer.v), layer.u, layer.bias)


def linear_case(run: Run, name: str, shape: Matrix, rank: int, density: float, goals: tuple[Goal, ...] = ()) -> Case:
    layer, x = layer_of(run, shape, rank, density), run.randn(shape.batch, shape.n)
    want = exact(layer, x)
    return Case(
        name,
        {"": lambda: layer(x)},
        lambda y: error_of(y, want),
        run.tolerance,
        rivals_of(layer, x),
        {"without S": low_rank(layer, x)} if rank else {},
        gflop=2e-9 * shape.tokens * (layer.nnz + rank * (shape.m + shape.n)),
        goals=goals,
    )


def bench_linear(run: Run) -> Iterator[Row]:
    for shape in run.pick(Matrix, FUSED, FUSED[:1]):
        name = f"lrs_linear {shape}, batch {shape.batch}, r = m/8, 5 %"
        yield run.measure(linear_case(run, name, shape, max(1, min(shape.m, shape.n) // 8), 0.05))
    batches = [replace(size, batch=batch) for size in SIZES for batch in BATCHES]
    for shape in run.pick(Matrix, batches, batches[1:2]):
        for density in (0.05,) if run.quick else DENSITIES:
            name = f"sparse linear {shape}, batch {shape.batch}, {100 * density:g} %"
            yield run.measure(linear_case(run, name, shape, 0, density, sparse_goals(shape, density)))
    yield from bench_overhead(run)


def sparse_goals(shape: Matrix, density: float) -> tuple[Goal, ...]:
    if replace(shape, batch=1) not in SIZES:
        return ()
    large = shape.batch >= 128 and density >= 0.05
    where = "batch >= 128, density >= 5 %" if large else "batch < 128 or density < 5 %"
    goals = (Goal("11", f"sparse linear over {CSR}, {where}", 3.9 if large else 3.0, over(CSR)),)
    if density == 0.05:
        goals += (Goal("11", "sparse linear at 5 % over F.linear", 8.5, over("F.linear")),)
    return goals


def bench_overhead(run: Run) -> Iterator[Row]:
    """A layer so small that its time is the way to the kernel."""
    layer = CMDLinear(8, 8, device=run.device, dtype=run.dtype, rank=2, density=0.25)
    x, weight, bias = run.randn(1, 8), layer.to_dense().weight, layer.bias
    want = exact(layer, x)

    def repeated(mode: Callable[[], AbstractContextManager], call: Call) -> Call:
        def many() -> object:
            with mode():
                for _ in range(CALLS):
                    result = call()
            return result

        return many

    for mode, least in ((torch.inference_mode, 20), (torch.no_grad, 35)):
        name = f"a call of CMDLinear 8x8, {mode.__name__}"
        yield run.measure(
            Case(
                name,
                {"": repeated(mode, lambda: layer(x))},
                lambda y: error_of(y, want),
                run.tolerance,
                {"F.linear": repeated(mode, lambda: F.linear(x, weight, bias))},
                goals=(Goal("h", f"{name}: microseconds", least, lambda row: row.ours.p50, at_most=True),),
                unit="us",
                calls=CALLS,
            )
        )
