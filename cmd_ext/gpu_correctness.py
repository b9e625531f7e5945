"""What `gpu-check` asks of a device: every operator against ref.py in double, its gradients, and what only a GPU can
get wrong: the order of work on streams, graphs, memory that nobody has cleared.

A check is a name and a function that tells how close it was, or raises. All of them run on any device. Arguments are
those of the dispatcher, so that one list of samples serves the operators, opcheck, gradcheck and graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd import gradcheck

from . import ops, ref
from .ops import Pattern

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
LAST = torch.channels_last
RAW = ops._ops

Check = tuple[str, Callable[[], str]]


@dataclass(frozen=True)
class Target:
    """A device; `native` where the CUDA path runs on it (a GPU, or the emulator of the tests on CPU tensors)."""

    device: torch.device
    native: bool

    @property
    def large(self) -> bool:
        """Whether there is the speed for sizes that fill many tiles."""
        return self.device.type == "cuda"


def target(name: str) -> Target:
    device = torch.device(name)
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


# Values -------------------------------------------------------------------------------------------------------------


def judge(ratios: Iterable[tuple[str, float]]) -> str:
    """Of (case, error / bound): the worst, in words; raises where it exceeds 1."""
    worst, case = max((ratio, case) for case, ratio in ratios)
    if worst > 1:
        raise AssertionError(f"error is {worst:.3g} times its bound at {case}")
    return f"{worst:.2g} of the bound at {case}"


def error_ratio(on: Target, name: str, args: list, terms: int, tf32: bool = False) -> float:
    """Largest error of an operator in units of its bound.

    The bound is one rounding to the result's dtype and `terms` roundings of its accumulator, relative to the sum of the
    magnitudes. The CUDA path also rounds the branches of 16-bit layers, and tf32 each of up to four factors.
    """
    got, oracle = getattr(RAW, name)(*args), ORACLES[name]
    exact = change(lambda a: a.cpu().double() if a.is_floating_point() else a.cpu(), args)
    want = oracle(*exact)
    magnitude = oracle(*change(lambda a: a.abs() if a.is_floating_point() else a, exact))
    if got.shape != want.shape or got.dtype != args[0].dtype or got.device != args[0].device:
        raise AssertionError(f"gave {[*got.shape]} {got.dtype} on {got.device}, want {[*want.shape]}")
    info = torch.finfo(got.dtype)
    accumulator = torch.finfo(F64 if got.dtype == F64 else F32).eps
    bound = 0.51 * info.eps * want.abs() + 2 * terms * accumulator * magnitude + info.tiny * info.eps
    if on.native and got.dtype in (BF16, F16):
        bound += 1.01 * info.eps * magnitude
    if tf32:
        bound += 4 * 2.0**-11 * magnitude
    errors = (got.cpu().double() - want).abs() / bound
    return errors.nan_to_num(nan=torch.inf).max().item() if errors.numel() else 0.0


def _layer_cases(on: Target, name: str, dtype: torch.dtype, tensor_cores: bool):
    """(case, arguments, terms) of an operator of a layer; only such as the tensor cores take, if they are asked for."""
    if name == "lrs_linear":
        for case in LINEAR + LARGE_LINEAR * on.large:
            if not tensor_cores or case[2] % 8 == 0:
                yield str(case), linear_args(on, case, dtype), case[2] + case[3] + 1
        return
    for label, case in {**CONV, **(LARGE_CONV if on.large else {})}.items():
        if tensor_cores and label not in TENSOR_CORE_CASES:
            continue
        for memory_format in (torch.contiguous_format, LAST):
            where = f"{label}, {str(memory_format).removeprefix('torch.')}"
            if name == "lrs_conv2d":
                args = conv_args(on, case, dtype, memory_format)
                yield where, args, args[2].shape[1] + args[1].shape[1] + 1
            else:
                args = gradient_args(on, name, case, dtype, memory_format)
                pixels = args[0][:, 0].numel()
                yield where, args, pixels if "values" in name else len(args[1]) * 9 + case[-2]


def _matrix_cases(on: Target, name: str, dtype: torch.dtype):
    if name == "dense_weight":
        sizes = [(7, 96, 3, 40, 1), (12, 33, 4, 99, 3), (5, 6, 0, 7, 1), (5, 6, 2, 0, 1), (40, 72, 33, 500, 1)]
        for m, n, rank, nnz, groups in [*sizes, (130, 140, 70, 900, 2), *[(1030, 2050, 20, 40000, 1)] * on.large]:
            layer = weights(on, m, n, rank, nnz, groups, dtype)
            yield f"{m}x{n}, rank {rank}, nnz {nnz}", [*layer[:5], groups], rank + 1
        return
    sizes = [(7, 96, 40, 50), (1, 9, 3, 4), (9, 1, 33, 4), (5, 6, 0, 7), (5, 6, 8, 0), (20, 30, 700, 100)]
    for m, n, k, nnz in [*sizes, *[(512, 600, 4100, 20000)] * on.large]:
        pattern = weights(on, m, n, 0, nnz)[3:5]
        yield f"{m}x{n}, k {k}, nnz {nnz}", [random(on, m, k, dtype=dtype), random(on, n, k, dtype=dtype), *pattern], k


def _value_check(on: Target, name: str, dtype: torch.dtype, route: str) -> str:
    matrices = name in ("dense_weight", "sddmm")
    cases = _matrix_cases(on, name, dtype) if matrices else _layer_cases(on, name, dtype, route == "mma")
    with path(route):
        return judge((label, error_ratio(on, name, args, terms)) for label, args, terms in cases)


def _tf32_check(on: Target, name: str) -> str:
    """Within the bound of tf32, and not as exact as float32: the tensor cores were used."""
    with path("mma", tf32=True):
        cases = list(_layer_cases(on, name, F32, True))
        told = judge((label, error_ratio(on, name, args, terms, tf32=True)) for label, args, terms in cases)
        sloppy = max(error_ratio(on, name, args, 1) for _, args, _ in cases)
    if sloppy < 10:
        raise AssertionError("results are as exact as float32: the tensor cores were not used")
    return told


def layer_checks(on: Target) -> Iterator[Check]:
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for name in ("lrs_linear", "lrs_conv2d", "_lrs_conv2d_grad_input"):
            for route in ("csr", "mma") if dtype in (BF16, F16) else ("csr",):
                yield f"{name} {kind}, {route}", partial(_value_check, on, name, dtype, route)
        for name in ("_lrs_conv2d_grad_values", "dense_weight", "sddmm"):
            yield f"{name} {kind}", partial(_value_check, on, name, dtype, "")
    for name in ("lrs_linear", "lrs_conv2d", "_lrs_conv2d_grad_input"):
        if on.native:
            yield f"{name} tf32, mma", partial(_tf32_check, on, name)


# Selection and SVD --------------------------------------------------------------------------------------------------


def same(got: Iterable[Tensor], want: Iterable[Tensor], what: str = "") -> None:
    """The same bits, but for what kind of NaN it is."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = a.detach().cpu(), b.detach().cpu()
        equal = a.shape == b.shape and a.dtype == b.dtype
        if equal and a.is_floating_point():
            known = ~b.isnan()
            equal = torch.equal(~a.isnan(), known) and torch.equal(a[known], b[known])
            equal = equal and torch.equal(a[known].signbit(), b[known].signbit())
        elif equal:
            equal = torch.equal(a, b)
        if not equal:
            raise AssertionError(f"output {i} differs {what}".rstrip())


