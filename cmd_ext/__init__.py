"""Low-rank plus sparse compression of PyTorch networks: every weight W becomes U V + S."""

from pathlib import Path as _Path

import torch as _torch

__version__ = "0.1.0"


def _load_ops() -> None:
    folder = _Path(__file__).parent
    library = folder / "_ops.abi3.so"
    if not library.exists():
        raise ImportError(f"cmd_ext: the op library is not built ({library} is missing); run `pip install .` in its source")
    try:
        _torch.ops.load_library(str(library))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"cmd_ext: the op library does not load under torch {_torch.__version__} (wants torch >= 2.11): {reason}; "
            "reinstall it against this torch with `pip install --force-reinstall --no-deps .`"
        ) from None


_load_ops()

from .decompose import Decomposition, decompose, decompose_batch  # noqa: E402
from .modules import CMDConv2d, CMDLinear  # noqa: E402
