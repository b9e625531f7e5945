"""The decisions of setup.py, the build backend's search for torch, and what a library that does not load says."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import cmd_ext
from cmd_ext import _C

ROOT = Path(__file__).parents[1]
SOURCES = ["csrc/cuda/linear.cu"]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_py() -> ModuleType:
    return load("setup.py")


def toolkit(home: Path, version: int | None) -> str:
    """A folder that looks like a CUDA toolkit; without a version it has nvcc alone, like a wrapper script."""
    (home / "bin").mkdir(parents=True)
    (home / "bin/nvcc").touch(mode=0o755)
    if version:
        (home / "include").mkdir()
        (home / "include/cuda_runtime_api.h").write_text(f"/* runtime */\n#define CUDART_VERSION  {version}\n")
    return str(home)


def test_cuda_version_is_read_from_the_headers(setup_py, tmp_path):
    assert setup_py.cuda_version(toolkit(tmp_path / "a", 13000)) == (13, 0)
    assert setup_py.cuda_version(toolkit(tmp_path / "b", 12080)) == (12, 8)


def test_an_nvcc_without_headers_is_no_toolkit(setup_py, tmp_path):
    wrapper = toolkit(tmp_path / "wrapper", None)
    assert setup_py.cuda_version(wrapper) is None
    assert wrapper not in setup_py.cuda_homes({"PATH": f"{wrapper}/bin"})


def test_the_toolkit_on_path_comes_first_and_a_named_one_is_alone(setup_py, tmp_path):
    on_path, named = toolkit(tmp_path / "path", 13000), toolkit(tmp_path / "named", 12080)
    assert setup_py.cuda_homes({"PATH": f"{on_path}/bin"})[0] == on_path
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        assert setup_py.cuda_homes({"PATH": f"{on_path}/bin", variable: named}) == [named]
    assert setup_py.cuda_homes({"PATH": f"{on_path}/bin", "CUDA_HOME": str(tmp_path)}) == []


def test_cuda_is_built_where_torch_and_toolkit_agree(setup_py, tmp_path):
    home = toolkit(tmp_path / "cuda", 13000)
    for force in ({}, {"FORCE_CUDA": "1"}):
        assert setup_py.cuda_decision("13.2", SOURCES, {"CUDA_HOME": home, **force})[0] == home


def test_the_toolkit_of_torchs_major_version_is_chosen(setup_py, monkeypatch, tmp_path):
    homes = [toolkit(tmp_path / "new", 13000), toolkit(tmp_path / "old", 12060)]
    monkeypatch.setattr(setup_py, "cuda_homes", lambda env: homes)
    assert setup_py.cuda_decision("12.8", SOURCES, {})[0] == homes[1]


@pytest.mark.parametrize(
    ("torch_cuda", "sources", "version", "env", "reason"),
    [
        ("13.0", SOURCES, 13000, {"CMD_EXT_CUDA": "0"}, "CMD_EXT_CUDA=0 switches it off"),
        (None, SOURCES, 13000, {}, "install a CUDA build of torch"),
        ("13.0", [], 13000, {}, "this version has CPU kernels only"),
        ("13.0", SOURCES, 12080, {}, r"torch is built for CUDA 13.0, \S+ is 12.8; set CUDA_HOME to a toolkit 13.x"),
        ("13.0", SOURCES, None, {}, r"CUDA_HOME=\S+ is no folder with bin/nvcc and include/cuda_runtime_api.h"),
    ],
)
def test_a_missing_cuda_piece_means_cpu_and_under_force_cuda_an_error(
    setup_py, tmp_path, torch_cuda, sources, version, env, reason
):
    env = {"CUDA_HOME": toolkit(tmp_path / "cuda", version), **env}
    home, why = setup_py.cuda_decision(torch_cuda, sources, env)
    assert home is None
    assert re.search(reason, why)
    with pytest.raises(SystemExit, match=f"^cmd_ext: FORCE_CUDA=1 asks for CUDA kernels, but .*{reason}") as stop:
        setup_py.cuda_decision(torch_cuda, sources, {**env, "FORCE_CUDA": "1"})
    assert "\n" not in str(stop.value)


def test_no_toolkit_anywhere(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "cuda_homes", lambda env: [])
    assert "neither PATH nor /usr/local" in setup_py.cuda_decision("13.0", SOURCES, {})[1]


def test_arch_list_holds_what_the_toolkit_knows(setup_py):
    assert setup_py.arch_list((12, 6)) == "8.0;9.0+PTX"
    assert setup_py.arch_list((13, 0)) == "8.0;9.0;10.0;12.0+PTX"


def program(folder: Path, name: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).touch(mode=0o755)
    return str(folder)


def test_the_compiler_is_cxx_or_the_first_installed(setup_py, tmp_path):
    path = program(tmp_path, "clang++")
    assert setup_py.cxx_compiler({"PATH": path}) == "clang++"
    program(tmp_path, "g++")
    assert setup_py.cxx_compiler({"PATH": path}) == "g++"
    program(tmp_path, "ccache")
    assert setup_py.cxx_compiler({"PATH": path, "CXX": "ccache g++ -m64"}) == "ccache g++ -m64"


def test_no_compiler_says_what_to_install(setup_py, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no C\+\+ compiler; install one \(`apt-get install g\+\+`"):
        setup_py.cxx_compiler({"PATH": str(tmp_path)})
    with pytest.raises(SystemExit, match=r"CXX=g\+\+-99 is not a program"):
        setup_py.cxx_compiler({"PATH": program(tmp_path, "g++"), "CXX": "g++-99"})


def test_missing_python_headers_are_named(setup_py, monkeypatch, tmp_path):
    setup_py.check_python_headers()
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup_py.sysconfig, "get_config_var", lambda name: None)
    with pytest.raises(SystemExit, match=r"Python.h is missing; .*apt-get install python3\.\d+-dev"):
        setup_py.check_python_headers()


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (None, r"needs torch >= 2.11 \(.*\); run `pip install torch`"),
        (SimpleNamespace(__version__="2.9.1+cpu"), r"needs torch >= 2.11, got 2.9.1\+cpu; run `pip install -U torch`"),
    ],
)
def test_absent_and_old_torch_are_refused(setup_py, monkeypatch, torch, message):
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(SystemExit, match=message):
        setup_py.import_torch()


def test_a_development_version_of_torch_is_accepted(setup_py, monkeypatch):
    torch = SimpleNamespace(__version__="2.16.0a0+git12ab")
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert setup_py.import_torch() is torch


def test_build_lists_every_source_once(setup_py, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "PATH", "MAX_JOBS"):  # restored after the test
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("CMD_EXT_CUDA", "0")
    monkeypatch.setenv("MAX_JOBS", "3")
    ops, module = setup_py.build()["ext_modules"]
    assert os.environ["MAX_JOBS"] == "3"
    assert sorted([*ops.sources, *module.sources]) == sorted(
        str(path.relative_to(ROOT)) for folder in ("csrc", "csrc/cpu") for path in ROOT.glob(f"{folder}/*.cpp")
    )
    assert module.sources == ["csrc/module.cpp"]


def test_default_jobs_are_at_most_the_cores(setup_py):
    assert 1 <= setup_py.default_jobs() <= os.cpu_count()


@pytest.fixture
def backend(monkeypatch, tmp_path) -> ModuleType:
    """The backend as in an isolated build: no torch in sight, and the interpreter of an environment without torch."""
    backend = load("build_backend/cmd_ext_backend.py")
    venv.create(tmp_path / "empty", symlinks=True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: find_spec(name) if name != "torch" else None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "empty/bin/python"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("CMD_EXT_TORCH_SITE", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return backend


def environment_with_torch(folder: Path) -> tuple[Path, str]:
    """A virtual environment and its site-packages folder, with a stand-in for torch that must not be imported."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text("raise AssertionError")
    (site / "torch/version.py").touch()
    return folder, str(site)


