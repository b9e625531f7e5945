"""The size of one call of a layer, which the models of its time take."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """One call of a layer: weight [m, n] per group row, `inputs` and `outputs` elements of x and y.

    The factors are [m * taps, rank] and [groups * rank, n / taps]. With taps > 1 they are two thin convolutions with
    `between` pixels in between.
    """

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
    taps: int = 1
    between: int = 0

    @property
    def density(self) -> float:
        return self.nnz / max(self.m * self.n, 1)

    @property
    def middle(self) -> int:
        """Pixels (rows) between V and U."""
        return self.between if self.taps > 1 else self.tokens
