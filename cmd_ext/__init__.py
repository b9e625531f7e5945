"""Low-rank plus sparse compression of PyTorch networks: every weight W becomes U V + S."""

from pathlib import Path as _Path

import torch as _torch

__version__ = "0.1.0"


def _load_ops() -> None:
    folder = _Path(__file__).parent
    library = folder / "_ops.abi3.so"
    if not library.exists():
        raise ImportError(
            f"cmd_ext: the op library is not built ({library} is missing); run `pip install .` in its source"
        )
    try:
        _torch.ops.load_library(str(library))
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]  # torch wraps the loader's own words
        raise ImportError(
            f"cmd_ext: the op library does not load under torch {_torch.__version__} (wants torch >= 2.11): {reason}; "
            "reinstall it against this torch with `pip install --force-reinstall --no-deps .`"
        ) from None


_load_ops()

from .allocation import UnsatisfiableError  # noqa: E402
from .batchnorm import recalibrate_batchnorm  # noqa: E402
from .compress import Plan, apply_plan, compress, to_dense  # noqa: E402
from .cost import profile  # noqa: E402
from .decompose import Decomposition, decompose, decompose_batch  # noqa: E402
from .finetune import finetune  # noqa: E402
from .html_report import save_report  # noqa: E402
from .inference import fuse  # noqa: E402
from .io import load, save  # noqa: E402
from .modules import CMDConv2d, CMDLinear  # noqa: E402
from .moments import second_moments  # noqa: E402
from .path import decompose_path, decompose_path_batch  # noqa: E402
from .sensitivity import plot_sensitivity, sensitivity  # noqa: E402

__all__ = [
    "CMDConv2d",
    "CMDLinear",
    "Decomposition",
    "Plan",
    "UnsatisfiableError",
    "apply_plan",
    "compress",
    "decompose",
    "decompose_batch",
    "decompose_path",
    "decompose_path_batch",
    "finetune",
    "fuse",
    "load",
    "plot_sensitivity",
    "profile",
    "recalibrate_batchnorm",
    "save",
    "save_report",
    "second_moments",
    "sensitivity",
    "to_dense",
]
