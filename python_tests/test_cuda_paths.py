"""The tensor-core path of the layers, chosen by force, against cmd_ext.ref: values and gradients, packing, padding."""

from __future__ import annotations

import pytest
import torch
from op_bounds import F32, HALVES, apply, check_gradients, check_value, layer, random

from cmd_ext import ops, ref

LAST = torch.channels_last
# x sizes, m, kernel, stride, padding, dilation, groups, rank, density: chunks of 16 bytes everywhere but in the rank.
CONV = {
    "3x3": ((2, 16, 7, 6), 24, (3, 3), (1, 1), (1, 1), (1, 1), 1, 5, 0.2),
    "groups": ((1, 32, 5, 5), 16, (3, 2), (2, 1), (1, 0), (1, 2), 2, 3, 0.3),
    "no S": ((2, 16, 4, 4), 8, (3, 3), (2, 2), (1, 1), (1, 1), 1, 8, 0.0),
    "no rank": ((2, 16, 4, 4), 8, (3, 3), (1, 1), (2, 2), (2, 2), 1, 0, 0.5),
    "two launches": ((1, 80, 5, 4), 264, (1, 1), (1, 1), (0, 0), (1, 1), 1, 70, 0.05),
    "split K": ((1, 288, 3, 3), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, 80, 0.02),
}


@pytest.fixture(autouse=True)
def _on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        pytest.skip("a path of the CUDA kernels")
    monkeypatch.setenv("CMD_EXT_CUDA_PATH", "mma")


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float layers run as tf32, and are judged by its 10 bits of mantissa."""
    monkeypatch.setenv("CMD_EXT_TF32", "1")


def conv_args(case: str, dtype: torch.dtype, memory_format: torch.memory_format = LAST) -> tuple:
    size, m, kernel, stride, padding, dilation, groups, rank, density = CONV[case]
    n = size[1] // groups * kernel[0] * kernel[1]
    weights = layer(m, n, rank, int(density * m * n), groups, dtype)
    x = random(*size, dtype=dtype).contiguous(memory_format=memory_format)
    return x, *weights, random(m, dtype=dtype), kernel, stride, padding, dilation, groups


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CONV)
def test_convolution(case, dtype, memory_format):
    args = conv_args(case, dtype, memory_format)
    y = check_value("lrs_conv2d", *args, terms=args[2].shape[1] + args[1].shape[1])
    assert y.is_contiguous(memory_format=memory_format)
    check_gradients("lrs_conv2d", *args, terms=args[0][:, 0].numel() + args[2].shape[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("batch", "m", "n", "rank", "nnz"), [(20, 40, 48, 5, 300), (1, 8, 8, 0, 9), (130, 264, 72, 70, 900)]
)
def test_linear(batch, m, n, rank, nnz, dtype):
    weights, x, bias = layer(m, n, rank, nnz, dtype=dtype), random(batch, n, dtype=dtype), random(m, dtype=dtype)
    check_value("lrs_linear", x, *weights, bias, terms=n + rank)
    check_gradients("lrs_linear", x, *weights, bias, terms=m + n + batch)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("case", CONV)
def test_tf32(case):
    x, u, v, values, pattern, *rest = conv_args(case, F32)
    args = x, u, v, values, pattern, *rest
    got = ops.lrs_conv2d(*args)
    want = ref.lrs_conv2d(*apply(torch.Tensor.double, args))
    magnitude = ref.lrs_conv2d(*apply(lambda a: a.double().abs(), args))
    # Every operand (Z too) is off by at most half a unit of 10 bits.
    assert ((got.double() - want).abs() <= 2.5 * 2.0**-11 * magnitude).all()
    exact = (got.double() - want).abs().max() <= 1e-6 * magnitude.max()
    assert not exact, "the tensor cores were not used"
