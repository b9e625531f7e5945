"""The support of S as files hold it: its size, packed, unpacked.

One of three forms, the smallest. The size depends on m, n and nnz alone, so that it is known before a layer is fitted:

* none: S is empty or full; nothing is stored.
* columns: `col_idx` [nnz] and `row_counts` [m], in the narrowest of uint8, uint16 and int32 that holds all values that
  the shape allows (columns below n, counts up to min(n, nnz)).
* bitmap: one bit an entry of the flattened S, bit i % 8 (least significant first) of byte i // 8; the last byte is
  filled up with zeros. The smaller one from about 1/16 density (1/8 for n <= 256).
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import torch
from torch import Tensor

FORMS = {"none": (), "columns": ("col_idx", "row_counts"), "bitmap": ("bitmap",)}  # and the tensors of each


def form(m: int, n: int, nnz: int) -> str:
    """The form of least bytes for nnz entries in [m, n]."""
    sizes = _sizes(m, n, nnz)
    return min(sizes, key=sizes.get)


def size(m: int, n: int, nnz: int) -> int:
    """Bytes of the support of nnz entries in [m, n], without their values."""
    return min(_sizes(m, n, nnz).values())


def most_entries(m: int, n: int, element: int, limit: float) -> int:
    """The largest nnz whose values of `element` bytes and support take at most `limit` bytes."""
    if m * n * element <= limit:  # a full S needs no support and is smaller than one that lacks an entry
        return m * n
    return max(0, bisect_right(range(m * n), limit, key=lambda nnz: nnz * element + size(m, n, nnz)) - 1)


def pack(row_ptr: Tensor, col_idx: Tensor, n: int) -> tuple[str, dict[str, Tensor]]:
    """The smallest form of a support.

    Args:
        row_ptr: [m + 1] from 0 to nnz.
        col_idx: [nnz] in [0, n), ascending within a row.
        n: columns of S.

    Returns:
        The form and its tensors by name, on the CPU.
    """
    counts, columns = np.diff(row_ptr.cpu().numpy()), col_idx.cpu().numpy()
    m, nnz = len(counts), len(columns)
    chosen = form(m, n, nnz)
    if chosen == "columns":
        counts, columns = counts.astype(_narrowest(min(n, nnz))), columns.astype(_narrowest(n - 1))
        return chosen, {"col_idx": torch.from_numpy(columns), "row_counts": torch.from_numpy(counts)}
    if chosen == "bitmap":
        kept = np.zeros(m * n, dtype=bool)
        kept[np.repeat(np.arange(m, dtype=np.int64) * n, counts) + columns] = True
        return chosen, {"bitmap": torch.from_numpy(np.packbits(kept, bitorder="little"))}
    return chosen, {}


def unpack(chosen: str, tensors: dict[str, Tensor], m: int, n: int, nnz: int) -> tuple[Tensor, Tensor]:
    """The support that `pack` packed.

    Args:
        chosen: the form.
        tensors: its tensors by name.
        m, n, nnz: shape and entries of S.

    Returns:
        row_ptr [m + 1] and col_idx [nnz], int32. That columns lie in [0, n) and ascend is left to the caller to check.

    Raises:
        ValueError: an unknown form, a tensor of another shape or dtype, or not nnz entries.
    """
    if chosen not in FORMS:
        raise ValueError(f"support must be one of {', '.join(FORMS)}, got {chosen!r}")
    if chosen == "none":
        if nnz not in (0, m * n):
            raise ValueError(f"values must be [0] or [{m * n}] where no support is stored, got [{nnz}]")
        full = n if nnz else 0
        columns = np.arange(nnz, dtype=np.int64) % max(n, 1)
        return _int32(np.arange(m + 1, dtype=np.int64) * full), _int32(columns)
    if chosen == "columns":
        columns = _checked(tensors, "col_idx", nnz, (torch.uint8, torch.uint16, torch.int32))
        counts = _checked(tensors, "row_counts", m, (torch.uint8, torch.uint16, torch.int32))
    else:
        bits = np.unpackbits(_checked(tensors, "bitmap", -(-m * n // 8), (torch.uint8,)), bitorder="little")
        if bits[m * n :].any():
            raise ValueError(f"bitmap must end in zeros from bit {m * n} on, got ones there")
        counts = np.count_nonzero(bits[: m * n].reshape(m, n), axis=1)
        columns = np.flatnonzero(bits.view(bool)) % n
    if counts.size and not 0 <= counts.min() <= counts.max() <= n:
        raise ValueError(f"row_counts must lie in [0, {n}], got {counts.min()} to {counts.max()}")
    if counts.sum(dtype=np.int64) != nnz:
        raise ValueError(f"{FORMS[chosen][-1]} must have {nnz} entries as values has, got {counts.sum(dtype=np.int64)}")
    row_ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return _int32(row_ptr), _int32(columns)


def _sizes(m: int, n: int, nnz: int) -> dict[str, int]:
    if nnz in (0, m * n):
        return {"none": 0}
    columns = nnz * _narrowest(n - 1).itemsize + m * _narrowest(min(n, nnz)).itemsize
    return {"columns": columns, "bitmap": -(-m * n // 8)}


def _narrowest(largest: int) -> np.dtype:
    return np.dtype("u1" if largest < 1 << 8 else "u2" if largest < 1 << 16 else "i4")


def _int32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int32))


def _checked(tensors: dict[str, Tensor], name: str, length: int, dtypes: tuple[torch.dtype, ...]) -> np.ndarray:
    tensor = tensors[name]
    if tensor.shape != (length,) or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be [{length}] of {wanted}, got {[*tensor.shape]} of {tensor.dtype}")
    return tensor.numpy()
