"""Rows of the convolution: S alone, U V + S over the 3x3 convolutions of networks, and the backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmd_ext import CMDConv2d
from cmd_ext.bench.timing import Row, interleaved

LAST = torch.channels_last
SECONDS = 0.5  # of a comparison


@dataclass(frozen=True)
class Shape:
    """A 3x3 convolution with padding 1 of [batch, channels, side, side]."""

    batch: int
    channels: int
    out_channels: int
    side: int
    stride: int = 1
    count: int = 1  # such layers in the network

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.channels}->{self.out_channels}@{self.side}{stride}, batch {self.batch}"


SQUARE = (Shape(8, 64, 64, 56), Shape(8, 128, 128, 28), Shape(8, 256, 256, 14), Shape(8, 512, 512, 7))


def resnet18(batch: int) -> list[Shape]:
    """The 3x3 convolutions of ResNet-18 at 224 x 224."""
    same = [Shape(batch, c, c, s, 1, n) for c, s, n in ((64, 56, 4), (128, 28, 3), (256, 14, 3), (512, 7, 3))]
    return same + [Shape(batch, c, 2 * c, s, 2) for c, s in ((64, 56), (128, 28), (256, 14))]


def small_images(batch: int) -> list[Shape]:
    """The 3x3 convolutions of a ResNet-18 for 32 x 32 images."""
    same = [Shape(batch, c, c, s, 1, n) for c, s, n in ((64, 32, 5), (128, 16, 3), (256, 8, 3), (512, 4, 3))]
    return same + [Shape(batch, c, 2 * c, s, 2) for c, s in ((64, 32), (128, 16), (256, 8))]


def layer_of(shape: Shape, rank: int, density: float) -> CMDConv2d:
    torch.manual_seed(0)
    layer = CMDConv2d(
        shape.channels, shape.out_channels, 3, shape.stride, 1, bias=True, rank=rank, density=density
    ).requires_grad_(False)
    layer.backend = "fused"
    return layer


def images(shape: Shape) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape.batch, shape.channels, shape.side, shape.side)
    return x, x.contiguous(memory_format=LAST)


def dense_rivals(layer: CMDConv2d, x: Tensor, last: Tensor) -> list[Callable[[], Tensor]]:
    """The dense layer in both memory formats and with weights packed for oneDNN ahead of time."""
    dense, stride = layer.to_dense(), layer.stride
    weight, bias, last_weight = dense.weight, dense.bias, dense.weight.contiguous(memory_format=LAST)
    rivals = [
        lambda: F.conv2d(x, weight, bias, stride, 1),
        lambda: F.conv2d(last, last_weight, bias, stride, 1),
    ]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], list(stride), [1, 1], 1, list(x.shape))
        for image in (x, last):
            rivals.append(
                lambda image=image: torch.ops.mkldnn._convolution_pointwise(
                    image, packed, bias, [1, 1], list(stride), [1, 1], 1, "none", [], ""
                )
            )
    return rivals


def check(got: Tensor, want: Tensor) -> None:
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < 1e-5, f"wrong result: relative error {error:.2e}"


def forward_times(shape: Shape, rank: int, density: float) -> tuple[float, float, float]:
    """Milliseconds of our layer (the better memory format), of channels_last alone, and of the best dense rival."""
    layer, (x, last) = layer_of(shape, rank, density), images(shape)
    dense = layer.to_dense().double()
    check(layer(last), dense(x.double()))
    ours_last, ours, *theirs = interleaved(
        [lambda: layer(last), lambda: layer(x), *dense_rivals(layer, x, last)], seconds=SECONDS
    )
    return min(ours, ours_last), ours_last, min(theirs)


@torch.no_grad()
def bench_conv() -> Iterator[Row]:
    wanted = {0.02: (5.5, 9, 13, 18), 0.05: (5.0, 8.0, 8.5, 11), 0.2: (2.5, 2.5, 2.5, 2.5)}
    for density, ratios in wanted.items():
        for shape, ratio in zip(SQUARE, ratios, strict=True):
            _, ours, theirs = forward_times(shape, 0, density)
            yield Row(f"S * x, {density:.0%}, {shape}", ours, theirs, "ms", "best dense", ratio, "channels_last")
    networks = {
        "ResNet-18 at 224, batch 8": (resnet18(8), (4.3, 2.2)),
        "ResNet-18 at 224, batch 1": (resnet18(1), (4.0, 2.0)),
        "ResNet-18 at 32, batch 32": (small_images(32), (4.8, 2.4)),
    }
    for name, (shapes, ratios) in networks.items():
        for (part, density), ratio in zip(((8, 0.02), (4, 0.05)), ratios, strict=True):
            times = [(forward_times(s, s.channels // part, density), s.count) for s in shapes]
            ours, theirs = (sum(t[i] * count for t, count in times) for i in (0, 2))
            yield Row(
                f"{name}: its 3x3 convolutions, r = c/{part}, {density:.0%}", ours, theirs, "ms", "best dense", ratio
            )


def backward(module: torch.nn.Module, x: Tensor, dy: Tensor, *of: str) -> Callable[[], tuple[Tensor, ...]]:
    """A function that repeats the backward pass of one forward pass, for x and the parameters named in `of`."""
    module.requires_grad_(False)
    leaves = [x.clone() if name == "x" else getattr(module, name) for name in of]
    for leaf in leaves:
        leaf.requires_grad_()
    y = module(leaves[of.index("x")] if "x" in of else x)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def bench_backward() -> Iterator[Row]:
    wanted = {("dx", 0.05): (5.0, 6.5, 6.5, 6.5), ("dS", 0.05): (10.0,) * 4, ("dS", 0.2): (4.0,) * 4}
    wanted["all, r = c/8", 0.05] = (3.5,) * 4
    whole = {"dx": (("x",), ("x",)), "dS": (("values",), ("weight",))}
    whole["all, r = c/8"] = ("x", "u", "v", "values", "bias"), ("x", "weight", "bias")
    for (name, (ours, theirs)), density in itertools.product(whole.items(), (0.05, 0.2)):
        for i, shape in enumerate(SQUARE):
            layer, (x, last) = layer_of(shape, shape.channels // 8 if len(ours) > 1 else 0, density), images(shape)
            dy = torch.randn(shape.batch, shape.out_channels, shape.side, shape.side)
            dy_last = dy.contiguous(memory_format=LAST)
            mine = backward(layer, last, dy_last, *ours)
            check_gradients(layer, layer.to_dense(), mine(), x, dy, ours, theirs)
            plain = backward(layer.to_dense(), x, dy, *theirs)
            channels_last = backward(layer.to_dense().to(memory_format=LAST), last, dy_last, *theirs)
            time, *times = interleaved([mine, plain, channels_last], seconds=SECONDS)
            ratio = wanted[name, density][i] if (name, density) in wanted else None
            yield Row(f"backward: {name}, {density:.0%}, {shape}", time, min(times), "ms", "dense, best layout", ratio)


def check_gradients(layer, dense, got, x, dy, ours, theirs) -> None:
    """The gradients of x and S against the dense layer's in float64."""
    dense = dense.double()
    want = dict(zip(theirs, backward(dense, x.double(), dy.double(), *theirs)(), strict=True))
    got = dict(zip(ours, got, strict=True))
    if "x" in ours:
        check(got["x"], want["x"])
    if "values" in ours:
        rows = torch.repeat_interleave(torch.arange(layer.out_channels), layer.row_ptr.diff().long())
        check(got["values"], want["weight"].flatten(1)[rows, layer.col_idx.long()])
