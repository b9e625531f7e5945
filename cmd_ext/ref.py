"""The operators in plain PyTorch: their specification, the oracle of the tests and the baseline of the benches.

Same names and arguments as ops.py. They build S (and U V + S) densely, in the dtype of the arguments; nothing falls
back to them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import Pattern


def csr_to_dense(values: Tensor, row_ptr: Tensor, col_idx: Tensor, n: int) -> Tensor:
    """S [m, n] from CSR, differentiable in `values`."""
    m = row_ptr.numel() - 1
    rows = torch.repeat_interleave(torch.arange(m, device=values.device), row_ptr.diff().long())
    return values.new_zeros(m, n).index_put((rows, col_idx.long()), values)


def dense_weight(u: Tensor, v: Tensor, values: Tensor, pattern: Pattern, groups: int = 1) -> Tensor:
    """U V + S [m, n]; with groups, U [m, r] and V [groups * r, n] are multiplied group by group."""
    m, r = u.shape
    n = v.shape[1]
    low_rank = torch.bmm(u.view(groups, m // groups, r), v.view(groups, r, n)).view(m, n)
    return low_rank + csr_to_dense(values, pattern.row_ptr, pattern.col_idx, n)


def truncated_svd(a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triplets by a full SVD, signed like ops.truncated_svd."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(a.dtype)
    return u * signs, s, vh * signs.mT


def topk_csr(a: Tensor, nnz: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest |a| by a stable sort (so that ties go to the lower linear index), NaN first."""
    if a.dim() == 2:
        values, row_ptr, col_idx = topk_csr(a[None], nnz)
        return values[0], row_ptr[0], col_idx[0]
    b, m, n = a.shape
    flat = a.flatten(1).double()
    magnitude = torch.where(flat.isnan(), torch.inf, flat.abs())
    by_size = torch.argsort(magnitude, descending=True, stable=True)
    nan_first = torch.argsort(flat.gather(1, by_size).isnan().to(torch.int8), descending=True, stable=True)
    kept = by_size.gather(1, nan_first)[:, :nnz].sort(1).values
    counts = kept.new_zeros(b, m).scatter_add(1, kept // n, torch.ones_like(kept))
    return a.flatten(1).gather(1, kept), F.pad(counts.cumsum(1), (1, 0)).int(), (kept % n).int()


def residual_topk_csr(w: Tensor, u: Tensor, v: Tensor, nnz: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, r = u.shape[-2:]
    groups = v.shape[-2] // r if r else 1
    blocks = u.unflatten(-2, (groups, m // groups)) @ v.unflatten(-2, (groups, r))
    residual = w - blocks.flatten(-3, -2)
    return residual, *topk_csr(residual, nnz)


def csr_transpose(row_ptr: Tensor, col_idx: Tensor, n: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """By a stable sort of the columns."""
    m = row_ptr.numel() - 1
    rows = torch.repeat_interleave(torch.arange(m, device=row_ptr.device), row_ptr.diff().long())
    columns = rows * groups // max(m, 1) * n + col_idx
    perm = torch.argsort(columns, stable=True)
    counts = torch.bincount(columns, minlength=groups * n)
    return F.pad(counts.cumsum(0), (1, 0)).int(), rows[perm].int(), perm.int()


def lrs_linear(x: Tensor, u: Tensor, v: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dense_weight(u, v, values, pattern), bias)


def sddmm(a: Tensor, b: Tensor, row_ptr: Tensor, col_idx: Tensor) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(a.shape[0], device=a.device), row_ptr.diff().long())
    return (a @ b.T)[rows, col_idx.long()]


def lrs_conv2d(
    x, u, v, values, pattern, bias, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
) -> Tensor:
    weight = dense_weight(u, v, values, pattern, groups).view(u.shape[0], -1, *kernel_size)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def alternation(w: Tensor, rank: int, nnz: int, passes: int) -> float:
    """The textbook fit of U V + S (GoDec): a full SVD and a full sort in every pass. Returns the relative error."""
    s = torch.zeros_like(w)
    for _ in range(passes):
        u, sigma, vh = torch.linalg.svd(w - s, full_matrices=False)
        rest = w - (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        kept = rest.abs().flatten().topk(nnz).indices
        s = torch.zeros_like(w).view(-1).index_put((kept,), rest.flatten()[kept]).view_as(w)
    return ((rest - s).norm() / w.norm()).item()
