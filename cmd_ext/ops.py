"""The operators of cmd_ext: public function, fake kernel and autograd formula of each.

Schemas are in csrc/ops.cpp, the same functions in plain PyTorch in ref.py. S is stored as `values` and a `Pattern`,
its support in both orientations, so that every gradient is a gather. On the CPU every call checks the support (a plan:
once); on a GPU that would wait for the device, so `Pattern.from_csr` checks it once. Outputs are contiguous
(channels_last where the input image is). The kernels give the same bits with any number of threads; torch's GEMM, QR
and convolution gradients around them may not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

_ops = torch.ops.cmd_ext
IntPair = tuple[int, int]


class Pattern(NamedTuple):
    """Support of S [m, n] as CSR and as CSR of its transpose, all int32.

    `row_ptr` [m + 1] and `col_idx` [nnz] list S by rows, columns ascending. `col_ptr` [groups * n + 1] and `row_idx`
    [nnz] list it by columns (column c of row group g at g * n + c), with `values[perm]` the values in that order.
    """

    row_ptr: Tensor
    col_idx: Tensor
    col_ptr: Tensor
    row_idx: Tensor
    perm: Tensor

    @classmethod
    def from_csr(cls, row_ptr: Tensor, col_idx: Tensor, n: int, groups: int = 1) -> Pattern:
        """Checks a CSR support and adds its transpose.

        Args:
            row_ptr: [m + 1] integers from 0 to nnz, not decreasing.
            col_idx: [nnz] integers in [0, n), strictly ascending within a row.
            n: columns of S.
            groups: row groups (of a grouped convolution); divides m.

        Raises:
            ValueError: the arrays are not a CSR support of n columns.
        """
        row_ptr, col_idx = row_ptr.to(torch.int32), col_idx.to(torch.int32)
        csr_rows(row_ptr, col_idx, n)
        m = row_ptr.numel() - 1
        if groups < 1 or m % groups:
            raise ValueError(f"Pattern: groups must divide the {m} rows, got {groups}")
        return _with_transpose(row_ptr, col_idx, n, groups)

    def transpose(self) -> Pattern:
        """The pattern of S^T (groups = 1); its values are `values[perm]`."""
        inverse = torch.empty_like(self.perm)
        inverse[self.perm.long()] = torch.arange(len(self.perm), dtype=self.perm.dtype, device=self.perm.device)
        return Pattern(self.col_ptr, self.row_idx, self.row_ptr, self.col_idx, inverse)


def csr_rows(row_ptr: Tensor, col_idx: Tensor, n: int) -> Tensor:
    """The row of every nonzero [nnz], int64, after checking that the arrays are a CSR support of n columns."""
    if row_ptr.dim() != 1 or col_idx.dim() != 1 or row_ptr.numel() < 1:
        raise ValueError(
            f"CSR: row_ptr must be [m + 1] and col_idx [nnz], got {[*row_ptr.shape]} and {[*col_idx.shape]}"
        )
    counts = row_ptr.diff()
    nnz = col_idx.numel()
    if row_ptr[0] != 0 or row_ptr[-1] != nnz or (counts < 0).any():
        raise ValueError(
            f"CSR: row_ptr must rise from 0 to nnz = {nnz}, got {row_ptr[0].item()} to {row_ptr[-1].item()}"
        )
    if nnz and not 0 <= col_idx.min() <= col_idx.max() < n:
        raise ValueError(f"CSR: col_idx must lie in [0, {n}), got {col_idx.min().item()} to {col_idx.max().item()}")
    rows = _rows_of(row_ptr, nnz)
    if ((col_idx.diff() <= 0) & (rows.diff() == 0)).any():
        raise ValueError("CSR: col_idx must ascend strictly within each row, got repeated or unsorted columns")
    return rows


def _with_transpose(row_ptr: Tensor, col_idx: Tensor, n: int, groups: int = 1) -> Pattern:
    """The pattern of a valid CSR support."""
    return Pattern(row_ptr, col_idx, *_ops.csr_transpose(row_ptr, col_idx, n, groups))


def _rows_of(row_ptr: Tensor, nnz: int) -> Tensor:
    """The row of every nonzero [nnz] of a valid CSR support; reads no data, so that fake tensors pass.

    Of b supports with row_ptr [b, m + 1] and nnz nonzeros in all, rows are counted through the batch.
    """
    counts = row_ptr.diff().flatten().long()
    rows = torch.arange(counts.shape[0], device=row_ptr.device)
    return torch.repeat_interleave(rows, counts, output_size=nnz)


def _check_dtypes(op: str, first: str, like: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != like.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {first} = {like.dtype}, got {tensor.dtype}")


def _autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, casts floating tensors to its dtype, as torch's own linear and convolution do."""
    if not torch._C._is_any_autocast_enabled():  # the usual case, at little cost
        return (x, *tensors)
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None else t.to(dtype) for t in (x, *tensors))


