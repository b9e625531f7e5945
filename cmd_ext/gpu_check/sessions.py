"""What is measured, one session after the other: all ways of computing a layer against the dense library, top-k and SVD
against torch's, training, and what the rates of dispatch.py are taken from. A session returns rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from cmd_ext import ops, ref
from cmd_ext.gpu_check.samples import F32, F64, STRICT, path, settings
from cmd_ext.gpu_check.timing import (
    KINDS,
    MAIN,
    RESNET18,
    TOLERANCE,
    Contender,
    Entry,
    Layer,
    captured,
    l2_flush,
    measure,
    precision,
    relative_error,
)
from cmd_ext.ops import Pattern

RANKS, DENSITIES = (0.05, 0.1, 0.25), (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
QUICK_RANKS, QUICK_DENSITIES = (0.1,), (0, 0.01, 0.05)


class OutOfTimeError(Exception):
    """The time budget was spent before this measurement."""


def support(m: int, n: int, density: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Pattern]:
    """Values and the pattern of a random S."""
    _, row_ptr, col_idx = ops.topk_csr(torch.rand(m, n, device=device), round(density * m * n))
    pattern = Pattern(row_ptr, col_idx, *ops.csr_transpose(row_ptr, col_idx, n))
    return (torch.randn(col_idx.shape[0], device=device) * n**-0.5).to(dtype), pattern


def fits_tensor_cores(layer: Layer, kind: str, dtype: torch.dtype) -> bool:
    return kind in ("tf32", "bfloat16", "float16") and layer.channels * dtype.itemsize % 16 == 0


def layer_rows(
    layer: Layer, kind: str, share: float, densities: Iterable[float], device: torch.device, seconds: float
) -> list[dict]:
    """One row for each density of S: all backends, torch's composition, and the dense layer in each layout."""
    dtype, m, n = KINDS.get(kind) or getattr(torch, kind), layer.m, layer.n
    rank = max(1, round(share * min(m, n))) if share else 0
    with torch.no_grad(), precision(kind):
        images = layer.images(device, dtype)
        plain, last = images["contiguous"], images.get("channels_last", images["contiguous"])
        u = (torch.randn(m, rank, device=device) * max(rank, 1) ** -0.5).to(dtype)
        v = (torch.randn(rank, n, device=device) * n**-0.5).to(dtype)
        entry, rows = Entry(kind), []
        for density in densities:
            values, pattern = support(m, n, density, device, dtype)
            exact = F64 if dtype == F64 else F32
            with settings(STRICT[:2]):
                wide = [t.to(exact) for t in (u, v, values)]
                want = layer.dense(plain.to(exact), layer.weight(ref.dense_weight(*wide, pattern), plain))
            if not rows and rank:
                w = ops.dense_weight(u, v, values, pattern)
                for layout, x in images.items():
                    entry.add(f"dense {layout}", partial(layer.dense, x, layer.weight(w, x)), want)
                pace = measure(entry.contenders, device, 0)
                best = images[min(pace, key=lambda name: pace[name]["p50"]).removeprefix("dense ")] if pace else plain
            layer_args = (u, v, values, pattern)
            mine = {"csr": (partial(layer.ours, plain, *layer_args), "csr")}
            if fits_tensor_cores(layer, kind, dtype):
                mine["mma"] = (partial(layer.ours, last, *layer_args), "mma")
            if rank:
                mine["rebuild"] = (partial(layer.rebuilt, best, *layer_args), "")
            for name, (call, route) in mine.items():
                entry.add(f"{name} {density}", call, want, route)
            if rank:
                s = None
                if density:
                    s = torch.sparse_csr_tensor(
                        pattern.row_ptr, pattern.col_idx, values, (m, n), check_invariants=False
                    )
                entry.add(f"composed {density}", partial(layer.composed, plain, u, v, s), want)
            sizes = {"m": m, "n": n, "tokens": layer.tokens, "rank": rank, "density": density, "nnz": len(values)}
            inputs, outputs = layer.elements
            rows.append({"layer": layer.name, "kind": kind, **sizes, "inputs": inputs, "outputs": outputs})
        _time(entry, device, seconds, l2_flush(device) if layer.tokens <= 16 else None, rows)
    return rows


