"""A small network and images on which fits to data and fits to weights differ."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """Convolutions whose inputs are far from white: smooth images, then channels mixed by the layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=2, stride=2)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        x = self.second(self.first(self.stem(x).relu()).relu()).relu()
        return self.out(self.head(self.norm(self.grouped(x)).relu().mean((2, 3))).relu())


def smooth_images(count: int = 4, size: int = 8) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    coarse = (torch.randn(size, 3, 4, 4, generator=g) for _ in range(count))
    return [nn.functional.interpolate(x, 12, mode="bilinear") + 0.3 for x in coarse]
