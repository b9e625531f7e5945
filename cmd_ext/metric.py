"""Moments of a layer as a metric of the error D of its weight: tr(G D H D^T), seen from the eigenbases of G and H."""

from __future__ import annotations

import torch
from torch import Tensor

from .projections import Fit, Sparse, leading_part

NEGATIVE = 1e-3  # eigenvalues down to minus this, for unit diagonals, are taken for rounding


def _diagonal(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=1, dim2=2) if moment.dim() == 3 else moment


def _ridge(moment: Tensor, groups: int, damping: float) -> Tensor:
    """[blocks, 1]: damping times the mean of the diagonal over the groups of a weight; 1 where that is 0."""
    mean = _diagonal(moment).reshape(-1, groups * moment.shape[1]).mean(1).repeat_interleave(groups)[:, None]
    return torch.where(mean > 0, damping * mean, 1.0)


def _unit(moment: Tensor, ridge: Tensor) -> Tensor:
    """The units of the coordinates [blocks, size] in which the diagonal becomes 1."""
    diagonal = _diagonal(moment) + ridge
    floor = torch.finfo(diagonal.dtype).eps * diagonal.amax(1, keepdim=True)  # for dead channels without damping
    return torch.maximum(diagonal, floor).sqrt()


def _normalized(moment: Tensor, ridge: Tensor, unit: Tensor) -> Tensor:
    scaled = moment / unit[:, :, None]
    scaled.diagonal(dim1=1, dim2=2).add_(ridge / unit)
    return scaled.div_(unit[:, None, :])


def _negative(name: str) -> str:
    return f"decompose: {name} must be positive semidefinite, got one with negative eigenvalues"


