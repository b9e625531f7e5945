"""The rows that meet a layer's weight matrix, windows of a convolution's input, and sums of their products."""

from __future__ import annotations

import math
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .modules import CMDConv2d

_CHUNK = 1 << 24  # entries of the rows that are gathered and multiplied at once
_CHUNK_ROWS = 8192  # a float32 sum over so few products keeps 5 digits; longer sums are in float64
_BLOCK = 96  # columns of H computed at once: only blocks on and above the diagonal are

_log = distributed.logger(__name__)


class Moment:
    """The sum of x x^T over the rows x of a layer's inputs; with a twin's weight W and rows y, of y x^T and (W y)^2."""

    def __init__(
        self, name: str, module: nn.Module, positions: int, max_features: int, seed: int, twin: Tensor | None = None
    ) -> None:
        self.name, self.module, self.positions = name, module, positions
        self.groups, self.features = sizes(module)
        self.full = fits(self.groups, self.features, max_features)
        self.sum = self.cross = self.energies = None
        self.twin = None if twin is None else _as_rows(twin.detach(), module)
        self.rows, self.first_call = 0, None
        self.generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        if not self.full:
            _log.info(
                "second_moments: %s has %d groups of %d features, beyond max_features = %d: only the diagonal is kept",
                name or type(module).__name__, self.groups, self.features, max_features,
            )  # fmt: skip

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """The rows of one call's input x, and of the twin's y."""
        if not x.numel():
            return
        pixels, (kernel, stride, dilation) = _pixels(self.module, x), _geometry(self.module)
        other = None if y is None else _pixels(self.module, y)
        images, height, width, channels = pixels.shape
        rows, columns = (
            (size - d * (k - 1) - 1) // step + 1
            for size, k, step, d in zip((height, width), kernel, stride, dilation, strict=True)
        )
        image, place = (t.to(x.device) for t in self._drawn(images, rows * columns))
        corner = (image * height + place // columns * stride[0]) * width + place % columns * stride[1]
        down, right = (torch.arange(k, device=x.device) * d for k, d in zip(kernel, dilation, strict=True))
        taps = (down[:, None] * width + right).flatten()

        def rows_at(pixels: Tensor, corner: Tensor) -> Tensor:
            places = (corner[:, None] + taps).flatten()
            rows = pixels.reshape(-1, channels).index_select(0, places)  # whole pixels: faster than F.unfold
            rows = rows.view(len(corner), len(taps), self.groups, channels // self.groups).permute(2, 0, 1, 3)
            return rows.reshape(self.groups, len(corner), self.features)

        pixels = pixels.contiguous()
        other = None if other is None else other.contiguous()
        for part in corner.split(max(1, min(_CHUNK_ROWS, _CHUNK // (self.groups * self.features)))):
            self._add_rows(rows_at(pixels, part), None if other is None else rows_at(other, part))
        self.rows += len(corner)

    def _drawn(self, images: int, places: int) -> tuple[Tensor, Tensor]:
        """Indices of images and of places in them: all, or one of each of `positions` equal strata."""
        if places <= self.positions:
            place = torch.arange(places).expand(images, places)
        else:
            shift = torch.rand(images, self.positions, dtype=torch.float64, generator=self.generator)
            place = ((torch.arange(self.positions) + shift) * (places / self.positions)).long().clamp_max(places - 1)
        return torch.arange(images).repeat_interleave(place.shape[1]), place.reshape(-1)

    def _add_rows(self, rows: Tensor, others: Tensor | None) -> None:
        """rows [groups, count, n], n in the order (kernel row, kernel column, channel)."""
        self._begin(rows.device)
        if others is not None:
            self.cross += torch.bmm(others.mT, rows) if self.full else (others * rows).sum(1)
            self.energies += torch.bmm(others, self.twin.to(others).mT).square().sum(1).flatten()
        if not self.full:
            self.sum += rows.square().sum(1)
            return
        for start in range(0, self.features, _BLOCK):
            stop = min(start + _BLOCK, self.features)
            self.sum[:, start:stop, start:] += torch.bmm(rows[:, :, start:stop].mT, rows[:, :, start:])

    def _begin(self, device: torch.device) -> None:
        if self.sum is None:
            self.sum = self._zeros(device)
            if self.twin is not None:
                self.cross = self._zeros(device)
                self.energies = torch.zeros(self.twin.shape[:2].numel(), dtype=torch.float64, device=device)

    def _zeros(self, device: torch.device) -> Tensor:
        sizes = (self.groups, self.features, self.features)[: 2 + self.full]
        return torch.zeros(sizes, dtype=torch.float64, device=device)

    def reduce(self, device: torch.device) -> None:
        """Sums over the ranks."""
        if distributed.world_size() == 1:
            return
        self._begin(device)
        far = self.first_call is None
        facts = torch.tensor([self.rows], dtype=torch.int64, device=device)
        dist.all_reduce(facts)
        for total in (self.sum, self.cross, self.energies):
            if total is not None:
                dist.all_reduce(total)
        order = torch.tensor([torch.iinfo(torch.int64).max if far else self.first_call], device=device)
        dist.all_reduce(order, dist.ReduceOp.MIN)
        self.rows, self.first_call = int(facts), int(order)

    def mean_energies(self) -> Tensor:
        return self.energies / self.rows

    def result(self, which: str = "sum") -> Tensor:
        """The mean of a sum, which is given away."""
        mean = getattr(self, which).div_(self.rows)
        setattr(self, which, None)
        if not mean.isfinite().all():
            raise ValueError(f"second_moments: the squares of the inputs of layer {self.name!r} overflow float32")
        wanted = next((p.dtype for p in self.module.parameters()), torch.float32)
        mean = mean.to(torch.float64 if wanted == torch.float64 else torch.float32)
        taps = math.prod(_geometry(self.module)[0])
        order = torch.arange(self.features, device=mean.device).view(taps, -1).T.flatten()  # to (channel, row, column)
        if self.full and which == "sum":
            for start in range(_BLOCK, self.features, _BLOCK):  # mirror the blocks above the diagonal
                stop = min(start + _BLOCK, self.features)
                mean[:, start:stop, :start] = mean[:, :start, start:stop].mT
        mean = mean[:, order[:, None], order] if self.full else mean[:, order]
        return mean[0] if self.groups == 1 else mean


def fits(groups: int, features: int, max_features: int) -> bool:
    return groups * features**2 <= max_features**2


def sizes(module: nn.Module) -> tuple[int, int]:
    """(groups, n)."""
    if isinstance(module, (nn.Conv2d, CMDConv2d)):
        return module.groups, module.in_channels // module.groups * math.prod(module.kernel_size)
    return 1, module.in_features


def _geometry(module: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and dilation; a linear layer is a 1x1 convolution."""
    if isinstance(module, (nn.Conv2d, CMDConv2d)):
        return module.kernel_size, module.stride, module.dilation
    return (1, 1), (1, 1), (1, 1)


def _as_rows(weight: Tensor, module: nn.Module) -> Tensor:
    """A weight as [groups, m / groups, n] with n in the order (kernel row, kernel column, channel)."""
    groups, features = sizes(module)
    taps = math.prod(_geometry(module)[0])
    return weight.reshape(len(weight), -1, taps).transpose(1, 2).reshape(groups, -1, features)


def _pixels(module: nn.Module, x: Tensor) -> Tensor:
    """The layer's padded input as [images, height, width, channels], float32 at least; of a linear layer, height 1."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(module, (nn.Conv2d, CMDConv2d)):
        return _padded(module, x if x.dim() == 4 else x[None]).permute(0, 2, 3, 1)
    return x.reshape(x.shape[0] if x.dim() > 1 else 1, 1, -1, x.shape[-1])


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, CMDConv2d):
        vertical, horizontal = module._inner_padding
        pad = module._pad or [horizontal, horizontal, vertical, vertical]
    else:
        pad = module._reversed_padding_repeated_twice
    return F.pad(x, pad, mode="constant" if module.padding_mode == "zeros" else module.padding_mode) if any(pad) else x
