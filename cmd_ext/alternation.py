"""The weight-only fits: alternation between a low-rank and a sparse projection, as decompose.py tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .projections import Fit, Largest, Sparse, leading_part, own_columns


def alternate(
    blocks: Tensor,
    groups: int,
    rank: int,
    nnz: int,
    n_iter: int,
    tol: float,
    generator,
    start=None,
    s: Sparse | None = None,
) -> Fit:
    """The weight-only fit of blocks [b * groups, m / groups, n].

    `start` (u, v) is their leading part if known. With an S (Sparse) the passes go on from there, not annealed.
    """
    rows, n = blocks.shape[1:]
    w = blocks.view(-1, groups * rows, n)
    b, m = w.shape[:2]
    norms = torch.linalg.vector_norm(w, dim=2).double().norm(dim=1)  # a row is short enough for float32
    if rank == 0:
        u, v = w.new_zeros(b * groups, rows, 0), w.new_zeros(b * groups, 0, n)
    else:
        u, v = start or leading_part(blocks, rank, generator)
    warm = s is not None
    rest = torch.empty_like(w)

    def follow(s: Sparse) -> tuple[Tensor, Tensor]:
        rest.copy_(w).view(-1)[s.index(n)] -= s.values.flatten()
        u = torch.linalg.qr(torch.bmm(rest.view_as(blocks), v.mT)).Q
        return u, torch.bmm(u.mT, rest.view_as(blocks))

    if warm and rank:
        u, v = follow(s)
    history: list[Tensor] = []
    passes = n_iter if 0 < rank < min(rows, n) and 0 < nnz < m * n else 1
    going, kept = None, None  # the weights that go on, None: all; factors and S of all
    for t in range(1, passes + 1):
        growing = 2 * t < passes and not warm
        low_rank = u.reshape(b, m, rank), v.reshape(b, groups * rank, n)
        s, left = _residual_part(w, *low_rank, nnz * 2 * t // passes if growing else nnz)
        error = left / norms.clamp_min(torch.finfo(torch.float64).tiny)
        if going is not None:  # each weight stops by itself, whoever shares its batch
            error = torch.where(going, error, torch.nan)
            u, v, s = kept = _chosen(going, (u, v, s), kept)
        history.append(error)
        if t == passes:
            break
        if not growing and len(history) > 1:
            better = _improves(history, tol)
            going = better if going is None else going & better
            if not going.any():
                break
            going, kept = None if going.all() else going, (u, v, s)
        u, v = follow(s)
    return Fit(u, v, s, history)


def alternate_together(
    w: Tensor, points: Sequence[tuple[int, int]], passes: Sequence[int], generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The annealed fits of one weight [groups, m, n] at several (rank, nnz), in one batch and without an early stop.

    Args:
        passes: of each point.

    Returns:
        u [points * groups, m, r] with orthonormal columns, v [.., r, n], of the largest rank and with zeros beyond a
        point's own; S as a dense [.., m, n].
    """
    ranks, groups = [rank for rank, _ in points], len(w)
    start = torch.linalg.qr(leading_part(w, max(ranks), generator)[0]).Q if any(ranks) else w[:, :, :0]
    parts, order = [], []
    for count in sorted({*passes}):
        members = [i for i, own in enumerate(passes) if own == count]
        parts.append(_annealed(w, start, [points[i] for i in members], count))
        order += [i * groups + g for i in members for g in range(groups)]
    if len(parts) == 1:
        return parts[0]
    back = torch.tensor(order, device=w.device).argsort()
    return tuple(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True))


def _annealed(w: Tensor, start: Tensor, points: Sequence[tuple[int, int]], passes: int):
    """From u = start, of which each point takes its own columns."""
    each, u = (x if len(points) == 1 else x.repeat(len(points), 1, 1) for x in (w, start))
    mask = own_columns([rank for rank, _ in points], len(w), start)
    u = u if mask is None else u * mask
    v, s, rest = torch.bmm(u.mT, each), torch.empty_like(each), torch.empty_like(each)
    for t in range(1, passes + 1):
        torch.baddbmm(each, u, v, alpha=-1, out=rest)
        s = Largest([nnz * min(2 * t, passes) // passes for _, nnz in points], rest).keep(rest, s)
        if t == passes:
            return u, v, s
        torch.sub(each, s, out=rest)
        u = torch.linalg.qr(torch.bmm(rest, v.mT)).Q
        u = u if mask is None else u.mul_(mask)
        v = torch.bmm(u.mT, rest)


def _chosen(going: Tensor, new: tuple[Tensor, Tensor, Sparse], kept: tuple[Tensor, Tensor, Sparse]):
    """Factors by blocks and S of the weights that go on from `new`, those of the others from `kept`."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        which = going.repeat_interleave(len(a) // len(going))
        return torch.where(which.view(-1, *[1] * (a.dim() - 1)), a, b)

    pairs = zip(vars(new[2]).values(), vars(kept[2]).values(), strict=True)
    return pick(new[0], kept[0]), pick(new[1], kept[1]), Sparse(*(pick(a, b) for a, b in pairs))


def _residual_part(w: Tensor, u: Tensor, v: Tensor, nnz: int) -> tuple[Sparse, Tensor]:
    """The nnz largest entries of each W - U V, and the norm of what is left after them [b], float64."""
    residual, *csr = ops.residual_topk_csr(w, u, v, nnz)
    squares = torch.linalg.vector_norm(residual, dim=2).double().square().sum(1)  # a row is short enough for float32
    left = squares - torch.linalg.vector_norm(csr[0], dim=1, dtype=torch.float64).square()
    return Sparse(*csr), left.clamp_min(0).sqrt()


def _improves(history: list[Tensor], tol: float) -> Tensor:
    """[weights]; False for those that have stopped."""
    before, after = history[-2], history[-1]
    return before - after > tol * before
