"""What every test gets: a fixed seed, warnings as errors; what some ask for: a device, the folder of real data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import op_bounds
import pytest
import torch

PROBE = "cmd_ext::lrs_linear"
os.environ["CMD_EXT_AUTOTUNE"] = "0"  # the choice of a backend must not depend on how busy the machine is


def pytest_configure(config: pytest.Config) -> None:
    # A later line wins. Torch warns of itself: its compiler of its use of torch.jit, opcheck of reading a .grad.
    for line in (
        "error",
        "ignore::DeprecationWarning:torch",
        "ignore:The .grad attribute of a Tensor that is not a leaf",
        "ignore:Warning only once for all operators",  # the device "simt" overrides kernels on purpose
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda", "simt"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on this device: "cuda" by making it the default, "simt" by replacing the CPU kernels.

    "simt" wants the library that `make simt` builds, named by CMD_EXT_SIMT_LIBRARY.
    """
    monkeypatch.setattr(op_bounds, "branches_are_rounded", request.param != "cpu")
    if request.param == "cpu":
        yield request.param
    elif request.param == "cuda":
        if not (torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(PROBE, "CUDA")):
            pytest.skip("no GPU, or a build without CUDA kernels")
        for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            monkeypatch.setattr(part, "fp32_precision", "ieee")
        with torch.device("cuda"):
            yield request.param
    else:
        library = os.environ.get("CMD_EXT_SIMT_LIBRARY")
        if not library:
            pytest.skip("CMD_EXT_SIMT_LIBRARY is not set (make simt builds it)")
        torch.ops.load_library(library)
        kernels = torch.library.Library("cmd_ext", "IMPL")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
            if name.startswith("cmd_ext_simt::"):
                op = name.partition("::")[2]
                kernels.impl(op, getattr(torch.ops.cmd_ext_simt, op).default, "CPU", allow_override=True)
        yield request.param
        kernels._destroy()


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
