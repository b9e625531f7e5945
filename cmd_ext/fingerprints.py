"""Hashes that tell whether two networks, or two sets of data, are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Batch


def of_model(model: nn.Module) -> str:
    """Of the parameters and buffers: names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        _add(digest, value)
    return digest.hexdigest()


def of_data(batches: list[Batch]) -> str:
    """Of batches of inputs and targets."""
    digest = hashlib.sha256()
    for batch in batches:
        _add(digest, batch)
    return digest.hexdigest()


def of_facts(*facts: Any) -> str:
    """Of numbers, strings, lists and dicts of them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Tensors by their bits; the structure around them by type, length and keys."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {[*value.shape]}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, (tuple, list)):
        digest.update(str(len(value)).encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
