"""In-tree PEP 517 backend: builds against the torch of the environment that pip installs into.

Build isolation hides that environment's packages, but its interpreter still runs the build. Asked in a process of its
own, it tells where torch is and what its `sys.path` was; both are appended to the build's. No second torch is
downloaded: only where there is none, torch becomes a build requirement. Of the front ends that build in an environment
of their own, `python -m build` gets the torch of the activated one; uv hides that, so it needs --no-build-isolation or
CMD_EXT_TORCH_SITE, the folder above torch/.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys

try:
    import setuptools
    from setuptools import build_meta as _setuptools
except ImportError:
    raise SystemExit("cmd_ext: building needs setuptools >= 77, got none; run `pip install setuptools`") from None
if int(setuptools.__version__.split(".")[0]) < 77:  # older ones leave bdist_wheel to another package
    raise SystemExit(
        f"cmd_ext: building needs setuptools >= 77, got {setuptools.__version__}; run `pip install -U setuptools`"
    )

TORCH = "torch>=2.11"
_ASK = """
import importlib.util, json, sys
torch = importlib.util.find_spec("torch")
print(json.dumps([sys.version_info[:2], torch.origin if torch else None, sys.path]))
"""


def _visible_from(python: str) -> list[str]:
    """The folders that make torch importable as in `python`; none where it has no torch or is another Python."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    try:
        answer = subprocess.run([python, "-c", _ASK], env=env, cwd=os.sep, capture_output=True, check=True).stdout
        version, origin, path = json.loads(answer)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return []
    if origin is None or tuple(version) != sys.version_info[:2]:
        return []
    return [os.path.dirname(os.path.dirname(origin)), *path]


def _torch_folders() -> list[str]:
    named = os.environ.get("CMD_EXT_TORCH_SITE")
    if named:
        if not os.path.isfile(os.path.join(named, "torch", "version.py")):
            raise SystemExit(f"cmd_ext: CMD_EXT_TORCH_SITE={named} holds no torch; name the folder above torch/")
        return [named]
    activated = [os.environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    pythons = [sys.executable, *(os.path.join(prefix, "bin", "python") for prefix in activated)]
    return next(filter(None, map(_visible_from, pythons)), [])


def _expose_torch() -> bool:
    """Makes torch importable without importing it; False if no environment has it."""
    if importlib.util.find_spec("torch"):
        return True
    folders = _torch_folders()
    # At the end: the build environment's own setuptools and ninja come first.
    sys.path.extend(folder for folder in folders if folder and folder not in sys.path)
    return bool(folders)


def get_requires_for_build_wheel(config_settings=None):
    return [] if _expose_torch() else [TORCH]


def _with_torch(hook):
    def run(*args, **kwargs):
        _expose_torch()
        return hook(*args, **kwargs)

    return run


def build_wheel(*args, **kwargs):
    for leftover in glob.glob("build/lib.*"):  # a module deleted since the last build would get into the wheel
        shutil.rmtree(leftover)
    return _with_torch(_setuptools.build_wheel)(*args, **kwargs)


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_wheel = _with_torch(_setuptools.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(_setuptools.prepare_metadata_for_build_editable)
build_editable = _with_torch(_setuptools.build_editable)
build_sdist = _setuptools.build_sdist


def get_requires_for_build_sdist(config_settings=None):
    return []
