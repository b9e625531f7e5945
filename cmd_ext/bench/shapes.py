"""Shapes of layers: their grammar on the command line, and those of networks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from cmd_ext import models

GRAMMAR = """[Nb:]MxN, a matrix of M outputs and N inputs (512x4608; linear at b tokens: N16:1024x4096), or
[Nb:]C->M@S[kK][sT][pP], a convolution of b images: C to M channels on an S x S map, kernel K (3), stride T (1), padding
P (K / 2); CxM@S is the same (64x64@56, N8:64->128@56s2)"""

_ITEM = re.compile(r"(?:N(\d+):)?(\d+)(x|->)(\d+)(?:@(\d+)(?:k(\d+))?(?:s(\d+))?(?:p(\d+))?)?")


@dataclass(frozen=True)
class Matrix:
    """A matrix [m, n]; as a linear layer at `batch` tokens."""

    m: int
    n: int
    batch: int = 1

    @property
    def tokens(self) -> int:
        return self.batch

    @property
    def elements(self) -> int:
        """Of x and y together."""
        return self.batch * (self.m + self.n)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}"


@dataclass(frozen=True)
class Conv:
    """A convolution of [batch, channels, side, side]; padding None is half the kernel."""

    batch: int
    channels: int
    out_channels: int
    side: int
    stride: int = 1
    kernel: int = 3
    padding: int | None = None

    @property
    def pad(self) -> int:
        return self.kernel // 2 if self.padding is None else self.padding

    @property
    def m(self) -> int:
        return self.out_channels

    @property
    def n(self) -> int:
        return self.channels * self.kernel**2

    @property
    def out_side(self) -> int:
        return (self.side + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def tokens(self) -> int:
        """Pixels of the output, over the batch."""
        return self.batch * self.out_side**2

    @property
    def elements(self) -> int:
        """Of x and y together."""
        return self.batch * self.channels * self.side**2 + self.tokens * self.m

    def __str__(self) -> str:
        kernel = f" {self.kernel}x{self.kernel}" if self.kernel != 3 else ""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.channels}->{self.out_channels}@{self.side}{kernel}{stride}, batch {self.batch}"


Shape = Matrix | Conv


def parse(text: str) -> list[Shape]:
    """The shapes of a comma-separated list. Raises ValueError that names the item that is none."""
    return [_parse_item(item.strip()) for item in text.split(",")]


def _parse_item(item: str) -> Shape:
    match = _ITEM.fullmatch(item)
    if not match or (match[3] == "->" and not match[5]):
        raise ValueError(f"wanted MxN like 512x4608 or C->M@S like N8:64->128@56s2, got {item!r}")
    batch, first, last = int(match[1] or 1), int(match[2]), int(match[4])
    if match[5] is None:
        shape: Shape = Matrix(first, last, batch)
    else:
        stride, kernel, padding = int(match[7] or 1), int(match[6] or 3), match[8] and int(match[8])
        shape = Conv(batch, first, last, int(match[5]), stride, kernel, padding)
    positive = all(value > 0 for name, value in vars(shape).items() if name != "padding")
    if not positive or (isinstance(shape, Conv) and shape.side + 2 * shape.pad < shape.kernel):
        raise ValueError(f"wanted sizes above 0 and a kernel that fits into the padded map, got {item!r}")
    return shape


# Networks -----------------------------------------------------------------------------------------------------------


def trace(model: nn.Module, side: int) -> Counter[Shape]:
    """The convolutions and linear layers of one image's pass, with their number. Nothing is computed."""
    found: Counter[Shape] = Counter()

    def note(layer: nn.Module, inputs: tuple, _output) -> None:
        if isinstance(layer, nn.Linear):
            found[Matrix(layer.out_features, layer.in_features)] += 1
        else:
            k, s, p = layer.kernel_size[0], layer.stride[0], layer.padding[0]
            padding = None if p == k // 2 else p
            found[Conv(1, layer.in_channels, layer.out_channels, inputs[0].shape[-1], s, k, padding)] += 1

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    model.eval()(torch.empty(1, 3, side, side, device="meta"))
    return found


def vgg16(width: int = 64, side: int = 224, classes: int = 1000) -> nn.Module:
    """VGG-16 without batch norm for `side` x `side` images (a multiple of 32); `width` channels in its first stage.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks, configuration D.
    """
    layers: list[nn.Module] = []
    channels = 3
    for repeats, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
            channels = factor * width
        layers.append(nn.MaxPool2d(2))
    pooled, hidden = side // 32, 64 * width
    classifier = [nn.Linear(channels * pooled**2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return models.ConvNet(nn.Sequential(*layers), pooled, nn.Sequential(*classifier, nn.Linear(hidden, classes)))


def _resnet18_at_224() -> Counter[Shape]:
    found: Counter[Shape] = Counter({Conv(1, 3, 64, 224, 2, 7): 1, Conv(1, 64, 64, 56): 4, Matrix(1000, 512): 1})
    for channels, side in ((64, 56), (128, 28), (256, 14)):
        found[Conv(1, channels, 2 * channels, side, 2)] = 1
        found[Conv(1, channels, 2 * channels, side, 2, 1)] = 1
        found[Conv(1, 2 * channels, 2 * channels, side // 2)] = 3
    return found


def _alexnet_at_224() -> Counter[Shape]:
    """Source: torchvision's widths."""
    convs = [Conv(1, 3, 64, 224, 4, 11, 2), Conv(1, 64, 192, 27, 1, 5), Conv(1, 192, 384, 13), Conv(1, 384, 256, 13)]
    return Counter([*convs, Conv(1, 256, 256, 13), Matrix(4096, 9216), Matrix(4096, 4096), Matrix(1000, 4096)])


@cache
def networks() -> dict[str, Counter[Shape]]:
    """The layers of one image's pass through each network, with their number."""
    with torch.device("meta"):
        small = {"ResNet-18": models.resnet18(), "VGG-16": models.vgg16(), "AlexNet": models.alexnet()}
        return {
            "ResNet-18 at 224": _resnet18_at_224(),
            "VGG-16 at 224": trace(vgg16(), 224),
            "AlexNet at 224": _alexnet_at_224(),
            "ResNet-56 at 32": trace(models.resnet56(), 32),
            **{f"{name} at 32": trace(model, 32) for name, model in small.items()},
        }


def with_batch(shapes: Iterable[Shape], batch: int) -> list[Shape]:
    return [replace(shape, batch=batch) for shape in shapes]
