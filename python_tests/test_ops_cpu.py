"""What only the CPU kernels promise: the same bits on any number of threads, every instruction set, bounded memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from op_bounds import F32, layer, random
from test_ops import OPS, outputs

from cmd_ext import _C


def large(name: str) -> list:
    """Arguments large enough to be cut into pieces; rank 0, as torch's GEMM promises no bits."""
    if name == "topk_csr":
        return [random(2, 400, 700, dtype=F32), 50000]
    if name == "residual_topk_csr":
        return [random(1, 400, 700, dtype=F32), random(1, 400, 0, dtype=F32), random(1, 0, 700, dtype=F32), 50000]
    if "linear" in name or name == "sddmm":
        u, v, values, pattern = layer(256, 300, 0, 20000, dtype=F32)
        if name == "sddmm":
            return [random(256, 65, dtype=F32), random(300, 65, dtype=F32), *pattern[:2]]
        return [random(100, 300, dtype=F32), u, v, values, *pattern, random(256, dtype=F32)]
    u, v, values, pattern = layer(64, 64 * 9, 0, 9000, dtype=F32)
    x, grad = random(20, 64, 14, 14, dtype=F32), random(20, 64, 12, 12, dtype=F32)
    geometry = [(3, 3), (1, 1), (0, 0), (1, 1), 1]
    if name == "lrs_conv2d":
        return [x, u, v, values, *pattern, None, *geometry]
    if name == "_lrs_conv2d_grad_input":
        return [grad, u, v, values, *pattern, (14, 14), *geometry]
    return [grad, x, *pattern[:2], *geometry]


@pytest.mark.parametrize("name", OPS[1:])
def test_same_bits_with_any_number_of_threads(name):
    args, before, runs = large(name), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(outputs(name, args))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


PATHS = ["scalar", "avx2", "avx512"]  # each machine has the first ones


def run(*command: str, path: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CMD_EXT_CPU": path}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_cpu_capability():
    forced = os.environ.get("CMD_EXT_CPU")
    assert _C.cpu_capability() in ([forced.replace("baseline", "scalar")] if forced else PATHS)


@pytest.mark.skipif("CMD_EXT_CPU" in os.environ, reason="the instruction set is already chosen")
@pytest.mark.parametrize("path", PATHS)
def test_values_on_every_instruction_set(path):
    if path == _C.cpu_capability():
        pytest.skip("the other tests run on it")
    probe = run("-c", "from cmd_ext import _C; _C.cpu_capability()", path=path)
    if "CMD_EXT_CPU must be a path that this CPU has" in probe.stderr:
        pytest.skip("this CPU lacks it")
    assert probe.returncode == 0, probe.stderr
    chosen = "capability or number_of_threads or (_value and float32 and cpu and not svd and not channels_last)"
    files = [__file__, os.path.join(os.path.dirname(__file__), "test_ops.py")]
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files, path=path)
    assert result.returncode == 0, result.stdout


def test_the_older_name_of_the_scalar_path():
    result = run("-c", "import torch, cmd_ext._C as c; print(c.cpu_capability())", path="baseline")
    assert result.stdout == "scalar\n", result.stderr


WRONG = """
import torch, cmd_ext
from cmd_ext import CMDConv2d, CMDLinear, ops
layers = [(CMDConv2d(3, 4, 3, rank=1, density=0.5), torch.ones(2, 3, 8, 8)),
          (CMDLinear(8, 4, rank=1, density=0.5), torch.ones(2, 8))]
for layer, x in layers:
    layer.backend = "fused"
    for grad in (True, False):
        try:
            with torch.set_grad_enabled(grad):
                layer(x)
        except ValueError as error:
            print(error)
try:
    ops.topk_csr(torch.ones(1, 3, 4), 2)
except ValueError as error:
    print(error)
"""


def test_an_unknown_instruction_set_is_an_error_of_one_line():
    result = run("-c", WRONG, path="avx")
    lines = result.stdout.splitlines()
    assert len(lines) == 5, result.stderr
    for line in lines:
        assert re.search(r"CMD_EXT_CPU must be a path that this CPU has \(scalar.*\), got avx$", line)
    result = run("-m", "cmd_ext", "doctor", path="avx")
    assert result.returncode == 1
    assert re.fullmatch(r"cmd_ext doctor: CMD_EXT_CPU must be .*, got avx\n", result.stderr)


MEASURE = r"""
import re, sys, torch
from cmd_ext import ops, ref

def status(field):
    return int(re.search(field + r":\s+(\d+)", open("/proc/self/status").read())[1]) / 1000

def run(op, x, m, n, nnz_per_row, *geometry):
    step = n // nnz_per_row
    columns = torch.arange(m)[:, None] % step + torch.arange(nnz_per_row) * step
    pattern = ops.Pattern.from_csr(torch.arange(m + 1) * nnz_per_row, columns.flatten(), n)
    leaves = [x, torch.randn(m, 32), torch.randn(32, n), torch.randn(m * nnz_per_row)]
    op(*[t.requires_grad_() for t in leaves], pattern, None, *geometry).sum().backward()

op = getattr({"ops": ops, "ref": ref}[sys.argv[1]], sys.argv[2])
if sys.argv[2] == "lrs_linear":
    small, large = (torch.randn(4, 64), 64, 64, 4), (torch.randn(4, 25088), 4096, 25088, 125)
else:
    geometry = (3, 3), (1, 1), (1, 1)
    small = torch.randn(2, 64, 4, 4), 64, 64 * 9, 4, *geometry
    large = torch.randn(2, 2048, 4, 4), 2048, 2048 * 9, 92, *geometry
run(op, *small)
before = status("VmRSS")
run(op, *large)
print(status("VmHWM") - before)
"""


def measure(*arguments: str) -> float:
    """Growth of the peak memory over one forward and backward of a large layer, in MB, in a process of its own.

    From /proc, as ru_maxrss of a new process starts at the peak of its parent.
    """
    return float(subprocess.run([sys.executable, "-c", MEASURE, *arguments], stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
def test_memory_stays_far_below_the_dense_weight():
    dense_linear, dense_conv = 4 * 4096 * 25088 / 1e6, 4 * 2048 * 2048 * 9 / 1e6
    assert measure("ops", "lrs_linear") < dense_linear / 4
    assert measure("ops", "lrs_conv2d") < dense_conv / 3
    assert measure("ref", "lrs_conv2d") > dense_conv
