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

LAST, RAW = torch.channels_last, torch.ops.cmd_ext
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


def bench_backward() -> Iterator[Row]:
    for shape, density in itertools.product(SQUARE, (0.05, 0.2)):
        layer, (x, last) = layer_of(shape, 0, density), images(shape)
        weight = layer.dense_weight()
        dy = torch.randn(shape.batch, shape.out_channels, shape.side, shape.side)
        dy_last, last_weight = dy.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
        weights, geometry = (layer.u, layer.v, layer.values, *layer.pattern), ((3, 3), (1, 1), (1, 1), (1, 1), 1)

        def dense(x, w, dy, which):
            return torch.ops.aten.convolution_backward(
                dy, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [which == 0, which == 1, False]
            )[which]

        def grad_input(dy=dy_last, weights=weights, x=x, geometry=geometry):
            return RAW._lrs_conv2d_grad_input(dy, *weights, x.shape[2:], *geometry)

        def grad_values(dy=dy_last, x=last, pattern=layer.pattern, geometry=geometry):
            return RAW._lrs_conv2d_grad_values(dy, x, *pattern[:2], *geometry)

        dw = dense(x.double(), weight.double(), dy.double(), 1).flatten(1)
        rows = torch.repeat_interleave(torch.arange(shape.out_channels), layer.row_ptr.diff().long())
        check(grad_values(), dw[rows, layer.col_idx.long()])
        check(grad_input(), dense(x.double(), weight.double(), dy.double(), 0))
        for which, name, ours in ((0, "dx", grad_input), (1, "dS", grad_values)):
            mine, *theirs = interleaved(
                [
                    ours,
                    lambda w=which, x=x, weight=weight, dy=dy: dense(x, weight, dy, w),
                    lambda w=which, x=last, weight=last_weight, dy=dy_last: dense(x, weight, dy, w),
                ],
                seconds=SECONDS,
            )
            wanted = {(0, 0.05): 5.0 if shape.side == 56 else 6.5, (1, 0.05): 10.0, (1, 0.2): 4.0}.get((which, density))
            yield Row(f"{name}, {density:.0%}, {shape}", mine, min(theirs), "ms", "dense, best layout", wanted)
    for shape in SQUARE:
        layer, (x, last) = layer_of(shape, shape.channels // 8, 0.05).requires_grad_(), images(shape)
        dense = layer.to_dense().requires_grad_()
        dense_last = layer.to_dense().to(memory_format=LAST).requires_grad_()

        def step(module, x):
            """A function that runs the backward pass of one forward pass again and again."""
            leaf = x.clone().requires_grad_()
            y, leaves = module(leaf), [leaf, *module.parameters()]
            dy = torch.randn_like(y)
            return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

        ours, *theirs = interleaved([step(layer, last), step(dense, x), step(dense_last, last)], seconds=SECONDS)
        yield Row(f"backward, r = c/8, 5 %, {shape}", ours, min(theirs), "ms", "dense, best layout", 3.5)
