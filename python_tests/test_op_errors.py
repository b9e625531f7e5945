"""The messages of the operators: every wrong argument is named, with what was wanted and what came."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from op_bounds import F32, F64, apply, random
from test_ops import RAW, public_args, sample
from torch import Tensor

from cmd_ext import ops
from cmd_ext.ops import Pattern


def entry(index: int, value: int):
    """A change of one entry of a vector."""

    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] = value
        return t

    return change


def support_errors(op: str, ptr: str, idx: str) -> list[tuple]:
    return [
        (op, ptr, Tensor.long, f"{ptr} must be int32"),
        (op, idx, Tensor.long, f"{idx} must be int32"),
        (op, ptr, lambda t: t[:-1], f"{ptr} must be [rows + 1] = ["),
        (op, ptr, entry(-1, 99), f"{ptr} must run from 0 to nnz = "),
        (op, ptr, entry(0, 1), f"{ptr} must run from 0 to nnz = "),
        (op, ptr, entry(1, 99), f"{ptr} must not decrease, got 99 then "),
        (op, ptr, entry(2, -1), f"{ptr} must not decrease, got "),
        (op, idx, lambda t: t[:-1], ""),
        (op, idx, entry(0, -1), f"{idx} must lie in [0, "),
        (op, idx, entry(-1, 1 << 30), f"{idx} must lie in [0, "),
        (op, idx, entry(3, -(1 << 31)), f"{idx} must lie in [0, "),
    ]


def weight_errors(op: str, first: str) -> list[tuple]:
    return [
        (op, first, Tensor.int, f"{first} must be float32, float64, bfloat16 or float16"),
        *((op, name, Tensor.float, f"{name} must have the dtype of the first") for name in ("u", "v", "values")),
        (op, "u", lambda t: t[0], "u must be [m, r], got 1-dimensional [2]"),
        (op, "values", lambda t: t[None], "values must be [nnz], got 2-dimensional [1, "),
        (op, "values", lambda t: t[1:], ""),
    ]


def geometry_errors(op: str) -> list[tuple]:
    return [
        (op, "kernel_size", lambda _: (0, 3), "kernel_size must be >= 1, got [0, 3]"),
        (op, "stride", lambda _: (1, 0), "stride must be >= 1, got [1, 0]"),
        (op, "padding", lambda _: (-1, 0), "padding must be >= 0, got [-1, 0]"),
        (op, "dilation", lambda _: (1, -1), "dilation must be >= 1, got [1, -1]"),
        (op, "stride", lambda _: (1, 1, 1), "stride must be two integers, got [1, 1, 1]"),
        (op, "groups", lambda _: 0, "groups must be >= 1, got 0"),
        (op, "dilation", lambda _: (9, 2), "padded input 5 is smaller than the kernel's span 10"),
    ]


ERRORS = [
    ("truncated_svd", "a", lambda t: t[0], "a must be [b, m, n], got 2-dimensional [4, 5]"),
    ("truncated_svd", "a", Tensor.int, "a must be float32, float64, bfloat16 or float16"),
    ("truncated_svd", "a", Tensor.half, "a must be float32 or float64, got a 16-bit type"),
    ("truncated_svd", "a", lambda t: t * torch.nan, "the SVD did not converge; a must be free of NaN"),
    ("truncated_svd", "basis", Tensor.float, "basis must have the dtype of the first argument"),
    ("truncated_svd", "basis", lambda t: t[0], "basis must be [b, n, l], got 2-dimensional [5, 4]"),
    ("truncated_svd", "basis", lambda t: t[:1], "basis must be [b, n, l] with b = 2 and n = 5, got [1, 5, 4]"),
    ("truncated_svd", "basis", lambda t: t.mT, "basis must be [b, n, l] with b = 2 and n = 5, got [2, 4, 5]"),
    ("truncated_svd", "basis", lambda t: t.repeat(1, 1, 2), "basis must have at most min(m, n) = 4 columns, got 8"),
    ("truncated_svd", "rank", lambda _: 5, "rank must lie in [0, columns of basis] = [0, 4], got 5"),
    ("truncated_svd", "rank", lambda _: -1, "rank must lie in [0, columns of basis] = [0, 4], got -1"),
    ("truncated_svd", "n_iter", lambda _: -1, "n_iter must be >= 0, got -1"),
    ("topk_csr", "a", Tensor.int, "a must be float32, float64, bfloat16 or float16"),
    ("topk_csr", "a", lambda t: t[0], "a must be [b, m, n], got 2-dimensional [5, 6]"),
    ("topk_csr", "nnz", lambda _: -1, "nnz must lie in [0, m * n] = [0, 30], got -1"),
    ("topk_csr", "nnz", lambda _: 31, "nnz must lie in [0, m * n] = [0, 30], got 31"),
    ("residual_topk_csr", "w", Tensor.int, "w must be float32, float64, bfloat16 or float16"),
    ("residual_topk_csr", "w", Tensor.half, "w must be float32 or float64, got a 16-bit type"),
    ("residual_topk_csr", "w", lambda t: t[0], "w must be [b, m, n], got 2-dimensional [4, 6]"),
    ("residual_topk_csr", "u", lambda t: t[0], "u must be [b, m, r], got 2-dimensional [4, 3]"),
    ("residual_topk_csr", "v", lambda t: t[0], "v must be [b, groups * r, n], got 2-dimensional [6, 6]"),
    ("residual_topk_csr", "u", Tensor.float, "u must have the dtype of the first argument"),
    ("residual_topk_csr", "v", Tensor.float, "v must have the dtype of the first argument"),
    ("residual_topk_csr", "u", lambda t: t[:, 1:], "u must be [b, m, r] = [2, 4, 3], got [2, 3, 3]"),
    ("residual_topk_csr", "v", lambda t: t[:, 1:], "v must be [b, groups * r, n] with r = u.size(2) = 3, got "),
    ("residual_topk_csr", "v", lambda t: t[:, :0], "v must be [b, groups * r, n] with r = u.size(2) = 3, got "),
    ("residual_topk_csr", "u", lambda t: t[..., :0], "v must be [b, groups * r, n] with r = u.size(2) = 0, got "),
    ("residual_topk_csr", "u", lambda t: t[..., :2], "groups = v.size(1) / r = 3 must divide m = 4"),
    ("residual_topk_csr", "v", lambda t: t[..., 1:], "v must be [b, groups * r, n] = [2, 6, 6], got [2, 6, 5]"),
    ("residual_topk_csr", "nnz", lambda _: 25, "nnz must lie in [0, m * n] = [0, 24], got 25"),
    *(e for e in support_errors("csr_transpose", "row_ptr", "col_idx") if "rows + 1" not in e[3]),
    ("csr_transpose", "row_ptr", lambda t: t[None], "row_ptr must be [m + 1], got 2-dimensional [1, 5]"),
    ("csr_transpose", "row_ptr", lambda t: t[:0], "row_ptr must be [m + 1], got [0]"),
    ("csr_transpose", "col_idx", lambda t: t[None], "col_idx must be [nnz], got 2-dimensional [1, 9]"),
    ("csr_transpose", "n", lambda _: -1, "n must be >= 0, got -1"),
    ("csr_transpose", "n", lambda _: 1 << 30, "m and groups * n must fit in int32, got m 4 and groups * n 2147483648"),
    ("csr_transpose", "groups", lambda _: 3, "groups must divide m = row_ptr.size(0) - 1 = 4, got 3"),
    *weight_errors("lrs_linear", "x"),
    *support_errors("lrs_linear", "row_ptr", "col_idx"),
    ("lrs_linear", "x", lambda t: t[0, 0], "x must be [..., n], got a scalar"),
    ("lrs_linear", "x", lambda t: t[:, 1:], "x must be [..., n] with n = v.size(1) = 6, got [3, 5]"),
    ("lrs_linear", "u", lambda t: t[:, 1:], "u must be [m, r] with r = v.size(0) = 2, got [5, 1]"),
    ("lrs_linear", "v", lambda t: t[0], "v must be [r, n], got 1-dimensional [6]"),
    ("lrs_linear", "bias", lambda t: t[1:], "bias must be [m] = [5], got [4]"),
    ("lrs_linear", "bias", Tensor.half, "bias must have the dtype of the first argument"),
    *support_errors("sddmm", "row_ptr", "col_idx"),
    ("sddmm", "a", Tensor.int, "a must be float32, float64, bfloat16 or float16"),
    ("sddmm", "a", lambda t: t[0], "a must be [m, k], got 1-dimensional [4]"),
    ("sddmm", "b", lambda t: t[0], "b must be [n, k], got 1-dimensional [4]"),
    ("sddmm", "b", lambda t: t[:, 1:], "b must be [n, k] with k = a.size(1) = 4, got [6, 3]"),
    ("sddmm", "b", Tensor.float, "b must have the dtype of the first argument"),
    *weight_errors("lrs_conv2d", "x"),
    *support_errors("lrs_conv2d", "row_ptr", "col_idx"),
    *geometry_errors("lrs_conv2d"),
    ("lrs_conv2d", "x", lambda t: t[0], "x must be [batch, channels, height, width], got 3-dimensional [4, 3, 3]"),
    (
        "lrs_conv2d",
        "x",
        lambda t: t[:, 1:],
        "x must have v.size(1) / kernel taps * groups = 4 channels, got [2, 3, 3, 3]",
    ),
    ("lrs_conv2d", "v", lambda t: t[0], "v must be [groups * r, n], got 1-dimensional [12]"),
    ("lrs_conv2d", "v", lambda t: t[1:], "v must be [groups * r, n] with groups * r = 4, got [3, 12]"),
    ("lrs_conv2d", "v", lambda t: t[:, 1:], "v.size(1) must be a multiple of the kernel's 6 taps, got 11"),
    ("lrs_conv2d", "groups", lambda _: 3, "groups must divide m = u.size(0) = 4, got 3"),
    ("lrs_conv2d", "bias", lambda t: t[1:], "bias must be [m] = [4], got [3]"),
    ("lrs_conv2d", "bias", Tensor.float, "bias must have the dtype of the first argument"),
    *weight_errors("_lrs_conv2d_grad_input", "grad"),
    *support_errors("_lrs_conv2d_grad_input", "col_ptr", "row_idx"),
    *geometry_errors("_lrs_conv2d_grad_input"),
    ("_lrs_conv2d_grad_input", "grad", lambda t: t[0], "grad must be [batch, m, out_height, out_width]"),
    ("_lrs_conv2d_grad_input", "grad", lambda t: t[..., 1:], "grad must be [batch, m, out_height, out_width]"),
    ("_lrs_conv2d_grad_input", "perm", lambda t: t[1:], "perm must be [nnz] = [20], got [19]"),
    ("_lrs_conv2d_grad_input", "input_size", lambda _: (4, 5, 6), "input_size must be two integers, got [4, 5, 6]"),
    *support_errors("_lrs_conv2d_grad_values", "row_ptr", "col_idx"),
    *geometry_errors("_lrs_conv2d_grad_values"),
    ("_lrs_conv2d_grad_values", "grad", Tensor.int, "grad must be float32, float64, bfloat16"),
    ("_lrs_conv2d_grad_values", "x", Tensor.float, "x must have the dtype of the first argument"),
    ("_lrs_conv2d_grad_values", "grad", lambda t: t[0], "grad must be [batch, m, out_height, out_width]"),
    ("_lrs_conv2d_grad_values", "x", lambda t: t[0], "x must be [batch, channels, height, width]"),
    ("_lrs_conv2d_grad_values", "groups", lambda _: 3, "groups must divide 4 and 4, got 3"),
    ("_lrs_conv2d_grad_values", "x", lambda t: t[..., 1:], "grad must be [batch, m, out_height, out_width]"),
]


@pytest.mark.parametrize(("name", "argument", "change", "message"), ERRORS, ids=[f"{e[0]}: {e[3]}" for e in ERRORS])
def test_wrong_argument(name, argument, change, message):
    op = getattr(RAW, name)
    arguments = [a.name for a in op.default._schema.arguments]
    args = dict(zip(arguments, apply(Tensor.detach, sample(name)), strict=True))
    args[argument] = change(args[argument])
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        op(**args)


def test_wrong_permutation_is_never_followed():
    args = sample("_lrs_conv2d_grad_input")
    args[8] = args[8] + 1
    with pytest.raises((RuntimeError, IndexError)):
        RAW._lrs_conv2d_grad_input(*args)
    args = sample("lrs_linear")
    args[8] = args[8] + 1
    with pytest.raises((RuntimeError, IndexError)):
        RAW.lrs_linear(*args).sum().backward()


def csr(row_ptr: list[int], col_idx: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(row_ptr, dtype=torch.int32), torch.tensor(col_idx, dtype=torch.int32)


@pytest.mark.parametrize(
    ("row_ptr", "col_idx", "message"),
    [
        ([[0, 1]], [0], "CSR: row_ptr must be [m + 1] and col_idx [nnz], got [1, 2] and [1]"),
        ([], [], "CSR: row_ptr must be [m + 1] and col_idx [nnz], got [0] and [0]"),
        ([0, 1], [[0]], "CSR: row_ptr must be [m + 1] and col_idx [nnz], got [2] and [1, 1]"),
        ([0, 2], [0], "CSR: row_ptr must rise from 0 to nnz = 1, got 0 to 2"),
        ([1, 2], [0, 1], "CSR: row_ptr must rise from 0 to nnz = 2, got 1 to 2"),
        ([0, 2, 1, 2], [0, 1], "CSR: row_ptr must rise from 0 to nnz = 2, got 0 to 2"),
        ([0, 1], [3], "CSR: col_idx must lie in [0, 3), got 3 to 3"),
        ([0, 2], [-1, 0], "CSR: col_idx must lie in [0, 3), got -1 to 0"),
        ([0, 2], [1, 0], "CSR: col_idx must ascend strictly within each row, got repeated or unsorted columns"),
        ([0, 1, 3], [2, 1, 1], "CSR: col_idx must ascend strictly within each row, got repeated or unsorted columns"),
    ],
)
def test_wrong_csr(row_ptr, col_idx, message):
    for check in (ops.csr_rows, Pattern.from_csr):
        with pytest.raises(ValueError, match=re.escape(message)):
            check(*csr(row_ptr, col_idx), 3)


@pytest.mark.parametrize("groups", [0, -1, 2])
def test_wrong_groups_of_a_pattern(groups):
    with pytest.raises(ValueError, match=f"Pattern: groups must divide the 3 rows, got {groups}"):
        Pattern.from_csr(*csr([0, 1, 1, 2], [0, 2]), 3, groups)


def test_wrong_arguments_of_the_public_functions():
    for name, (argument, index) in itertools.product(("lrs_linear", "lrs_conv2d"), (("values", 3), ("bias", 5))):
        args = public_args(name, F64)
        args[index] = args[index].float()
        message = f"{name}: {argument} must have the dtype of x = torch.float64, got torch.float32"
        with pytest.raises(TypeError, match=message):
            getattr(ops, name)(*args)
    a, b, row_ptr, col_idx = sample("sddmm")
    with pytest.raises(TypeError, match=r"sddmm: b must have the dtype of a = torch.float64, got torch.float16"):
        ops.sddmm(a, b.half(), row_ptr, col_idx)
    a = random(6, 9)
    with pytest.raises(ValueError, match=re.escape("topk_csr: a must be [m, n] or [b, m, n], got [9]")):
        ops.topk_csr(a[0], 1)
    with pytest.raises(TypeError, match=r"residual_topk_csr: v must have the dtype of w = torch.float64"):
        ops.residual_topk_csr(a, a[:, :2], a[:2].float(), 1)
    message = "residual_topk_csr: w, u and v must be matrices or batches of them, got [6, 9], [6, 2] and [1, 2, 9]"
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.residual_topk_csr(a, a[:, :2], a[None, :2], 1)
    with pytest.raises(TypeError, match=r"truncated_svd: basis must have the dtype of a = torch.float64"):
        ops.truncated_svd(a, 3, basis=random(9, 4, dtype=F32))
    with pytest.raises(ValueError, match=re.escape("truncated_svd: a must be [b, m, n] or [m, n], got [9]")):
        ops.truncated_svd(a[0], 1)
    for rank in (-1, 7):
        message = f"truncated_svd: rank must lie in [0, min(m, n)] = [0, 6], got {rank}"
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.truncated_svd(a, rank)