def _eigen(name: str, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, which take the place of `moment`: for wide layers the largest thing in memory."""
    values, moment = moment.new_empty(moment.shape[:2]), moment.mT  # by columns, as LAPACK wants it: no copy
    torch.linalg.eigh(moment, out=(values, moment))
    if (values < -NEGATIVE).any():
        raise ValueError(_negative(name))
    return values.clamp_min_(0), moment


class Metric:
    """tr(G D H D^T) of blocks D [b, m, n], of which `groups` make a weight.

    Attributes:
        rows [b, m, 1], columns [b, 1, n]: units; rows * D * columns has H and G with unit diagonals, and no entry of
            the weight above 1.
        lam [b, 1, n], basis [b, n, n]: eigenvalues and eigenvectors of H in these units; basis None is the identity.
        gam [b, m, 1], row_basis [b, m, m]: the same of G.
        full: whether H or G is more than a diagonal.
    """

    def __init__(
        self, w: Tensor, h: Tensor | None, g: Tensor | None, groups: int, damping: float, eigen: bool = True
    ) -> None:
        """w [b, m, n]; h [b, n, n] or [b, n]; g [b, m, m] or [b, m]. Keeps h, copies nothing of its size.

        Without `eigen` there are no lam and basis, but resolvent() and leading(), which do without them.
        """
        ones = w.new_ones(())
        self.h, self.basis, self.ridge, self.lam, self.columns = None, None, ones, ones, ones
        self.g, self.row_basis, self.gam, self.rows = None, None, ones, ones
        if h is not None:
            ridge = _ridge(h, groups, damping)
            unit = _unit(h, ridge)
            self.columns = unit[:, None, :]
            if h.dim() == 3:
                self.h, self.ridge = h, ridge[:, :, None]
                self._normal = (ridge, unit)
                if eigen:
                    lam, self.basis = _eigen("second_moment", _normalized(h, ridge, unit))
                    self.lam = lam[:, None, :]
                else:
                    self._factors(NEGATIVE)  # a check
        if g is not None:
            ridge = _ridge(g, groups, damping)
            unit = _unit(g, ridge)
            self.rows = unit[:, :, None]
            if g.dim() == 3:
                self.g = _normalized(g, ridge, unit)
                gam, self.row_basis = _eigen("output_moment", self.g.clone())
                self.gam = gam.clamp_min(torch.finfo(gam.dtype).eps * gam.shape[1])[:, :, None]
        largest = (self.rows * w * self.columns).abs().view(-1, groups * w[0].numel()).amax(1)
        largest = torch.where(largest > 0, largest, 1.0).repeat_interleave(groups)
        self.rows = self.rows / largest[:, None, None]
        self.full = self.h is not None or self.g is not None
        self.weight = self.gam * self.lam
        self.half = self.gam.sqrt()

    def _factors(self, rho: float) -> Tensor:
        """Cholesky factors of H + rho in our units, in the place of it. By columns, as LAPACK wants them: no copies."""
        ridge, unit = self._normal
        shifted = _normalized(self.h, ridge, unit)
        shifted.diagonal(dim1=1, dim2=2).add_(rho)
        for block in shifted.mT:
            info = torch.empty((), dtype=torch.int32, device=block.device)
            torch.linalg.cholesky_ex(block, out=(block, info))
            if info:
                raise ValueError(_negative("second_moment"))
        return shifted.mT

    def resolvent(self, rho: float) -> Tensor:
        """(H + rho)^-1 [b, n, n] in our units; rho well above rounding."""
        factors = self._factors(rho)
        for block in factors:
            torch.cholesky_inverse(block, out=block)
        return factors.mT

    def leading(self, x: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
        """q [b, m, rank] of the best L of blocks x, without damping of H; its first columns are those of lower ranks.

        The leading eigenvectors of A H A^T, A = gam^1/2 F^T x; for m > n of R H R^T with A = Q R.
        """
        a = self.whiten_rows(x)
        if self.h is None:
            return torch.linalg.qr(leading_part(a, rank, generator)[0]).Q
        tall = a.shape[1] > a.shape[2]
        q, a = torch.linalg.qr(a) if tall else (None, a)
        top = torch.linalg.eigh(torch.bmm(self.times_h(a, damped=False), a.mT)).eigenvectors[..., -rank:].flip(-1)
        return torch.bmm(q, top) if tall else top

    def in_weight_units(self, fit: Fit) -> Fit:
        """A fit of rows * W * columns as one of W."""
        sparse, (blocks, m), n = fit.sparse, fit.u.shape[:2], fit.v.shape[2]
        units = (self.rows * self.columns).expand(blocks, m, n).reshape(-1)
        values = sparse.values / units[sparse.index(n)].view_as(sparse.values)
        return Fit(fit.u / self.rows, fit.v / self.columns, Sparse(values, sparse.row_ptr, sparse.col_idx), fit.history)

    def rotate(self, x: Tensor) -> Tensor:
        """F^T x E."""
        x = x if self.basis is None else torch.bmm(x, self.basis)
        return x if self.row_basis is None else torch.bmm(self.row_basis.mT, x)

    def rotate_back(self, x: Tensor) -> Tensor:
        x = x if self.basis is None else torch.bmm(x, self.basis.mT)
        return x if self.row_basis is None else torch.bmm(self.row_basis, x)

    def whiten_rows(self, x: Tensor) -> Tensor:
        """gam^1/2 F^T x."""
        return self.half * (x if self.row_basis is None else torch.bmm(self.row_basis.mT, x))

    def color_rows(self, x: Tensor) -> Tensor:
        x = x / self.half
        return x if self.row_basis is None else torch.bmm(self.row_basis, x)

    def times_h(self, x: Tensor, damped: bool = True) -> Tensor:
        """x H in our units."""
        if self.h is None:
            return x
        x = x / self.columns
        y = torch.bmm(x, self.h)
        return (y.add_(self.ridge * x) if damped else y).div_(self.columns)

    def times_both(self, x: Tensor, damped: bool = True) -> Tensor:
        """G x H in our units."""
        x = self.times_h(x, damped)
        return x if self.g is None else torch.bmm(self.g, x)

    def loss(self, x: Tensor) -> Tensor:
        """tr(G x H x^T) of each block, without damping of H."""
        return (self.times_both(x, damped=False) * x).sum((1, 2))
