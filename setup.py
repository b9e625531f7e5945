"""Builds the two libraries of cmd_ext: _ops (the operators, stable ABI) and _C (build facts, torch-free pybind11).

Environment:
    FORCE_CUDA=1            a missing CUDA piece is an error; without it the CPU kernels are built alone
    CMD_EXT_CUDA=0          no CUDA kernels
    CUDA_HOME               the toolkit; by default the one on PATH or in /usr/local that fits torch
    TORCH_CUDA_ARCH_LIST    the GPU generations, by default all that the toolkit knows from 8.0 on
    MAX_JOBS                compilers at a time, by default one per core and GB of memory
    CXX                     the C++ compiler
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import sys
import sysconfig
import textwrap
from collections.abc import Mapping

from setuptools import Extension, setup
from setuptools.errors import BaseError, CompileError, LinkError


def cuda_version(home: str) -> tuple[int, int] | None:
    """Version of the toolkit in `home`; None if nvcc or the headers lack (an nvcc on PATH may be a wrapper)."""
    header = f"{home}/include/cuda_runtime_api.h"
    if not (os.path.isfile(f"{home}/bin/nvcc") and os.path.isfile(header)):
        return None
    with open(header, encoding="utf-8", errors="replace") as file:
        number = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", file.read())
    return (int(number[1]) // 1000, int(number[1]) % 1000 // 10) if number else None


def cuda_homes(env: Mapping[str, str]) -> list[str]:
    """Usable toolkits, best first. A folder named in CUDA_HOME is the only candidate."""
    named = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=env.get("PATH"))
    on_path = [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
    guessed = [*on_path, "/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    return [home for home in ([named] if named else guessed) if cuda_version(home)]


def cuda_decision(torch_cuda: str | None, sources: list[str], env: Mapping[str, str]) -> tuple[str | None, str]:
    """(toolkit to build the CUDA kernels with or None, why). A GPU in the building machine plays no part."""
    wanted = int(torch_cuda.split(".")[0]) if torch_cuda else None
    homes = cuda_homes(env)
    fitting = [home for home in homes if cuda_version(home)[0] == wanted]
    if env.get("CMD_EXT_CUDA") == "0":
        missing = "CMD_EXT_CUDA=0 switches it off"
    elif wanted is None:
        missing = "this torch is built without CUDA; install a CUDA build of torch"
    elif not sources:
        missing = "this version has CPU kernels only"
    elif fitting:
        return fitting[0], f"nvcc in {fitting[0]}, torch built for CUDA {torch_cuda}"
    elif homes:
        found = "{}.{}".format(*cuda_version(homes[0]))
        missing = f"torch is built for CUDA {torch_cuda}, {homes[0]} is {found}; set CUDA_HOME to a toolkit {wanted}.x"
    else:
        named = env.get("CUDA_HOME") or env.get("CUDA_PATH")
        where = f"CUDA_HOME={named} is no folder" if named else "neither PATH nor /usr/local leads to a folder"
        missing = f"{where} with bin/nvcc and include/cuda_runtime_api.h; set CUDA_HOME to a CUDA {torch_cuda} toolkit"
    if env.get("FORCE_CUDA") == "1":
        raise SystemExit(f"cmd_ext: FORCE_CUDA=1 asks for CUDA kernels, but {missing}")
    return None, missing


def arch_list(version: tuple[int, int]) -> str:
    """GPU generations to build for: minor versions run the code of their major one, later GPUs the PTX of the last."""
    return "8.0;9.0" + (";10.0;12.0+PTX" if version >= (12, 8) else "+PTX")


def default_jobs() -> int:
    """One compiler per core, and 1 GB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory >> 30))


