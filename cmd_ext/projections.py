"""The projections that the fits alternate between: the leading part of rank r, and S as CSR."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops

EXACT_SIDE = 1024  # up to this short side the leading part is exact: its cost is a few passes


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
