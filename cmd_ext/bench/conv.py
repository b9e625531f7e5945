"""Convolutions: S alone, U V alone, U V + S over the 3x3 layers of networks, and their backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmd_ext import CMDConv2d, ref
from cmd_ext.bench.deepsparse import sparse_engine
from cmd_ext.bench.shapes import Conv, networks, with_batch
from cmd_ext.bench.timing import Call, Case, Goal, Row, Run, error_of, over, total

LAST = torch.channels_last
SQUARE = (Conv(8, 64, 64, 56), Conv(8, 128, 128, 28), Conv(8, 256, 256, 14), Conv(8, 512, 512, 7))
PACKED, UNFUSED, ALONE = "V, U by oneDNN packed", "unfused: V, U by oneDNN, our S", "without S"

# density: (target, the least ratios over the best dense convolution for SQUARE)
SPARSE = {
    0.02: [("2", (5.5, 9, 13, 18))],
    0.05: [("a", (5.0, 8.0, 8.5, 11)), ("1", (4.5, 7, 7.5, 10))],
    0.2: [("2", (2.5, 2.5, 2.5, 2.5))],
}
# (network, batch): {(part, density): [(target, least ratio over the best rival)]}, with rank = channels / part
TOTALS = {
    ("ResNet-18 at 224", 8): {(8, 0.02): [("b", 4.3), ("4", 4.0)], (4, 0.05): [("4", 2.2)]},
    ("ResNet-18 at 224", 1): {(8, 0.02): [("b", 4.0), ("4", 3.6)], (4, 0.05): [("4", 2.0)]},
    ("ResNet-18 at 32", 32): {(8, 0.02): [("b", 4.8), ("5", 4.5)], (6, 0.05): [("5", 3.0)], (4, 0.05): [("5", 2.4)]},
    ("VGG-16 at 224", 1): {(8, 0.02): [], (4, 0.05): []},
}
FUSION = {8: 1.4, 1: 1.8}  # target 6, by batch
ONE_THREAD = {0.05: 0.65, 0.2: 0.85}  # target 3: fraction of the peak
BACKWARD = {
    ("dx", 0.05): [("9", (5.0, 6.5, 6.5, 6.5))],
    ("dx", 0.2): [],
    ("dS", 0.05): [("8", (10.0,) * 4)],
    ("dS", 0.2): [("8", (4.0,) * 4)],
    ("all, r = c/8", 0.05): [("d", (3.5,) * 4), ("10", (2.9,) * 4)],
    ("all, r = c/8", 0.2): [],
}


def layer_of(run: Run, shape: Conv, rank: int, density: float, form: str = "channel") -> CMDConv2d:
    torch.manual_seed(0)
    geometry = (shape.channels, shape.out_channels, shape.kernel, shape.stride, shape.pad)
    layer = CMDConv2d(*geometry, device=run.device, dtype=run.dtype, rank=rank, density=density, form=form)
    layer.backend = "fused"
    return layer.requires_grad_(False)


def images(run: Run, shape: Conv) -> tuple[Tensor, Tensor]:
    """x, contiguous and channels_last."""
    x = run.randn(shape.batch, shape.channels, shape.side, shape.side)
    return x, x.contiguous(memory_format=LAST)


def exact(layer: CMDConv2d, x: Tensor) -> Tensor:
    """The layer by ref.py in float64."""
    weights = (layer.u.double(), layer.v.double(), layer.values.double(), layer.pattern, layer.bias.double())
    return ref.lrs_conv2d(x.double(), *weights, layer.kernel_size, layer.stride, layer.padding)


# Rivals -------------------------------------------------------------------------------------------------------------


def packed_conv(weight: Tensor, bias: Tensor | None, x: Tensor, stride: int, pad: int) -> Callable[[Tensor], Tensor]:
    """A dense convolution whose weights oneDNN has packed ahead of time for inputs like x."""
    pads, strides, ones = [pad, pad], [stride, stride], [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, pads, strides, ones, 1, list(x.shape))
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda image: run(image, packed, bias, pads, strides, ones, 1, "none", [], "")


def packs(x: Tensor) -> bool:
    """Whether oneDNN takes packed weights for x."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def dense_rivals(layer: CMDConv2d, x: Tensor, last: Tensor) -> dict[str, Call]:
    dense, stride, pad = layer.to_dense(), layer.stride[0], layer.padding[0]
    weight, bias, last_weight = dense.weight, dense.bias, dense.weight.contiguous(memory_format=LAST)
    rivals = {
        "dense NCHW": lambda: F.conv2d(x, weight, bias, stride, pad),
        "dense channels_last": lambda: F.conv2d(last, last_weight, bias, stride, pad),
    }
    if packs(x):
        conv = packed_conv(weight, bias, x, stride, pad)
        rivals["dense packed NCHW"] = lambda: conv(x)
        rivals["dense packed channels_last"] = lambda: conv(last)
    return rivals


