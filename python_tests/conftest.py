"""What every test gets: a fixed seed, warnings as errors and, where it exists, the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # A later line wins. Torch warns of itself: its compiler of its use of torch.jit, opcheck of reading a .grad.
    for line in (
        "error",
        "ignore::DeprecationWarning:torch",
        "ignore:The .grad attribute of a Tensor that is not a leaf",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder CMD_EXT_DATA: cifar10.tar and pretrained/*.safetensors."""
    name = os.environ.get("CMD_EXT_DATA")
    if not name:
        pytest.skip("CMD_EXT_DATA is not set (a folder with cifar10.tar and pretrained/*.safetensors)")
    folder = Path(name)
    if not (folder / "cifar10.tar").is_file() or not any(folder.glob("pretrained/*.safetensors")):
        pytest.skip(f"CMD_EXT_DATA = {name} lacks cifar10.tar or pretrained/*.safetensors")
    return folder
