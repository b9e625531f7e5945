"""Which way of computing a layer is fastest, by a model whose rates are measured once per device.

A layer of weight [m, n] at `tokens` rows of x (pixels of y, for a convolution) can be computed "dense" (U V + S is
rebuilt, then the dense library), "lowrank" (S is empty: the dense library twice) or "fused" (the kernels of cmd_ext).
On a GPU each step takes the larger of its operations over a rate and its bytes over the bandwidth, plus the time of a
launch; the rates come from `python -m cmd_ext gpu-check`, which stores what it measured, else from the generation's
data sheet. The CPU has a model of its own (cpu_model.py).
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from . import cpu_model
from .work import Work

TOKENS = 2048  # assumed before the first call
CLOSE = 2.0  # predicted times of up to so many times the least one are compared by measurement,
LITTLE = 5e-3  # and those of up to so many seconds: the constants are least sure of small calls, which cost little
ROUNDS, MOST_ROUNDS, SECONDS = 3, 25, 0.01  # of that measurement
MARGIN = 1.05  # what another backend must gain over "dense" there: less is lost in the noise


@dataclass(frozen=True)
class DeviceRates:
    """What the model knows of a GPU, in bytes/s, seconds and FLOP/s by dtype ("float32", "bfloat16", ...).

    Attributes:
        bandwidth: of memory, in a large copy.
        launch: seconds that one more kernel costs.
        dense: of the dense library.
        sparse: 2 * nnz * tokens / time of the sparse kernels.
        mma: of the tensor-core path of a layer, which computes S densely; only dtypes that it takes.
    """

    bandwidth: float
    launch: float
    dense: dict[str, float]
    sparse: dict[str, float]
    mma: dict[str, float]


def _sheet(bandwidth: float, fp32: float, fp64: float, tensor: float, mma_share: float) -> DeviceRates:
    """Rates from a data sheet: 80 % of the dense peaks; shared memory bounds the sparse kernels to shares of FFMA."""
    dense = {"float64": 0.8 * fp64, "float32": 0.8 * fp32, "float16": 0.8 * tensor, "bfloat16": 0.8 * tensor}
    sparse = {"float64": 0.25 * fp64, "float32": 0.25 * fp32, "float16": 0.4 * fp32, "bfloat16": 0.4 * fp32}
    mma = dict.fromkeys(("float16", "bfloat16"), mma_share * tensor)
    return DeviceRates(bandwidth, 3e-6, dense, sparse, mma)


# By compute capability. mma.sync reaches all of the tensor cores' rate before sm_90 and on sm_120, part of it between.
DATA_SHEETS = {
    (8, 0): _sheet(1.5e12, 19.5e12, 9.7e12, 312e12, 0.6),
    (9, 0): _sheet(3.0e12, 67e12, 34e12, 798e12, 0.45),
    (10, 0): _sheet(7.0e12, 75e12, 37e12, 2250e12, 0.2),
    (12, 0): _sheet(1.6e12, 56e12, 0.9e12, 235e12, 0.7),
}


def predict(work: Work, rates: DeviceRates, rebuild: bool) -> dict[str, float]:
    """Seconds of one call by backend; `rebuild` says whether the dense weight must be built for it."""
    dtype, element = str(work.dtype).removeprefix("torch."), work.dtype.itemsize
    dense_rate = rates.dense[dtype]

    def step(flop: float, rate: float, elements: float, extra_bytes: float = 0) -> float:
        return rates.launch + max(flop / rate, (elements * element + extra_bytes) / rates.bandwidth)

    m, n, r, t, size = work.m, work.n, work.rank, work.tokens, work.m * work.n
    dense = step(2 * size * t, dense_rate, work.inputs + work.outputs + size)
    if rebuild:
        factors = r * (m * work.taps + work.groups * n // work.taps)
        dense += step(2 * r * size, rates.dense["float32"], size + factors + work.nnz, 4 * work.nnz)
    rows, columns, z = m * work.taps, n // work.taps, work.middle
    project = step(2 * r * columns * work.groups * z, dense_rate, work.inputs + r * work.groups * (columns + z))
    expand = step(2 * r * rows * t, dense_rate, work.outputs + r * (rows + work.groups * z))
    lowrank = project + expand if r > 0 else rates.launch
    if work.nnz == 0:
        return {"dense": dense, "lowrank": lowrank}
    csr = step(2 * work.nnz * t, rates.sparse[dtype], 3 * work.inputs + 2 * work.outputs + work.nnz, 4 * work.nnz)
    fused = lowrank + csr
    if work.taps > 1:  # S by the kernels of cmd_ext, U V by the dense library, and their sum
        return {"dense": dense, "fused": fused + step(work.outputs, rates.dense["float32"], 3 * work.outputs)}
    if dtype in rates.mma:
        mma = step(2 * (size + r * m) * t, rates.mma[dtype], work.inputs + work.outputs + work.nnz, 8 * work.nnz)
        fused = min(fused, project + mma)
    return {"dense": dense, "fused": fused}


def predicted(work: Work, device: torch.device, rebuild: bool) -> dict[str, float]:
    """Seconds of one call by backend, the possible ones; empty on devices without a model or without our kernels."""
    if device.type == "cpu":
        return cpu_model.predict(work, cpu_model.load_rates(), rebuild)
    if device.type == "cuda" and has_cuda_kernels():
        return predict(work, load_rates(device), rebuild)
    return {}


def choose(work: Work, device: torch.device, rebuild: bool) -> str:
    """The backend for a call: the fastest by the model of the device; without one "dense", for an empty S "lowrank"."""
    times = predicted(work, device, rebuild) or {"lowrank" if work.nnz == 0 else "dense": 0.0}
    return min(times, key=times.get)


def candidates(work: Work, device: torch.device) -> list[str]:
    """The backends worth timing for calls without gradients, the predicted fastest first.

    Where nothing can be timed, that one alone: on other devices than the CPU, and where CMD_EXT_AUTOTUNE=0 or torch is
    told to be deterministic (the backends round differently).
    """
    if device.type != "cpu" or torch.are_deterministic_algorithms_enabled() or not cpu_model.may_measure():
        return [choose(work, device, False)]
    times = predicted(work, device, False)
    near = CLOSE if work.dtype in (torch.float32, torch.float64) else float("inf")  # the model is of these two
    most = max(near * min(times.values()), LITTLE)
    return [way for way in sorted(times, key=times.get) if times[way] <= most]


def fastest(calls: dict[str, Callable], *args) -> str:
    """The one of the calls that takes the least time for these arguments; "dense" where the others gain little.

    They run in turn, so that all see the same weather: ROUNDS times, and where that took less than SECONDS, on until it
    did or MOST_ROUNDS are done.
    """
    times = {way: [] for way in calls}
    for call in calls.values():
        call(*args)
    start = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for way, call in calls.items():
            begin = time.perf_counter()
            call(*args)
            times[way].append(time.perf_counter() - begin)
    medians = {way: statistics.median(of) for way, of in times.items()}
    best = min(medians, key=medians.get)
    return "dense" if medians.get("dense", float("inf")) <= MARGIN * medians[best] else best


@lru_cache(maxsize=1)
def has_cuda_kernels() -> bool:
    """Whether this build of cmd_ext has CUDA kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("cmd_ext::lrs_linear", "CUDA")


