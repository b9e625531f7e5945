"""What `gpu-check` measures: every way of computing a layer against the dense library, top-k and SVD against torch's,
and the rates by which dispatch.py chooses.

Every contender is checked before it is timed. Contenders of a session run in turn, so that drift hits them alike; times
are in microseconds, from CUDA events on a GPU.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, ref
from .dispatch import DeviceRates, Work, predict
from .gpu_correctness import BF16, F32, F64, LAST, STRICT, path, replayable, settings
from .ops import Pattern

KINDS = {"float32": F32, "tf32": F32, "bfloat16": BF16}  # what a layer computes in
TOLERANCE = {"float64": 1e-12, "float32": 3e-5, "tf32": 3e-3, "bfloat16": 2e-2, "float16": 3e-3}  # relative, Frobenius
RANKS, DENSITIES = (0.05, 0.1, 0.25), (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
QUICK_RANKS, QUICK_DENSITIES = (0.1,), (0, 0.01, 0.05)
MOST, LEAST = 50, 3  # timed runs of a contender


class OutOfTimeError(Exception):
    """The time budget was spent before this measurement."""


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


# Sessions -----------------------------------------------------------------------------------------------------------


def support(m: int, n: int, density: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Pattern]:
    """Values and the pattern of a random S."""
    _, row_ptr, col_idx = ops.topk_csr(torch.rand(m, n, device=device), round(density * m * n))
    pattern = Pattern(row_ptr, col_idx, *ops.csr_transpose(row_ptr, col_idx, n))
    return (torch.randn(col_idx.shape[0], device=device) * n**-0.5).to(dtype), pattern


def fits_tensor_cores(layer: Layer, kind: str, dtype: torch.dtype) -> bool:
    return kind in ("tf32", "bfloat16", "float16") and layer.channels * dtype.itemsize % 16 == 0


def layer_rows(
    layer: Layer, kind: str, share: float, densities: Iterable[float], device: torch.device, seconds: float
) -> list[dict]:
    """One row for each density of S: all backends, torch's composition, and the dense layer in each layout."""
    dtype, m, n = KINDS.get(kind) or getattr(torch, kind), layer.m, layer.n
    rank = max(1, round(share * min(m, n))) if share else 0
    with torch.no_grad(), precision(kind):
        images = layer.images(device, dtype)
        plain, last = images["contiguous"], images.get("channels_last", images["contiguous"])
        u = (torch.randn(m, rank, device=device) * max(rank, 1) ** -0.5).to(dtype)
        v = (torch.randn(rank, n, device=device) * n**-0.5).to(dtype)
        entry, rows = Entry(kind), []
        for density in densities:
            values, pattern = support(m, n, density, device, dtype)
            exact = F64 if dtype == F64 else F32
            with settings(STRICT[:2]):
                wide = [t.to(exact) for t in (u, v, values)]
                want = layer.dense(plain.to(exact), layer.weight(ref.dense_weight(*wide, pattern), plain))
            if not rows and rank:
                w = ops.dense_weight(u, v, values, pattern)
                for layout, x in images.items():
                    entry.add(f"dense {layout}", partial(layer.dense, x, layer.weight(w, x)), want)
                pace = measure(entry.contenders, device, 0)
                best = images[min(pace, key=lambda name: pace[name]["p50"]).removeprefix("dense ")] if pace else plain
            layer_args = (u, v, values, pattern)
            mine = {"csr": (partial(layer.ours, plain, *layer_args), "csr")}
            if fits_tensor_cores(layer, kind, dtype):
                mine["mma"] = (partial(layer.ours, last, *layer_args), "mma")
            if rank:
                mine["rebuild"] = (partial(layer.rebuilt, best, *layer_args), "")
            for name, (call, route) in mine.items():
                entry.add(f"{name} {density}", call, want, route)
            if rank:
                s = None
                if density:
                    s = torch.sparse_csr_tensor(
                        pattern.row_ptr, pattern.col_idx, values, (m, n), check_invariants=False
                    )
                entry.add(f"composed {density}", partial(layer.composed, plain, u, v, s), want)
            sizes = {"m": m, "n": n, "tokens": layer.tokens, "rank": rank, "density": density, "nnz": len(values)}
            inputs, outputs = layer.elements
            rows.append({"layer": layer.name, "kind": kind, **sizes, "inputs": inputs, "outputs": outputs})
        _time(entry, device, seconds, l2_flush(device) if layer.tokens <= 16 else None, rows)
    return rows


