"""Milliseconds of a layer on this machine's CPU: a model whose constants are fitted once to measured layers.

The time of a call is a sum of its work, each kind times a constant: the call itself, the elements of x and y, the
numbers stored as weights, and multiply-adds; the sparse kernels have their nonzeros and their rows of sums besides. The
constants are those that predict a few small measured layers with the least relative error. They are measured at first
use (about a second), kept in the user's cache folder by CPU, instruction set, threads, versions of torch and kernels,
and replaced by those of a machine with 2 cores and AVX2 where measuring would be in the way: while a program is traced,
in a process group, or where CMD_EXT_AUTOTUNE=0 switches all of this off.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import mul
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import _C, ops
from .work import Work

KERNELS = 4  # their version: constants of others are measured anew
SMALL_BATCH = 16  # rows of x below which a matrix product is bound by reading weights
ROW_COLUMNS = 288  # columns of W whose inputs a convolution's sums run over together


@dataclass(frozen=True)
class CpuRates:
    """Seconds per unit of work, in the order of `dense_work` and `fused_work`, for float32."""

    conv_dense: tuple[float, ...]
    conv_fused: tuple[float, ...]
    linear_dense: tuple[float, ...]
    linear_fused: tuple[float, ...]


def dense_work(work: Work) -> list[float]:
    """Of the dense library: the call, elements of x and y, weights, multiply-adds, and what makes some of these dearer.

    That is, for a convolution, the patches of x (of few channels, there is little to do with each); for a product, the
    multiply-adds of a small batch.
    """
    size = work.m * work.n
    extra = work.n * work.tokens if work.convolution else size * min(work.tokens - 1, SMALL_BATCH)
    return [1.0, work.inputs + work.outputs, size, size * work.tokens, extra]


def fused_work(work: Work) -> list[float]:
    """Of our kernels: the call, elements, stored numbers, rows of sums, products with S, products of the factors.

    Without factors and S the outputs are filled in, which takes a quarter of what moving them takes.
    """
    if work.rank == work.nnz == 0:
        return [1.0, work.outputs / 4, 0.0, 0.0, 0.0, 0.0]
    t, factors = work.tokens, work.rank * (work.m + work.groups * work.n)
    rows = work.m * -(-work.n // ROW_COLUMNS) * t if work.nnz else 0
    return [1.0, work.inputs + work.outputs, factors + 2 * work.nnz, rows, work.nnz * t, factors * t]


def lowrank_work(work: Work) -> list[float]:
    """Of the dense library, for V and then U."""
    rows, middle = work.groups * work.rank, work.groups * work.rank * work.middle
    first = replace(work, m=rows, n=work.n // work.taps, tokens=work.middle, outputs=middle)
    second = replace(work, n=work.rank * work.taps, inputs=middle)
    return [a + b for a, b in zip(dense_work(first), dense_work(second), strict=True)]


def predict(work: Work, rates: CpuRates, rebuild: bool) -> dict[str, float]:
    """Seconds of one call by backend; `rebuild` says whether the dense weight must be built for it."""
    dense, fused = (
        (rates.conv_dense, rates.conv_fused) if work.convolution else (rates.linear_dense, rates.linear_fused)
    )
    times = {"dense": _dot(dense, dense_work(work)), "fused": _dot(fused, fused_work(work))}
    if rebuild:
        product = replace(work, n=max(work.rank, 1), tokens=work.n, inputs=work.nnz, outputs=work.m * work.n)
        times["dense"] += _dot(rates.linear_dense, dense_work(product))
    if work.taps > 1:  # U V by the dense library, S by our kernels (their sum takes little); rank 0 comes without taps
        lowrank = _dot(dense, lowrank_work(work))
        if work.nnz == 0:
            times = {"dense": times["dense"], "lowrank": lowrank}
        else:
            times["fused"] = lowrank + _dot(fused, fused_work(replace(work, rank=0)))
    elif work.nnz == 0:
        times["lowrank"] = _dot(dense, lowrank_work(work)) if work.rank else times["fused"]
        if not work.convolution:  # then our kernels are the same two products
            del times["fused"]
    scale = max(work.dtype.itemsize, 4) / 4
    return {way: scale * seconds for way, seconds in times.items()}


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Of a few numbers: numpy takes longer, and this is part of every call."""
    return sum(map(mul, a, b))


