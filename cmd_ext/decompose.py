"""decompose(): W [m, n] -> U [m, r] V [r, n] + S, weight-only.

The fit alternates between a low-rank and a sparse projection (GoDec) with three changes that make it both better and
an order of magnitude cheaper than the textbook form:

* it starts from the exact rank-r part of W (Gram matrix and eigh on the short side), because the fixed point depends
  on the start and no number of passes repairs a random one;
* each pass takes ONE subspace step from the previous factors instead of an SVD;
* the number of nonzeros grows linearly over the first half of the passes (annealing), so that S takes what low rank
  cannot explain, not what it has not explained yet. The error is therefore monotone over the second half only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import dispatch, forms, ops, support

DEFAULT_COEFFICIENT = 0.7  # the best or near-best share of S on real layers once a third of the entries is kept
BUDGET_UNITS = ("params", "bytes")
_EXACT_SIDE = 1024  # up to this short side the start is exact: its cost is a few passes


@dataclass
class Decomposition:
    """W ~ U V + S.

    Attributes:
        u, v: [m, r] and [groups * r, n], scaled to equal norms per component; in the spatial form of a kernel
            [m, c, kh, kw] they are [m * kh, r] and [groups * r, c * kw].
        values, row_ptr, col_idx: S over [m, n] in CSR, int32 indices, columns ascending.
        relative_error: ||W - U V - S||_F / ||W||_F (0 for a zero W).
        history: the relative error after each pass.
        groups: row groups, each with its own rank-r part.
        form: "channel" or "spatial".
        kernel_size: (kh, kw); (1, 1) for a matrix.
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

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @property
    def nnz(self) -> int:
        return self.values.shape[0]

    def to_dense(self) -> Tensor:
        """U V + S as [m, n]."""
        rows, columns, g = self.u.shape[0], self.v.shape[1], self.groups
        dense = torch.bmm(self.u.view(g, rows // g, -1), self.v.view(g, -1, columns)).view(rows, columns)
        if self.form == "spatial":
            dense = forms.restore(dense, self.kernel_size)
        dense.view(-1)[_linear_index(self.row_ptr, self.col_idx, dense.shape[1])] += self.values
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

    Raises:
        ValueError: budget or coefficient outside [0, 1], or an unknown unit.

    Source: Zhang et al., Machine Learning 2022, the sparse coefficient.
    """
    coefficient = DEFAULT_COEFFICIENT if sparse_coefficient is None else sparse_coefficient
    for name, value in (("budget", budget), ("sparse_coefficient", coefficient)):
        if not 0 <= value <= 1:
            raise ValueError(f"decompose: {name} must lie in [0, 1], got {value}")
    if unit not in BUDGET_UNITS:
        raise ValueError(f"decompose: budget_unit must be one of {', '.join(BUDGET_UNITS)}, got {unit!r}")
    tiny = 1e-9  # 0.3 * 10 must count as 3
    nnz = int(coefficient * budget * m * n + tiny)
    rows, columns = m * taps, n // taps
    rank = int((1 - coefficient) * budget * m * n / (rows + groups * columns) + tiny)  # of equal bytes: all are values
    if unit == "bytes":
        nnz = support.most_entries(m, n, element, coefficient * budget * m * n * element + tiny)
    return min(rank, rows // groups, columns), min(nnz, m * n)


def decompose(
    weight: Tensor,
    *,
    rank: int | None = None,
    nnz: int | None = None,
    budget: float | None = None,
    sparse_coefficient: float | None = None,
    budget_unit: str = "params",
    n_iter: int = 20,
    tol: float = 1e-5,
    groups: int = 1,
    form: str = "channel",
    generator: torch.Generator | None = None,
) -> Decomposition:
    """Fits W ~ U V + S with a given rank and number of nonzeros.

    Args:
        weight: [m, n], or a convolution's [m, channels / groups, kernel_h, kernel_w]; float32, float64, bfloat16 or
            float16 (16-bit weights are fitted in float32).
        rank, nnz: sizes of the branches; one that is left out is 0.
        budget, sparse_coefficient: instead of these, the kept share of the weight and the share of S in it (see
            split_budget).
        budget_unit: what `budget` is a share of: "params" counts an entry of S as one parameter, "bytes" counts what a
            file holds, with the support of S and in the dtype of `weight`.
        n_iter: passes; 20 is fast, 40 gains another 1-5 % of error.
        tol: stop when a pass of the second half lowers the error by less than this fraction.
        groups: row groups with a low-rank part each (grouped convolution).
        form: "channel", or "spatial" for a kernel larger than 1x1: U V is then of the matrix [m * kh, c * kw], two thin
            convolutions (see forms.py), and a unit of rank costs m * kh + groups * c * kw parameters.
        generator: of the random start of large matrices; the result is the same from call to call if None.

    Returns:
        A Decomposition in the dtype of `weight`.

    Raises:
        ValueError: no or two kinds of size, a size out of range, a shape that does not fit, NaN or Inf in `weight`.

    Source: Zhou and Tao, ICML 2011 (GoDec) for the alternation; start, warm pass and annealing as told above.
    """
    options = {"n_iter": n_iter, "tol": tol, "groups": groups, "form": form, "generator": generator}
    sizes = {"rank": rank, "nnz": nnz, "budget": budget, "sparse_coefficient": sparse_coefficient}
    return decompose_batch([weight], **sizes, budget_unit=budget_unit, **options)[0]


def decompose_batch(
    weights: Sequence[Tensor],
    *,
    rank: int | None = None,
    nnz: int | None = None,
    budget: float | None = None,
    sparse_coefficient: float | None = None,
    budget_unit: str = "params",
    n_iter: int = 20,
    tol: float = 1e-5,
    groups: int = 1,
    form: str = "channel",
    generator: torch.Generator | None = None,
) -> list[Decomposition]:
    """`decompose` of several weights; those of one shape, dtype and device are fitted in one batched call.

    Args and errors: as decompose. The results come in the order of `weights`. A batch stops when its slowest member
    meets `tol`.
    """
    if n_iter < 1:
        raise ValueError(f"decompose: n_iter must be >= 1, got {n_iter}")
    batches = defaultdict(list)
    for index, weight in enumerate(weights):
        matrix = _as_matrix(weight, groups, form)
        taps = forms.taps_of(form, weight.shape[2:])
        batches[matrix.shape, taps, matrix.dtype, matrix.device].append((index, matrix))
    results: list[Decomposition | None] = [None] * len(weights)
    for (shape, taps, dtype, device), members in batches.items():
        r, k = _sizes(*shape, groups, rank, nnz, budget, sparse_coefficient, budget_unit, dtype.itemsize, taps)
        here = device if device.type == "cuda" and dispatch.has_cuda_kernels() else torch.device("cpu")
        stack = torch.stack([matrix for _, matrix in members]).to(here)
        with torch.no_grad(), torch.autocast(here.type, enabled=False):
            wide = stack.float() if dtype in (torch.bfloat16, torch.float16) else stack
            fits = _fit(wide, groups, r, k, n_iter, tol, generator)
        for (index, _), fit in zip(members, fits, strict=True):
            fit.u, fit.v, fit.values = (t.to(device, dtype) for t in (fit.u, fit.v, fit.values))
            fit.row_ptr, fit.col_idx = fit.row_ptr.to(device), fit.col_idx.to(device)
            fit.form, fit.kernel_size = form, (*weights[index].shape[2:],) or (1, 1)
            if form == "spatial":
                sparse = fit.values, fit.row_ptr, fit.col_idx, fit.kernel_size, shape[1]
                fit.values, fit.row_ptr, fit.col_idx = forms.restore_csr(*sparse)
            results[index] = fit
    return results


def _as_matrix(weight: Tensor, groups: int, form: str) -> Tensor:
    if weight.dim() not in (2, 4) or weight.numel() == 0:
        raise ValueError(f"decompose: weight must be a non-empty [m, n] or [m, c, kh, kw], got {[*weight.shape]}")
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"decompose: weight must be float32, float64, bfloat16 or float16, got {weight.dtype}")
    if weight.shape[0] % groups:
        raise ValueError(f"decompose: groups must divide the {weight.shape[0]} rows, got {groups}")
    if not weight.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"decompose: weight must be finite, got {bad} NaN or Inf among {weight.numel()} entries")
    forms.check_form("decompose", form, weight.shape[2:])
    return forms.arrange(weight.detach()) if form == "spatial" else weight.detach().reshape(weight.shape[0], -1)


def _sizes(m, n, groups, rank, nnz, budget, coefficient, unit, element, taps) -> tuple[int, int]:
    if budget is not None:
        if rank is not None or nnz is not None:
            raise ValueError("decompose: give (rank, nnz) or (budget, sparse_coefficient), got both")
        return split_budget(m // taps, n * taps, budget, coefficient, groups, unit, element, taps)
    if rank is None and nnz is None:
        raise ValueError("decompose: give rank and/or nnz, or a budget, got none of them")
    if coefficient is not None:
        raise ValueError("decompose: sparse_coefficient divides a budget, got it without one")
    if unit != "params":
        raise ValueError(f"decompose: budget_unit is what a budget counts, got {unit!r} without one")
    rank, nnz = rank or 0, nnz or 0
    full = min(m // groups, n)
    if not 0 <= rank <= full:
        raise ValueError(f"decompose: rank must lie in [0, min({forms.sides(taps)})] = [0, {full}], got {rank}")
    if not 0 <= nnz <= m * n:
        raise ValueError(f"decompose: nnz must lie in [0, m * n] = [0, {m * n}], got {nnz}")
    return rank, nnz


def _linear_index(row_ptr: Tensor, col_idx: Tensor, n: int) -> Tensor:
    """Where the nonzeros lie in the flattened matrix, or in the flattened batch of [b, m + 1] and [b, nnz]."""
    counts = row_ptr.diff().flatten().long()
    starts = torch.arange(0, len(counts) * n, n, device=row_ptr.device)
    return torch.repeat_interleave(starts, counts, output_size=col_idx.numel()).add_(col_idx.flatten())


def _fit(w: Tensor, groups: int, rank: int, nnz: int, n_iter: int, tol: float, generator) -> list[Decomposition]:
    """The alternation on a batch w [b, m, n]."""
    b, m, n = w.shape
    blocks = w.view(b * groups, m // groups, n)
    norms = torch.linalg.vector_norm(w, dim=(1, 2), dtype=torch.float64)
    if rank == 0:
        u, v = w.new_zeros(b * groups, m // groups, 0), w.new_zeros(b * groups, 0, n)
    else:
        u, v = _leading_part(blocks, rank, generator)
    history: list[Tensor] = []
    rest = torch.empty_like(w)
    passes = n_iter if 0 < rank < min(m // groups, n) and 0 < nnz < m * n else 1
    for t in range(1, passes + 1):
        growing = 2 * t < passes
        low_rank = u.reshape(b, m, rank), v.reshape(b, groups * rank, n)
        s = _sparse_part(w, *low_rank, nnz * 2 * t // passes if growing else nnz)
        history.append(s.error / norms.clamp_min(torch.finfo(torch.float64).tiny))
        if t == passes or (not growing and len(history) > 1 and not _improves(history, tol)):
            break
        rest.copy_(w).view(-1)[_linear_index(s.row_ptr, s.col_idx, n)] -= s.values.flatten()
        u = torch.linalg.qr(torch.bmm(rest.view_as(blocks), v.mT)).Q
        v = torch.bmm(u.mT, rest.view_as(blocks))
    return _results(w, u, v, s, groups, history)


def _improves(history: list[Tensor], tol: float) -> bool:
    before, after = history[-2], history[-1]
    return bool((before - after > tol * before).any())


def _leading_part(w: Tensor, rank: int, generator) -> tuple[Tensor, Tensor]:
    """The exact best rank-r part of each w [b, m, n] as orthonormal u [b, m, r] times v [b, r, n] (or the reverse)."""
    m, n = w.shape[1:]
    if rank == min(m, n):  # nothing to approximate
        identity = torch.eye(rank, dtype=w.dtype, device=w.device).expand(len(w), rank, rank)
        return (identity, w) if m <= n else (w, identity)
    if min(m, n) <= _EXACT_SIDE and w.is_cuda:
        gram = torch.bmm(w, w.mT) if m <= n else torch.bmm(w.mT, w)
        try:
            q = torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
        except torch.linalg.LinAlgError:  # an ill-conditioned Gram matrix: the SVD sees W itself, in double
            u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
            return u[..., :rank].to(w), (s[..., :rank, None] * vh[..., :rank, :]).to(w)
        return (q, torch.bmm(q.mT, w)) if m <= n else (torch.bmm(w, q), q.mT.contiguous())
    if generator is None:
        generator = torch.Generator(w.device).manual_seed(0)
    oversample = min(m, n) if min(m, n) <= _EXACT_SIDE else 8
    u, s, vh = ops.truncated_svd(w, rank, n_iter=4, oversample=oversample, generator=generator)
    return u, s[..., None] * vh


@dataclass
class _Sparse:
    """S of each matrix of a batch as CSR, and the error left after it [b]."""

    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    error: Tensor


def _sparse_part(w: Tensor, u: Tensor, v: Tensor, nnz: int) -> _Sparse:
    residual, values, row_ptr, col_idx = ops.residual_topk_csr(w, u, v, nnz)
    squares = torch.linalg.vector_norm(residual, dim=2).double().square().sum(1)  # a row is short enough for float32
    left = squares - torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()
    return _Sparse(values, row_ptr, col_idx, left.clamp_min(0).sqrt())


def _results(w, u, v, s: _Sparse, groups: int, history: list[Tensor]) -> list[Decomposition]:
    b, m, n = w.shape
    u_norm, v_norm = u.norm(dim=1), v.norm(dim=2)
    scale = torch.where((u_norm > 0) & (v_norm > 0), (v_norm / u_norm.clamp_min(1e-30)).sqrt(), 1.0)
    u, v = u * scale[:, None, :], v / scale[:, :, None]
    u, v = u.reshape(b, m, -1), v.reshape(b, -1, n)
    fits = []
    for i in range(b):
        sparse = (t[i].clone() for t in (s.values, s.row_ptr, s.col_idx))
        fit = Decomposition(u[i].contiguous(), v[i].contiguous(), *sparse, 0.0, [float(h[i]) for h in history], groups)
        norm = w[i].double().norm()
        fit.relative_error = float((w[i].double() - fit.to_dense().double()).norm() / norm) if norm > 0 else 0.0
        fits.append(fit)
    return fits
