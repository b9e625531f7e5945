"""decompose_path(): one weight at many sizes (rank, nnz), at a fraction of the cost of as many single fits.

The eigendecompositions are made once, and ranks are nested: the leading part of the largest rank holds all others. The
points are walked by falling number of parameters, the first one as a single fit. Each other starts from the nearest one
that is done; the multipliers that the ADMM of data_aware.py needs besides are the gradient of the loss there, so that a
few sweeps, at half the cost with a constant penalty, go on from any fit. The first point of another share of S has no
near one and is fitted by itself, shortly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .data_aware import SWEEPS, DataAware
from .decompose import DAMPING, Decomposition, alternate, check_sizes, energies_of, results_of
from .metric import Metric
from .problems import batches, problems, stacks
from .projections import Fit, leading_part

Point = tuple[int, int]  # rank, nnz
# Of the passes of a single fit, those of a point near another one, the sweeps there, and both of one that is far.
PASSES, FOLLOWING, FAR = 0.05, 0.3, 0.3


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
        A Decomposition per point, in their order. `history` holds the sweeps of that point alone.

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
    """`decompose_path` of several weights at the same points; those of one shape go through batched calls.

    Args and errors: as decompose_path, with a moment or None per weight. Returns a list of points per weight.
    """
    if n_iter < 1:
        raise ValueError(f"decompose: n_iter must be >= 1, got {n_iter}")
    checked = problems(weights, second_moments, output_moments, groups, damping)
    for problem in checked:
        for rank, nnz in points:
            check_sizes(*problem.weight.shape, groups, rank, nnz)
    results: list[list[Decomposition]] = [[] for _ in checked]
    for batch in batches(checked):
        w, h, g = stacks(batch)
        with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
            full = min(w.shape[1] // groups, w.shape[2])
            most = max((rank for rank, _ in points if rank < full), default=0)
            path = Path(w, h, g, groups, damping, most, n_iter, generator)
            fits = path.walk(points)
        for i, problem in enumerate(batch):
            results[problem.index] = [fits[point][i].to(problem.weight) for point in points]
    return results


class Path:
    """The walk of a batch w [b, m, n], with moments h and g by blocks or None."""

    def __init__(self, w, h, g, groups: int, damping: float, rank: int, n_iter: int, generator) -> None:
        """rank: the largest one to come below the full one."""
        self.w, self.h, self.groups, self.n_iter = w, h, groups, n_iter
        blocks = w.view(len(w) * groups, -1, w.shape[2])
        self.metric = Metric(blocks, h, g, groups, damping)
        self.blocks = self.metric.rows * blocks * self.metric.columns
        self.rank_cost = w.shape[1] + groups * w.shape[2]
        self.energies = energies_of(w, groups, h)
        self.start = leading_part(self.blocks, rank, generator)
        if self.metric.full:
            self.aware = DataAware(self.metric, self.blocks, groups)
            self.nested = self.aware.leading(rank, generator)

    def walk(self, points: Sequence[Point]) -> dict[Point, list[Decomposition]]:
        """The results by point."""
        done: dict[Point, Fit] = {}
        results = {}
        for point in sorted(set(points), key=lambda p: (-self._cost(p), p)):
            near = min(done, key=lambda p: self._distance(p, point), default=None)
            fit = self._fit(point, near, done.get(near))
            if point[1] and not self._exact(point):
                done[point] = fit
            fit = self.metric.in_weight_units(fit)
            results[point] = results_of(self.w, fit, self.groups, self.h, self.energies)
        return results

    def _cost(self, point: Point) -> int:
        return point[0] * self.rank_cost + point[1]

    def _distance(self, a: Point, b: Point) -> float:
        return abs(self._cost(a) - self._cost(b)) + 4 * self._apart(a, b) * self._cost(b)

    def _apart(self, a: Point, b: Point) -> float:
        """How much the shares of S differ."""
        return abs(a[1] / max(1, self._cost(a)) - b[1] / max(1, self._cost(b)))

    def _exact(self, point: Point) -> bool:
        """Whether U V or S alone is W."""
        return point[0] == min(self.blocks.shape[1:]) or point[1] == self.w[0].numel()

    def _fit(self, point: Point, near: Point | None, fit: Fit | None) -> Fit:
        (rank, nnz), aware = point, self.metric.full
        if self._exact(point):
            return alternate(self.blocks, self.groups, rank, nnz, 1, 0.0, None)
        if aware and nnz == 0:
            return self.aware.without_sparse(self.nested[..., :rank])
        start = self.start[0][:, :, :rank], self.start[1][:, :rank]
        alone = near is None or (aware and self.metric.g is not None)
        # Another share of S is another kind of fit: it takes an L of its own.
        far = alone or self._apart(near, point) > 0.1
        passes = self.n_iter if alone else max(1, round(self.n_iter * (FAR if far else PASSES)))
        if not far and not aware:
            return alternate(self.blocks, self.groups, rank, nnz, passes, 0.0, None, start, fit.sparse)
        if far or near[0] < rank:
            own = alternate(self.blocks, self.groups, rank, nnz, passes, 1e-5, None, start)
            if not aware:
                return own
            if far:
                return self.aware.improve(own, SWEEPS * passes)
            u, v = own.u, own.v
        else:
            u, v = self.aware.truncated(fit, rank)
        return self.aware.follow(fit, u, v, nnz, max(2, round(self.n_iter * FOLLOWING)))
