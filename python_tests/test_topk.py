"""topk_csr on matrices large enough for its sample, against a stable sort: the same entries, index by index."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmd_ext import ops, ref
from cmd_ext.projections import Largest

M, N = 150, 331  # more entries than one piece of work, rows not a multiple of a vector


def gaussian() -> Tensor:
    return torch.randn(M, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


INPUTS = {
    "gaussian": gaussian,
    "heavy tail": lambda: gaussian() ** 3 / gaussian().flip(0),
    "quantised": lambda: (gaussian() * 8).round() / 8,
    "few values": lambda: (gaussian() * 2).round(),
    "all equal": lambda: torch.full((M, N), -2.0),
    "pruned": lambda: torch.where(gaussian().abs() > 2, gaussian(), 0.0),
    "sorted": lambda: torch.arange(M * N).view(M, N).double(),
    "one large row": lambda: gaussian() * torch.where(torch.arange(M) == 77, 100.0, 1.0)[:, None],
    "large rows at the end": lambda: gaussian() * torch.where(torch.arange(M) > 140, 100.0, 1.0)[:, None],
    "period": lambda: gaussian() + (torch.arange(M * N).view(M, N) % 64 == 0) * 10,
    "NaN and infinities": lambda: gaussian().index_fill(1, torch.arange(0, N, 9), torch.nan) / (gaussian() > -1.5),
}
SHARES = (0.0, 1e-4, 0.01, 0.05, 0.2, 0.5, 0.95, 1.0)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_topk_csr_index_exact(name, dtype):
    a = INPUTS[name]().to(dtype)
    for share in SHARES:
        nnz = int(share * a.numel())
        assert_same(ops.topk_csr(a, nnz), ref.topk_csr(a, nnz))


VIEWS = {
    "transposed": lambda t: t.T,
    "strided": lambda t: t[::2, 1:],
    "expanded": lambda t: t[:1].expand(M, N),
}


@pytest.mark.parametrize("name", VIEWS)
def test_topk_csr_of_a_view(name):
    a = VIEWS[name](gaussian())
    for nnz in (1, a.numel() // 20, a.numel() // 2):
        assert_same(ops.topk_csr(a, nnz), ref.topk_csr(a, nnz))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_topk_csr_of_an_empty_shape(shape):
    values, row_ptr, col_idx = ops.topk_csr(torch.empty(shape), 0)
    assert values.shape == col_idx.shape == (*shape[:-2], 0)
    assert row_ptr.shape == (*shape[:-2], shape[-2] + 1)
    assert not row_ptr.any()


def test_topk_csr_does_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        for name in ("gaussian", "quantised"):
            a = INPUTS[name]()
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(ops.topk_csr(a, a.numel() // 20))
            for other in results[1:]:
                assert_same(other, results[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("groups", [1, 3])
def test_residual_topk_csr_selects_from_its_residual(groups, share):
    w, rank = gaussian()[None].expand(2, M, N), 4
    u, v = w[:, :, :rank] * 0.1, w[:, : groups * rank] * 0.1  # views: no argument is contiguous
    before = w.clone()
    nnz = int(share * M * N)
    residual, *kept = ops.residual_topk_csr(w, u, v, nnz)
    torch.testing.assert_close(residual, ref.residual_topk_csr(w, u, v, nnz)[0])
    assert_same(tuple(kept), ref.topk_csr(residual, nnz))
    assert torch.equal(w, before)


@pytest.mark.parametrize("shape", [(12, 20), (40, 450)])  # one selection for all, and one for each
@pytest.mark.parametrize("nnz", [[0, 0, 0], [0, 7, 200], [30, 30, 30], [1, 240, 90]])
def test_largest_keeps_as_many_of_each_matrix(shape, nnz):
    x = torch.randn(6, shape[0] // 2, shape[1], generator=torch.Generator().manual_seed(0))  # two blocks a matrix
    out = Largest(nnz, x).keep(x, torch.full_like(x, torch.nan))
    for part, kept, count in zip(x.view(3, -1), out.view(3, -1), nnz, strict=True):
        index = part.abs().topk(count).indices
        assert torch.equal(kept, torch.zeros_like(part).index_copy(0, index, part[index]))
