"""In-tree PEP 517 backend: builds against the torch of the environment that pip installs into.

Under build isolation pip hides that environment's packages, but `sys.prefix` is still its own, so torch is found
there and appended to `sys.path`. No second torch is downloaded; only where there is none, torch becomes a build
requirement. `CMD_EXT_TORCH_SITE` names the folder that holds torch for front ends that build in another environment.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import sysconfig

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no torch)

TORCH = "torch>=2.11"


def _candidates():
    yield os.environ.get("CMD_EXT_TORCH_SITE")
    yield sysconfig.get_path("purelib")
    yield sysconfig.get_path("platlib")
    # A front end with an environment of its own (`python -m build`, uv): take the activated one.
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            yield from glob.glob(os.path.join(os.environ[variable], "lib", python, "site-packages"))


def _expose_torch() -> bool:
    """Makes torch importable; False if no environment has it. Does not import it."""
    if importlib.util.find_spec("torch"):
        return True
    for site in _candidates():
        if site and os.path.isfile(os.path.join(site, "torch", "version.py")):
            sys.path.append(site)  # at the end: the build environment's setuptools and ninja come first
            print(f"cmd_ext: building against the torch in {site}", file=sys.stderr)
            return True
    return False


def get_requires_for_build_wheel(config_settings=None):
    return [] if _expose_torch() else [TORCH]


def get_requires_for_build_editable(config_settings=None):
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings=None):
    return []


def _with_torch(hook):
    def run(*args, **kwargs):
        _expose_torch()
        return hook(*args, **kwargs)

    return run


prepare_metadata_for_build_wheel = _with_torch(_setuptools.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(_setuptools.prepare_metadata_for_build_editable)
build_wheel = _with_torch(_setuptools.build_wheel)
build_editable = _with_torch(_setuptools.build_editable)
