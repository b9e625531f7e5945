"""The projections that the fits alternate between: the leading part of rank r, and S as CSR or densely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops

EXACT_SIDE = 1024  # up to this short side the leading part is exact: its cost is a few passes
FEW = 1 << 14  # entries up to which one selection for all is cheaper than one for each


@dataclass
class Sparse:
    """S of each matrix of a batch as CSR: values [b, nnz], row_ptr [b, m + 1], col_idx [b, nnz]."""

    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor

    def index(self, n: int) -> Tensor:
        """Where the nonzeros lie in the flattened batch [b, m, n]."""
        return linear_index(self.row_ptr, self.col_idx, n)

    def to_dense(self, size: torch.Size) -> Tensor:
        """S by blocks [blocks, m, n]."""
        out = self.values.new_zeros(size)
        out.view(-1)[self.index(size[2])] = self.values.flatten()
        return out


@dataclass
class Fit:
    """U V + S of a batch of blocks: u [b, m, r], v [b, r, n], S by weights, which are one or several blocks."""

    u: Tensor
    v: Tensor
    sparse: Sparse
    history: list[Tensor]  # relative errors [weights] after each pass


def linear_index(row_ptr: Tensor, col_idx: Tensor, n: int) -> Tensor:
    """Where the nonzeros lie in the flattened matrix, or in the flattened batch of [b, m + 1] and [b, nnz]."""
    counts = row_ptr.diff().flatten().long()
    starts = torch.arange(0, len(counts) * n, n, device=row_ptr.device)
    return torch.repeat_interleave(starts, counts, output_size=col_idx.numel()).add_(col_idx.flatten())


def leading_part(w: Tensor, rank: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-r part of each w [b, m, n] as orthonormal u [b, m, r] times v [b, r, n] (or the reverse).

    Exact up to a short side of EXACT_SIDE; above, by subspace iteration from a start of `generator`, or from the same
    one in every call. Components come by falling size, so that the first ones are the leading part of a lower rank.
    """
    m, n = w.shape[1:]
    if rank == min(m, n):  # nothing to approximate
        identity = torch.eye(rank, dtype=w.dtype, device=w.device).expand(len(w), rank, rank)
        return (identity, w) if m <= n else (w, identity)
    if min(m, n) <= EXACT_SIDE and w.is_cuda:
        gram = torch.bmm(w, w.mT) if m <= n else torch.bmm(w.mT, w)
        try:
            q = torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
        except torch.linalg.LinAlgError:  # an ill-conditioned Gram matrix: the SVD sees W itself, in double
            u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
            return u[..., :rank].to(w), (s[..., :rank, None] * vh[..., :rank, :]).to(w)
        return (q, torch.bmm(q.mT, w)) if m <= n else (torch.bmm(w, q), q.mT.contiguous())
    if generator is None:
        generator = torch.Generator(w.device).manual_seed(0)
    oversample = min(m, n) if min(m, n) <= EXACT_SIDE else 8
    u, s, vh = ops.truncated_svd(w, rank, n_iter=4, oversample=oversample, generator=generator)
    return u, s[..., None] * vh


class Largest:
    """Keeps the nnz[i] >= 0 largest entries (and their equals) of each of some matrices."""

    def __init__(self, nnz: Sequence[int], like: Tensor) -> None:
        """like: [b, m, n] as the arguments of the calls; len(nnz) matrices of b / len(nnz) blocks."""
        self.nnz, self.most, self.sizes = nnz, max(nnz), None
        self.entries = like.numel() // len(nnz)
        if 0 < self.entries <= FEW:
            # One selection for all: what a matrix wants less it gets as infinities, which are the largest.
            place = torch.arange(self.most - min(nnz), device=like.device)
            absent = torch.tensor([self.most - count for count in nnz], device=like.device)
            self.sizes = like.new_empty(len(nnz), 1, self.entries + len(place))
            self.sizes[:, :, self.entries :] = torch.where(place < absent[:, None, None], torch.inf, 0.0)

    def keep(self, x: Tensor, out: Tensor) -> Tensor:
        """out <- x without the others."""
        parts, to = x.view(len(self.nnz), 1, -1), out.view(len(self.nnz), 1, -1)
        if self.most == 0:
            to.zero_()
        elif self.sizes is None:
            self._one_by_one(parts, to)
        else:
            size = torch.abs(parts, out=self.sizes[:, :, : self.entries])
            least = ops.topk_csr(self.sizes, self.most)[0].amin(1)
            torch.ge(size, least[:, None, None], out=to).mul_(parts)  # many times faster than with bool
        return out

    def _one_by_one(self, parts: Tensor, out: Tensor) -> None:
        for part, to, count in zip(parts, out, self.nnz, strict=True):
            if count == 0:
                to.zero_()
                continue
            below = ops.topk_csr(part[None], count)[0].abs().amin()
            below = torch.nextafter(below, torch.zeros_like(below)).item()
            torch.hardshrink(part, below, out=to)  # many times faster than a mask


def own_columns(ranks: Sequence[int], groups: int, u: Tensor) -> Tensor | None:
    """[len(ranks) * groups, 1, r], 1 for the first rank columns of each and 0 beyond, r those of u [.., m, r].

    None if all have all of them.
    """
    if min(ranks) == u.shape[2]:
        return None
    own = torch.tensor(ranks, device=u.device).repeat_interleave(groups)
    return (torch.arange(u.shape[2], device=u.device) < own[:, None]).to(u.dtype)[:, None, :]