def test_without_torch_it_becomes_a_build_requirement(backend):
    assert backend.get_requires_for_build_wheel() == ["torch>=2.11"]
    assert backend.get_requires_for_build_editable() == ["torch>=2.11"]
    assert backend.get_requires_for_build_sdist() == []


def test_the_torch_of_the_installing_environment_is_used(backend, monkeypatch, tmp_path):
    folder, site = environment_with_torch(tmp_path / "target")
    monkeypatch.setattr(sys, "executable", str(folder / "bin/python"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "isolated"))
    before = list(sys.path)
    assert backend.get_requires_for_build_wheel() == []
    assert sys.path[: len(before)] == before, "the build environment's own packages come first"
    assert site in sys.path[len(before) :]
    backend.get_requires_for_build_wheel()
    assert sys.path.count(site) == 1


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_a_front_end_with_its_own_environment_gets_the_activated_one(backend, monkeypatch, tmp_path, variable):
    folder, site = environment_with_torch(tmp_path / "active")
    monkeypatch.setenv(variable, str(folder))
    assert backend.get_requires_for_build_editable() == []
    assert site in sys.path


def test_another_pythons_torch_is_not_used(backend, monkeypatch, tmp_path):
    (tmp_path / "other/bin").mkdir(parents=True)
    python = tmp_path / "other/bin/python"
    python.write_text("#!/bin/sh\necho '[[3, 1], \"/other/torch/__init__.py\", []]'\n")
    python.chmod(0o755)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "other"))
    assert backend.get_requires_for_build_wheel() == ["torch>=2.11"]