def factors(layer: CMDConv2d) -> tuple[Tensor, Tensor]:
    """V and U as convolution kernels."""
    return layer.v.view(layer.rank, -1, *layer.kernel_size), layer.u.view(layer.out_channels, layer.rank, 1, 1)


def low_rank(layer: CMDConv2d, x: Tensor, last: Tensor) -> dict[str, Call]:
    """U V as two dense convolutions, with bias."""
    (v, u), stride, pad = factors(layer), layer.stride[0], layer.padding[0]
    calls = {}
    for name, image in (("NCHW", x), ("channels_last", last)):
        calls[f"V, U by F.conv2d {name}"] = lambda i=image: F.conv2d(F.conv2d(i, v, None, stride, pad), u, layer.bias)
    if packs(x):
        z = F.conv2d(x, v, None, stride, pad)
        first, second = packed_conv(v, None, x, stride, pad), packed_conv(u, layer.bias, z, 1, 0)
        calls[PACKED] = lambda: second(first(last))
    return calls


def with_torch_csr(layer: CMDConv2d, x: Tensor) -> Call:
    """U V as two dense convolutions and S by torch's sparse product on unfolded images."""
    s = torch.sparse_csr_tensor(layer.row_ptr, layer.col_idx, layer.values, layer.matrix_shape)
    stride, pad = layer.stride[0], layer.padding[0]
    low = next(iter(low_rank(layer, x, x).values())) if layer.rank else None

    def call() -> Tensor:
        columns = F.unfold(x, layer.kernel_size, padding=pad, stride=stride)
        product = s @ columns.transpose(0, 1).reshape(columns.shape[1], -1)
        side = (x.shape[-1] + 2 * pad - layer.kernel_size[0]) // stride + 1
        sparse = product.view(-1, x.shape[0], side, side).transpose(0, 1)
        return low() + sparse if low else sparse + layer.bias[:, None, None]

    return call


def sparse_alone(run: Run, shape: Conv, layer: CMDConv2d) -> CMDConv2d:
    """The layer's S, without U V and bias."""
    s = layer_of(run, shape, 0, 0.0)
    s.load_state_dict({**layer.state_dict(), "u": layer.u[:, :0], "v": layer.v[:0], "bias": torch.zeros_like(s.bias)})
    return s


# Forward ------------------------------------------------------------------------------------------------------------


def forward_case(
    run: Run, name: str, shape: Conv, rank: int, density: float, goals: tuple[Goal, ...] = (), **options
) -> Case:
    """In both memory formats, against the dense layer and what torch composes."""
    layer, (x, last) = layer_of(run, shape, rank, density), images(run, shape)
    want = exact(layer, x)
    ours = {"channels_last": lambda: layer(last), "NCHW": lambda: layer(x)}
    rivals, references = dense_rivals(layer, x, last), {}
    if rank:
        low = low_rank(layer, x, last)
        if not layer.nnz:
            rivals |= low
        elif packs(x):
            s, composed = sparse_alone(run, shape, layer), low[PACKED]
            references = {UNFUSED: lambda: composed().add_(s(last)), ALONE: composed}
    if layer.nnz:
        rivals["composed with torch CSR"] = with_torch_csr(layer, x)
        if not rank:
            rivals |= sparse_engine(layer, x)
    useful = 2e-9 * shape.tokens * (layer.nnz + rank * (shape.m + shape.n))
    return Case(
        name,
        ours,
        lambda y: error_of(y, want),
        run.tolerance,
        rivals,
        references,
        gflop=useful,
        goals=goals,
        **options,
    )