def cxx_compiler(env: Mapping[str, str]) -> str:
    """Command of the C++ compiler: CXX, else the first that is installed."""
    names = [env["CXX"]] if env.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(shlex.split(name)[0], path=env.get("PATH")):
            return name
    absent = f"CXX={env['CXX']} is not a program" if env.get("CXX") else "there is no C++ compiler"
    raise SystemExit(f"cmd_ext: {absent}; install one (`apt-get install g++` or `dnf install gcc-c++`) or set CXX")


def check_python_headers() -> None:
    folders = {sysconfig.get_path("include"), sysconfig.get_config_var("INCLUDEPY")}
    if not any(folder and os.path.isfile(f"{folder}/Python.h") for folder in folders):
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        raise SystemExit(f"cmd_ext: Python.h is missing; install it (`apt-get install {python}-dev`)")


def short(error: Exception) -> str:
    return textwrap.shorten(str(error) or repr(error), 160, placeholder=" ...")


def import_torch():
    try:
        import torch
    except (ImportError, OSError) as error:
        raise SystemExit(f"cmd_ext: building needs torch >= 2.11 ({short(error)}); run `pip install torch`") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise SystemExit(f"cmd_ext: building needs torch >= 2.11, got {torch.__version__}; run `pip install -U torch`")
    return torch


def build() -> dict:
    """The arguments of setup() that describe the libraries."""
    torch = import_torch()
    os.environ["CXX"] = cxx_compiler(os.environ)
    check_python_headers()
    cuda_sources = sorted(glob.glob("csrc/cuda/*.cu"))
    home, why = cuda_decision(torch.version.cuda, cuda_sources, os.environ)
    cuda = f"CUDA kernels: {'yes' if home else 'no'}, {why}"
    print(f"cmd_ext: torch {torch.__version__} in {os.path.dirname(torch.__file__)}; {cuda}", file=sys.stderr)
    version = cuda_version(home) if home else None
    if home:
        os.environ["CUDA_HOME"] = home  # read when torch's build code is imported
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or arch_list(version)
    os.environ["MAX_JOBS"] = os.environ.get("MAX_JOBS") or str(default_jobs())
    # Last on PATH: the ninja of an environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])

    from torch.utils import cpp_extension

    facts = [
        ("CMD_EXT_TORCH", torch.__version__),
        ("CMD_EXT_CUDA_BUILD", "{}.{}".format(*version) if version else "none"),
    ]
    cxx = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
    flags = {"cxx": cxx, "nvcc": ["-std=c++17", "-O3", "-lineinfo"]}
    sources = {*glob.glob("csrc/*.cpp"), *glob.glob("csrc/cpu/*.cpp")} - {"csrc/module.cpp"}
    device = "cuda" if home else "cpu"
    torch_includes = cpp_extension.include_paths(device)
    ops = Extension(
        "cmd_ext._ops",
        sorted(sources) + (cuda_sources if home else []),
        include_dirs=torch_includes,
        library_dirs=cpp_extension.library_paths(device),
        libraries=["torch_cpu", *(["cudart_static"] if home else [])],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), *([("CMD_EXT_CUDA", None)] if home else [])],
        extra_compile_args=flags,
        py_limited_api=True,  # no Python in it at all: one library for every Python
        language="c++",
    )
    module = Extension(
        "cmd_ext._C",
        ["csrc/module.cpp"],
        include_dirs=torch_includes,  # only for the pybind11 that torch carries
        define_macros=facts,
        extra_compile_args=flags,
        language="c++",
    )

    class BuildExtension(cpp_extension.BuildExtension):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs, use_ninja=shutil.which("ninja") is not None)

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # flags and headers change without a newer source file

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (RuntimeError, OSError, BaseError, CompileError, LinkError) as error:
                raise SystemExit(
                    f"cmd_ext: the build stopped ({short(error)}); the first error above says why. "
                    "If a compiler was killed, memory ran out: set MAX_JOBS=1"
                ) from None

    return {"ext_modules": [ops, module], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    setup(**({} if "sdist" in sys.argv else build()))  # a source archive needs neither torch nor compiler
