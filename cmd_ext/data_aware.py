"""The data-aware fit: min tr(G D H D^T) with D = W - U V - S, rank r and k nonzeros.

H [n, n] is the second moment of the layer's input, G [m, m] that of the gradient at its output (or the identity). Both
are scaled to unit diagonals and seen from their eigenbases, H' = E lam E^T and G' = F gam F^T. There the objective is
the sum of gam_i lam_j D_ij^2, so that

* the best L of rank r is gam^-1/2 Q Q^T gam^1/2 A for A = W - S, with Q the leading left vectors of gam^1/2 A lam^1/2.
  This is the whitened optimum of DRONE and SVD-LLM without an inverse or a factor of H, so H may be singular. Within
  the alternation Q moves by one warm step, Q <- qr(B lam B^T Q) with B = gam^1/2 A, whatever the aspect of W;
* S is one of three blocks of an ADMM (L, S, and the k-sparse copy D of S with multipliers Z): a mere division;
* what is left on the support found is a least-squares problem, which conjugate gradients and L-steps solve in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .metric import Metric
from .projections import Fit, Sparse, leading_part, linear_index

# The penalty rho of the first and of the last sweep, for unit diagonals; it grows geometrically. The start wants a weak
# one, so that the support can still change.
PENALTY = 0.03, 1.2
SWEEPS = 3  # of the ADMM for a pass of the weight-only fit
ROUNDS, STEPS = 3, 6  # of the alternation on the support, and of conjugate gradients in each


class DataAware:
    """The fits of a batch of blocks w [b, m, n], given in the units of a metric.

    Attributes:
        turned: w from the eigenbases, as are low (L), d (D), z (Z) and q (Q) of the sweeps; copy is D itself.
    """

    def __init__(self, metric: Metric, w: Tensor, groups: int) -> None:
        self.metric, self.w, self.groups = metric, w, groups
        self.turned = metric.rotate(w)
        self.norm = self._error(self.turned).clamp_min(torch.finfo(torch.float64).tiny)
        self.whole = metric.loss(w).view(-1, groups).sum(1).clamp_min(torch.finfo(w.dtype).tiny)

    def leading(self, rank: int, generator: torch.Generator | None) -> Tensor:
        """q [b, m, rank] of the best L alone; its first columns are those of the lower ranks."""
        a = self.metric.half * self.turned * self.metric.lam.sqrt()
        return torch.linalg.qr(leading_part(a, rank, generator)[0]).Q

    def without_sparse(self, q: Tensor) -> Fit:
        """The best U V whose U is that of q."""
        u, v = self.metric.color_rows(q), torch.bmm(q.mT, self.metric.whiten_rows(self.w))
        return self._fit(u, v, Sparse(*ops.topk_csr(self._by_weight(self.w), 0)), [])

    def improve(self, start: Fit, sweeps: int) -> Fit:
        """The ADMM from a fit without data, then its support. A weight that gains nothing keeps `start`."""
        self.begin(start)
        history = [self.sweep(rho) for rho in penalties(sweeps, *PENALTY)]
        return self.better(self.polish(history, ROUNDS, STEPS), start)

    def begin(self, fit: Fit) -> None:
        """Starts the sweeps from a fit."""
        self.nnz = fit.sparse.values.shape[1]
        self.q = torch.linalg.qr(self.metric.whiten_rows(fit.u)).Q
        self.low = self.metric.rotate(torch.bmm(fit.u, fit.v))
        self.copy = fit.sparse.to_dense(self.w.shape)
        self.d = self.metric.rotate(self.copy)
        self.z = torch.zeros_like(self.d)

    def sweep(self, rho: float) -> Tensor:
        """One update of S, L, D and Z; the relative error of L + D [weights]."""
        metric, weight = self.metric, self.metric.weight
        s = (self.turned - self.low).mul_(weight).sub_(self.z).add_(self.d, alpha=rho).div_(weight + rho)
        if self.q.shape[2]:
            b = (self.turned - s).mul_(metric.half)
            self.q = torch.linalg.qr(torch.bmm(b * metric.lam, torch.bmm(b.mT, self.q))).Q
            self.low = torch.bmm(self.q, torch.bmm(self.q.mT, b)).div_(metric.half)
        free = metric.rotate_back(torch.add(s, self.z, alpha=1 / rho))
        self.copy = self._largest(free, self.nnz)
        self.d = metric.rotate(self.copy)
        self.z.add_(s.sub_(self.d), alpha=rho)
        return self._error(self.turned - self.low - self.d) / self.norm

    def _largest(self, x: Tensor, nnz: int) -> Tensor:
        least = ops.topk_csr(self._by_weight(x), nnz)[0].abs().amin(1)
        return torch.where(x.abs() >= least.repeat_interleave(self.groups)[:, None, None], x, 0.0)

    def polish(self, history: list[Tensor], rounds: int, steps: int) -> Fit:
        """The least-squares fit of L and of the values of S on the support of D, from the last sweep."""
        values, row_ptr, col_idx = ops.topk_csr(self._by_weight(self.copy), self.nnz)
        index = linear_index(row_ptr, col_idx, self.w.shape[2])
        mask = torch.zeros_like(self.copy)
        mask.view(-1)[index] = 1.0
        q, s = self.q, self.copy * mask
        if rank := q.shape[2]:
            u, v = self.metric.color_rows(q), torch.bmm(q.mT, self.metric.whiten_rows(self.w - s))
        else:
            u, v, rounds, steps = q, self.w.new_empty(len(q), 0, self.w.shape[2]), 1, rounds * steps
        for _ in range(rounds):
            s = self._on_support(torch.baddbmm(self.w, u, v, alpha=-1), mask, s, steps)
            if rank:
                q, u, v = self._low_rank(self.w - s, q)
        return self._fit(u, v, Sparse(s.view(-1)[index].view_as(values), row_ptr, col_idx), history)

    def _low_rank(self, a: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b = self.metric.whiten_rows(a)
        q = torch.linalg.qr(torch.bmm(self.metric.times_h(b), torch.bmm(b.mT, q))).Q
        return q, self.metric.color_rows(q), torch.bmm(q.mT, b)

    def _on_support(self, r: Tensor, mask: Tensor, s: Tensor, steps: int) -> Tensor:
        """Conjugate gradients on min tr(G (r - s) H (r - s)^T), s on the mask: by rows, or by blocks where G is full.

        The diagonals are 1, so that these are the Jacobi-preconditioned ones.
        """
        metric, dims, tiny = self.metric, 2 if self.metric.g is None else (1, 2), torch.finfo(s.dtype).tiny
        left = metric.times_both(r - s).mul_(mask)
        p, norm = left, (left * left).sum(dims, keepdim=True)
        for _ in range(steps):
            moved = metric.times_both(p).mul_(mask)
            alpha = norm / (p * moved).sum(dims, keepdim=True).clamp_min(tiny)
            s = s + alpha * p
            left = left - alpha * moved
            before, norm = norm, (left * left).sum(dims, keepdim=True)
            p = left + (norm / before.clamp_min(tiny)) * p
        return s

    def better(self, fit: Fit, other: Fit) -> Fit:
        """Of each weight the fit with the lower loss, with the history of the first."""
        ours, theirs = self._loss(fit), self._loss(other)
        worse = ~(ours <= theirs)  # NaN too
        if not worse.any():
            return fit

        def pick(a: Tensor, b: Tensor) -> Tensor:
            which = worse if len(a) == len(worse) else worse.repeat_interleave(self.groups)
            return torch.where(which.view(-1, *[1] * (a.dim() - 1)), b, a)

        pairs = zip(vars(fit.sparse).values(), vars(other.sparse).values(), strict=True)
        sparse = Sparse(*(pick(a, b) for a, b in pairs))
        history = [*fit.history[:-1], torch.where(worse, theirs, ours)]
        return Fit(pick(fit.u, other.u), pick(fit.v, other.v), sparse, history)

    def _fit(self, u: Tensor, v: Tensor, sparse: Sparse, history: list[Tensor]) -> Fit:
        fit = Fit(u, v, sparse, history)
        history.append(self._loss(fit))
        return fit

    def _loss(self, fit: Fit) -> Tensor:
        """Relative and without damping of H [weights]."""
        rest = torch.baddbmm(self.w, fit.u, fit.v, alpha=-1).sub_(fit.sparse.to_dense(self.w.shape))
        return (self.metric.loss(rest).view(-1, self.groups).sum(1) / self.whole).clamp_min(0).sqrt().double()

    def _by_weight(self, x: Tensor) -> Tensor:
        return x.view(-1, self.groups * x.shape[1], x.shape[2])

    def _error(self, x: Tensor) -> Tensor:
        squares = (x * x).mul_(self.metric.weight).sum(2).double().sum(1)
        return squares.view(-1, self.groups).sum(1).sqrt()


def penalties(sweeps: int, first: float, last: float) -> list[float]:
    return [first * (last / first) ** (t / max(1, sweeps - 1)) for t in range(sweeps)]