# The fit ------------------------------------------------------------------------------------------------------------

# c -> m channels, kernel, side, stride, batch: the kinds of layers that ResNets and VGGs have, at small sizes.
CONVOLUTIONS = (
    (8, 8, 3, 4, 1, 1),
    (3, 64, 3, 64, 1, 1),
    (16, 16, 3, 32, 1, 1),
    (16, 16, 3, 32, 1, 8),
    (32, 32, 3, 16, 1, 8),
    (64, 64, 3, 8, 1, 8),
    (64, 64, 3, 56, 1, 1),
    (64, 128, 3, 56, 2, 1),
    (128, 128, 3, 28, 1, 1),
    (128, 128, 3, 14, 1, 8),
    (256, 256, 3, 14, 1, 1),
    (512, 512, 3, 7, 1, 1),
    (512, 512, 3, 4, 1, 8),
    (256, 64, 1, 28, 1, 1),
    (256, 1024, 1, 14, 1, 1),
    (512, 512, 1, 7, 1, 8),
)
LINEARS = (  # n -> m features, batch
    (512, 512, 1),
    (512, 512, 32),
    (1024, 1024, 1),
    (1024, 1024, 16),
    (4096, 2048, 1),
    (4096, 1024, 8),
    (1024, 2048, 64),
    (1024, 1024, 128),
)
POINTS = ((0.125, 0.02), (0.0, 0.2), (0.25, 0.05))  # rank as a share of m, density


