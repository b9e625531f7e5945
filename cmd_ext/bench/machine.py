"""What figures depend on: the machine, and the packages that rivals come from."""

from __future__ import annotations

import importlib
import os
import platform
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

import cmd_ext
from cmd_ext import _C

# The packages of rivals that a user may lack, and the module that we import of each.
PACKAGES = {"scipy": "scipy.sparse.linalg", "scikit-learn": "sklearn.utils.extmath", "deepsparse": "deepsparse"}


@lru_cache
def optional(package: str) -> ModuleType | None:
    """The module of a rival's package; None where it cannot be imported, for whatever reason."""
    try:
        return importlib.import_module(PACKAGES[package])
    except Exception:  # a broken package must not end our run
        return None


def machine(device: torch.device) -> dict[str, str]:
    """CPU or GPU, instruction set, threads, versions."""
    return {
        "cpu": _cpu_name(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "kernels": _C.cpu_capability(),
        "torch": torch.__version__,
        "mkl": _of_torch(r"Math Kernel Library Version ([\w.]+)"),
        "onednn": _of_torch(r"MKL-DNN v([\w.]+)"),
        **{package: _version(package) if optional(package) else "not installed" for package in PACKAGES},
        "cmd_ext": cmd_ext.__version__,
    }


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        return name


def _of_torch(pattern: str) -> str:
    found = re.search(pattern, torch.__config__.show())
    return found[1] if found else "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"