def _time(entry: Entry, device: torch.device, seconds: float, before, rows: list[dict]) -> None:
    """Eager and captured times into the rows; names of contenders end in the row's density or belong to all rows."""
    graphs = captured({k: c for k, c in entry.contenders.items() if not k.startswith("composed")}, device)
    times = {
        "eager": measure(entry.contenders, device, seconds / 2, before),
        "graph": measure(graphs, device, seconds / 2, before),
    }
    times |= {"errors": entry.errors, "skipped": entry.skipped}
    for row in rows:
        for kind, found in times.items():
            row[kind] = {}
            for name, value in found.items():
                if name.startswith("dense ") or name.endswith(f" {row['density']}"):
                    row[kind][name.removesuffix(f" {row['density']}")] = value


def sparse_rows(layer: Layer, kind: str, device: torch.device, seconds: float) -> list[dict]:
    """S alone at 5 %, from which the rates of the sparse kernels and of the tensor-core path are taken."""
    return [{**row, "alone": True} for row in layer_rows(layer, kind, 0, (0.05,), device, seconds)]


def topk_rows(m: int, n: int, device: torch.device, seconds: float) -> list[dict]:
    w, nnz = torch.randn(m, n, device=device), m * n // 20
    contenders = {
        "topk_csr": Contender(lambda: ops.topk_csr(w, nnz)),
        "torch.topk": Contender(lambda: w.abs().flatten().topk(nnz, sorted=False)),
    }
    got, want = (contenders[name].call()[0].abs().sort().values for name in contenders)
    if not torch.equal(got, want):
        raise AssertionError("topk_csr keeps other magnitudes than torch.topk")
    return [{"layer": f"topk_csr {m}x{n}, 5 %", "kind": "float32", "eager": measure(contenders, device, seconds)}]


def svd_rows(m: int, n: int, rank: int, device: torch.device, seconds: float) -> list[dict]:
    w = torch.randn(m, n, device=device)
    contenders = {
        "truncated_svd": Contender(lambda: ops.truncated_svd(w, rank)),
        "torch.svd_lowrank": Contender(lambda: torch.svd_lowrank(w, rank + 8, 4)),
        "torch.linalg.svd": Contender(lambda: torch.linalg.svd(w, full_matrices=False)),
    }
    with precision("float32"):
        u, s, vh = contenders["truncated_svd"].call()
        best = torch.linalg.svdvals(w)[rank:].norm()
        excess = ((w - (u * s) @ vh).norm() / best).item()
        if not excess < 1.02:
            raise AssertionError(f"truncated_svd leaves {excess:.4f} times what the best factors of its rank leave")
        times = measure(contenders, device, seconds)
    name = f"truncated_svd {m}x{n}, rank {rank}"
    return [{"layer": name, "kind": "float32", "excess": excess, "eager": times}]


def train_rows(layer: Layer, kind: str, density: float, device: torch.device, seconds: float) -> list[dict]:
    """Forward and backward of a layer with rank 10 %: ours on each path, rebuilt, and dense."""
    dtype, m, n = KINDS[kind], layer.m, layer.n
    rank = max(1, min(m, n) // 10)
    with precision(kind):
        images = layer.images(device, dtype)
        x = images.get("channels_last", images["contiguous"]).requires_grad_()
        u = (torch.randn(m, rank, device=device) * rank**-0.5).to(dtype).requires_grad_()
        v = (torch.randn(rank, n, device=device) * n**-0.5).to(dtype).requires_grad_()
        values, pattern = support(m, n, density, device, dtype)
        leaves = (x, u, v, values.requires_grad_())
        w = layer.weight(ops.dense_weight(*leaves[1:], pattern), x).detach().requires_grad_()
        grad = torch.randn_like(layer.dense(x, w)).detach()

        def ours() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer.ours(*leaves, pattern), leaves, grad)

        def rebuilt() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer.rebuilt(*leaves, pattern), leaves, grad)

        tf32 = kind == "tf32"
        contenders = {"csr": Contender(ours, "csr", tf32), "rebuild": Contender(rebuilt)}
        if fits_tensor_cores(layer, kind, dtype):
            contenders["mma"] = Contender(ours, "mma", tf32)
        contenders["dense"] = Contender(lambda: torch.autograd.grad(layer.dense(x, w), (x, w), grad))
        want = rebuilt()
        for name in contenders.keys() & {"csr", "mma"}:
            with path(contenders[name].route, tf32):
                errors = map(relative_error, ours(), [t.float() for t in want])
                worst = max(errors)
            if worst > 3 * TOLERANCE[kind]:
                raise AssertionError(f"{name}: relative error of a gradient {worst:.2e}")
        times = measure(contenders, device, seconds)
    sizes = {"rank": rank, "density": density, "nnz": len(values)}
    return [{"layer": f"forward and backward, {layer.name}", "kind": kind, **sizes, "eager": times}]