def conv_calls(spec: Sequence[int], share: float, density: float) -> tuple[Work, Callable, Callable]:
    """A convolution's work, and functions that compute it densely and by our kernels with kept plans."""
    c, m, k, side, stride, batch = spec
    g = torch.Generator().manual_seed(0)
    n, geometry = c * k * k, ([stride, stride], [k // 2, k // 2], [1, 1], 1)
    x, w = torch.randn(batch, c, side, side, generator=g), _randn(m, n, g).view(m, c, k, k)
    u, v, values, pattern = _branches(m, n, share, density, g)
    plan = ops.plan_lrs_conv2d(u, v, values, pattern, x.shape, False, [k, k], *geometry)
    out = batch * ((side + 2 * (k // 2) - k) // stride + 1) ** 2
    work = Work(m, n, 1, u.shape[1], len(values), out, x.numel(), out * m, x.dtype, True)
    return work, lambda: F.conv2d(x, w, None, stride, k // 2), lambda: ops.planned_lrs_conv2d(x, plan, None)


def linear_calls(spec: Sequence[int], share: float, density: float) -> tuple[Work, Callable, Callable]:
    """The same for a linear layer."""
    n, m, batch = spec
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(batch, n, generator=g), _randn(m, n, g)
    u, v, values, pattern = _branches(m, n, share, density, g)
    plan = ops.plan_lrs_linear(values, pattern, n, batch <= ops.FEW_SAMPLES)
    work = Work(m, n, 1, u.shape[1], len(values), batch, x.numel(), batch * m, x.dtype)
    return work, lambda: F.linear(x, w), lambda: ops.planned_lrs_linear(x, u, v, plan, None)


def _branches(m: int, n: int, share: float, density: float, g: torch.Generator) -> tuple:
    """U, V, values and the support of S: as many random columns in each row."""
    rank, count = round(share * min(m, n)), max(1, round(density * n))
    starts = torch.arange(count + 1) * n // count
    cols = starts[:-1] + (torch.rand(m, count, generator=g) * starts.diff()).int()
    pattern = ops.Pattern.from_csr(torch.arange(m + 1) * count, cols.flatten(), n)
    return _randn(m, rank, g), _randn(rank, n, g), torch.randn(m * count, generator=g), pattern


def _randn(m: int, n: int, g: torch.Generator) -> torch.Tensor:
    """A matrix of normal numbers that repeat in each row: the time of a product does not depend on them."""
    return torch.randn(1, n, generator=g).repeat(m, 1)


def seconds_of(call: Callable, repeats: int = 3) -> float:
    """The median time of a call after a first one."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def fit_rates() -> CpuRates:
    """Measures the layers above and fits the constants."""
    fits = []
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for specs, calls in ((CONVOLUTIONS, conv_calls), (LINEARS, linear_calls)):
            dense, fused = [], []
            for spec in specs:
                for i, point in enumerate(POINTS):
                    work, dense_call, fused_call = calls(spec, *point)
                    if i == 0:
                        dense.append((dense_work(work), seconds_of(dense_call)))
                    fused.append((fused_work(work), seconds_of(fused_call)))
            fits += [fit(dense), fit(fused)]
    return CpuRates(*fits)


def fit(samples: Sequence[tuple[Sequence[float], float]]) -> tuple[float, ...]:
    """The constants c >= 0 with the least squares of relative errors, (work . c - seconds) / seconds."""
    a = np.array([np.divide(work, seconds) for work, seconds in samples])
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1
    a = a / scale
    gram, target, c = a.T @ a, a.sum(0), np.zeros(a.shape[1])
    for _ in range(2000):  # coordinate descent: the few columns are far from parallel
        for j in range(len(c)):
            if gram[j, j] > 0:
                c[j] = max(0.0, c[j] + (target[j] - gram[j] @ c) / gram[j, j])
    return tuple(float(value) for value in c / scale)


# Keeping ------------------------------------------------------------------------------------------------------------


def rates_key() -> str:
    """What the constants depend on, as the name of a file."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1] for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    version = "-".join(torch.__version__.split(".")[:2])
    threads = f"{os.cpu_count()}-cores-{_C.cpu_capability()}-{torch.get_num_threads()}-threads"
    text = f"cpu-{KERNELS}-{name}-{threads}-torch-{version}"
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() + ".json"


def may_measure() -> bool:
    """Whether a measurement would be of use and in nobody's way here."""
    if os.environ.get("CMD_EXT_AUTOTUNE") == "0" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None:
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


_loaded: dict[int, CpuRates] = {}  # by number of threads


def load_rates() -> CpuRates:
    """The constants of this machine: kept in the cache folder, else measured if that may be done, else the defaults."""
    if os.environ.get("CMD_EXT_AUTOTUNE") == "0":
        return DEFAULTS
    threads = torch.get_num_threads()
    if threads not in _loaded:
        file = cache_folder() / rates_key()
        rates = read_rates(file)
        if rates is None:
            if not may_measure():
                return DEFAULTS  # it may be done later
            rates = fit_rates()
            save_rates(file, rates)
        _loaded[threads] = rates
    return _loaded[threads]


def cache_folder() -> Path:
    """Where measured rates are kept: $XDG_CACHE_HOME/cmd_ext, by default ~/.cache/cmd_ext."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmd_ext"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "cmd_ext"


def read_rates(file: Path) -> CpuRates | None:
    """The constants in a file of save_rates; None if it is missing or holds anything else."""
    try:
        rates = CpuRates(**{name: tuple(values) for name, values in json.loads(file.read_text("utf-8")).items()})
        for kind in asdict(DEFAULTS):
            values = getattr(rates, kind)
            if len(values) != len(getattr(DEFAULTS, kind)) or not all(0 <= v < float("inf") for v in values):
                return None
            if not any(values):
                return None
        return rates
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def save_rates(file: Path, rates: CpuRates) -> None:
    """Keeps constants for later processes; where the folder cannot be written, they serve this one alone."""
    part = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(rates), indent=1), "utf-8")
        part.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()


DEFAULTS = CpuRates(
    conv_dense=(1.8e-5, 7.5e-10, 6.0e-10, 1.0e-11, 1.2e-10),
    conv_fused=(2.6e-5, 5.6e-10, 1.0e-11, 8.0e-11, 2.2e-11, 1.7e-11),
    linear_dense=(3.0e-6, 2.4e-9, 1.5e-10, 5.7e-12, 3.0e-11),
    linear_fused=(4.5e-5, 9.0e-10, 1.9e-10, 1.0e-11, 1.4e-11, 1.6e-11),
)
