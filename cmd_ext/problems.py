"""What a fit is given: weights and moments as matrices, checked, and grouped into batches of equal shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch, forms

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BATCH_BYTES = 4 << 20  # of the full moments of a batch: wide layers, to whom batching brings nothing, come one by one


@dataclass
class Problem:
    """weight [m, n]; h [groups, n, n] or [groups, n]; g [groups, m / groups, m / groups] or [groups, m / groups].

    In the spatial form of a kernel of height `taps` the weight is [m * taps, n / taps], without moments.
    """

    index: int
    weight: Tensor
    h: Tensor | None
    g: Tensor | None
    kernel_size: tuple[int, int] = (1, 1)
    taps: int = 1

    @property
    def kind(self) -> tuple:
        dims = tuple(None if moment is None else moment.dim() for moment in (self.h, self.g))
        return self.weight.shape, self.taps, self.weight.dtype, self.weight.device, dims

    def moment_bytes(self) -> int:
        return sum(4 * t.numel() for t in (self.h, self.g) if t is not None and t.dim() == 3)


def problems(weights: Sequence[Tensor], h, g, groups: int, damping: float, form: str = "channel") -> list[Problem]:
    """h and g: a moment or None per weight, or None. Raises the errors of decompose()."""
    if not damping >= 0:
        raise ValueError(f"decompose: damping must be >= 0, got {damping}")
    for name, moments in (("second_moments", h), ("output_moments", g)):
        if moments is not None and len(moments) != len(weights):
            raise ValueError(f"decompose: {name} must be one per weight = {len(weights)}, got {len(moments)}")
    checked = []
    for index, weight in enumerate(weights):
        own_h, own_g = (None if moments is None else moments[index] for moments in (h, g))
        w = _as_matrix(weight, groups, form, own_h if own_h is not None else own_g)
        kernel_size = (*weight.shape[2:],) or (1, 1)
        moments = _second(own_h, groups, w), _output(own_g, groups, w)
        checked.append(Problem(index, w, *moments, kernel_size, forms.taps_of(form, kernel_size)))
    return checked


def _as_matrix(weight: Tensor, groups: int, form: str, moment: Tensor | None) -> Tensor:
    if weight.dim() not in (2, 4) or weight.numel() == 0:
        raise ValueError(f"decompose: weight must be a non-empty [m, n] or [m, c, kh, kw], got {[*weight.shape]}")
    if weight.dtype not in _DTYPES:
        raise TypeError(f"decompose: weight must be float32, float64, bfloat16 or float16, got {weight.dtype}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"decompose: groups must divide the {weight.shape[0]} rows, got {groups}")
    if not weight.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"decompose: weight must be finite, got {bad} NaN or Inf among {weight.numel()} entries")
    forms.check_form("decompose", form, weight.shape[2:], moment)
    return forms.arrange(weight.detach()) if form == "spatial" else weight.detach().reshape(weight.shape[0], -1)


def _second(h: Tensor | None, groups: int, w: Tensor) -> Tensor | None:
    if h is None:
        return None
    n = w.shape[1]
    wanted = f"[{n}, {n}] or [{n}]" if groups == 1 else f"[{groups}, {n}, {n}] or [{groups}, {n}]"
    if groups == 1 and tuple(h.shape) in ((n,), (n, n)):
        h = h[None]
    if tuple(h.shape) not in ((groups, n), (groups, n, n)):
        raise ValueError(f"decompose: second_moment must be {wanted}, got {[*h.shape]}")
    return _checked("second_moment", h)


def _output(g: Tensor | None, groups: int, w: Tensor) -> Tensor | None:
    if g is None:
        return None
    m = w.shape[0]
    if tuple(g.shape) not in ((m,), (m, m)):
        raise ValueError(f"decompose: output_moment must be [{m}, {m}] or [{m}], got {[*g.shape]}")
    if g.dim() == 1:
        return _checked("output_moment", g.view(groups, -1))
    rows = m // groups
    return _checked("output_moment", torch.stack([g[i : i + rows, i : i + rows] for i in range(0, m, rows)]))


def _checked(name: str, moment: Tensor) -> Tensor:
    """A moment [groups, size, size] or [groups, size] that is finite, symmetric up to rounding, of a diagonal >= 0."""
    if moment.dtype not in _DTYPES:
        raise TypeError(f"decompose: {name} must be float32, float64, bfloat16 or float16, got {moment.dtype}")
    bad = sum(int((~rows.isfinite()).sum()) for rows in moment.split(256, 1))
    if bad:
        raise ValueError(f"decompose: {name} must be finite, got {bad} NaN or Inf among {moment.numel()} entries")
    diagonal = moment.diagonal(dim1=1, dim2=2) if moment.dim() == 3 else moment
    if (diagonal < 0).any():
        raise ValueError(f"decompose: {name} must have a diagonal >= 0, got {diagonal.min().item():.3g} on it")
    if moment.dim() == 3:
        skew = max(
            (a - b).abs().max().item() for a, b in zip(moment.split(256, 1), moment.mT.split(256, 1), strict=True)
        )
        if skew > max(1e-4, 8 * torch.finfo(moment.dtype).eps) * diagonal.max().item():
            raise ValueError(f"decompose: {name} must be symmetric, got entries that differ from theirs by {skew:.3g}")
    return moment.detach()


def batches(checked: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Those of one kind together, as far as memory allows."""
    kinds = defaultdict(list)
    for problem in checked:
        kinds[problem.kind].append(problem)
    for members in kinds.values():
        count = max(1, _BATCH_BYTES // max(1, members[0].moment_bytes()))
        yield from (members[i : i + count] for i in range(0, len(members), count))


def stacks(batch: Sequence[Problem]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """w [b, m, n] and, by blocks, h and g; float32 or float64, where the kernels run. One alone is not copied."""
    device, dtype = batch[0].weight.device, batch[0].weight.dtype
    device = device if device.type == "cuda" and dispatch.has_cuda_kernels() else torch.device("cpu")
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        if tensors[0] is None:
            return None
        moved = [t.to(device, dtype) for t in tensors]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    return tuple(joined(list(parts)) for parts in zip(*((p.weight[None], p.h, p.g) for p in batch), strict=True))
