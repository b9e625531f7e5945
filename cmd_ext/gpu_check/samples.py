"""The arguments of the operators in the checks, the exact results, and the settings under which they are compared.

Arguments are those of the dispatcher, so that one list serves the operators, opcheck, gradcheck and graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_ext import ops, ref
from cmd_ext.ops import Pattern

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
LAST = torch.channels_last
RAW = ops._ops


@dataclass(frozen=True)
class Target:
    """A device; `native` where the CUDA path runs on it (a GPU, or the emulator of the tests on CPU tensors)."""

    device: torch.device
    native: bool

    @property
    def large(self) -> bool:
        """Whether there is the speed for sizes that fill many tiles."""
        return self.device.type == "cuda"


def target(device: torch.device) -> Target:
    return Target(device, device.type == "cuda")


# Settings -----------------------------------------------------------------------------------------------------------

STRICT = (
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    (torch.backends.cudnn, "deterministic", True),
)


@contextmanager
def settings(wanted: Iterable[tuple[object, str, object]]) -> Iterator[None]:
    """Attributes of torch.backends, for a while."""
    before = [(place, name, getattr(place, name)) for place, name, _ in wanted]
    try:
        for place, name, value in wanted:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


@contextmanager
def path(name: str, tf32: bool = False) -> Iterator[None]:
    """Layers on a GPU take this path: "csr", "mma" or, for "", the one that they choose; `tf32` opens mma to float."""
    wanted = {"CMD_EXT_CUDA_PATH": name, "CMD_EXT_TF32": "1" if tf32 else "0"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def replayable(call: Callable[[], object], device: torch.device, pool=None) -> Callable[[], object]:
    """A function that repeats the call on the same tensors: as a captured graph on a GPU."""
    if device.type != "cuda":
        return call
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):  # warm-up: libraries choose algorithms and allocate, which no graph may hold
        for _ in range(2):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = call()

    def replay() -> object:
        graph.replay()
        return out

    return replay


# Arguments ----------------------------------------------------------------------------------------------------------


def change(function: Callable[[Tensor], Tensor], args: Iterable) -> list:
    return [function(a) if isinstance(a, Tensor) else a for a in args]


def random(on: Target, *size: int, dtype: torch.dtype = F64) -> Tensor:
    """Normal numbers from the CPU's generator, so that every device gets the same."""
    return torch.randn(size, dtype=F64).to(on.device, dtype)


def weights(on: Target, m: int, n: int, rank: int, nnz: int, groups: int = 1, dtype: torch.dtype = F64) -> list[Tensor]:
    """u, v, values and the five tensors of the pattern."""
    values, row_ptr, col_idx = ref.topk_csr(torch.randn(m, n, dtype=F64), nnz)
    pattern = [row_ptr, col_idx, *ref.csr_transpose(row_ptr, col_idx, n, groups)]
    factors = [random(on, m, rank, dtype=dtype), random(on, groups * rank, n, dtype=dtype)]
    return [*factors, values.to(on.device, dtype), *(t.to(on.device) for t in pattern)]


# (sizes of x before n, m, n, rank, nnz)
LINEAR = [
    ((), 7, 96, 3, 40),
    *(((batch,), 37, 53, 5, 300) for batch in (1, 3, 7, 20, 100)),
    ((2, 3), 7, 96, 4, 100),
    ((2, 0), 7, 96, 4, 100),
    ((4,), 7, 96, 4, 0),
    ((4,), 7, 96, 0, 100),
    ((4,), 7, 96, 0, 0),
    ((4,), 7, 40, 7, 280),
    ((5,), 1, 40, 1, 10),
    ((5,), 40, 1, 1, 10),
    ((20,), 40, 48, 5, 300),
    ((1,), 8, 8, 0, 9),
    ((130,), 264, 72, 70, 900),
]
LARGE_LINEAR = [((33,), 520, 610, 6, 9000), ((300,), 520, 616, 70, 9000), ((2, 515), 1032, 1024, 90, 60000)]