def _time(entry: Entry, device: torch.device, seconds: float, before, rows: list[dict]) -> None:
    """Eager and captured times into the rows; names of contenders end in the row's density or belong to all rows."""
    graphs = captured({k: c for k, c in entry.contenders.items() if not k.startswith("composed")}, device)
    times = {
        "eager": measure(entry.contenders, device, seconds / 2, before),
        "graph": measure(graphs, device, seconds / 2, before),
    }
    times |= {"errors": entry.errors, "skipped": entry.skipped}
    for row in rows:
        for kind, found in times.items():
            row[kind] = {}
            for name, value in found.items():
                if name.startswith("dense ") or name.endswith(f" {row['density']}"):
                    row[kind][name.removesuffix(f" {row['density']}")] = value


def sparse_rows(layer: Layer, kind: str, device: torch.device, seconds: float) -> list[dict]:
    """S alone at 5 %, from which the rates of the sparse kernels and of the tensor-core path are taken."""
    return [{**row, "alone": True} for row in layer_rows(layer, kind, 0, (0.05,), device, seconds)]


def topk_rows(m: int, n: int, device: torch.device, seconds: float) -> list[dict]:
    w, nnz = torch.randn(m, n, device=device), m * n // 20
    contenders = {
        "topk_csr": Contender(lambda: ops.topk_csr(w, nnz)),
        "torch.topk": Contender(lambda: w.abs().flatten().topk(nnz, sorted=False)),
    }
    got, want = (contenders[name].call()[0].abs().sort().values for name in contenders)
    if not torch.equal(got, want):
        raise AssertionError("topk_csr keeps other magnitudes than torch.topk")
    return [{"layer": f"topk_csr {m}x{n}, 5 %", "kind": "float32", "eager": measure(contenders, device, seconds)}]


def svd_rows(m: int, n: int, rank: int, device: torch.device, seconds: float) -> list[dict]:
    w = torch.randn(m, n, device=device)
    contenders = {
        "truncated_svd": Contender(lambda: ops.truncated_svd(w, rank)),
        "torch.svd_lowrank": Contender(lambda: torch.svd_lowrank(w, rank + 8, 4)),
        "torch.linalg.svd": Contender(lambda: torch.linalg.svd(w, full_matrices=False)),
    }
    with precision("float32"):
        u, s, vh = contenders["truncated_svd"].call()
        best = torch.linalg.svdvals(w)[rank:].norm()
        excess = ((w - (u * s) @ vh).norm() / best).item()
        if not excess < 1.02:
            raise AssertionError(f"truncated_svd leaves {excess:.4f} times what the best factors of its rank leave")
        times = measure(contenders, device, seconds)
    name = f"truncated_svd {m}x{n}, rank {rank}"
    return [{"layer": name, "kind": "float32", "excess": excess, "eager": times}]


def train_rows(layer: Layer, kind: str, density: float, device: torch.device, seconds: float) -> list[dict]:
    """Forward and backward of a layer with rank 10 %: ours on each path, rebuilt, and dense."""
    dtype, m, n = KINDS[kind], layer.m, layer.n
    rank = max(1, min(m, n) // 10)
    with precision(kind):
        images = layer.images(device, dtype)
        x = images.get("channels_last", images["contiguous"]).requires_grad_()
        u = (torch.randn(m, rank, device=device) * rank**-0.5).to(dtype).requires_grad_()
        v = (torch.randn(rank, n, device=device) * n**-0.5).to(dtype).requires_grad_()
        values, pattern = support(m, n, density, device, dtype)
        leaves = (x, u, v, values.requires_grad_())
        w = layer.weight(ops.dense_weight(*leaves[1:], pattern), x).detach().requires_grad_()
        grad = torch.randn_like(layer.dense(x, w)).detach()

        def ours() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer.ours(*leaves, pattern), leaves, grad)

        def rebuilt() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer.rebuilt(*leaves, pattern), leaves, grad)

        tf32 = kind == "tf32"
        contenders = {"csr": Contender(ours, "csr", tf32), "rebuild": Contender(rebuilt)}
        if fits_tensor_cores(layer, kind, dtype):
            contenders["mma"] = Contender(ours, "mma", tf32)
        contenders["dense"] = Contender(lambda: torch.autograd.grad(layer.dense(x, w), (x, w), grad))
        want = rebuilt()
        for name in contenders.keys() & {"csr", "mma"}:
            with path(contenders[name].route, tf32):
                errors = map(relative_error, ours(), [t.float() for t in want])
                worst = max(errors)
            if worst > 3 * TOLERANCE[kind]:
                raise AssertionError(f"{name}: relative error of a gradient {worst:.2e}")
        times = measure(contenders, device, seconds)
    sizes = {"rank": rank, "density": density, "nnz": len(values)}
    return [{"layer": f"forward and backward, {layer.name}", "kind": kind, **sizes, "eager": times}]


