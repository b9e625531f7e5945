"""decompose(): W [m, n] -> U [m, r] V [r, n] + S.

Without data, the fit alternates between a low-rank and a sparse projection (GoDec) with three changes that make it both
better and an order of magnitude cheaper than the textbook form:

* it starts from the exact rank-r part of W (Gram matrix and eigh on the short side), because the fixed point depends
  on the start and no number of passes repairs a random one;
* each pass takes ONE subspace step from the previous factors instead of an SVD;
* the number of nonzeros grows linearly over the first half of the passes (annealing), so that S takes what low rank
  cannot explain, not what it has not explained yet. The error is therefore monotone over the second half only.

With the second moment of the layer's input it is the output that counts. A diagonal moment only scales the columns of
W; with a full one, data_aware.py goes on where the alternation ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import forms, ops, support
from .alternation import alternate
from .chains import Chains
from .data_aware import SWEEPS, DataAware
from .metric import Metric
from .problems import Problem, batches, problems, stacks
from .projections import Fit, Sparse, linear_index

DAMPING = 1e-2
DEFAULT_COEFFICIENT = 0.7  # the best or near-best share of S on real layers once a third of the entries is kept
CANCELLED = 0.03  # an error below it, as the difference of two squares, has lost digits
WIDE = 1024  # columns beyond which no eigenbasis of H is made
SINGLE = 3.5  # sweeps of a single fit there, in those of a chain's first
BUDGET_UNITS = ("params", "bytes")


@dataclass
class Decomposition:
    """W ~ U V + S.

    Attributes:
        u, v: [m, r] and [groups * r, n], scaled to equal norms per component; in the spatial form of a kernel
            [m, c, kh, kw] they are [m * kh, r] and [groups * r, c * kw].
        values, row_ptr, col_idx: S over [m, n] in CSR, int32 indices, columns ascending.
        relative_error: ||W - U V - S||_F / ||W||_F (0 for a zero W).
        history: the relative error after each pass; with a moment that is no diagonal, the damped and weighted one
            after each sweep of the data-aware fit, which is not monotone, and the one of the result; beyond 1024
            columns that one alone.
        groups: row groups, each with its own rank-r part.
        form: "channel" or "spatial".
        kernel_size: (kh, kw); (1, 1) for a matrix.
        output_error: sqrt(tr(D H D^T) / tr(W H W^T)) with D = W - U V - S and H the second moment as given (0 where
            the denominator is); None without one.
    """

    u: Tensor
    v: Tensor
    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    relative_error: float
    history: list[float] = field(repr=False)
    groups: int = 1
    form: str = "channel"
    kernel_size: tuple[int, int] = (1, 1)
    output_error: float | None = None

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @property
    def nnz(self) -> int:
        return self.values.shape[0]

    def to(self, like: Tensor) -> Decomposition:
        """Itself, on the device and in the dtype of `like`."""
        self.u, self.v, self.values = (t.to(like) for t in (self.u, self.v, self.values))
        self.row_ptr, self.col_idx = self.row_ptr.to(like.device), self.col_idx.to(like.device)
        return self

    def scale_rows(self, factors: Tensor) -> None:
        """Multiplies the rows of U V + S, in the channel form, by factors [m]; the errors are those of before."""
        factors = factors.to(self.u)
        self.u = self.u * factors[:, None]
        self.values = self.values * torch.repeat_interleave(factors, self.row_ptr.diff().long())

    def to_dense(self) -> Tensor:
        """U V + S as [m, n]."""
        rows, columns, g = self.u.shape[0], self.v.shape[1], self.groups
        dense = torch.bmm(self.u.view(g, rows // g, -1), self.v.view(g, -1, columns)).view(rows, columns)
        if self.form == "spatial":
            dense = forms.restore(dense, self.kernel_size)
        dense.view(-1)[linear_index(self.row_ptr, self.col_idx, dense.shape[1])] += self.values
        return dense


def split_budget(
    m: int,
    n: int,
    budget: float,
    sparse_coefficient: float | None = None,
    groups: int = 1,
    unit: str = "params",
    element: int = 4,
    taps: int = 1,
    round_to: int = 1,
) -> tuple[int, int]:
    """(rank, nnz) of a budget, with B = budget * m * n: nnz = floor(c B), rank = floor((1 - c) B / (m + groups * n)).

    In bytes B is budget times the dense bytes; the largest nnz is taken whose values and support (as files hold it) fit
    into c B, and the largest rank whose factors fit into (1 - c) B. Neither falls when the budget grows.

    Args:
        m, n: matrix shape; n per group.
        budget: kept parameters / (m * n), or kept bytes / dense bytes, 0 to 1.
        sparse_coefficient: c, the share of S, 0 to 1; 0.7 if None.
        groups: row groups with a factor V each.
        unit: "params" (an entry of S counts as one) or "bytes" (it has its share of the support, too).
        element: bytes of a value, of which only "bytes" depends.
        taps: kernel_h in the spatial form, where the factored matrix is [m * taps, n / taps].
        round_to: the rank is rounded down to a multiple of it, and where c > 0 what that frees goes to S.

    Raises:
        ValueError: budget or coefficient outside [0, 1], an unknown unit, round_to below 1.

    Source: Zhang et al., Machine Learning 2022, the sparse coefficient.
    """
    coefficient = DEFAULT_COEFFICIENT if sparse_coefficient is None else sparse_coefficient
    for name, value in (("budget", budget), ("sparse_coefficient", coefficient)):
        if not 0 <= value <= 1:
            raise ValueError(f"decompose: {name} must lie in [0, 1], got {value}")
    if round_to < 1:
        raise ValueError(f"decompose: round_to must be >= 1, got {round_to}")
    if unit not in BUDGET_UNITS:
        raise ValueError(f"decompose: budget_unit must be one of {', '.join(BUDGET_UNITS)}, got {unit!r}")
    tiny = 1e-9  # 0.3 * 10 must count as 3
    rows, columns = m * taps, n // taps
    each = rows + groups * columns  # values of a rank
    rank = min(int((1 - coefficient) * budget * m * n / each + tiny), rows // groups, columns)
    freed = rank % round_to
    entries = coefficient * budget * m * n + (freed * each if coefficient > 0 else 0) + tiny
    nnz = support.most_entries(m, n, element, entries * element) if unit == "bytes" else int(entries)
    return rank - freed, min(nnz, m * n)


def decompose(
    weight: Tensor,
    *,
    rank: int | None = None,
    nnz: int | None = None,
    budget: float | None = None,
    sparse_coefficient: float | None = None,
    budget_unit: str = "params",
    second_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
    round_to: int = 1,
    n_iter: int = 20,
    tol: float = 1e-5,
    groups: int = 1,
    form: str = "channel",
    generator: torch.Generator | None = None,
) -> Decomposition:
    """Fits W ~ U V + S with a given rank and number of nonzeros.

    Without moments it minimises ||D||_F with D = W - U V - S, with them tr(G D H D^T): the mean squared error of the
    layer's output (H), weighted by what the loss makes of it (G).

    Args:
        weight: [m, n], or a convolution's [m, channels / groups, kernel_h, kernel_w]; float32, float64, bfloat16 or
            float16 (16-bit weights are fitted in float32).
        rank, nnz: sizes of the branches; one that is left out is 0.
        budget, sparse_coefficient: instead of these, the kept share of the weight and the share of S in it (see
            split_budget).
        budget_unit: what `budget` is a share of: "params" counts an entry of S as one parameter, "bytes" counts what a
            file holds, with the support of S and in the dtype of `weight`.
        second_moment: H = E[x x^T] of the layer's (unfolded) input, [n, n] or with groups [groups, n, n]; or its
            diagonal, [n] or [groups, n]. Symmetric up to rounding, positive semidefinite; may be singular.
        output_moment: G = E[g g^T] of the loss gradient g at the layer's output, [m, m], or its diagonal [m]. With
            groups only its diagonal blocks count.
        damping: times the mean of its diagonal, added to the diagonal of a moment, so that directions which the
            calibration data lack are not free. Without S there is none: U V is the optimum itself.
        round_to: the rank that a budget gives becomes a multiple of it (see split_budget).
        n_iter: passes; 20 is fast, 40 gains another 1-5 % of error.
        tol: stop when a pass of the second half lowers the error by less than this fraction.
        groups: row groups with a low-rank part each (grouped convolution).
        form: of the low-rank branch of a convolution's weight: "channel" factors [m, n], "spatial" [m * kernel_h,
            n / kernel_h], which becomes a 1 x kernel_w and a kernel_h x 1 convolution; without moments only.
        generator: of the random start of large matrices; the result is the same from call to call if None.

    Returns:
        A Decomposition in the dtype of `weight`.

    Raises:
        ValueError: no or two kinds of size, a size out of range, a shape that does not fit, NaN or Inf in `weight` or
            in a moment, a moment that is not symmetric or has negative eigenvalues.
        TypeError: weight or moment of another dtype.

    Source: Zhou and Tao, ICML 2011 (GoDec) for the alternation; start, warm pass and annealing as told above. Chen et
    al., NeurIPS 2021 (DRONE) for the optimum without S; Meng et al., ICML 2024 (ALPS) for the ADMM of S.
    """
    sizes = {"rank": rank, "nnz": nnz, "budget": budget, "sparse_coefficient": sparse_coefficient}
    sizes |= {"budget_unit": budget_unit, "round_to": round_to}
    moments = {"second_moments": [second_moment], "output_moments": [output_moment], "damping": damping}
    options = {"n_iter": n_iter, "tol": tol, "groups": groups, "form": form, "generator": generator}
    return decompose_batch([weight], **sizes, **moments, **options)[0]


def decompose_batch(
    weights: Sequence[Tensor],
    *,
    rank: int | None = None,
    nnz: int | None = None,
    budget: float | None = None,
    sparse_coefficient: float | None = None,
    budget_unit: str = "params",
    second_moments: Sequence[Tensor | None] | None = None,
    output_moments: Sequence[Tensor | None] | None = None,
    damping: float = DAMPING,
    round_to: int = 1,
    n_iter: int = 20,
    tol: float = 1e-5,
    groups: int = 1,
    form: str = "channel",
    generator: torch.Generator | None = None,
) -> list[Decomposition]:
    """`decompose` of several weights; those of one shape, dtype and device are fitted in batched calls.

    Args and errors: as decompose, with a moment or None per weight. The results come in the order of `weights`; each is
    that of the weight alone, but for rounding.
    """
    if n_iter < 1:
        raise ValueError(f"decompose: n_iter must be >= 1, got {n_iter}")
    checked = problems(weights, second_moments, output_moments, groups, damping, form)
    given = rank, nnz, budget, sparse_coefficient, budget_unit, round_to
    wanted = [_sizes(p, groups, *given) for p in checked]
    results: list[Decomposition | None] = [None] * len(checked)
    for batch in batches(checked):
        sizes = wanted[batch[0].index]
        w, h, g = stacks(batch)
        with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
            fits = _fit(w, h, g, groups, *sizes, damping, n_iter, tol, generator)
        for problem, fit in zip(batch, fits, strict=True):
            results[problem.index] = _in_form(form, fit, problem.kernel_size).to(problem.weight)
    return results


def _in_form(form: str, fit: Decomposition, kernel_size: tuple[int, int]) -> Decomposition:
    """The fit of the arranged matrix as that of the kernel: S over [m, n]."""
    fit.form, fit.kernel_size = form, kernel_size
    if form == "spatial":
        sparse = fit.values, fit.row_ptr, fit.col_idx, kernel_size, fit.v.shape[1]
        fit.values, fit.row_ptr, fit.col_idx = forms.restore_csr(*sparse)
    return fit


def _sizes(problem: Problem, groups, rank, nnz, budget, coefficient, unit, round_to) -> tuple[int, int]:
    (m, n), taps = problem.weight.shape, problem.taps
    if budget is not None:
        if rank is not None or nnz is not None:
            raise ValueError("decompose: give (rank, nnz) or (budget, sparse_coefficient), got both")
        sizes = m // taps, n * taps, budget, coefficient, groups
        return split_budget(*sizes, unit, problem.weight.element_size(), taps, round_to)
    if rank is None and nnz is None:
        raise ValueError("decompose: give rank and/or nnz, or a budget, got none of them")
    if coefficient is not None:
        raise ValueError("decompose: sparse_coefficient divides a budget, got it without one")
    if unit != "params":
        raise ValueError(f"decompose: budget_unit is what a budget counts, got {unit!r} without one")
    if round_to != 1:
        raise ValueError("decompose: round_to rounds the rank of a budget, got it without one")
    check_sizes(m, n, groups, rank or 0, nnz or 0, taps)
    return rank or 0, nnz or 0


def check_sizes(m: int, n: int, groups: int, rank: int, nnz: int, taps: int = 1) -> None:
    full = min(m // groups, n)
    if not 0 <= rank <= full:
        raise ValueError(f"decompose: rank must lie in [0, min({forms.sides(taps)})] = [0, {full}], got {rank}")
    if not 0 <= nnz <= m * n:
        raise ValueError(f"decompose: nnz must lie in [0, m * n] = [0, {m * n}], got {nnz}")


def _fit(w, h, g, groups, rank, nnz, damping, n_iter, tol, generator) -> list[Decomposition]:
    """Of a batch w [b, m, n], with moments h and g by blocks or None."""
    b, m, n = w.shape
    exact = rank == min(m // groups, n) or nnz == m * n
    blocks, metric = w.view(b * groups, m // groups, n), None
    wide = h is not None and h.dim() == 3 and n > WIDE and (g is None or g.dim() == 2)
    if h is not None or g is not None:
        damping = damping if nnz else 10 * torch.finfo(w.dtype).eps
        metric = Metric(blocks, h, g, groups, damping, eigen=not wide)
        blocks = metric.rows * blocks * metric.columns
    if wide and not exact:
        if nnz:
            chains = Chains(metric, blocks, n_iter, generator)
            ((_, fit),) = chains.walk([[(rank, nnz)]], longer=SINGLE)
            del chains
        else:
            q = metric.leading(blocks, rank, generator)
            none = Sparse(*ops.topk_csr(blocks.view(1, m, n), 0))
            fit = Fit(metric.color_rows(q), torch.bmm(q.mT, metric.whiten_rows(blocks)), none, [])
    elif metric and metric.full and nnz == 0 and not exact:
        aware = DataAware(metric, blocks, groups)
        fit = aware.without_sparse(aware.leading(rank, generator))
    else:
        fit = alternate(blocks, groups, rank, nnz, n_iter, tol, generator)
        if metric and metric.full and not exact:
            fit = DataAware(metric, blocks, groups).improve(fit, SWEEPS * n_iter)
    if metric:
        fit = metric.in_weight_units(fit)
    return results_of(w, fit, groups, h, Sizes.of(w, groups, h))


def results_of(
    w: Tensor, fit: Fit, groups: int, h: Tensor | None, sizes: Sizes, measured: bool = False
) -> list[Decomposition]:
    """sizes: of w. measured: whether the history of the fit ends with the error of the weight."""
    (b, m, n), s = w.shape, fit.sparse
    u_norm, v_norm = fit.u.norm(dim=1), fit.v.norm(dim=2)
    scale = torch.where((u_norm > 0) & (v_norm > 0), (v_norm / u_norm.clamp_min(1e-30)).sqrt(), 1.0)
    u, v = fit.u * scale[:, None, :], fit.v / scale[:, :, None]
    u, v = u.reshape(b, m, -1), v.reshape(b, -1, n)
    results = []
    for i in range(b):
        sparse = (t[i].clone() for t in (s.values, s.row_ptr, s.col_idx))
        history = [error for error in (float(errors[i]) for errors in fit.history) if error == error]  # until it stops
        result = Decomposition(u[i].contiguous(), v[i].contiguous(), *sparse, 0.0, history, groups)
        if measured and history[-1] > CANCELLED:
            result.relative_error = history[-1]
            results.append(result)
            continue
        norm, rest = sizes.norms[i], w[i] - result.to_dense()
        result.relative_error = _norm(rest) / norm if norm > 0 else 0.0
        if h is not None:
            whole = sizes.energies[i]
            result.output_error = (energy(rest, h[i * groups : (i + 1) * groups]) / whole) ** 0.5 if whole > 0 else 0.0
            result.history = result.history or [result.output_error]
        results.append(result)
    return results


def _norm(x: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(x, dim=1).double().norm())
    if 1e-12 < norm < 1e12:
        return norm
    scale = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)  # squares of tiny weights must not vanish
    return float(torch.linalg.vector_norm(x / scale, dim=1).double().norm() * scale)


@dataclass
class Sizes:
    """Of each w: its norm, and if there is an h the energy tr(W H W^T)."""

    norms: list[float]
    energies: list[float]

    @classmethod
    def of(cls, w: Tensor, groups: int, h: Tensor | None) -> Sizes:
        parts = [] if h is None else h.split(groups)
        return cls([_norm(x) for x in w], [energy(x, part) for x, part in zip(w, parts, strict=False)])


def energy(x: Tensor, moment: Tensor) -> float:
    """tr(x H x^T) of x [m, n] and H [groups, n, n] or [groups, n]."""
    blocks = x.view(len(moment), -1, x.shape[1])
    moved = blocks * moment[:, None, :] if moment.dim() == 2 else torch.bmm(blocks, moment)
    return max(0.0, float((moved * blocks).sum(2).double().sum()))