# x sizes, m, kernel, stride, padding, dilation, groups, rank, density
CONV = {
    "one pixel": ((2, 6, 1, 1), 5, (1, 1), (1, 1), (0, 0), (1, 1), 1, 2, 0.3),
    "4x4 maps": ((33, 8, 4, 4), 20, (3, 3), (1, 1), (1, 1), (1, 1), 1, 3, 0.2),
    "57x33, all asymmetric": ((2, 6, 57, 33), 6, (3, 2), (2, 1), (1, 0), (2, 1), 2, 2, 0.3),
    "stride 2": ((2, 16, 43, 40), 4, (3, 3), (2, 2), (1, 1), (1, 1), 2, 2, 0.05),
    "stride > kernel": ((2, 4, 12, 9), 6, (2, 1), (3, 4), (1, 2), (1, 1), 1, 2, 0.5),
    "depthwise": ((2, 6, 15, 14), 12, (5, 5), (1, 2), (2, 2), (1, 1), 6, 1, 0.4),
    "1x7": ((2, 3, 5, 17), 4, (1, 7), (1, 1), (0, 3), (1, 1), 1, 2, 0.5),
    "kernel larger than image": ((2, 3, 2, 2), 4, (5, 5), (1, 1), (2, 2), (1, 1), 1, 2, 0.3),
    "one channel in": ((2, 1, 9, 7), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 0.5),
    "one channel out": ((2, 3, 9, 7), 1, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 0.5),
    "rank 0, nnz 0": ((2, 4, 6, 6), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0, 0),
    "full": ((2, 4, 6, 6), 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, 3, 1),
    "3x3": ((2, 16, 7, 6), 24, (3, 3), (1, 1), (1, 1), (1, 1), 1, 5, 0.2),
    "groups": ((1, 32, 5, 5), 16, (3, 2), (2, 1), (1, 0), (1, 2), 2, 3, 0.3),
    "no S": ((2, 16, 4, 4), 8, (3, 3), (2, 2), (1, 1), (1, 1), 1, 8, 0),
    "no rank": ((2, 16, 4, 4), 8, (3, 3), (1, 1), (2, 2), (2, 2), 1, 0, 0.5),
    "wide": ((1, 80, 5, 4), 264, (1, 1), (1, 1), (0, 0), (1, 1), 1, 70, 0.05),
    "deep": ((1, 288, 3, 3), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, 80, 0.02),
}
LARGE_CONV = {
    "28x28, 64 channels": ((8, 64, 28, 28), 72, (3, 3), (1, 1), (1, 1), (1, 1), 1, 16, 0.05),
    "14x14, 128 channels, stride 2": ((9, 128, 15, 14), 136, (3, 3), (2, 2), (1, 1), (1, 1), 1, 70, 0.02),
    "80x80": ((1, 64, 80, 80), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, 2, 0.05),
}
# Channels of a group, in and out, in whole chunks of 16 bytes.
TENSOR_CORE_CASES = ("3x3", "groups", "no S", "no rank", "wide", "deep", *LARGE_CONV)


def linear_args(on: Target, case: tuple, dtype: torch.dtype) -> list:
    batch, m, n, rank, nnz = case
    return [random(on, *batch, n, dtype=dtype), *weights(on, m, n, rank, nnz, 1, dtype), random(on, m, dtype=dtype)]


def conv_args(on: Target, case: tuple, dtype: torch.dtype, memory_format=torch.contiguous_format) -> list:
    size, m, kernel, *geometry, groups, rank, density = case
    n = size[1] // groups * kernel[0] * kernel[1]
    layer = weights(on, m, n, rank, int(density * m * n), groups, dtype)
    x = random(on, *size, dtype=dtype).contiguous(memory_format=memory_format)
    return [x, *layer, random(on, m, dtype=dtype), kernel, *geometry, groups]


def gradient_args(
    on: Target, name: str, case: tuple, dtype: torch.dtype, memory_format=torch.contiguous_format
) -> list:
    """Arguments of the operator that gives conv's gradient for the input or for the values of S."""
    x, *layer, _, kernel, stride, padding, dilation, groups = conv_args(on, case, dtype, memory_format)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(x.shape[2:], padding, spans, stride, strict=True)]
    grad = random(on, x.shape[0], len(layer[0]), *out, dtype=dtype).contiguous(memory_format=memory_format)
    geometry = (kernel, stride, padding, dilation, groups)
    if name == "_lrs_conv2d_grad_input":
        return [grad, *layer, tuple(x.shape[2:]), *geometry]
    return [grad, x, *layer[3:5], *geometry]


# What the operators of a layer compute, from the arguments of the dispatcher.


def _weight(u, v, values, row_ptr, col_idx, groups):
    return ref.dense_weight(u, v, values, Pattern(row_ptr, col_idx, row_ptr, col_idx, col_idx), groups)


def _linear(x, u, v, values, *rest):
    return ref.lrs_linear(x, u, v, values, Pattern(*rest[:5]), rest[5])


def _conv(x, u, v, values, *rest):
    return ref.lrs_conv2d(x, u, v, values, Pattern(*rest[:5]), *rest[5:])


def _grad_input(grad, u, v, values, row_ptr, col_idx, _col_ptr, _row_idx, _perm, size, kernel, *geometry):
    weight = _weight(u, v, values, row_ptr, col_idx, geometry[-1]).view(len(u), -1, *kernel)
    channels = weight.shape[1] * geometry[-1]
    return torch.nn.grad.conv2d_input((len(grad), channels, *size), weight, grad, *geometry)


