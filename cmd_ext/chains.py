"""Data-aware fits of one weight at many sizes: chains of fits that follow each other, several of them in step.

The problem is that of data_aware.py without G: min tr(D H D^T), D = W - U V - S. Its ADMM with a constant penalty rho
needs no eigenbasis of H: S = (W H - L H - Z + rho D) (H + rho)^-1 is one product with a matrix that all chains share,
and S H follows from it without another. From one fit to the next go U, S, and as multipliers Z the gradient of the loss
at the former, so that few sweeps suffice.

A wide weight is a tenth of its H, and a fit may not take many of its size: L H stays U (V H), and steps write into what
the ones before leave. With W and W H a sweep takes six arrays of the weight's size and the fit on the support ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from . import ops
from .alternation import alternate_together
from .metric import Metric
from .projections import Fit, Largest, Sparse, linear_index, own_columns

Point = tuple[int, int]  # rank, nnz
# A chain's first fit: passes without data (more of them where more is kept), the penalties (for a unit diagonal of H),
# the sweeps with each, the rounds of the alternation on the support and the steps of conjugate gradients in each. Then
# the other fits: penalties with their sweeps and how many more for weak directions of H; steps. Passes and sweeps are
# times n_iter.
FIRST_PASSES, PENALTIES, FIRST_SWEEPS = (0.4, 1.0), (0.04, 0.1, 0.25, 0.6, 1.2), (0.2, 0.1)
FIRST_ROUNDS, FIRST_STEPS = 1, 6
NEXT = (0.1, 0.0, 0.06), (0.25, 0.3, 0.12), (0.6, 0.15, 0.12)
NEXT_STEPS = 3
EASY, HARD = 0.1, 10.0  # the share of weak directions of H that asks for no more sweeps, and how many more above it
SMALL, LARGE = 0.4, 3.0  # the same of the share that is kept
RELAX = 1.6  # over-relaxation of these: as good as a third more sweeps. From afar, in a first fit, it does harm
KEPT_BYTES = 4 << 20  # of matrices (H + rho)^-1
ROWS = 64  # of which products are summed together


@dataclass
class Front:
    """A fit of each of some chains [chains * groups, m, n], one below the other.

    Attributes:
        points: their sizes.
        q: U, orthonormal, of the largest rank; the columns beyond a chain's own rank are 0.
        v_h: V H.
        d: S.
        z: the multipliers; of a fit in the end the gradient (W - L - S) H.
        v: V of a fit in the end.
    """

    points: list[Point]
    q: Tensor
    v_h: Tensor
    d: Tensor | None
    z: Tensor | None
    v: Tensor | None = None


class Chains:
    """Blocks w [groups, m, n] of one weight in the units of a metric, whose H is full and whose G is not."""

    def __init__(self, metric: Metric, w: Tensor, n_iter: int, generator: torch.Generator | None) -> None:
        self.metric, self.w, self.n_iter, self.generator = metric, w, n_iter, generator
        self.groups, self.effort = len(w), None
        self.resolvents: dict[float, Tensor] = {}
        self.w_h = self._times_h(w)

    def walk(
        self, chains: Sequence[Sequence[Point]], broad: int = 1, longer: float = 1.0
    ) -> Iterator[tuple[Point, Fit]]:
        """The fits. The ranks of a chain do not grow.

        Args:
            broad: the first point of a chain stands alone, then so many go on from the last one of those before.
            longer: times as many sweeps as usual.
        """
        front, self.longer, lasts = None, longer, []
        for i in range(1 + max((len(chain) + broad - 2) // broad for chain in chains)):
            steps = [chain[max(0, 1 + (i - 1) * broad) : 1 + i * broad] for chain in chains]
            points = [point for step in steps for point in step]
            if front is None:
                front, rounds, conjugate = self._first(points), FIRST_ROUNDS, FIRST_STEPS
            else:
                front = self._next(front, [last for last, step in zip(lasts, steps, strict=True) for _ in step], points)
                rounds, conjugate = 1, NEXT_STEPS
            lasts = [end - 1 for end in accumulate(map(len, steps))]
            self._release()
            found = self._settle(front, rounds, conjugate)
            while found:
                yield found.pop(0)

    # The two kinds of start --------------------------------------------------------------------------------------

    def _first(self, points: list[Point]) -> Front:
        """From fits without data, with a penalty that grows."""
        kept = [self._kept([point]) for point in points]
        shares = [min(max(2 * share - 0.6, FIRST_PASSES[0]), FIRST_PASSES[1]) for share in kept]
        passes = [max(1, 2 * round(self.n_iter * share / 2)) for share in shares]
        q, v, d = alternate_together(self.w, points, passes, self.generator)
        front = Front(points, q, self._times_h(v), d, torch.zeros_like(d))
        del d, v
        for rho in PENALTIES:
            self._resolve(rho)
            front = self._sweeps(front, max(1, self._count(*FIRST_SWEEPS, points)))
        return front

    def _next(self, front: Front, going: list[int], points: list[Point]) -> Front:
        """From the fits of the chains that go on, with a constant penalty that lets the gradient compete with S."""
        q, v_h = [], []
        owns = [slice(c * self.groups, (c + 1) * self.groups) for c in going]
        for c, own, (rank, _) in zip(going, owns, points, strict=True):
            u, v, vh = (t[own, ..., : front.points[c][0]] for t in (front.q, front.v.mT, front.v_h.mT))
            if rank < u.shape[2]:  # the leading components under H
                turn = torch.linalg.eigh(torch.bmm(vh.mT, v)).eigenvectors[..., u.shape[2] - rank :]
                u, vh = torch.bmm(u, turn), torch.bmm(vh, turn)
            q.append(u)
            v_h.append(vh.mT)
        d, z = front.d, front.z
        if going != [*range(len(front.points))]:
            d, z = (torch.cat([t[own] for own in owns]) for t in (d, z))
        front.d = front.z = None
        front = Front(points, _padded(q, 2), _padded(v_h, 1), d, z)
        del d, z
        for rho, sweeps, more in NEXT:
            if count := self._count(sweeps, more, points):
                self._resolve(rho)
                front = self._sweeps(front, count, RELAX)
        return front

    # The sweeps ---------------------------------------------------------------------------------------------------

    def _sweeps(self, front: Front, count: int, relax: float = 1.0) -> Front:
        q, v_h, d, e, rho = front.q, front.v_h, front.d, front.z.div_(self.rho), self.rho
        front.d = front.z = None
        chains, r, largest = len(front.points), front.q.shape[2], Largest([nnz for _, nnz in front.points], d)
        w, w_h, columns = self._each(self.w, chains), self._each(self.w_h, chains), self._columns(front)
        for _ in range(count):
            near = d.sub_(e)
            e.mul_(2 - relax).add_(near, alpha=1 - relax)  # e + (1 - relax) d, in place
            spare = torch.add(w_h, near, alpha=rho)
            if r:
                spare.baddbmm_(q, v_h, alpha=-1)
            s = self._product(spare, self.resolvent)
            if r:
                near.sub_(s).mul_(-rho).baddbmm_(q, v_h)  # (W - S) H
                q = self._turned(near, torch.sub(w, s, out=spare), q, columns)
                v_h = torch.bmm(q.mT, near)
            del near
            free = s.mul_(relax).add_(e)
            d = largest.keep(free, spare)
            e = free.sub_(d)
        return replace(front, q=q, v_h=v_h, d=d, z=e.mul_(rho))

    def _turned(self, a_h: Tensor, a: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
        """One step of the subspace iteration for A H A^T."""
        q = torch.linalg.qr(torch.bmm(a_h, torch.bmm(q.mT, a).mT)).Q
        return q if mask is None else q.mul_(mask)

    def _columns(self, front: Front) -> Tensor | None:
        return own_columns([rank for rank, _ in front.points], self.groups, front.q)

    def _resolve(self, rho: float) -> None:
        """(H + rho)^-1 [groups, n, n]; of wide layers only the last one is kept."""
        self.rho = rho
        if rho not in self.resolvents:
            self._release(1)
            self.resolvents[rho] = self.metric.resolvent(rho)
        self.resolvent = self.resolvents[rho]
        if self.effort is None:  # by the mean of rho / (lam + rho)
            weak = rho * self.resolvent.diagonal(dim1=1, dim2=2).mean().item()
            self.effort = HARD * max(0.0, weak - EASY)

    def _release(self, more: int = 0) -> None:
        """Frees the matrices (H + rho)^-1 if they, and some more, are too large to keep."""
        if self.metric.h.numel() * self.metric.h.element_size() * (len(self.resolvents) + more) > KEPT_BYTES:
            self.resolvent = None
            self.resolvents.clear()

    def _kept(self, points: list[Point]) -> float:
        """The share of the values, the mean of some points."""
        kept = sum(rank * sum(self.w.shape[1:]) + nnz / self.groups for rank, nnz in points)
        return kept / len(points) / self.w[0].numel()

    def _count(self, share: float, more: float, points: list[Point]) -> int:
        """Sweeps: more of them where H has weak directions and where much is kept."""
        large = max(0.0, self._kept(points) - SMALL)
        return round(self.longer * self.n_iter * (share + more * self.effort) * (1 + LARGE * large))

    # The fit on the support -----------------------------------------------------------------------------------------

    def _settle(self, front: Front, rounds: int, steps: int) -> list[tuple[Point, Fit]]:
        """The least-squares fits of L and of the values of S on the support of d. The front becomes theirs."""
        chains, n, tiny = len(front.points), self.w.shape[2], torch.finfo(self.w.dtype).tiny
        eps = 10 * torch.finfo(self.w.dtype).eps
        patterns, mask = [], torch.zeros(front.d.shape, dtype=torch.bool, device=front.d.device)
        for c, (part, (_, nnz)) in enumerate(zip(front.d.view(chains, 1, -1, n), front.points, strict=True)):
            _, row_ptr, col_idx = ops.topk_csr(part, nnz)
            index = linear_index(row_ptr, col_idx, n)
            mask.view(chains, -1)[c, index] = True
            patterns.append((index, row_ptr, col_idx))
        columns, q, s = self._columns(front), front.q, front.d.mul_(mask)
        front.d = front.z = None
        rest = self._each(self.w, chains) - s
        rest_h = self._times_h(s).neg_().add_(self._each(self.w_h, chains))
        v = v_h = s.new_zeros(len(s), q.shape[2], n)

        def factor() -> tuple[Tensor, Tensor, Tensor]:
            """U, V and V H of W - S; `rest` and `rest_h` are that without U V."""
            rest.baddbmm_(q, v), rest_h.baddbmm_(q, v_h)
            u = self._turned(rest_h, rest, q, columns)
            new, new_h = torch.bmm(u.mT, rest), torch.bmm(u.mT, rest_h)
            rest.baddbmm_(u, new, alpha=-1), rest_h.baddbmm_(u, new_h, alpha=-1)
            return u, new, new_h

        if q.shape[2]:
            q, v, v_h = factor()
        for _ in range(rounds):
            left = rest_h * mask
            p, norm = left.clone(), _dots(left, left)
            for _ in range(steps):
                p_h = self._times_h(p)
                curvature = _dots(p, p_h)  # p is 0 off the support
                flat = curvature <= eps * _dots(p, p)  # where H is singular: nothing but rounding
                alpha = torch.where(flat, 0.0, norm / torch.where(flat, 1.0, curvature))
                s.addcmul_(alpha, p)
                rest.addcmul_(alpha, p, value=-1)
                rest_h.sub_(p_h.mul_(alpha))
                left.sub_(p_h.mul_(mask))
                del p_h
                before, norm = norm, _dots(left, left)
                p.mul_(norm / before.clamp_min(tiny)).add_(left)
            del left, p
            if q.shape[2]:
                q, v, v_h = factor()
        fits = []
        for c, (index, row_ptr, col_idx) in enumerate(patterns):
            own, rank = slice(c * self.groups, (c + 1) * self.groups), front.points[c][0]
            sparse = Sparse(s[own].reshape(-1)[index][None], row_ptr, col_idx)
            fits.append((front.points[c], Fit(q[own, :, :rank], v[own, :rank], sparse, [])))
        front.q, front.d, front.z, front.v, front.v_h = q, s, rest_h, v, v_h
        return fits

    # Products with matrices of the groups -----------------------------------------------------------------------------

    def _each(self, x: Tensor, chains: int) -> Tensor:
        return x if chains == 1 else x.expand(chains, *x.shape).reshape(-1, *x.shape[1:])

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x [chains * groups, rows, n] times the matrix of its group."""
        if self.groups == 1:
            return torch.mm(x.view(-1, x.shape[2]), matrix[0]).view_as(x)
        chains = len(x) // self.groups
        rows = (
            x.view(chains, self.groups, *x.shape[1:])
            .transpose(0, 1)
            .reshape(self.groups, chains * x.shape[1], x.shape[2])
        )
        moved = torch.bmm(rows, matrix).view(self.groups, chains, *x.shape[1:])
        return moved.transpose(0, 1).reshape(x.shape)

    def _times_h(self, x: Tensor) -> Tensor:
        """x H in our units."""
        metric = self.metric
        chains = len(x) // self.groups
        columns, ridge = self._each(metric.columns, chains), self._each(metric.ridge, chains)
        x = x / columns
        return self._product(x, metric.h).add_(x.mul_(ridge)).div_(columns)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _padded(parts: list[Tensor], dim: int) -> Tensor:
    """Joined, with zeros where one is shorter than another along `dim`, 1 or 2."""
    most = max(part.shape[dim] for part in parts)
    ahead = [0] * (2 * (2 - dim) + 1)
    return _joined([torch.nn.functional.pad(part, (*ahead, most - part.shape[dim])) for part in parts])


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows [.., rows, 1], some rows at a time."""
    parts = zip(a.split(ROWS, 1), b.split(ROWS, 1), strict=True)
    return torch.cat([(x * y).sum(2, keepdim=True) for x, y in parts], 1)