def square_goals(shape: Conv, targets: list, what: str) -> tuple[Goal, ...]:
    """The goals of one of SQUARE from lists of four."""
    if shape not in SQUARE:
        return ()
    return tuple(Goal(target, what, wanted[SQUARE.index(shape)], over("dense")) for target, wanted in targets)


def percent(density: float) -> str:
    return f"{density:.0%}"


def bench_conv(run: Run) -> Iterator[Row]:
    shapes = run.pick(Conv, SQUARE, SQUARE[3:])
    for density in (0.05,) if run.quick else SPARSE:
        for shape in shapes:
            goals = square_goals(shape, SPARSE[density], f"S * x at {percent(density)}, {shape}, over the best dense")
            if density == 0.05:
                what = f"S * x at 5%, {shape}, over DeepSparse"
                goals += (Goal("14", what, 2.0, over("DeepSparse")),)
            name = f"S * x, {percent(density)}, {shape}"
            yield run.measure(forward_case(run, name, shape, 0, density, goals))
    if run.shapes or run.quick:
        for (part, density), shape in [((8, 0.02), s) for s in shapes] + [((4, 0.05), s) for s in shapes]:
            yield run.measure(fused_case(run, shape, part, density))
        return
    for density, least in ONE_THREAD.items():
        shape = SQUARE[2]
        name = f"S * x, {percent(density)}, {shape}, 1 thread"
        goal = Goal("3", f"{name}: fraction of the peak, packing included", least, lambda row: row.fraction)
        yield run.measure(forward_case(run, name, shape, 0, density, (goal,), threads=1))
    for shape in SQUARE:
        name = f"U V * x, r = c/8, {shape}"
        goal = Goal("7", f"{name}, over two oneDNN convolutions", 1.1, over(PACKED))
        yield run.measure(forward_case(run, name, shape, shape.channels // 8, 0.0, (goal,)))
    for shape in SQUARE[1:3]:
        for density in (0.0, 0.05):
            yield spatial_row(run, shape, density)
    for network, batch in TOTALS:
        yield from bench_totals(run, network, batch)


def spatial_row(run: Run, shape: Conv, density: float) -> Row:
    """The spatial form beside the channel form of r = c/8 at as many parameters, and beside its own dense weight."""
    rank = shape.channels // 8
    channel, (x, last) = layer_of(run, shape, rank, density), images(run, shape)
    rank = rank * (shape.m + shape.n) // (shape.kernel * (shape.m + shape.channels))
    layer = layer_of(run, shape, rank, density, "spatial")
    want = layer.to_dense().double()(x.double())
    rivals: dict[str, Call] = {
        "channel form channels_last": lambda: channel(last),
        "channel form NCHW": lambda: channel(x),
    }
    part = f"U V + S, {percent(density)}" if density else "U V"
    case = Case(
        f"spatial form: {part}, r = {rank}, {shape}",
        {"channels_last": lambda: layer(last), "NCHW": lambda: layer(x)},
        lambda y: error_of(y, want),
        run.tolerance,
        rivals | dense_rivals(layer, x, last),
        checked=False,
        gflop=2e-9 * shape.tokens * (layer.u.numel() + layer.v.numel() + layer.nnz),
    )
    row = run.measure(case)
    ways = {"channel": row.over("channel"), "dense": row.over("dense")}
    told = ", ".join(f"{way} {row.ours.p50 * ratio:.3g} ms" for way, ratio in ways.items())
    return dataclasses.replace(row, note=f"{row.note}; {told}")


def fused_case(run: Run, shape: Conv, part: int, density: float) -> Case:
    name = f"U V + S, r = c/{part}, {percent(density)}, {shape}"
    return forward_case(run, name, shape, max(1, shape.channels // part), density)


def bench_totals(run: Run, network: str, batch: int) -> Iterator[Row]:
    """Every 3x3 convolution of a network but its first, and their sum."""
    counts = {s: c for s, c in networks()[network].items() if isinstance(s, Conv) and s.kernel == 3 and s.channels > 3}
    for (part, density), targets in TOTALS[network, batch].items():
        rows = []
        for shape, count in zip(with_batch(counts, batch), counts.values(), strict=True):
            rows.append((run.measure(fused_case(run, shape, part, density)), count))
            yield rows[-1][0]
        name = f"{network}, batch {batch}: its 3x3 convolutions, r = c/{part}, {percent(density)}"
        goals = tuple(Goal(target, f"{name}, over the best dense", wanted, over("dense")) for target, wanted in targets)
        if (part, density) == (8, 0.02) and network == "ResNet-18 at 224":
            goals += (Goal("6", f"{name}, over {UNFUSED}", FUSION[batch], over(UNFUSED)),)
        yield total(name, rows, "dense", goals)


# Backward -----------------------------------------------------------------------------------------------------------


def gradient(module: nn.Module, x: Tensor, dy: Tensor, *of: str) -> Callable[[], tuple[Tensor, ...]]:
    """A function that repeats the backward pass of one forward pass, for x and the parameters named in `of`."""
    module.requires_grad_(False)
    leaves = [x.clone() if name == "x" else getattr(module, name) for name in of]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        y = module(leaves[of.index("x")] if "x" in of else x)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def bench_backward(run: Run) -> Iterator[Row]:
    shapes = run.pick(Conv, SQUARE, SQUARE[3:])
    for (part, density), targets in BACKWARD.items():
        if run.quick and density != 0.05:
            continue
        for shape in shapes:
            goals = square_goals(shape, targets, f"backward: {part}, {percent(density)}, {shape}, over the best dense")
            yield run.measure(
                backward_case(run, f"backward: {part}, {percent(density)}, {shape}", part, shape, density, goals)
            )


def backward_case(run: Run, name: str, part: str, shape: Conv, density: float, goals: tuple[Goal, ...]) -> Case:
    ours, theirs = {
        "dx": (("x",), ("x",)),
        "dS": (("values",), ("weight",)),
        "all, r = c/8": (("x", "u", "v", "values", "bias"), ("x", "weight", "bias")),
    }[part]
    layer = layer_of(run, shape, max(1, shape.channels // 8) if len(ours) > 1 else 0, density)
    x, last = images(run, shape)
    dy = run.randn(shape.batch, shape.m, shape.out_side, shape.out_side)
    dy_last = dy.contiguous(memory_format=LAST)
    rivals = {
        "dense NCHW": gradient(layer.to_dense(), x, dy, *theirs),
        "dense channels_last": gradient(layer.to_dense().to(memory_format=LAST), last, dy_last, *theirs),
    }
    support = torch.repeat_interleave(layer.row_ptr.diff().long()), layer.col_idx.long()
    if part == "dS":
        rivals |= {f"{name}, then masked": partial(masked, call, support) for name, call in rivals.items()}
    want = exact_gradients(layer, x, dy)
    r, m, n = layer.rank, shape.m, shape.n
    sparse = layer.nnz * (("x" in ours) + ("values" in ours))
    useful = 2e-9 * shape.tokens * (sparse + (r * (3 * n + 2 * m) if r else 0))
    return Case(
        name,
        {"channels_last": gradient(layer, last, dy_last, *ours), "NCHW": gradient(layer, x, dy, *ours)},
        lambda got: max(error_of(a, want[b]) for a, b in zip(got, ours, strict=True)),
        run.tolerance,
        rivals,
        checked=False,
        gflop=useful,
        goals=goals,
    )


def masked(dense: Callable[[], tuple[Tensor, ...]], support: tuple[Tensor, Tensor]) -> Tensor:
    """The dense gradient of the weight, gathered where S has entries."""
    return dense()[0].flatten(1)[support]


def exact_gradients(layer: CMDConv2d, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of x and every parameter, by ref.py in float64."""
    names = ("x", "u", "v", "values", "bias")
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.u, layer.v, layer.values, layer.bias)]
    with torch.enable_grad():
        x, u, v, values, bias = leaves
        y = ref.lrs_conv2d(x, u, v, values, layer.pattern, bias, layer.kernel_size, layer.stride, layer.padding)
    return dict(zip(names, torch.autograd.grad(y, leaves, dy.double()), strict=True))
