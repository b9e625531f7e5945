"""The file of a fine-tuning run: random state, atomic writing, reading that runs no code."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "cmd_ext.finetune 1"


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device: torch.device, generators: list[torch.Generator]) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], device: torch.device, generators: list[torch.Generator]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def check_writable(path: Path) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with open(_temporary(path), "wb"):
            pass
        os.unlink(_temporary(path))
    except OSError as error:
        raise OSError(
            error.errno, f"finetune: the checkpoint cannot be written: {error.strerror}", str(path)
        ) from error


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at once: a run killed in here leaves the old checkpoint whole."""
    with open(_temporary(path), "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(_temporary(path), path)


def read(path: Path, settings: dict[str, str]) -> dict[str, Any] | None:
    """The checkpoint's content, None if there is no file."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise whatever the broken bytes lead them to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"finetune: checkpoint {path} is damaged or no checkpoint, delete it to start over: {reason}"
        ) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"finetune: {path} must be a checkpoint of finetune ({FORMAT}), got another file")
    found = saved["settings"]
    different = [name for name in settings | found if settings.get(name) != found.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"finetune: checkpoint {path} is of another run: {name}: wanted {settings.get(name)}, got "
            f"{found.get(name)} ({len(different)} of {len(settings | found)} settings differ)"
        )
    return saved