def rates_file(name: str) -> Path:
    """The file of the measured rates of a GPU of that name."""
    return cpu_model.cache_folder() / (re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() + ".json")


def data_sheet(capability: tuple[int, int]) -> DeviceRates:
    """The rates of a GPU generation: of the newest known one that is not newer than `capability`."""
    known = [key for key in DATA_SHEETS if key <= capability]
    return DATA_SHEETS[max(known)] if known else DATA_SHEETS[min(DATA_SHEETS)]


@lru_cache(maxsize=64)
def load_rates(device: torch.device) -> DeviceRates:
    """Measured rates of a GPU, or those of its data sheet. A file that does not hold rates counts as none."""
    properties = torch.cuda.get_device_properties(device)
    measured = read_rates(rates_file(properties.name))
    return measured or data_sheet((properties.major, properties.minor))


def read_rates(file: Path) -> DeviceRates | None:
    """The rates in a file of save_rates; None if it is missing or does not hold positive numbers for every dtype."""
    try:
        rates = DeviceRates(**json.loads(file.read_text(encoding="utf-8")))
        numbers = [rates.bandwidth, rates.launch, *rates.mma.values()]
        for name in ("float64", "float32", "float16", "bfloat16"):
            numbers += [rates.dense[name], rates.sparse[name]]
        return rates if all(0 < number < float("inf") for number in numbers) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def save_rates(device: torch.device, rates: DeviceRates) -> Path:
    """Keeps measured rates for later processes and drops what this process had loaded."""
    file = rates_file(torch.cuda.get_device_properties(device).name)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.tmp")
    part.write_text(json.dumps(asdict(rates), indent=1), encoding="utf-8")
    part.replace(file)
    load_rates.cache_clear()
    return file
