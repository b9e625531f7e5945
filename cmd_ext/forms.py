"""The two forms of a convolution's low-rank branch, and the way between them.

A kernel [m, c, kh, kw] (c channels per group, n = c * kh * kw) is factored as a matrix [m * taps, n / taps]:

* "channel", taps = 1: [m, c * kh * kw]. V is a kh x kw convolution to r channels, U a 1 x 1 convolution.
* "spatial", taps = kh: [m * kh, c * kw], row (output, kernel row), column (channel, kernel column). V is a 1 x kw
  convolution with the horizontal stride, padding and dilation, U a kh x 1 convolution with the vertical ones. At equal
  parameters its mean error over trained 3x3 layers is the lower one (a row of the bench group decompose).

The mirrored arrangement, kh x 1 first, takes as many multiply-adds for a square kernel, stride and image; rows first
reads images in the order of their memory. S is CSR over [m, n] in both forms. For kh = 1 the two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

FORMS = ("channel", "spatial")


def check_form(caller: str, form: str, kernel_size: Sequence[int], second_moment=None, choices=FORMS) -> None:
    """Raises ValueError for an unknown form and for "spatial" where it is none: 1 x 1 kernels, a second moment."""
    if form not in choices:
        raise ValueError(f"{caller}: form must be one of {', '.join(choices)}, got {form!r}")
    if form == "spatial" and not any(k > 1 for k in kernel_size):
        got = "x".join(map(str, kernel_size)) or "a matrix"
        raise ValueError(f"{caller}: form 'spatial' needs a convolution kernel larger than 1x1, got {got}")
    if form == "spatial" and second_moment is not None:
        raise ValueError(f"{caller}: second_moment needs form 'channel', got 'spatial'")


def taps_of(form: str, kernel_size: Sequence[int]) -> int:
    """Rows of the factored matrix [m * taps, n / taps] per output."""
    return kernel_size[0] if form == "spatial" else 1


def has_two_forms(kernel_size: Sequence[int]) -> bool:
    """Whether the spatial form of a kernel is another one than its channel form."""
    return len(kernel_size) == 2 and kernel_size[0] > 1


def padding_ahead(conv: nn.Conv2d) -> list[int] | None:
    """Left, right, top and bottom padding that F.pad must do ahead of the convolution; None where it pads itself."""
    left_right_top_bottom = conv._reversed_padding_repeated_twice
    symmetric = left_right_top_bottom[::2] == left_right_top_bottom[1::2]
    return None if conv.padding_mode == "zeros" and symmetric else left_right_top_bottom


def sides(taps: int) -> str:
    """The sides of the factored matrix, for messages."""
    return "m, n" if taps == 1 else "m * kernel_h, n / kernel_h"


def arrange(weight: Tensor) -> Tensor:
    """[m, c, kh, kw] as the spatial form's matrix [m * kh, c * kw]."""
    m, c, kh, kw = weight.shape
    return weight.transpose(1, 2).reshape(m * kh, c * kw)


def restore(matrix: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """The inverse of arrange, as [m, c * kh * kw]."""
    kh, kw = kernel_size
    m, c = matrix.shape[0] // kh, matrix.shape[1] // kw
    return matrix.reshape(m, kh, c, kw).transpose(1, 2).reshape(m, c * kh * kw)


def restore_csr(values: Tensor, row_ptr: Tensor, col_idx: Tensor, kernel_size: Sequence[int], columns: int):
    """S over the spatial form's [m * kh, columns] as CSR over [m, columns * kh]: values, row_ptr, col_idx."""
    kh, kw = kernel_size
    rows, n = ops.csr_rows(row_ptr, col_idx, columns), columns * kh
    channel, j = col_idx.long() // kw, col_idx.long() % kw
    where = rows // kh * n + (channel * kh + rows % kh) * kw + j
    where, order = where.sort()
    ends = torch.arange((row_ptr.numel() - 1) // kh + 1, device=where.device) * n
    return values[order], torch.searchsorted(where, ends).to(row_ptr.dtype), (where % n).to(col_idx.dtype)


def spatial_weight(
    u: Tensor, v: Tensor, values: Tensor, pattern: ops.Pattern, kernel_size: Sequence[int], groups: int
) -> Tensor:
    """U V + S of the spatial form as [m, n], differentiable.

    Args:
        u, v: [m * kh, r] and [groups * r, n / kh].
        values, pattern: S over [m, n].
        kernel_size: (kh, kw).
    """
    m, n = u.shape[0] // kernel_size[0], v.shape[1] * kernel_size[0]
    none = torch.zeros(u.shape[0] + 1, dtype=torch.int32, device=u.device), pattern.col_idx[:0]
    low_rank = ops.dense_weight(u, v, values[:0], ops.Pattern(*none, *none, none[1]), groups)
    return restore(low_rank, kernel_size) + ops.dense_weight(
        u.new_empty(m, 0), v.new_empty(0, n), values, pattern, groups
    )


def thin_kernels(u: Tensor, v: Tensor, kernel_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """V and U of the spatial form as kernels [groups * r, c, 1, kw] and [m, r, kh, 1].

    Contiguous: a transposed view would pass for channels_last and decide the memory format of the output.
    """
    kh, kw = kernel_size
    first = v.reshape(v.shape[0], v.shape[1] // kw, 1, kw)
    return first, u.reshape(u.shape[0] // kh, kh, u.shape[1]).transpose(1, 2).contiguous().unsqueeze(-1)


def thin_convolutions(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int
) -> Tensor:
    """U (V x) + bias: the 1 x kw convolution, then the kh x 1 one."""
    z = F.conv2d(x, first, None, (1, stride[1]), (0, padding[1]), (1, dilation[1]), groups)
    return F.conv2d(z, second, bias, (stride[0], 1), (padding[0], 0), (dilation[0], 1), groups)
