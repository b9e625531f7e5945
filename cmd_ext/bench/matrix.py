"""Matrices: truncated SVD and exact top-k."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmd_ext import ops, ref
from cmd_ext.bench.machine import optional
from cmd_ext.bench.shapes import Matrix
from cmd_ext.bench.timing import Call, Case, Goal, Row, Run, over


def structured(m: int, n: int, seed: int = 0) -> Tensor:
    """Low rank, plus noise with heavy tails: what trained weights look like."""
    g = torch.Generator().manual_seed(seed)
    rank = max(1, min(m, n) // 20)
    low = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    return torch.randn(m, n, generator=g) * torch.randn(m, n, generator=g).abs() + 0.3 * low


def of_run(run: Run, w: Tensor) -> Tensor:
    return w.to(run.device, run.dtype)


# Truncated SVD ------------------------------------------------------------------------------------------------------

# Shape, rank and spectrum: flat ("gauss") or falling like 1 / i ("power").
SVDS = (
    (Matrix(64, 576), 7, "power"),
    (Matrix(128, 1152), 15, "gauss"),
    (Matrix(256, 2304), 30, "gauss"),
    (Matrix(512, 4608), 25, "power"),
    (Matrix(512, 4608), 61, "gauss"),
    (Matrix(512, 4608), 128, "power"),
    (Matrix(4096, 4096), 204, "gauss"),
)
EXCESS = 3e-2  # the least accurate result that counts as a truncated SVD
MOVED = 0.02  # of the norm, between the calls of a warm start


def with_spectrum(m: int, n: int, spectrum: str) -> Tensor:
    torch.manual_seed(0)
    a = torch.randn(m, n, dtype=torch.float64)
    if spectrum == "power":
        side = min(m, n)
        q = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64)).Q
        q = q / torch.arange(1, side + 1)
        a = q @ a / n**0.5 if m <= n else a @ q.T / m**0.5
    return a


@dataclass(frozen=True)
class Excess:
    """How far the error of a rank-r approximation is above the least one, in float64, as a share of it."""

    a: Tensor
    least: float

    @classmethod
    def of(cls, a: Tensor, rank: int) -> Excess:
        a = a.double()
        values = torch.linalg.eigvalsh(a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a)
        return cls(a, values[: len(values) - rank].clamp_min(0).sum().sqrt().item())

    def __call__(self, result) -> float:
        """Of u, s and vh; infinite if the columns of u are not orthonormal."""
        # scipy's vectors have negative strides, which torch cannot take.
        parts = (np.ascontiguousarray(t) if isinstance(t, np.ndarray) else t for t in result)
        u, s, vh = (torch.as_tensor(t, dtype=torch.float64, device=self.a.device) for t in parts)
        identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        if not torch.allclose(u.T @ u, identity, atol=1e-3):
            return float("inf")
        return abs((self.a - (u * s) @ vh).norm().item() / self.least - 1)


def lowrank(a: Tensor, rank: int, more: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """torch.svd_lowrank with so many columns more."""
    u, s, v = torch.svd_lowrank(a, min(rank + more, *a.shape), steps)
    return u[:, :rank], s[:rank], v.T[:rank]


def svd_rivals(a: Tensor, rank: int) -> dict[str, Call]:
    def leading(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return u[:, :rank], s[:rank], vh[:rank]

    rivals: dict[str, Call] = {"torch.svd_lowrank(r + 8, 4)": lambda: lowrank(a, rank, 8, 4)}
    if min(a.shape) <= 1024:
        rivals["torch.linalg.svd"] = lambda: leading(*torch.linalg.svd(a, full_matrices=False))
    if a.device.type == "cpu":
        array = a.numpy()
        if scipy := optional("scipy"):
            rivals["scipy svds"] = lambda: scipy.svds(array, rank)
        if sklearn := optional("scikit-learn"):
            rivals["sklearn randomized_svd"] = lambda: sklearn.randomized_svd(array, rank, n_iter=4, random_state=0)
    return rivals


def bench_svd(run: Run) -> Iterator[Row]:
    named = [(shape, max(1, min(shape.m, shape.n) // 8), "gauss") for shape in run.pick(Matrix, (), ())]
    for shape, rank, spectrum in named or (SVDS[:1] if run.quick else SVDS):
        name = f"truncated_svd {shape}, rank {rank}, {spectrum}"
        exact = with_spectrum(shape.m, shape.n, spectrum)
        a = of_run(run, exact)
        accuracy = Goal("13", f"{name}: excess of the error", 1e-8, lambda row: row.errors["ours"], at_most=True)
        goals = (*svd_goals(shape, name, 8.0), accuracy)
        yield run.measure(svd_case(run, name, a, rank, lambda a=a, r=rank: ops.truncated_svd(a, r), goals))

        moved = exact + MOVED * exact.norm() / exact.numel() ** 0.5 * torch.randn_like(exact)
        basis = of_run(run, ref.truncated_svd(of_run(run, moved), rank)[2].T.contiguous())

        def warm(a: Tensor = a, rank: int = rank, basis: Tensor = basis) -> tuple[Tensor, ...]:
            return ops.truncated_svd(a, rank, n_iter=0, basis=basis)

        yield run.measure(svd_case(run, f"{name}, warm", a, rank, warm, svd_goals(shape, f"{name}, warm", 16.0)))


def svd_goals(shape: Matrix, name: str, wanted: float) -> tuple[Goal, ...]:
    if not 256 <= min(shape.m, shape.n) <= 512:
        return ()
    return (Goal("13", f"{name}, over torch.linalg.svd", wanted, over("torch.linalg.svd")),)


def svd_case(run: Run, name: str, a: Tensor, rank: int, call: Call, goals: tuple[Goal, ...]) -> Case:
    excess = Excess.of(a, rank)

    def note(ours, others: dict) -> str:
        return f"excess {excess(ours):.0e}; " + ", ".join(f"{key} {excess(value):.0e}" for key, value in others.items())

    rough: dict[str, Call] = {"torch.svd_lowrank(r, 2)": lambda: lowrank(a, rank, 0, 2)}  # an error 2 % above the least
    return Case(name, {"": call}, excess, EXCESS, svd_rivals(a, rank), rough, goals=goals, note=note)


# Exact top-k --------------------------------------------------------------------------------------------------------

TOPK = (Matrix(64, 1600), Matrix(256, 2304), Matrix(512, 4608), Matrix(4096, 4096), Matrix(5000, 4096))
READ = "one read (sum)"


def bench_topk(run: Run) -> Iterator[Row]:
    for shape in run.pick(Matrix, TOPK, TOPK[1:2]):
        a = of_run(run, structured(shape.m, shape.n))
        for density in (0.05,) if run.quick else (0.01, 0.05, 0.2):
            yield run.measure(topk_case(run, shape, a, density))


def topk_case(run: Run, shape: Matrix, a: Tensor, density: float) -> Case:
    nnz = max(1, round(a.numel() * density))
    name = f"topk_csr {shape}, {100 * density:g} %"
    want = ref.topk_csr(a, nnz)

    def check(got) -> float:
        return 0.0 if all(map(torch.equal, got, want)) else float("inf")

    def to_csr() -> Tensor:
        magnitude = a.abs()
        least = magnitude.flatten().kthvalue(a.numel() - nnz + 1).values
        return torch.where(magnitude >= least, a, 0).to_sparse_csr()

    rivals: dict[str, Call] = {
        "torch.topk": lambda: a.abs().flatten().topk(nnz, sorted=False),
        "torch.topk sorted": lambda: a.abs().flatten().topk(nnz),
        "kthvalue, mask, to_sparse_csr": to_csr,
    }
    references: dict[str, Call] = {
        READ: a.sum,
        "kthvalue": lambda: a.abs().flatten().kthvalue(a.numel() - nnz + 1),
    }
    if a.device.type == "cpu" and run.dtype in (torch.float32, torch.float64):
        references["numpy partition"] = lambda: np.partition(np.abs(a.numpy()).ravel(), a.numel() - nnz)
    goals = ()
    if a.numel() >= 2e6 and density == 0.05:
        goals += (Goal("12", f"{name}, CSR included, over torch.topk", 33, over("torch.topk")),)
        goals += (Goal("12", f"{name}, CSR included, over kthvalue", 15, over("kthvalue")),)
    if a.numel() >= 2e6 and density == 0.01:
        what = f"{name}: the whole call in times of {READ}"
        goals += (Goal("c", what, 2.0, lambda row: 1 / row.over(READ), at_most=True),)
    return Case(name, {"": lambda: ops.topk_csr(a, nnz)}, check, 0.0, rivals, references, checked=False, goals=goals)