def _grad_values(grad, x, row_ptr, col_idx, kernel, *geometry):
    size = (grad.shape[1], x.shape[1] // geometry[-1], *kernel)
    dense = torch.nn.grad.conv2d_weight(x, size, grad, *geometry).reshape(len(row_ptr) - 1, -1)
    return dense[ops.csr_rows(row_ptr, col_idx, dense.shape[1]), col_idx.long()]


ORACLES = {
    "lrs_linear": _linear,
    "dense_weight": _weight,
    "sddmm": ref.sddmm,
    "lrs_conv2d": _conv,
    "_lrs_conv2d_grad_input": _grad_input,
    "_lrs_conv2d_grad_values": _grad_values,
}

SMALL_CONV = ((2, 4, 3, 3), 4, (2, 3), (2, 1), (1, 2), (1, 2), 2, 2, 0.42)


def sample(on: Target, name: str) -> list:
    """Small arguments of an operator in double."""
    if name == "truncated_svd":
        return [random(on, 2, 4, 5), random(on, 2, 5, 4), 2, 1]  # as many columns as rows: the iteration is exact
    if name == "topk_csr":
        return [random(on, 2, 5, 6), 7]
    if name == "residual_topk_csr":
        return [random(on, 2, 4, 6), random(on, 2, 4, 2), random(on, 2, 4, 6), 7]
    if name == "csr_transpose":
        return [*weights(on, 4, 12, 0, 20, 2)[3:5], 12, 2]
    if name == "lrs_linear":
        return linear_args(on, ((3,), 5, 6, 2, 9), F64)
    if name == "dense_weight":
        return [*weights(on, 4, 6, 2, 9, 2)[:5], 2]
    if name == "sddmm":
        return [random(on, 5, 4), random(on, 6, 4), *weights(on, 5, 6, 0, 9)[3:5]]
    return conv_args(on, SMALL_CONV, F64) if name == "lrs_conv2d" else gradient_args(on, name, SMALL_CONV, F64)


OPS = ("truncated_svd", "topk_csr", "residual_topk_csr", "csr_transpose", *ORACLES)


@dataclass(frozen=True)
class Call:
    """An operator with a way to draw arguments, always of the same sizes."""

    label: str
    name: str
    draw: Callable[[Target], list]
    route: str = ""

    def run(self, args: list) -> list[Tensor]:
        with path(self.route):
            out = getattr(RAW, self.name)(*args)
        return [out] if isinstance(out, Tensor) else list(out)


def calls() -> list[Call]:
    """Every operator, and the layers on each of their paths, at sizes of several tiles."""
    conv = ((3, 16, 14, 13), 24, (3, 3), (1, 1), (1, 1), (1, 1), 1, 9, 0.1)
    found = [
        Call("truncated_svd", "truncated_svd", lambda on: [random(on, 2, 80, 90, dtype=F32),
                                                           random(on, 2, 90, 20, dtype=F32), 12, 2]),
        Call("topk_csr", "topk_csr", lambda on: [random(on, 2, 200, 331, dtype=F32), 7000]),
        Call("residual_topk_csr", "residual_topk_csr", lambda on: [
            random(on, 2, 70, 90, dtype=F32), random(on, 2, 70, 5, dtype=F32), random(on, 2, 5, 90, dtype=F32), 999]),
        Call("csr_transpose", "csr_transpose", lambda on: [*weights(on, 90, 70, 0, 900)[3:5], 70, 1]),
        Call("dense_weight", "dense_weight", lambda on: [*weights(on, 70, 90, 6, 700, 1, F32)[:5], 1]),
        Call("sddmm", "sddmm", lambda on: [random(on, 70, 700, dtype=F32), random(on, 90, 700, dtype=F32),
                                           *weights(on, 70, 90, 0, 500)[3:5]]),
        Call("lrs_linear, 3 tokens", "lrs_linear", lambda on: linear_args(on, ((3,), 70, 96, 6, 700), F32), "csr"),
        Call("lrs_linear, csr", "lrs_linear", lambda on: linear_args(on, ((100,), 70, 96, 6, 700), F32), "csr"),
        Call("lrs_linear, mma", "lrs_linear", lambda on: linear_args(on, ((100,), 72, 96, 9, 700), BF16), "mma"),
        Call("lrs_conv2d, csr", "lrs_conv2d", lambda on: conv_args(on, conv, F32), "csr"),
        Call("lrs_conv2d, mma", "lrs_conv2d", lambda on: conv_args(on, conv, BF16, LAST), "mma"),
    ]  # fmt: skip
    for name in ("_lrs_conv2d_grad_input", "_lrs_conv2d_grad_values"):
        found.append(Call(f"{name}, csr", name, lambda on, n=name: gradient_args(on, n, conv, F32), "csr"))
    name = "_lrs_conv2d_grad_input"
    found.append(Call(f"{name}, mma", name, lambda on: gradient_args(on, name, conv, BF16, LAST), "mma"))
    return found