def peak_rows(device: torch.device, seconds: float) -> list[dict]:
    """Bandwidth of a large copy, the time of one small kernel among others, and the rates of large products."""
    gpu = device.type == "cuda"
    source = torch.ones(1 << (30 if gpu else 24), dtype=torch.uint8, device=device)
    copy, tiny = torch.empty_like(source), torch.zeros(1, device=device)

    def hundred() -> None:
        for _ in range(100):
            tiny.add_(1)

    share = seconds / 7
    times = measure({"copy": Contender(lambda: copy.copy_(source)), "launch": Contender(hundred)}, device, 2 * share)
    bandwidth, launch = 2 * len(source) / times["copy"]["p50"] * 1e6, times["launch"]["p50"] * 1e-8
    dense = {}
    for kind in ("float64", "float32", "tf32", "float16", "bfloat16"):
        dtype = F32 if kind == "tf32" else getattr(torch, kind)
        side = 256 if not gpu else 4096 if dtype in (F64, F32) else 8192
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with precision(kind):
            times = measure({"product": Contender(partial(torch.mm, a, b))}, device, share)
        dense[kind] = 2 * side**3 / times["product"]["p50"] * 1e6
    return [{"layer": "peaks", "bandwidth": bandwidth, "launch": launch, "dense": dense}]


Session = Callable[[torch.device, float], list[dict]]


def sessions(quick: bool) -> list[tuple[str, Session]]:
    """Names and functions of (device, seconds), the most telling first."""
    ranks, densities = (QUICK_RANKS, QUICK_DENSITIES) if quick else (RANKS, DENSITIES)
    found: list[tuple[str, Session]] = [("peaks", peak_rows)]
    for kind in ("float64", "float32", "float16", "bfloat16"):
        for layer in (MAIN[0], MAIN[-1]):
            found.append((f"S alone, {kind}, {layer.name}", partial(sparse_rows, layer, kind)))

    def layers(of: list[Layer]) -> None:
        for layer in of:
            for kind in KINDS:
                for share in ranks:
                    name = f"{layer.name}, {kind}, rank {share:.0%}"
                    found.append((name, partial(layer_rows, layer, kind, share, densities)))

    layers(MAIN)
    for m, n in ((512, 4608), (4096, 4096)):
        found.append((f"topk_csr {m}x{n}", partial(topk_rows, m, n)))
    for m, n, rank in ((256, 2304, 26), (512, 4608, 51)):
        found.append((f"truncated_svd {m}x{n}", partial(svd_rows, m, n, rank)))
    for layer in (MAIN[0], MAIN[1], MAIN[-1]):
        for kind in ("float32", "bfloat16"):
            for density in densities[-1:] if quick else (0.01, 0.05):
                found.append((f"training, {kind}, {layer.name}", partial(train_rows, layer, kind, density)))
    if not quick:
        layers(RESNET18)
    return found


def tasks(device: torch.device, quick: bool, deadline: float) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """The sessions, each with a fair share of the time that is left; half of it, as preparing takes time too."""
    planned = sessions(quick)

    def run(index: int, session: Session) -> list[dict]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError("out of time")
        try:
            return session(device, 0.5 * left / (len(planned) - index))
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()

    for index, (name, session) in enumerate(planned):
        yield name, partial(run, index, session)


# From rows to figures -----------------------------------------------------------------------------------------------


def typical(row: dict, name: str) -> float | None:
    """Median microseconds of a contender, as a graph where it was captured."""
    found = row.get("graph", {}).get(name) or row.get("eager", {}).get(name)
    return found["p50"] if found else None