def test_cmd_ext_torch_site_names_the_folder(backend, monkeypatch, tmp_path):
    _, site = environment_with_torch(tmp_path / "named")
    monkeypatch.setenv("CMD_EXT_TORCH_SITE", site)
    assert backend.get_requires_for_build_wheel() == []
    assert sys.path[-1] == site
    monkeypatch.setenv("CMD_EXT_TORCH_SITE", str(tmp_path))
    with pytest.raises(SystemExit, match=r"CMD_EXT_TORCH_SITE=\S+ holds no torch; name the folder above torch/"):
        backend.get_requires_for_build_wheel()


def remove(library: Path) -> None:
    library.unlink()


def cut_off(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:40])


def call_unknown_function(library: Path) -> None:
    """As under a torch without one of the functions that the library calls."""
    library.write_bytes(re.sub(rb"\x00aoti_torch_g", b"\x00aoti_torch_q", library.read_bytes(), count=1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"the op library is not built \(\S+_ops.abi3.so is missing\); run `pip install .`"),
        (cut_off, r"the op library does not load under torch \S+ .*file too short; reinstall"),
        (call_unknown_function, r"the op library does not load under torch \S+ .*undefined symbol: aoti_torch_q\w+; "),
    ],
    ids=["missing", "cut off", "undefined symbol"],
)
def test_a_library_that_does_not_load_says_why_in_one_line(tmp_path, damage, message):
    package = shutil.copytree(Path(cmd_ext.__file__).parent, tmp_path / "cmd_ext")
    damage(package / "_ops.abi3.so")
    done = subprocess.run([sys.executable, "-c", "import cmd_ext"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(rf"^ImportError: cmd_ext: {message}", done.stderr.splitlines()[-1])
    assert done.stderr.count("Error: ") == 1, "no chain of causes"


@pytest.mark.skipif(_C.build_info()["cuda"] == "none", reason="a build without CUDA kernels")
def test_every_operator_has_a_cuda_kernel():
    names = {
        name for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU") if name.startswith("cmd_ext::")
    }
    names = {name for name in names if "plan" not in name and "grad_weights" not in name}  # of the CPU alone
    assert len(names) >= 10
    on_cuda = set(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"))
    assert names <= on_cuda, f"without a CUDA kernel: {sorted(names - on_cuda)}"
