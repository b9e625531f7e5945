"""The layers that are measured, and how: contenders in turn, by CUDA events on a GPU, each checked before.

Times are in microseconds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmd_ext import ops
from cmd_ext.gpu_check.samples import BF16, F32, LAST, path, replayable, settings
from cmd_ext.ops import Pattern

KINDS = {"float32": F32, "tf32": F32, "bfloat16": BF16}  # what a layer computes in
TOLERANCE = {"float64": 1e-12, "float32": 3e-5, "tf32": 3e-3, "bfloat16": 2e-2, "float16": 3e-3}  # relative, Frobenius
MOST, LEAST = 50, 3  # timed runs of a contender


# Layers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer at one input size: a linear one (kernel 0) of `batch` tokens, or a convolution that keeps the size."""

    name: str
    m: int
    channels: int
    batch: int
    kernel: int = 0
    stride: int = 1
    side: int = 1

    @property
    def n(self) -> int:
        return self.channels * max(self.kernel, 1) ** 2

    @property
    def out_side(self) -> int:
        return (self.side - 1) // self.stride + 1

    @property
    def tokens(self) -> int:
        return self.batch * self.out_side**2

    @property
    def elements(self) -> tuple[int, int]:
        """Of x and y."""
        return self.batch * self.channels * self.side**2, self.tokens * self.m

    def images(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same x in every layout that a user may have."""
        if not self.kernel:
            return {"contiguous": torch.randn(self.batch, self.channels, device=device).to(dtype)}
        x = torch.randn(self.batch, self.channels, self.side, self.side, device=device).to(dtype)
        return {"contiguous": x, "channels_last": x.contiguous(memory_format=LAST)}

    def weight(self, w: Tensor, x: Tensor) -> Tensor:
        """w [m, n] as the dense library takes it, in the layout of x."""
        if not self.kernel:
            return w
        layout = torch.contiguous_format if x.is_contiguous() else LAST
        return w.view(self.m, self.channels, self.kernel, self.kernel).contiguous(memory_format=layout)

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.kernel // 2) if self.kernel else F.linear(x, weight)

    def rebuilt(self, x: Tensor, u: Tensor, v: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        return self.dense(x, self.weight(ops.dense_weight(u, v, values, pattern), x))

    def ours(self, x: Tensor, u: Tensor, v: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        if not self.kernel:
            return ops.lrs_linear(x, u, v, values, pattern)
        k, p = self.kernel, self.kernel // 2
        return ops.lrs_conv2d(x, u, v, values, pattern, None, (k, k), (self.stride, self.stride), (p, p))

    def composed(self, x: Tensor, u: Tensor, v: Tensor, s: Tensor | None) -> Tensor:
        """What torch offers: two dense products, and its sparse product (of unfolded images)."""
        if not self.kernel:
            low = F.linear(F.linear(x, v), u)
            return low if s is None else low + torch.sparse.mm(s, x.t()).t()
        k, p = self.kernel, self.kernel // 2
        low = F.conv2d(F.conv2d(x, v.view(-1, self.channels, k, k), None, self.stride, p), u[:, :, None, None])
        if s is None:
            return low
        columns = F.unfold(x, k, padding=p, stride=self.stride).transpose(0, 1).reshape(self.n, -1)
        return low + torch.sparse.mm(s, columns).view(self.m, *low.shape[:1], *low.shape[2:]).transpose(0, 1)


MAIN = [
    Layer("ResNet-18 layer3, 3x3 256@14, batch 64", 256, 256, 64, 3, 1, 14),
    Layer("VGG conv4, 3x3 512@28, batch 32", 512, 512, 32, 3, 1, 28),
    *(Layer(f"linear 4096x4096, {tokens} tokens", 4096, 4096, tokens) for tokens in (16, 256, 2048)),
]
RESNET18 = [
    Layer("ResNet-18 conv1, 7x7/2 3-64@224, batch 64", 64, 3, 64, 7, 2, 224),
    Layer("ResNet-18 layer1, 3x3 64@56, batch 64", 64, 64, 64, 3, 1, 56),
    Layer("ResNet-18 layer2, 3x3/2 64-128@56, batch 64", 128, 64, 64, 3, 2, 56),
    Layer("ResNet-18 layer2, 1x1/2 64-128@56, batch 64", 128, 64, 64, 1, 2, 56),
    Layer("ResNet-18 layer2, 3x3 128@28, batch 64", 128, 128, 64, 3, 1, 28),
    Layer("ResNet-18 layer3, 3x3/2 128-256@28, batch 64", 256, 128, 64, 3, 2, 28),
    Layer("ResNet-18 layer3, 1x1/2 128-256@28, batch 64", 256, 128, 64, 1, 2, 28),
    Layer("ResNet-18 layer4, 3x3/2 256-512@14, batch 64", 512, 256, 64, 3, 2, 14),
    Layer("ResNet-18 layer4, 1x1/2 256-512@14, batch 64", 512, 256, 64, 1, 2, 14),
    Layer("ResNet-18 layer4, 3x3 512@7, batch 64", 512, 512, 64, 3, 1, 7),
    Layer("ResNet-18 fc, linear 1000x512, 64 tokens", 1000, 512, 64),
]


# Timing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A call, with the path that our layers take in it."""

    call: Callable[[], object]
    route: str = ""
    tf32: bool = False


class Clock:
    """Marks on a device's stream and the microseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def between(self, start, end) -> float:
        return 1e3 * start.elapsed_time(end) if self.device.type == "cuda" else 1e6 * (end - start)


def measure(
    contenders: dict[str, Contender], device: torch.device, seconds: float, before: Callable[[], object] | None = None
) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 of each, and the number of runs; all run in turn until each has had its share of `seconds`.

    `before` runs ahead of every call, untimed.
    """
    clock = Clock(device)

    def timed(contender: Contender):
        if before:
            before()
        with path(contender.route, contender.tf32):
            start = clock.mark()
            contender.call()
            return start, clock.mark()

    runs = {}
    for name, contender in contenders.items():
        timed(contender)
        marks = timed(contender)
        clock.wait()
        share = 1e6 * seconds / len(contenders)
        runs[name] = max(LEAST, min(MOST, int(share / max(clock.between(*marks), 1.0))))
    marks = {name: [] for name in contenders}
    for turn in range(max(runs.values(), default=0)):
        for name, contender in contenders.items():
            if turn < runs[name]:
                marks[name].append(timed(contender))
    clock.wait()
    return {name: spread([clock.between(*pair) for pair in pairs]) for name, pairs in marks.items()}


def spread(times: list[float]) -> dict[str, float]:
    times, last = sorted(times), len(times) - 1
    quantiles = {f"p{q}": times[round(last * q / 100)] for q in (20, 50, 80)}
    return {**quantiles, "runs": len(times)}


def captured(contenders: dict[str, Contender], device: torch.device) -> dict[str, Contender]:
    """The contenders as graphs, in one memory pool as they never run at the same time."""
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    found = {}
    for name, contender in contenders.items():
        with path(contender.route, contender.tf32):
            found[name] = Contender(replayable(contender.call, device, pool), contender.route, contender.tf32)
    return found


def l2_flush(device: torch.device) -> Callable[[], object] | None:
    """Overwrites the L2 cache, as a model's other layers would between two calls."""
    if device.type != "cuda":
        return None
    size = 2 * (getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 1 << 27)
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.to(want.dtype) - want).norm() / want.norm()).nan_to_num(nan=torch.inf).item()


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Torch's own products in `kind`, with the fastest algorithms, and no gradients."""
    mode = "tf32" if kind == "tf32" else "ieee"
    wanted = [
        (torch.backends.cuda.matmul, "fp32_precision", mode),
        (torch.backends.cudnn.conv, "fp32_precision", mode),
        (torch.backends.cudnn, "benchmark", True),
    ]
    with settings(wanted), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support.*")
        yield


class Entry:
    """Contenders that gave the right result. A wrong or failing one of ours raises, one of torch's is only noted."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.contenders: dict[str, Contender] = {}
        self.errors: dict[str, float] = {}
        self.skipped: dict[str, str] = {}

    def add(self, name: str, call: Callable[[], Tensor], want: Tensor, route: str | None = None) -> None:
        contender = Contender(call, route or "", self.kind == "tf32")
        try:
            with path(contender.route, contender.tf32):
                error = relative_error(call(), want)
        except (RuntimeError, NotImplementedError) as problem:
            if route is not None and not isinstance(problem, torch.OutOfMemoryError):
                raise
            self.skipped[name] = str(problem).splitlines()[0][:200]
            return
        if error > TOLERANCE[self.kind]:
            if route is not None:
                raise AssertionError(f"{name}: relative error {error:.2e}, want {TOLERANCE[self.kind]:.0e}")
            self.skipped[name] = f"relative error {error:.2e}"
            return
        self.errors[name], self.contenders[name] = error, contender