def peak_rows(device: torch.device, seconds: float) -> list[dict]:
    """Bandwidth of a large copy, the time of one small kernel among others, and the rates of large products."""
    gpu = device.type == "cuda"
    source = torch.ones(1 << (30 if gpu else 24), dtype=torch.uint8, device=device)
    copy, tiny = torch.empty_like(source), torch.zeros(1, device=device)

    def hundred() -> None:
        for _ in range(100):
            tiny.add_(1)

    share = seconds / 7
    times = measure({"copy": Contender(lambda: copy.copy_(source)), "launch": Contender(hundred)}, device, 2 * share)
    bandwidth, launch = 2 * len(source) / times["copy"]["p50"] * 1e6, times["launch"]["p50"] * 1e-8
    dense = {}
    for kind in ("float64", "float32", "tf32", "float16", "bfloat16"):
        dtype = F32 if kind == "tf32" else getattr(torch, kind)
        side = 256 if not gpu else 4096 if dtype in (F64, F32) else 8192
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with precision(kind):
            times = measure({"product": Contender(partial(torch.mm, a, b))}, device, share)
        dense[kind] = 2 * side**3 / times["product"]["p50"] * 1e6
    return [{"layer": "peaks", "bandwidth": bandwidth, "launch": launch, "dense": dense}]


Session = Callable[[torch.device, float], list[dict]]


def sessions(quick: bool) -> list[tuple[str, Session]]:
    """Names and functions of (device, seconds), the most telling first."""
    ranks, densities = (QUICK_RANKS, QUICK_DENSITIES) if quick else (RANKS, DENSITIES)
    found: list[tuple[str, Session]] = [("peaks", peak_rows)]
    for kind in ("float64", "float32", "float16", "bfloat16"):
        for layer in (MAIN[0], MAIN[-1]):
            found.append((f"S alone, {kind}, {layer.name}", partial(sparse_rows, layer, kind)))

    def layers(of: list[Layer]) -> None:
        for layer in of:
            for kind in KINDS:
                for share in ranks:
                    name = f"{layer.name}, {kind}, rank {share:.0%}"
                    found.append((name, partial(layer_rows, layer, kind, share, densities)))

    layers(MAIN)
    for m, n in ((512, 4608), (4096, 4096)):
        found.append((f"topk_csr {m}x{n}", partial(topk_rows, m, n)))
    for m, n, rank in ((256, 2304, 26), (512, 4608, 51)):
        found.append((f"truncated_svd {m}x{n}", partial(svd_rows, m, n, rank)))
    for layer in (MAIN[0], MAIN[1], MAIN[-1]):
        for kind in ("float32", "bfloat16"):
            for density in densities[-1:] if quick else (0.01, 0.05):
                found.append((f"training, {kind}, {layer.name}", partial(train_rows, layer, kind, density)))
    if not quick:
        layers(RESNET18)
    return found


def tasks(device: torch.device, quick: bool, deadline: float) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """The sessions, each with a fair share of the time that is left; half of it, as preparing takes time too."""
    planned = sessions(quick)

    def run(index: int, session: Session) -> list[dict]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError("out of time")
        try:
            return session(device, 0.5 * left / (len(planned) - index))
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()

    for index, (name, session) in enumerate(planned):
        yield name, partial(run, index, session)