def close(got: Iterable[Tensor], want: Iterable[Tensor], what: str = "") -> None:
    """Equal but for the order of the sums (a library may choose another algorithm)."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not b.is_floating_point():
            same([a], [b], what)
            continue
        a, b = a.detach().cpu().double(), b.detach().cpu()
        tolerance = 64 * torch.finfo(b.dtype).eps * b.double().abs().max() if b.numel() else 0
        if a.shape != b.shape or not ((a - b.double()).abs() <= tolerance).all():
            raise AssertionError(f"output {i} differs {what}".rstrip())


def _matrices(on: Target) -> dict[str, Tensor]:
    a = torch.randn(50, 70, dtype=F64)
    special = a.clone()
    special[::7, ::3], special[1::9, ::4], special[2::9, 1::4] = torch.nan, torch.inf, -torch.inf
    found = {
        "random": a,
        "row": torch.randn(1, 40, dtype=F64),
        "column": torch.randn(40, 1, dtype=F64),
        "many ties": (a * 3).round(),
        "all equal": torch.full((50, 70), -2.0, dtype=F64),
        "zeros of both signs": torch.where(a > 0, 0.0, -0.0).double(),
        "NaN and infinities": special,
        "wide range": a * 10.0 ** torch.randint(-40, 40, (50, 70)),
        "several chunks": torch.randn(200, 331, dtype=F64),
    }
    if on.large:
        found["large with ties"] = (torch.randn(515, 1501, dtype=F64) * 50).round()
    return found


def _topk_check(on: Target, dtype: torch.dtype) -> str:
    count = 0
    for name, matrix in _matrices(on).items():
        batch = torch.stack([matrix, matrix.flip(0), -matrix]).to(dtype)
        size = matrix.numel()
        for nnz in (0, 1, size // 3, size - 1, size):
            got = RAW.topk_csr(batch.to(on.device), nnz)
            same(got, ref.topk_csr(batch, nnz), f"from the reference for {name}, nnz {nnz}")
            same(got, RAW.topk_csr(batch, nnz), f"from the CPU for {name}, nnz {nnz}")
            count += 1
    return f"{count} cases, the same bits as the CPU"


def _residual_check(on: Target, dtype: torch.dtype) -> str:
    ratios = []
    for b, m, n, rank, groups in [(2, 12, 33, 3, 1), (1, 12, 20, 2, 3), (2, 5, 6, 0, 1), (1, 70, 90, 40, 1)] + [
        (1, 515, 1030, 90, 1)
    ] * on.large:
        w, u, v = (random(on, *s, dtype=dtype) for s in ((b, m, n), (b, m, rank), (b, groups * rank, n)))
        residual, *kept = RAW.residual_topk_csr(w, u, v, m * n // 4)
        same(kept, ref.topk_csr(residual.cpu(), m * n // 4), f"from the top-k of its residual at {m}x{n}")
        exact = [t.cpu().double() for t in (w, u, v)]
        want = ref.residual_topk_csr(*exact, 0)[0]
        magnitude = ref.residual_topk_csr(-exact[0].abs(), exact[1].abs(), exact[2].abs(), 0)[0].abs()
        bound = 2 * (rank + 1) * torch.finfo(dtype).eps * magnitude
        error = ((residual.cpu().double() - want).abs() / bound).nan_to_num(nan=torch.inf).max().item()
        ratios.append((f"{m}x{n}, rank {rank}", error))
    return judge(ratios)


def _transpose_check(on: Target) -> str:
    sizes = [
        (6, 5, 1, 13),
        (6, 5, 3, 20),
        (4, 7, 2, 0),
        (0, 3, 1, 0),
        (3, 4, 3, 12),
        (3, 300, 1, 600),
        (300, 3, 1, 600),
    ]
    for m, n, groups, nnz in sizes + [(2048, 1500, 4, 200000)] * on.large:
        _, row_ptr, col_idx = ref.topk_csr(torch.randn(m, n, dtype=F64), nnz)
        got = RAW.csr_transpose(row_ptr.to(on.device), col_idx.to(on.device), n, groups)
        same(got, ref.csr_transpose(row_ptr, col_idx, n, groups), f"at {m}x{n}, nnz {nnz}, {groups} groups")
    return "the same as the reference"


def selection_checks(on: Target) -> Iterator[Check]:
    for dtype in DTYPES:
        yield f"topk_csr {str(dtype).removeprefix('torch.')}", partial(_topk_check, on, dtype)
    for dtype in (F64, F32):
        yield f"residual_topk_csr {str(dtype).removeprefix('torch.')}", partial(_residual_check, on, dtype)
    yield "csr_transpose", partial(_transpose_check, on)


def _svd_check(on: Target, m: int, n: int, rank: int, dtype: torch.dtype) -> str:
    """Orthonormal, signed, descending, and as near to A as the best of that rank, for a spectrum of halves."""
    spectrum = 2.0 ** -torch.arange(min(m, n, 16), dtype=F64)
    bases = [torch.linalg.qr(torch.randn(3, size, len(spectrum), dtype=F64))[0] for size in (m, n)]
    a = ((bases[0] * spectrum) @ bases[1].mT).to(on.device, dtype)
    u, s, vh = RAW.truncated_svd(a, random(on, 3, n, min(rank + 8, m, n), dtype=dtype), rank, 12)
    exact = a.cpu().double()
    best = ref.truncated_svd(exact, rank)
    u, s, vh = (t.cpu().double() for t in (u, s, vh))
    eye = torch.eye(rank, dtype=F64)
    tolerance = 20 * torch.finfo(dtype).eps * max(m, n)
    errors = {
        "orthogonality of u": u.mT @ u - eye,
        "orthogonality of vh": vh @ vh.mT - eye,
        "singular values": s - best[1],
        "u s vh": (u * s[:, None]) @ vh - (best[0] * best[1][:, None]) @ best[2],
    }
    told = judge((what, (e.abs().amax() / tolerance).nan_to_num(nan=torch.inf).item()) for what, e in errors.items())
    if (s.diff() > 0).any() or (u.gather(1, u.abs().argmax(1, keepdim=True)) < 0).any():
        raise AssertionError("singular values rise, or the largest entry of a column of u is negative")
    return told


def svd_checks(on: Target) -> Iterator[Check]:
    sizes = [(7, 96, 3), (96, 7, 7), (40, 40, 5), (1, 9, 1), (9, 1, 1), (30, 20, 20), (90, 80, 6)]
    for m, n, rank in sizes + [(200, 300, 80), (256, 2304, 26), (700, 300, 250)] * on.large:
        for dtype in (F64, F32):
            name = f"truncated_svd {str(dtype).removeprefix('torch.')}, {m}x{n}, rank {rank}"
            yield name, partial(_svd_check, on, m, n, rank, dtype)


# Gradients ----------------------------------------------------------------------------------------------------------

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


def _leaves(name: str, args: list) -> list:
    """The arguments, those that the operator differentiates as leaves."""
    fixed = 1 if name == "truncated_svd" else None  # its start
    return [
        a.detach().requires_grad_(i != fixed) if isinstance(a, Tensor) and a.is_floating_point() else a
        for i, a in enumerate(args)
    ]


def _gradcheck(on: Target, name: str) -> str:
    gradcheck(getattr(RAW, name), _leaves(name, sample(on, name)))
    return "analytic and numerical gradients agree"


def _opcheck(on: Target, name: str) -> str:
    outcomes = torch.library.opcheck(getattr(RAW, name).default, _leaves(name, sample(on, name)))
    return f"{len(outcomes)} tests"


def gradient_checks(on: Target) -> Iterator[Check]:
    for name in OPS:
        if name != "csr_transpose":
            yield f"gradcheck of {name}", partial(_gradcheck, on, name)
    for name in OPS:
        yield f"opcheck of {name}", partial(_opcheck, on, name)


# Streams, graphs, memory --------------------------------------------------------------------------------------------


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


def _repeat(on: Target, call: Call) -> str:
    args = call.draw(on)
    want = call.run(args)
    for _ in range(2):
        same(call.run(args), want, "between runs")
    return "3 runs, the same bits"


def _poison(on: Target, call: Call) -> str:
    """The same bits when every free block of the allocator holds NaN (as floats) and -1 (as integers)."""
    args = call.draw(on)
    want = call.run(args)
    for _ in range(2):
        sizes = [1 << k for k in range(9, 27 if on.large else 16) for _ in range(4)]
        blocks = [torch.full((size,), 255, dtype=torch.uint8, device=on.device) for size in sizes]
        del blocks
        same(call.run(args), want, "on poisoned memory")
    return "the same bits on poisoned memory"


def _graph(on: Target, call: Call) -> str:
    """A captured call, replayed with other inputs in the same tensors."""
    fixed, args = change(Tensor.clone, call.draw(on)), call.draw(on)
    replay = replayable(lambda: call.run(fixed), on.device)
    for turn in (args, call.draw(on)):
        for a, b in zip(fixed, turn, strict=True):
            if isinstance(a, Tensor):
                a.copy_(b)
        close(replay(), call.run(turn), "after replay")
    return "replayed with changed inputs"


def _side_stream(on: Target, call: Call) -> str:
    """A call on another stream behind a long kernel and the copies that bring its inputs."""
    args, static = call.draw(on), change(Tensor.clone, call.draw(on))
    want = call.run(args)
    stream = None
    if on.device.type == "cuda":
        torch.cuda.synchronize(on.device)
        stream = torch.cuda.Stream(on.device)
    with torch.cuda.stream(stream):
        if stream:
            torch.cuda._sleep(50_000_000)  # cycles, some 30 ms
        for a, b in zip(static, args, strict=True):
            if isinstance(a, Tensor):
                a.copy_(b)
        got = call.run(static)
    if stream:
        stream.synchronize()
    close(got, want, "on a side stream")
    return "in order"


def _second_device(on: Target, call: Call) -> str:
    args = call.draw(on)
    other = torch.device("cuda", (on.device.index or 0) + 1)
    got = call.run(change(lambda t: t.to(other), args))
    if any(t.device != other for t in got):
        raise AssertionError(f"outputs are on {got[0].device}, want {other}")
    close(got, call.run(args), f"on {other}")
    return f"the same on {other}"


def _strides(on: Target, call: Call) -> str:
    """Every second entry of larger buffers full of poison."""

    def spaced(t: Tensor) -> Tensor:
        buffer = t.new_full([2 * s + 1 for s in t.shape], torch.nan if t.is_floating_point() else 1 << 30)
        return buffer[(slice(1, None, 2),) * t.dim()].copy_(t)

    args = call.draw(on)
    close(call.run(change(spaced, args)), call.run(args), "for strided arguments")
    return "the same for strided arguments"


def _not_finite(on: Target, call: Call) -> str:
    """NaN and infinity show up, and only where they belong: not in another token or image."""
    args = call.draw(on)
    clean = call.run(args)[0]
    args[0][1, 0], args[0][2, 0] = torch.nan, torch.inf
    got = call.run(args)[0]
    same([got[0]], [clean[0]], "beside a row with NaN")
    if not got[1].isnan().any() or got[2].isfinite().all():
        raise AssertionError("a NaN or an infinity got lost")
    return "kept to their own row"


def _svd_of_nan(on: Target) -> str:
    a, basis = random(on, 2, 80, 90, dtype=F32), random(on, 2, 90, 20, dtype=F32)
    clean = RAW.truncated_svd(a, basis, 12, 2)
    a[1, 3, 4] = torch.nan
    got = RAW.truncated_svd(a, basis, 12, 2)
    same([t[0] for t in got], [t[0] for t in clean], "beside a matrix with NaN")
    if not all(t[1].isnan().all() for t in got):
        raise AssertionError("the factors of a matrix with NaN must be NaN")
    return "NaN, and the other matrix of the batch unharmed"


def _empty(on: Target) -> str:
    """Sizes of zero that the value checks lack."""
    found = []
    for b, m, n in ((1, 0, 5), (1, 5, 0), (0, 5, 6)):
        found.append((RAW.topk_csr(random(on, b, m, n), 0), [(b, 0), (b, m + 1), (b, 0)]))
        found.append(
            (RAW.truncated_svd(random(on, b, m, n), random(on, b, n, 0), 0, 1), [(b, m, 0), (b, 0), (b, 0, n)])
        )
        w, u, v = random(on, b, m, n), random(on, b, m, 2), random(on, b, 2, n)
        found.append((RAW.residual_topk_csr(w, u, v, 0), [(b, m, n), (b, 0), (b, m + 1), (b, 0)]))
    found.append((RAW.truncated_svd(random(on, 0, 9, 8), random(on, 0, 8, 4), 3, 1), [(0, 9, 3), (0, 3), (0, 3, 8)]))
    layer = weights(on, 4, 12, 2, 20, groups=2)
    geometry = ((2, 3), (2, 1), (1, 2), (1, 2), 2)
    x, grad = random(on, 0, 4, 3, 3), random(on, 0, 4, 2, 3)
    found.append(([RAW.lrs_conv2d(x, *layer, None, *geometry)], [(0, 4, 2, 3)]))
    found.append(([RAW._lrs_conv2d_grad_input(grad, *layer, (3, 3), *geometry)], [(0, 4, 3, 3)]))
    values = RAW._lrs_conv2d_grad_values(grad, x, *layer[3:5], *geometry)
    found.append(([values], [(20,)]))
    if values.any():
        raise AssertionError("the gradient of no image must be zero")
    for got, sizes in found:
        if [tuple(t.shape) for t in got] != sizes:
            raise AssertionError(f"gave {[tuple(t.shape) for t in got]}, want {sizes}")
    return f"{len(found)} cases"


def runtime_checks(on: Target) -> Iterator[Check]:
    kinds = {"repeated": _repeat, "poison": _poison, "strides": _strides, "graph": _graph, "stream": _side_stream}
    if on.device.type == "cuda" and torch.cuda.device_count() > (on.device.index or 0) + 1:
        kinds["second device"] = _second_device
    for kind, check in kinds.items():
        for call in calls():
            yield f"{kind}: {call.label}", partial(check, on, call)
    for call in calls():
        if call.name in ("lrs_linear", "lrs_conv2d", "_lrs_conv2d_grad_input"):
            yield f"NaN: {call.label}", partial(_not_finite, on, call)
    if on.native:
        yield "NaN: truncated_svd", partial(_svd_of_nan, on)
    yield "empty sizes", partial(_empty, on)


def sanitizer_checks(on: Target) -> Iterator[Check]:
    """One call of each kernel, for compute-sanitizer to watch."""
    for call in calls():
        yield call.label, lambda call=call: f"{len(call.run(call.draw(on)))} outputs"


PARTS: dict[str, Callable[[Target], Iterator[Check]]] = {
    "selection": selection_checks,
    "svd": svd_checks,
    "layers": layer_checks,
    "gradients": gradient_checks,
    "runtime": runtime_checks,
    "sanitizer": sanitizer_checks,
}