def ceiling(row: dict, peaks: dict, dense: bool = False) -> float:
    """Microseconds that the row's bytes and operations take at the measured peaks, each byte moved once."""
    m, n, rank, nnz = row["m"], row["n"], row["rank"], row["nnz"]
    element = 2 if row["kind"] in ("bfloat16", "float16") else 8 if row["kind"] == "float64" else 4
    weights = m * n if dense else rank * (m + n) + nnz
    index = 0 if dense else 4 * (nnz + m + 1)
    moved = (row["inputs"] + row["outputs"] + weights) * element + index
    return 1e6 * max(moved / peaks["bandwidth"], 2 * weights * row["tokens"] / peaks["dense"][row["kind"]])


def describe(row: dict, peaks: dict | None) -> str:
    """A row as one line of text."""
    if "tokens" not in row:
        if "dense" in row:
            rates = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in row["dense"].items())
            return f"copy {row['bandwidth'] / 1e9:.0f} GB/s, launch {1e6 * row['launch']:.2f} us, TFLOP/s: {rates}"
        at = f", {100 * row['density']:g} %" if "density" in row else ""
        times = ", ".join(f"{name} {typical(row, name):.1f}" for name in row["eager"])
        return f"{row['layer']}, {row['kind']}{at}: {times} us"
    names = [name for name in row["eager"] if not name.startswith("dense ")]
    parts = [f"{name} {typical(row, name):.1f}" for name in names]
    dense = [typical(row, name) for name in row["eager"] if name.startswith("dense ")]
    ours = [time for time in (typical(row, "csr"), typical(row, "mma")) if time]
    if dense:
        parts.insert(0, f"dense {min(dense):.1f}")
    text = f"{row['layer']}, {row['kind']}, r {row['rank']}, {100 * row['density']:g} %: {', '.join(parts)} us"
    if dense and ours:
        text += f"; {min(dense) / min(ours):.2f}x dense"
    if peaks and ours:
        text += f", {ceiling(row, peaks) / min(ours):.0%} of the roofline"
    return text


def fit(rows: list[dict]) -> DeviceRates | None:
    """The rates that dispatch.py wants, from the measured peaks and the rows of S alone; None if some are missing."""
    peaks = next((row for row in rows if row["layer"] == "peaks"), None)
    if peaks is None:
        return None
    launch = peaks["launch"]

    def rate(flop: float, microseconds: float) -> float:
        elapsed = 1e-6 * microseconds
        return flop / (elapsed - min(launch, elapsed / 2))

    sparse: dict[str, list[float]] = {}
    mma: dict[str, list[float]] = {}
    for row in rows:
        if row.get("alone"):
            if typical(row, "csr"):
                work = 2 * row["nnz"] * row["tokens"]
                sparse.setdefault(row["kind"], []).append(rate(work, typical(row, "csr")))
            if typical(row, "mma"):
                work = 2 * row["m"] * row["n"] * row["tokens"]
                mma.setdefault(row["kind"], []).append(rate(work, typical(row, "mma")))
    if not sparse.keys() >= {"float64", "float32", "float16", "bfloat16"}:
        return None

    def mean(found: dict[str, list[float]]) -> dict[str, float]:
        return {kind: math.exp(sum(map(math.log, rates)) / len(rates)) for kind, rates in found.items()}

    dense = {kind: value for kind, value in peaks["dense"].items() if kind != "tf32"}
    return DeviceRates(peaks["bandwidth"], launch, dense, mean(sparse), mean(mma))


def choices(rows: list[dict], rates: DeviceRates) -> dict[str, float]:
    """How well the model chooses on the measured layers: share of rows where its choice is the fastest, and how many
    times slower than the fastest it is on average and at worst."""
    losses = []
    for row in rows:
        if "tokens" not in row or row.get("alone") or row["kind"] == "tf32":
            continue
        dtype = getattr(torch, row["kind"])
        sizes = (row["m"], row["n"], 1, row["rank"], row["nnz"], row["tokens"], row["inputs"], row["outputs"])
        predicted = predict(Work(*sizes, dtype), rates, rebuild=True)
        fused = [time for time in (typical(row, "csr"), typical(row, "mma")) if time]
        times = {
            "dense": typical(row, "rebuild"),
            "lowrank": typical(row, "composed"),
            "fused": min(fused, default=None),
        }
        times = {name: times[name] for name in predicted if times[name]}
        choice = min(predicted, key=predicted.get)
        if choice in times:
            losses.append(times[choice] / min(times.values()))
    if not losses:
        return {}
    right = sum(loss < 1.05 for loss in losses) / len(losses)
    return {"rows": len(losses), "right": right, "mean": sum(losses) / len(losses), "worst": max(losses)}
