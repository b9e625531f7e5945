"""Interleaved timing, the machine's description, and rows with a target."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

import cmd_ext
from cmd_ext import _C


@dataclass
class Row:
    """One comparison: `ours` against `theirs` (same unit); ratio = theirs / ours; wanted is the least ratio, if any."""

    name: str
    ours: float
    theirs: float
    unit: str
    rival: str
    wanted: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    def cells(self) -> list[str]:
        target = "-" if self.wanted is None else f"{self.ratio:.2f} / {self.wanted:g}"
        return [
            self.name,
            f"{self.ours:.4g}",
            f"{self.theirs:.4g}",
            self.unit,
            self.rival,
            f"{self.ratio:.2f}x",
            target,
            self.note,
        ]

    def to_dict(self) -> dict:
        return {**asdict(self), "ratio": self.ratio}


HEADER = ("row", "ours", "rival", "unit", "against", "ratio", "reached / wanted", "note")


def machine() -> dict[str, str]:
    """What a figure depends on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return {
        "cpu": name,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "kernels": _C.cpu_capability(),
        "torch": torch.__version__,
        "cmd_ext": cmd_ext.__version__,
    }


def interleaved(functions: list[Callable[[], object]], *, seconds: float = 1.0, least: int = 5) -> list[float]:
    """Median milliseconds of each function, called in turn until `seconds` are spent on them all."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < least:
        for function, list_ in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            list_.append(time.perf_counter() - start)
    return [1e3 * median(list_) for list_ in times]


def cpu_seconds(function: Callable[[], object]) -> tuple[float, object]:
    """CPU time of all threads, and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result