def _without_autocast(name: str, device: str) -> None:
    """Makes autocast leave an op's inside alone: its GEMMs and convolutions run in the dtype that the kernel chose."""
    op = getattr(_ops, name).default

    def kernel(*args):
        with torch.autocast(device, enabled=False):
            return op(*args)

    _autocast_kernels.impl(name, kernel, f"Autocast{device.upper()}")


_autocast_kernels = torch.library.Library("cmd_ext", "IMPL")
for _name in (
    "truncated_svd",
    "residual_topk_csr",
    "lrs_linear",
    "_planned_lrs_linear",
    "dense_weight",
    "lrs_conv2d",
    "_lrs_conv2d_grad_input",
):
    for _device in ("cpu", "cuda"):
        _without_autocast(_name, _device)


# truncated_svd ------------------------------------------------------------------------------------------------------

_GRAM_SIDE = 768  # up to this short side eigh of the Gram matrix costs about as much as n_iter = 4 on the CPU


def truncated_svd(
    a: Tensor,
    rank: int,
    *,
    n_iter: int = 4,
    oversample: int = 8,
    basis: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` singular triplets of each matrix, by its Gram matrix or by subspace iteration.

    Args:
        a: [b, m, n] or [m, n], float32 or float64.
        rank: 0 <= rank <= min(m, n).
        n_iter: steps of subspace iteration; 0 is enough with a warm `basis`.
        oversample: extra columns of the random start; enough of them to reach min(m, n) make the result exact.
        basis: [b, n, l] or [n, l] start with rank <= l <= min(m, n), e.g. the previous vh transposed. Random if None;
            on the CPU, nothing is iterated then up to a short side of 768: the result is exact.
        generator: of the random start.

    Returns:
        u [b, m, rank], s [b, rank] descending, vh [b, rank, n]; contiguous, without b for a matrix. The entry of
        each column of u largest in magnitude is positive.

    Raises:
        ValueError: rank, basis or a 16-bit dtype do not fit; on the CPU also NaN or infinity in a.

    Up to a short side of 64 the result is exact, whatever basis and n_iter. Exact means some eps * s[0]
    in s: a Gram matrix squares the condition number, so where s[rank - 1] < 0.03 * s[0] the CPU goes on in double for
    float32 (about twice the time) and to the SVD of a triangular factor for float64. On a GPU nothing waits for the
    device, so NaN in a gives NaN.

    Source: Halko, Martinsson, Tropp, SIAM Review 2011, algorithm 4.4; its error grows where s[rank] / s[rank - 1] is
    near 1. Yamamoto et al., ETNA 2015 (Cholesky QR twice).
    """
    single = a.dim() == 2
    if single:
        a, basis = a[None], None if basis is None else basis[None]
    if a.dim() != 3:
        raise ValueError(f"truncated_svd: a must be [b, m, n] or [m, n], got {[*a.shape]}")
    b, m, n = a.shape
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"truncated_svd: rank must lie in [0, min(m, n)] = [0, {min(m, n)}], got {rank}")
    if basis is None:
        exact = a.device.type == "cpu" and min(m, n) <= _GRAM_SIDE
        columns = min(m, n) if exact else min(rank + oversample, m, n)
        if columns == min(m, n):  # spans everything, so that its entries are not read
            basis = a.new_zeros(b, n, 1).expand(b, n, columns)
        else:
            basis = torch.randn(b, n, columns, dtype=a.dtype, device=a.device, generator=generator)
    _check_dtypes("truncated_svd", "a", a, basis=basis)
    u, s, vh = _ops.truncated_svd(a, basis, rank, n_iter)
    return (u[0], s[0], vh[0]) if single else (u, s, vh)


@register_fake("cmd_ext::truncated_svd")
def _(a, basis, rank, n_iter):
    b, m, n = a.shape
    return a.new_empty(b, m, rank), a.new_empty(b, rank), a.new_empty(b, rank, n)


def _svd_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output)


def _svd_backward(ctx, gu, gs, gvh):
    """Adjoint of the leading triplets, exact at convergence (the basis then has no influence).

    A perturbation moves u_j and v_j within all other singular directions of A. With A = U S V^T in full,
    F_ij = 1 / (s_j^2 - s_i^2) for i != j, p = F * (U^T gu) and q = F * (V^T gv), summed over retained j and all i:
    dA = sum_j gs_j u_j v_j^T + sum_ij (p_ij s_j + q_ij s_i) u_i v_j^T + (p_ij s_i + q_ij s_j) u_j v_i^T,
    and what gu and gv have outside of U and V moves with 1 / s_j.
    """
    a, u, s, vh = ctx.saved_tensors
    full_u, full_s, full_vh = torch.linalg.svd(a, full_matrices=False)
    k, r = full_s.shape[-1], s.shape[-1]
    # Same signs as the retained triplets.
    signs = torch.nn.functional.pad((full_u[..., :r] * u).sum(-2).sign(), (0, k - r), value=1.0)
    full_u, full_vh = full_u * signs[..., None, :], full_vh * signs[..., :, None]

    def inverse(t, zero):  # 0 where a triplet would move within itself or among equals, whose basis is arbitrary
        return t.masked_fill(zero | (t == 0), torch.inf).reciprocal()

    gap = s.square()[..., None, :] - full_s.square()[..., :, None]  # [k, r]
    f = inverse(gap, torch.eye(k, r, dtype=torch.bool, device=a.device))
    left, right = full_u.mT @ gu, full_vh @ gvh.mT
    p, q = f * left, f * right
    sj, si = s[..., None, :], full_s[..., :, None]
    grad = (u * gs[..., None, :]) @ vh
    grad = grad + full_u @ (p * sj + q * si) @ vh + u @ ((p * si + q * sj).mT @ full_vh)
    moved = inverse(s, torch.zeros_like(s, dtype=torch.bool))[..., None, :]
    grad = grad + ((gu - full_u @ left) * moved) @ vh + (u * moved) @ (gvh - right.mT @ full_vh)
    return grad, None, None, None


register_autograd("cmd_ext::truncated_svd", _svd_backward, setup_context=_svd_setup)


# topk_csr, residual_topk_csr ----------------------------------------------------------------------------------------


def topk_csr(a: Tensor, nnz: int) -> tuple[Tensor, Tensor, Tensor]:
    """The exactly `nnz` entries of each matrix largest in magnitude, as CSR.

    Args:
        a: [m, n] or [b, m, n], float32, float64, bfloat16 or float16.
        nnz: 0 <= nnz <= m * n.

    Returns:
        values [b, nnz], row_ptr [b, m + 1] int32, col_idx [b, nnz] int32, without b for a matrix. Ties go to the lower
        linear index; NaN counts as larger than infinity.

    Raises:
        ValueError: nnz out of range, or sizes too large for int32.
    """
    if a.dim() not in (2, 3):
        raise ValueError(f"topk_csr: a must be [m, n] or [b, m, n], got {[*a.shape]}")
    if a.dim() == 3:
        return _ops.topk_csr(a, nnz)
    values, row_ptr, col_idx = _ops.topk_csr(a[None], nnz)
    return values[0], row_ptr[0], col_idx[0]


def _empty_csr(a: Tensor, nnz: int) -> tuple[Tensor, Tensor, Tensor]:
    b, m, _ = a.shape
    ints = {"dtype": torch.int32}
    return a.new_empty(b, nnz), a.new_empty(b, m + 1, **ints), a.new_empty(b, nnz, **ints)


@register_fake("cmd_ext::topk_csr")
def _(a, nnz):
    return _empty_csr(a, nnz)


def _scatter(values: Tensor, row_ptr: Tensor, col_idx: Tensor, size: torch.Size) -> Tensor:
    """The dense matrices [b, m, n] of a batch of CSR ones."""
    index = _rows_of(row_ptr, col_idx.numel()) * size[2] + col_idx.flatten()
    return values.new_zeros(size.numel()).index_put((index,), values.flatten()).view(size)


def _topk_setup(ctx, inputs, output):
    _, row_ptr, col_idx = output
    ctx.save_for_backward(row_ptr, col_idx)
    ctx.size = inputs[0].shape
    ctx.mark_non_differentiable(row_ptr, col_idx)


def _topk_backward(ctx, grad, _row_ptr, _col_idx):
    return _scatter(grad, *ctx.saved_tensors, ctx.size), None


register_autograd("cmd_ext::topk_csr", _topk_backward, setup_context=_topk_setup)


def residual_topk_csr(w: Tensor, u: Tensor, v: Tensor, nnz: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R = W - U V of each matrix, and its `nnz` entries largest in magnitude as CSR.

    Args:
        w: [m, n] or [b, m, n], float32 or float64.
        u: [m, r] or [b, m, r]; r may be 0.
        v: [groups * r, n] or [b, groups * r, n]; rows g * r .. are multiplied with row group g of u.
        nnz: 0 <= nnz <= m * n.

    Returns:
        residual [b, m, n], values [b, nnz], row_ptr [b, m + 1] int32, col_idx [b, nnz] int32, without b for a matrix;
        ties and NaN as in topk_csr.

    Raises:
        ValueError: shapes do not fit, nnz out of range, or a 16-bit dtype.
        TypeError: dtypes differ.
    """
    _check_dtypes("residual_topk_csr", "w", w, u=u, v=v)
    if w.dim() not in (2, 3) or not w.dim() == u.dim() == v.dim():
        sizes = f"{[*w.shape]}, {[*u.shape]} and {[*v.shape]}"
        raise ValueError(f"residual_topk_csr: w, u and v must be matrices or batches of them, got {sizes}")
    if w.dim() == 3:
        return _ops.residual_topk_csr(w, u, v, nnz)
    residual, values, row_ptr, col_idx = _ops.residual_topk_csr(w[None], u[None], v[None], nnz)
    return residual[0], values[0], row_ptr[0], col_idx[0]


@register_fake("cmd_ext::residual_topk_csr")
def _(w, u, v, nnz):
    return w.new_empty(w.shape), *_empty_csr(w, nnz)


def _residual_setup(ctx, inputs, output):
    _, u, v, _ = inputs
    _, _, row_ptr, col_idx = output
    ctx.save_for_backward(u, v, row_ptr, col_idx)
    ctx.mark_non_differentiable(row_ptr, col_idx)


def _residual_backward(ctx, grad, grad_values, _row_ptr, _col_idx):
    """The values are entries of R: with dR = grad + grad_values on the support, dU = -dR V^T and dV = -U^T dR."""
    u, v, row_ptr, col_idx = ctx.saved_tensors
    _, need_u, need_v, _ = ctx.needs_input_grad
    grad = grad + _scatter(grad_values, row_ptr, col_idx, grad.shape)
    b, m, r = u.shape
    n = v.shape[2]
    groups = v.shape[1] // r if r else 1
    blocks = grad.reshape(b * groups, m // groups, n)
    gu = gv = None
    if need_u:
        gu = -torch.bmm(blocks, v.reshape(b * groups, r, n).mT).view(u.shape)
    if need_v:
        gv = -torch.bmm(u.reshape(b * groups, m // groups, r).mT, blocks).view(v.shape)
    return grad, gu, gv, None


register_autograd("cmd_ext::residual_topk_csr", _residual_backward, setup_context=_residual_setup)


# csr_transpose ------------------------------------------------------------------------------------------------------


def csr_transpose(row_ptr: Tensor, col_idx: Tensor, n: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A CSR support by columns. It has no gradient: the values of the transpose are `values[perm]`.

    Args:
        row_ptr: [m + 1] int32.
        col_idx: [nnz] int32 in [0, n), ascending strictly within a row.
        n: columns.
        groups: row groups, whose columns are listed one group after another; divides m.

    Returns:
        col_ptr [groups * n + 1], row_idx [nnz] and perm [nnz], int32, as in Pattern.

    Raises:
        ValueError: shapes do not fit or, on the CPU, the support is no CSR.
    """
    return _ops.csr_transpose(row_ptr, col_idx, n, groups)


@register_fake("cmd_ext::csr_transpose")
def _(row_ptr, col_idx, n, groups):
    return row_ptr.new_empty(groups * n + 1), torch.empty_like(col_idx), torch.empty_like(col_idx)


# lrs_linear, dense_weight, sddmm ------------------------------------------------------------------------------------


def _eagerly(op, setup, backward):
    """`op` for calls by Python: the same, at a third of the overhead where nothing but autograd looks at the call.

    What register_autograd makes of the same formulas passes the dispatcher several times in Python, which takes longer
    than a small layer. It stays what compilers, tracers, modes, transforms and subclasses of Tensor get.
    """

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup(ctx, args, output)
            return output

    Recorded.backward = staticmethod(backward)

    def call(*args):
        if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
            return op(*args)
        if torch._C._functorch.maybe_current_level() is not None or any(type(t) not in _PLAIN for t in args):
            return op(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Recorded.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


_PLAIN = {Tensor, torch.nn.Parameter, int, type(None)}


def lrs_linear(x: Tensor, u: Tensor, v: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None = None) -> Tensor:
    """y = x (U V + S)^T + bias, without building U V + S.

    Args:
        x: [..., n], float32, float64, bfloat16 or float16 (accumulated in float32).
        u: [m, r]; r may be 0.
        v: [r, n].
        values: [nnz] of S.
        pattern: support of S [m, n].
        bias: [m] or None.

    Returns:
        [..., m], contiguous.

    Raises:
        ValueError: shapes do not fit, or the pattern is no CSR support.
        TypeError: dtypes differ.

    Source: Zhang et al., Machine Learning 2022, the decomposed layer.
    """
    x, u, v, values, bias = _autocast(x, u, v, values, bias)
    _check_dtypes("lrs_linear", "x", x, u=u, v=v, values=values, bias=bias)
    return _call_linear(x, u, v, values, *pattern, bias)


FEW_SAMPLES = 32  # kFewSamples of csrc/cpu/kernels.h


def plan_lrs_linear(values: Tensor, pattern: Pattern, n: int, few: bool) -> Tensor:
    """What lrs_linear on the CPU works out from S alone, packed and checked; for planned_lrs_linear.

    Args: as of lrs_linear; `few` says whether the plan is for up to FEW_SAMPLES rows of x or for more. The plan is of
    the precision of the values, and of no use after one changed. Not differentiable.

    Returns:
        An opaque uint8 tensor.
    """
    values, _ = _autocast(values, None)
    return _ops._plan_lrs_linear(values, pattern.row_ptr, pattern.col_idx, n, few)


def planned_lrs_linear(x: Tensor, u: Tensor, v: Tensor, plan: Tensor, bias: Tensor | None) -> Tensor:
    """lrs_linear with the S of a plan, to the bit. Not differentiable.

    Raises:
        ValueError: the plan is for other sizes, another precision or as many rows of x, or is none.
        TypeError: dtypes differ.
    """
    x, u, v, bias = _autocast(x, u, v, bias)
    _check_dtypes("planned_lrs_linear", "x", x, u=u, v=v, bias=bias)
    return _ops._planned_lrs_linear(x, u, v, plan, bias)


@register_fake("cmd_ext::lrs_linear")
def _(x, u, v, values, row_ptr, col_idx, col_ptr, row_idx, perm, bias):
    return x.new_empty(*x.shape[:-1], u.shape[0])


def _linear_setup(ctx, inputs, output):
    *tensors, _bias = inputs
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx, grad):
    """With y = x (U V + S)^T: dx = dy (U V + S), the same op with (V^T, U^T, S^T); dS = dy^T x on the support."""
    x, u, v, values, *pattern = ctx.saved_tensors
    pattern = Pattern(*pattern)
    need_x, need_u, need_v, need_values, *_, need_bias = ctx.needs_input_grad
    gx = gu = gv = gvalues = gbias = None
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if need_x:
        gx = _call_linear(grad, v.t(), u.t(), values[pattern.perm], *pattern.transpose(), None)
    if need_u:
        gu = grads.t() @ (rows @ v.t())
    if need_v:
        gv = (grads @ u).t() @ rows
    if need_values:
        gvalues = _ops.sddmm(grads.t(), rows.t(), *pattern[:2])
    if need_bias:
        gbias = grads.sum(0)
    return gx, gu, gv, gvalues, None, None, None, None, None, gbias


register_autograd("cmd_ext::lrs_linear", _linear_backward, setup_context=_linear_setup)
_call_linear = _eagerly(_ops.lrs_linear, _linear_setup, _linear_backward)


def dense_weight(u: Tensor, v: Tensor, values: Tensor, pattern: Pattern, groups: int = 1) -> Tensor:
    """U V + S as a dense matrix, for the layers that a dense library computes faster.

    Args:
        u: [m, r], float32, float64, bfloat16 or float16.
        v: [groups * r, n]; rows g * r .. belong to row group g.
        values: [nnz] of S.
        pattern: support of S [m, n].
        groups: row groups; divides m.

    Returns:
        [m, n], accumulated in float32 for 16-bit types.

    Raises:
        ValueError: shapes do not fit, or the pattern is no CSR support.  TypeError: dtypes differ.
    """
    _check_dtypes("dense_weight", "u", u, v=v, values=values)
    return _call_dense_weight(u, v, values, *pattern[:2], groups)


@register_fake("cmd_ext::dense_weight")
def _(u, v, values, row_ptr, col_idx, groups):
    return u.new_empty(u.shape[0], v.shape[1])


def _dense_weight_setup(ctx, inputs, output):
    *tensors, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _dense_weight_backward(ctx, grad):
    """dU = dW V^T and dV = U^T dW per group; dS = dW on the support."""
    u, v, _, row_ptr, col_idx = ctx.saved_tensors
    need_u, need_v, need_values, *_ = ctx.needs_input_grad
    g, (m, r), n = ctx.groups, u.shape, v.shape[1]
    blocks = grad.reshape(g, m // g, n)
    gu = torch.bmm(blocks, v.reshape(g, r, n).mT).reshape(m, r) if need_u else None
    gv = torch.bmm(u.reshape(g, m // g, r).mT, blocks).reshape(g * r, n) if need_v else None
    gvalues = None
    if need_values:
        gvalues = grad.reshape(-1)[_rows_of(row_ptr, col_idx.shape[0]) * n + col_idx]
    return gu, gv, gvalues, None, None, None


register_autograd("cmd_ext::dense_weight", _dense_weight_backward, setup_context=_dense_weight_setup)
_call_dense_weight = _eagerly(_ops.dense_weight, _dense_weight_setup, _dense_weight_backward)


def sddmm(a: Tensor, b: Tensor, row_ptr: Tensor, col_idx: Tensor) -> Tensor:
    """Sampled dense-dense product: (a b^T) at the positions of a CSR support.

    Args:
        a: [m, k].
        b: [n, k], dtype of a.
        row_ptr: [m + 1] int32.
        col_idx: [nnz] int32 in [0, n).

    Returns:
        [nnz], accumulated in float32 for 16-bit types.

    Raises:
        ValueError: shapes do not fit or the support is no CSR.  TypeError: dtypes differ.
    """
    _check_dtypes("sddmm", "a", a, b=b)
    return _ops.sddmm(a, b, row_ptr, col_idx)


@register_fake("cmd_ext::sddmm")
def _(a, b, row_ptr, col_idx):
    return a.new_empty(col_idx.shape[0])


def _sddmm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _sddmm_backward(ctx, grad):
    """With G the gradient on the support: da = G b and db = G^T a, products of a sparse matrix with rank 0."""
    a, b, row_ptr, col_idx = ctx.saved_tensors
    need_a, need_b, *_ = ctx.needs_input_grad
    pattern = _with_transpose(row_ptr, col_idx, b.shape[0])

    def product(dense, values, pattern):  # S [m, n], dense [n, k] -> [m, k]
        u, v = grad.new_empty(pattern.row_ptr.shape[0] - 1, 0), grad.new_empty(0, dense.shape[0])
        return _ops.lrs_linear(dense.t(), u, v, values, *pattern, None).t()

    ga = product(b, grad, pattern) if need_a else None
    gb = product(a, grad[pattern.perm], pattern.transpose()) if need_b else None
    return ga, gb, None, None


register_autograd("cmd_ext::sddmm", _sddmm_backward, setup_context=_sddmm_setup)


# lrs_conv2d ---------------------------------------------------------------------------------------------------------


def lrs_conv2d(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    kernel_size: IntPair,
    stride: IntPair = (1, 1),
    padding: IntPair = (0, 0),
    dilation: IntPair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """2-d convolution with the kernel U V + S, without building it.

    Args:
        x: [batch, channels, height, width], float32, float64, bfloat16 or float16 (accumulated in float32), any
            strides.
        u: [m, r], m = out_channels; r may be 0.
        v: [groups * r, n], n = channels / groups * kernel_h * kernel_w; rows g * r .. belong to group g.
        values: [nnz] of S.
        pattern: support of S [m, n], `Pattern.from_csr(..., n, groups)`.
        bias: [m] or None.
        kernel_size, stride, padding, dilation: (height, width).
        groups: as in torch.nn.functional.conv2d.

    Returns:
        [batch, m, out_height, out_width]; channels_last if x is.

    Raises:
        ValueError: shapes do not fit, or the pattern is no CSR support.
        TypeError: dtypes differ.

    Source: Zhang et al., Machine Learning 2022, the decomposed layer.
    """
    x, u, v, values, bias = _autocast(x, u, v, values, bias)
    _check_dtypes("lrs_conv2d", "x", x, u=u, v=v, values=values, bias=bias)
    return _ops.lrs_conv2d(x, u, v, values, *pattern, bias, kernel_size, stride, padding, dilation, groups)


def plan_lrs_conv2d(
    u, v, values, pattern: Pattern, x_size, channels_last: bool, kernel_size, stride, padding, dilation, groups
) -> Tensor:
    """What lrs_conv2d on the CPU works out from its weights, packed, for inputs of one size; for planned_lrs_conv2d.

    Args: as of lrs_conv2d; x_size is that of x, channels_last the memory format in which it is fastest: it works for
    all. The plan is of the precision of u, and of no use after a weight changed. Not differentiable.

    Returns:
        An opaque uint8 tensor.
    """
    u, v, values = _autocast(u, v, values)
    _check_dtypes("plan_lrs_conv2d", "u", u, v=v, values=values)
    geometry = kernel_size, stride, padding, dilation, groups
    return _ops._plan_lrs_conv2d(u, v, values, pattern.row_ptr, pattern.col_idx, x_size, channels_last, *geometry)


def planned_lrs_conv2d(x: Tensor, plan: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """lrs_conv2d with the weights of a plan, to the bit, and its positive part with `relu`. Not differentiable.

    Raises:
        ValueError: the plan is for another size or precision, or is none.
    """
    x, bias = _autocast(x, bias)
    return _ops._planned_lrs_conv2d(x, plan, bias, relu)


def _like_image(x: Tensor, size) -> Tensor:
    """An empty [N, C, H, W] in the memory format of x, by the rule of csrc/conv2d.cpp."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


@register_fake("cmd_ext::lrs_conv2d")
def _(x, u, v, values, row_ptr, col_idx, col_ptr, row_idx, perm, bias, kernel_size, stride, padding, dilation, groups):
    spans = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(x.shape[2:], padding, spans, stride, strict=True)]
    return _like_image(x, (x.shape[0], u.shape[0], *out))


@register_fake("cmd_ext::_lrs_conv2d_grad_input")
def _(grad, u, v, values, row_ptr, col_idx, col_ptr, row_idx, perm, input_size, kernel_size, *geometry):
    channels = v.shape[1] // (kernel_size[0] * kernel_size[1]) * geometry[-1]
    return _like_image(grad, (grad.shape[0], channels, *input_size))


@register_fake("cmd_ext::_lrs_conv2d_grad_weights")
def _(grad, x, u, v, row_ptr, col_idx, kernel_size, stride, padding, dilation, groups):
    return u.new_empty(u.shape), v.new_empty(v.shape), grad.new_empty(col_idx.shape[0])


@register_fake("cmd_ext::_lrs_conv2d_grad_values")
def _(grad, x, row_ptr, col_idx, kernel_size, stride, padding, dilation, groups):
    return grad.new_empty(col_idx.shape[0])


def _conv_setup(ctx, inputs, output):
    *tensors, _bias, kernel_size, stride, padding, dilation, groups = inputs
    ctx.save_for_backward(*tensors)
    ctx.geometry = kernel_size, stride, padding, dilation, groups


def _factor_grads(grad, x, u, v, need_u, need_v, geometry):
    """Gradients for u and v of the low-rank branch, through torch's convolution gradients.

    z = V * x is computed again rather than kept, as it costs a fraction r / m of the layer.
    """
    m, r = u.shape
    if r == 0:
        return torch.zeros_like(u) if need_u else None, torch.zeros_like(v) if need_v else None
    if not (need_u or need_v):
        return None, None
    kernel_size, stride, padding, dilation, groups = geometry
    v_kernel = v.reshape(groups * r, -1, *kernel_size)
    z = torch.nn.functional.conv2d(x, v_kernel, None, stride, padding, dilation, groups)
    dz, gu, _ = torch.ops.aten.convolution_backward(
        grad, z, u.reshape(m, r, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups, [need_v, need_u, False]
    )
    gv = None
    if need_v:
        _, gv, _ = torch.ops.aten.convolution_backward(
            dz, x, v_kernel, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
        )
    return gu.reshape(m, r) if need_u else None, gv.reshape(v.shape) if need_v else None


def _weight_grads(grad, x, u, v, pattern, needs, geometry):
    """Gradients for u, v and values, as far as needed; on the CPU one pass that is not differentiable itself."""
    need_u, need_v, need_values = needs
    if u.shape[1] > 0 and all(needs) and grad.device.type == "cpu" and not torch.is_grad_enabled():
        return _ops._lrs_conv2d_grad_weights(grad, x, u, v, *pattern[:2], *geometry)
    gu, gv = _factor_grads(grad, x, u, v, need_u, need_v, geometry)
    return gu, gv, _ops._lrs_conv2d_grad_values(grad, x, *pattern[:2], *geometry) if need_values else None


def _conv_backward(ctx, grad):
    """dx by the transposed support, dS on the support only."""
    x, u, v, values, *pattern = ctx.saved_tensors
    need_x, need_u, need_v, need_values, *_, need_bias, _, _, _, _, _ = ctx.needs_input_grad
    gx = None
    if need_x:
        gx = _ops._lrs_conv2d_grad_input(grad, u, v, values, *pattern, x.shape[2:], *ctx.geometry)
    gu, gv, gvalues = _weight_grads(grad, x, u, v, pattern, (need_u, need_v, need_values), ctx.geometry)
    gbias = grad.sum((0, 2, 3)) if need_bias else None
    return gx, gu, gv, gvalues, None, None, None, None, None, gbias, None, None, None, None, None


register_autograd("cmd_ext::lrs_conv2d", _conv_backward, setup_context=_conv_setup)


def _grad_input_setup(ctx, inputs, output):
    *tensors, _input_size, kernel_size, stride, padding, dilation, groups = inputs
    ctx.save_for_backward(*tensors)
    ctx.geometry = kernel_size, stride, padding, dilation, groups


def _grad_input_backward(ctx, gx):
    """dx is linear in dy and in the weights, so with gx in the place of x these are the layer and its own gradients."""
    grad, u, v, values, *pattern = ctx.saved_tensors
    need_grad, need_u, need_v, need_values, *_ = ctx.needs_input_grad
    ggrad = None
    if need_grad:
        ggrad = _ops.lrs_conv2d(gx, u, v, values, *pattern, None, *ctx.geometry)
    gu, gv, gvalues = _weight_grads(grad, gx, u, v, pattern, (need_u, need_v, need_values), ctx.geometry)
    return ggrad, gu, gv, gvalues, *[None] * 11


register_autograd("cmd_ext::_lrs_conv2d_grad_input", _grad_input_backward, setup_context=_grad_input_setup)


def _grad_values_setup(ctx, inputs, output):
    grad, x, row_ptr, col_idx, *geometry = inputs
    ctx.save_for_backward(grad, x, row_ptr, col_idx)
    ctx.geometry = geometry


def _grad_values_backward(ctx, gvalues):
    """dS is bilinear in dy and x: the sparse layer, and its gradient for x, with the values gvalues and rank 0."""
    grad, x, row_ptr, col_idx = ctx.saved_tensors
    need_grad, need_x, *_ = ctx.needs_input_grad
    kernel_size, groups = ctx.geometry[0], ctx.geometry[-1]
    n = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    pattern = _with_transpose(row_ptr, col_idx, n, groups)
    u, v = x.new_empty(grad.shape[1], 0), x.new_empty(0, n)
    ggrad = gx = None
    if need_grad:
        ggrad = _ops.lrs_conv2d(x, u, v, gvalues, *pattern, None, *ctx.geometry)
    if need_x:
        gx = _ops._lrs_conv2d_grad_input(grad, u, v, gvalues, *pattern, x.shape[2:], *ctx.geometry)
    return ggrad, gx, *[None] * 7


register_autograd("cmd_ext::_lrs_conv2d_grad_values", _grad_values_backward, setup_context=_grad_values_setup)
