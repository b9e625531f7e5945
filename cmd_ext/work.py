"""The size of one call of a layer, which the models of its time take."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """One call of a layer: weight [m, n] per group row, `inputs` and `outputs` elements of x and y."""

    m: int
    n: int
    groups: int
    rank: int
    nnz: int
    tokens: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    convolution: bool = False

    @property
    def density(self) -> float:
        return self.nnz / max(self.m * self.n, 1)
