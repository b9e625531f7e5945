"""Builds the two libraries of cmd_ext: _ops (the operators, stable ABI) and _C (build facts, torch-free pybind11).

Environment: FORCE_CUDA=1 (a missing CUDA piece is an error), CMD_EXT_CUDA=0 (no CUDA), TORCH_CUDA_ARCH_LIST,
CUDA_HOME, MAX_JOBS (default: by cores and memory).
"""

from __future__ import annotations

import glob
import os
import shutil
import sys

from setuptools import Extension, setup

ARCHES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def cuda_home() -> str | None:
    """The toolkit folder: the one that has both nvcc and the runtime's headers (an nvcc on PATH may be a wrapper)."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    guessed = [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
    for home in [*named, *guessed, "/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]:
        if home and os.path.isfile(f"{home}/bin/nvcc") and os.path.isfile(f"{home}/include/cuda_runtime.h"):
            return home
    return None


def cuda_decision(torch_cuda: str | None, home: str | None, sources: list[str], env: dict) -> tuple[bool, str]:
    """(build CUDA kernels?, why). What is built never depends on a GPU being present on the building machine."""
    force = env.get("FORCE_CUDA") == "1"
    missing = None
    if env.get("CMD_EXT_CUDA") == "0":
        missing = "CMD_EXT_CUDA=0 switches it off"
    elif torch_cuda is None:
        missing = "this torch is a CPU build; install a CUDA build of torch"
    elif home is None:
        missing = f"no CUDA toolkit found; install nvcc {torch_cuda} or set CUDA_HOME to the folder with include/cuda_runtime.h"
    elif not sources:
        missing = "this version has CPU kernels only (csrc/cuda holds no .cu file)"
    if missing and force:
        raise SystemExit(f"cmd_ext: FORCE_CUDA=1 asks for CUDA, but {missing}")
    return (False, missing) if missing else (True, f"nvcc in {home}, torch built for CUDA {torch_cuda}")


def default_jobs() -> int:
    """One compiler per core, and 1 GB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30
    return max(1, min(os.cpu_count() or 1, memory >> 30))


def extensions() -> tuple[list[Extension], dict]:
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"cmd_ext: building needs torch >= 2.11 ({error}); run `pip install torch` first") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise SystemExit(f"cmd_ext: building needs torch >= 2.11, got {torch.__version__}; run `pip install -U torch`")

    home, sources = cuda_home(), sorted(glob.glob("csrc/cuda/*.cu"))
    cuda, why = cuda_decision(torch.version.cuda, home, sources, os.environ)
    print(f"cmd_ext: torch {torch.__version__}; CUDA kernels: {'yes' if cuda else 'no'}: {why}", file=sys.stderr)
    if cuda:
        os.environ["CUDA_HOME"] = home  # read when torch's build code is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHES)
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))

    from torch.utils import cpp_extension

    macros = [
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),
        ("CMD_EXT_TORCH", torch.__version__),
        ("CMD_EXT_CUDA_BUILD", torch.version.cuda if cuda else "none"),
    ]
    cxx = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
    flags = {"cxx": cxx, "nvcc": ["-std=c++17", "-O3", "-lineinfo"]}
    device = "cuda" if cuda else "cpu"
    torch_includes = cpp_extension.include_paths(device)
    ops = Extension(
        "cmd_ext._ops",
        sorted({*glob.glob("csrc/*.cpp"), *glob.glob("csrc/cpu/*.cpp")} - {"csrc/module.cpp"}) + (sources if cuda else []),
        include_dirs=torch_includes,
        library_dirs=cpp_extension.library_paths(device),
        libraries=["torch_cpu", *(["cudart_static"] if cuda else [])],
        define_macros=macros,
        extra_compile_args=flags,
        py_limited_api=True,  # no Python in it at all: one library for every Python
        language="c++",
    )
    try:
        import pybind11

        pybind_includes = [pybind11.get_include()]
    except ImportError:
        pybind_includes = torch_includes  # torch carries a copy
    module = Extension(
        "cmd_ext._C",
        ["csrc/module.cpp"],
        include_dirs=pybind_includes,
        define_macros=macros,
        extra_compile_args=flags,
        language="c++",
    )
    return [ops, module], {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)}


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    ext_modules, cmdclass = extensions()
    setup(ext_modules=ext_modules, cmdclass=cmdclass)
