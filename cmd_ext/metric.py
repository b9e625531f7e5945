"""Moments of a layer as a metric of the error D of its weight: tr(G D H D^T), seen from the eigenbases of G and H."""

from __future__ import annotations

import torch
from torch import Tensor

from .projections import Fit, Sparse


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


def _eigen(name: str, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, which take the place of `moment`: for wide layers the largest thing in memory."""
    values, moment = moment.new_empty(moment.shape[:2]), moment.mT  # by columns, as LAPACK wants it: no copy
    torch.linalg.eigh(moment, out=(values, moment))
    if (values < -1e-3).any():
        raise ValueError(f"decompose: {name} must be positive semidefinite, got one with negative eigenvalues")
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

    def __init__(self, w: Tensor, h: Tensor | None, g: Tensor | None, groups: int, damping: float) -> None:
        """w [b, m, n]; h [b, n, n] or [b, n]; g [b, m, m] or [b, m]. Keeps h, copies nothing of its size."""
        ones = w.new_ones(())
        self.h, self.basis, self.ridge, self.lam, self.columns = None, None, ones, ones, ones
        self.g, self.row_basis, self.gam, self.rows = None, None, ones, ones
        if h is not None:
            ridge = _ridge(h, groups, damping)
            unit = _unit(h, ridge)
            self.columns = unit[:, None, :]
            if h.dim() == 3:
                self.h, self.ridge = h, ridge[:, :, None]
                lam, self.basis = _eigen("second_moment", _normalized(h, ridge, unit))
                self.lam = lam[:, None, :]
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
