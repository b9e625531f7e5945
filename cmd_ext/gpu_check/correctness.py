"""The checks of results: every operator against ref.py in double, top-k bit for bit, gradients.

A check is a name and a function that tells how close it was, or raises. All of them run on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmd_ext import ref
from cmd_ext.gpu_check.samples import (
    BF16,
    CONV,
    DTYPES,
    F16,
    F32,
    F64,
    LARGE_CONV,
    LARGE_LINEAR,
    LAST,
    LINEAR,
    OPS,
    ORACLES,
    RAW,
    TENSOR_CORE_CASES,
    Target,
    change,
    conv_args,
    gradient_args,
    linear_args,
    path,
    random,
    sample,
    weights,
)

Check = tuple[str, Callable[[], str]]

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
        layouts = (torch.contiguous_format, LAST)
        if label in LARGE_CONV:  # only the one that the path is for: the exact results take their time
            layouts = layouts[tensor_cores : 1 + tensor_cores]
        for memory_format in layouts:
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
        for nnz in (size // 3,) if size > 1 << 17 else (0, 1, size // 3, size - 1, size):
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


PARTS: dict[str, Callable[[Target], Iterator[Check]]] = {
    "selection": selection_checks,
    "svd": svd_checks,
    "layers": layer_checks,
    "gradients": gradient_checks,
}
