"""decompose_path(): one weight at many sizes (rank, nnz), at a fraction of the cost of as many single fits.

The points form chains, each of one share of S and of falling size: the first fit of a chain stands alone, though it is
shorter than a single one, and each of the others goes on from one before. With data that is the matter of chains.py;
without, the passes go on from the former S. Ranks alone are nested. Where calls cost more than what they compute, a
small weight is fitted at all points in one batch, each for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from . import ops
from .alternation import alternate, alternate_together
from .chains import Chains, Point
from .data_aware import SWEEPS, DataAware
from .decompose import DAMPING, Decomposition, Sizes, check_sizes, results_of
from .metric import Metric
from .problems import problems, stacks
from .projections import Fit, Sparse, leading_part

FEW = 1 << 13  # entries of a small weight
APART = 0.1  # shares of S that differ by more belong to chains of their own
TOGETHER = 1 << 19  # entries of the weights that go in step
BROAD = 3  # points of a chain that do: few large products are cheaper than many small


def decompose_path(
    weight: Tensor,
    points: Sequence[Point],
    *,
    second_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
    groups: int = 1,
    n_iter: int = 20,
    generator: torch.Generator | None = None,
) -> list[Decomposition]:
    """`decompose` of one weight at every (rank, nnz) of a list, each at a fraction of the cost of a single fit.

    Args:
        weight, second_moment, output_moment, damping, groups, generator: as of decompose.
        points: (rank, nnz) in any order; repeated ones are fitted once.
        n_iter: passes that a single fit would make; a point gets a fraction of them.

    Returns:
        A Decomposition per point, in their order. `history` holds the errors of that point alone.

    Raises:
        ValueError, TypeError: as decompose; a rank or nnz out of range.
    """
    moments = {"second_moments": [second_moment], "output_moments": [output_moment]}
    options = {"damping": damping, "groups": groups, "n_iter": n_iter, "generator": generator}
    return decompose_path_batch([weight], points, **moments, **options)[0]


def decompose_path_batch(
    weights: Sequence[Tensor],
    points: Sequence[Point],
    *,
    second_moments: Sequence[Tensor | None] | None = None,
    output_moments: Sequence[Tensor | None] | None = None,
    damping: float = DAMPING,
    groups: int = 1,
    n_iter: int = 20,
    generator: torch.Generator | None = None,
) -> list[list[Decomposition]]:
    """`decompose_path` of several weights at the same points, each as if it were alone.

    Args and errors: as decompose_path, with a moment or None per weight. Returns a list of points per weight.
    """
    if n_iter < 1:
        raise ValueError(f"decompose: n_iter must be >= 1, got {n_iter}")
    checked = problems(weights, second_moments, output_moments, groups, damping)
    for problem in checked:
        for rank, nnz in points:
            check_sizes(*problem.weight.shape, groups, rank, nnz)
    results = []
    for problem in checked:
        w, h, g = stacks([problem])
        with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
            fits = Path(w, h, g, groups, damping, n_iter, generator).walk(points)
        results.append([fits[point].to(problem.weight) for point in points])
    return results


class Path:
    """The walk of one weight w [1, m, n], with moments h and g by blocks or None."""

    def __init__(self, w, h, g, groups: int, damping: float, n_iter: int, generator) -> None:
        self.w, self.h, self.groups, self.n_iter, self.generator = w, h, groups, n_iter, generator
        self.blocks, self.metric = w.view(groups, -1, w.shape[2]), None
        if h is not None or g is not None:
            self.metric = Metric(self.blocks, h, g, groups, damping, eigen=g is not None and g.dim() == 3)
            self.blocks = self.metric.rows * self.blocks * self.metric.columns
        self.rank_cost = w.shape[1] + groups * w.shape[2]

    def walk(self, points: Sequence[Point]) -> dict[Point, Decomposition]:
        """The results by point."""
        full, whole = min(self.blocks.shape[1:]), self.w.numel()
        mixed = {p for p in points if 0 < p[1] < whole and p[0] < full}
        ranks = {p for p in points if p[1] == 0 and 0 < p[0] < full}
        rest = {*points} - mixed - ranks
        sizes, results = Sizes.of(self.w, self.groups, self.h), {}
        alone = ((p, alternate(self.blocks, self.groups, *p, 1, 0.0, None)) for p in rest)
        for point, fit in chain(self._mixed(mixed), self._ranks(ranks), alone):
            if self.metric:
                fit = self.metric.in_weight_units(fit)
            measured = self.metric is None and len(fit.history) > 0
            (results[point],) = results_of(self.w, fit, self.groups, self.h, sizes, measured)
        return results

    def _ranks(self, points: set[Point]) -> Iterator[tuple[Point, Fit]]:
        """U V alone: nested, the leading part of the largest rank."""
        if not points:
            return
        most = max(rank for rank, _ in points)
        none = Sparse(*ops.topk_csr(self.blocks.view(1, -1, self.blocks.shape[2]), 0))
        if not (self.metric and self.metric.full):
            u, v = leading_part(self.blocks, most, self.generator)
            yield from (((rank, 0), Fit(u[:, :, :rank], v[:, :rank], none, [])) for rank, _ in points)
            return
        q = self.metric.leading(self.blocks, most, self.generator)
        rows = self.metric.whiten_rows(self.blocks)
        for point in points:
            u = q[:, :, : point[0]]
            yield point, Fit(self.metric.color_rows(u), torch.bmm(u.mT, rows), none, [])

    def _mixed(self, points: set[Point]) -> Iterator[tuple[Point, Fit]]:
        chains = self._chains(points)
        if not chains:
            return
        if not (self.metric and self.metric.full):
            yield from self._without_data(chains)
        elif self.metric.g is not None:
            yield from self._alone(points)
        else:
            walker = Chains(self.metric, self.blocks, self.n_iter, self.generator)
            count = max(1, TOGETHER // self.blocks.numel())
            broad = min(count, BROAD)
            for i in range(0, len(chains), count // broad):
                yield from walker.walk(chains[i : i + count // broad], broad)

    def _chains(self, points: set[Point]) -> list[list[Point]]:
        """By falling number of parameters, none with a growing rank."""
        if self.blocks.numel() <= FEW:
            return [[point] for point in sorted(points)]
        chains: list[list[Point]] = []
        for point in sorted(points, key=lambda p: (-self._cost(p), p)):
            near = [c for c in chains if c[-1][0] >= point[0] and self._apart(c[0], point) <= APART]
            if near:
                min(near, key=lambda c: self._apart(c[0], point)).append(point)
            else:
                chains.append([point])
        return chains

    def _cost(self, point: Point) -> int:
        return point[0] * self.rank_cost + point[1]

    def _apart(self, a: Point, b: Point) -> float:
        """How much the shares of S differ."""
        return abs(a[1] / self._cost(a) - b[1] / self._cost(b))

    def _alone(self, points: set[Point]) -> Iterator[tuple[Point, Fit]]:
        """Where G is full every point is a single fit: what follows another one is no cheaper."""
        aware = DataAware(self.metric, self.blocks, self.groups)
        for rank, nnz in points:
            start = alternate(self.blocks, self.groups, rank, nnz, self.n_iter, 1e-5, self.generator)
            yield (rank, nnz), aware.improve(start, SWEEPS * self.n_iter)

    def _without_data(self, chains: list[list[Point]]) -> Iterator[tuple[Point, Fit]]:
        if self.blocks.numel() <= FEW:
            yield from self._together([point for chain in chains for point in chain])
            return
        most = max(rank for points in chains for rank, _ in points)
        u, v = leading_part(self.blocks, most, self.generator) if most else (self.blocks[:, :, :0],) * 2
        for points in chains:
            near = None
            for point in points:
                rank, nnz = point
                passes = self._passes(point) if near is None else max(1, int(self.n_iter * self._kept(point) / 5))
                options = passes, 1e-5, self.generator, (u[:, :, :rank], v[:, :rank])
                near = alternate(self.blocks, self.groups, rank, nnz, *options, near and near.sparse)
                yield point, near

    def _together(self, points: list[Point]) -> Iterator[tuple[Point, Fit]]:
        passes = [self._passes(point) for point in points]
        u, v, s = alternate_together(self.blocks, points, passes, self.generator)
        for i, (rank, nnz) in enumerate(points):
            own = slice(i * self.groups, (i + 1) * self.groups)
            sparse = Sparse(*ops.topk_csr(s[own].reshape(self.w.shape), nnz))
            yield (rank, nnz), Fit(u[own, :, :rank], v[own, :rank], sparse, [])

    def _kept(self, point: Point) -> float:
        return self._cost(point) / self.w.numel()

    def _passes(self, point: Point) -> int:
        """Of a fit that stands alone: the more is kept the more."""
        return max(1, 2 * int(self.n_iter * min(max(0.5, 2 * self._kept(point) - 0.5), 1.0) / 2))
