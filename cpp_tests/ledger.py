#!/usr/bin/env python3
"""The ledger of the CUDA kernels: what ptxas makes of each for every architecture, read without a GPU.

    ledger.py            compiles csrc/cuda/*.cu and writes csrc/cuda/ledger.json
    ledger.py --check    compares with it and prints a line for everything that got worse
    --build FOLDER       a CMake build with the target cuda_access, for the part about memory accesses

Needs a CUDA toolkit (CUDA_HOME or /usr/local/cuda*) and nvdisasm (the package nvidia-cuda-nvdisasm, or on PATH). The
counts are of instructions in the code, not of executions. Occupancy is the number of resident warps an SM that
registers, shared memory, threads and blocks allow.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ledger_access

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "csrc/cuda/ledger.json"
ARCHS = (80, 90, 100, 120)
# Of an SM: warps, blocks, bytes of shared memory. 65536 registers, a quarter for each of its four schedulers; a block's
# shared memory comes with 1 KiB that the system reserves.
LIMITS = {80: (64, 32, 164 << 10), 90: (64, 32, 228 << 10), 100: (64, 32, 228 << 10), 120: (48, 24, 100 << 10)}
RESERVED_SHARED = 1024

COUNTED = {
    "LDG.128": r"LDG\.(\S*\.)?128\b",
    "STG.128": r"STG\.(\S*\.)?128\b",
    "LDS": r"LDS\b",
    "LDS.128": r"LDS\.(\S*\.)?128\b",
    "HMMA": r"HMMA\b",
    "LDSM": r"LDSM\b",
    "LDGSTS": r"LDGSTS\b",
    "BAR": r"BAR\b",
    "RED": r"REDG?\b",
    "ATOMG": r"ATOMG?\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
}
FLOAT_ATOMIC = re.compile(r"(REDG?|ATOM[GS]?)\.\S*\b(F16|BF16|F32|F64|F16x2|BF16x2)")
KEPT = ("HMMA", "LDSM", "LDGSTS", "LDG.128", "STG.128")  # fewer than recorded is a fault

# What kernels promise, by name: instructions that must be there, and the most dynamic shared memory a launch asks for.
TENSOR_CORES = ("HMMA", "LDSM", "LDGSTS", "STG.128")
PROMISES = [
    (r"gemm_kernel<.*, 128>", TENSOR_CORES, 96 << 10),
    (r"gemm_kernel<.*, 64>", TENSOR_CORES, 72 << 10),
    (r"gemm_onepass_kernel<", TENSOR_CORES, 80 << 10),
    (r"spmm_kernel<", ("LDGSTS", "LDS.128"), 64 << 10),
    (r"sddmm_tile_kernel<", ("LDGSTS", "LDG.128", "LDS.128"), 128 << 10),
    (r"threshold::(digit_histogram|count|compact)_kernel<", ("LDG.128",), 0),
    (r"threshold::residual_histogram_kernel<", ("LDG.128", "STG.128"), 0),
    (r"conv::(conv|grad_values)_tile_kernel<", ("LDS.128",), 96 << 10),
    (r"cholesky_inverse_kernel", (), 66 << 10),
]
# Registers a thread that a kernel's design counted on before it was written (most over the architectures), and why a
# kernel may exceed them by more than a tenth. The first pattern that matches counts.
IN_FLIGHT = "16 bytes of several loads are in flight; 32 warps an SM hide the latency of memory four times over"
PLANNED = [
    (r"gemm_kernel<", 128, ""),
    (r"gemm_onepass_kernel<.*sm_1", 156, "the sums alone allow one block an SM, which may have 255"),
    (r"gemm_onepass_kernel<", 183, ""),
    (r"threshold::residual_histogram_kernel<double>", 80, "each sum is two registers; two blocks an SM, not three"),
    (r"threshold::residual_histogram_kernel<", 80, ""),
    (r"threshold::(digit_histogram|compact)_kernel<", 40, IN_FLIGHT),
    (r"threshold::count_kernel<", 18, IN_FLIGHT),
    (r"threshold::pick_digit_kernel", 24, "one block a matrix: nothing shares the SM with it"),
    (r"jacobi_rotate<", 55, "two rows stay in registers between product and rotation; 1024 threads may have 64"),
    (r"cholesky_inverse_kernel", 96, ""),
    (r"spmm_kernel<", 62, "8 x 4 sums a thread over a staged tile of x, which the planned kernel read from memory"),
    (r"spmm_few_kernel<.*, 16>", 62, "16 sums a thread"),
    (r"spmm_few_kernel<", 62, ""),
    (r"sddmm_tile_kernel<", 83, "shared memory for one block of 512 threads, whose registers may be 128"),
    (r"conv::\w+_tile_kernel<", 128, ""),  # two blocks an SM; their shared memory sets the same limit
    (r"conv::\w+_direct_kernel<double>", 83, "each sum is two registers"),
    (r"conv::\w+_direct_kernel<", 83, ""),
    (r"csr_transpose::scan_table_kernel", 64, "a few blocks for the whole pattern"),
    (r"rebuild_kernel<", 64, "64 x 64 tile of U V, so that W is written once; three blocks an SM"),
    (r".*", 64, ""),  # streams
]
# Kernels that are launched only where their shared memory fits; others take over elsewhere.
OPTIONAL = r"sddmm_tile_kernel<"


def toolkit():
    """The folder of a real toolkit: an nvcc on PATH may be a wrapper elsewhere."""
    for home in [Path(os.environ.get("CUDA_HOME", "/nonexistent")), *sorted(Path("/usr/local").glob("cuda*"))]:
        if (home / "bin/nvcc").is_file() and (home / "bin/ptxas").is_file():
            return home / "bin"
    sys.exit("ledger: no CUDA toolkit in CUDA_HOME or /usr/local/cuda*")


def nvdisasm():
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvdisasm"))
    found = packaged[-1] if packaged else shutil.which("nvdisasm")
    return found or sys.exit("ledger: no nvdisasm; pip install nvidia-cuda-nvdisasm")


def run(*command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout, result.stderr


def short_names(mangled):
    """cmd_ext::cuda::f<float, 2> as f<float, 2>: names of template kernels without types of parameters."""
    demangled = run("c++filt", *mangled)[0].splitlines() if mangled else []
    return {name: short_name(text) for name, text in zip(mangled, demangled, strict=True)}


def short_name(demangled):
    depth = 0
    for i, character in enumerate(demangled):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            demangled = demangled[:i]
            break
    demangled = demangled.removeprefix("void ").replace("cmd_ext::cuda::", "")
    return demangled.replace("__nv_bfloat16", "bf16").replace("__half", "half")


def occupancy(arch, block, registers, shared):
    """Resident warps an SM, and what limits them."""
    max_warps, max_blocks, shared_bytes = LIMITS[arch]
    warps = -(-block // 32)
    warp_registers = max(256, -(-registers * 32 // 256) * 256)
    blocks = {
        "warps": max_warps // warps,
        "blocks": max_blocks,
        "registers": 65536 // 4 // warp_registers * 4 // warps,
        "shared": shared_bytes // (-(-(shared + RESERVED_SHARED) // 128) * 128),
    }
    limit = min(blocks, key=blocks.get)
    return blocks[limit] * warps, limit


def promised(name):
    """Instructions and dynamic shared bytes of the patterns that match a kernel's name."""
    matching = [(needs, dynamic) for pattern, needs, dynamic in PROMISES if re.match(pattern, name)]
    return {need for needs, _ in matching for need in needs}, max((dynamic for _, dynamic in matching), default=0)


def beyond_plan(key, registers):
    """What is wrong with the registers of a kernel whose plan gives no reason for them."""
    pattern, planned, reason = next(plan for plan in PLANNED if re.match(plan[0], key))
    excess = registers > 1.1 * planned and not reason
    return [f"{key}: {registers} registers, planned {planned} (PLANNED, {pattern})"] if excess else []


def block_sizes(ptx):
    """Threads of a block that each kernel's launch bounds allow; None without bounds."""
    sizes = {}
    for name, directives in re.findall(r"\.entry\s+([\w$]+)\s*\([^)]*\)([^{]*)\{", ptx):
        bound = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", directives)
        x, y, z = (int(part or 1) for part in bound.groups()) if bound else (0, 0, 0)
        sizes[name] = x * y * z or None
    return sizes


def resources(log):
    """What ptxas -v says of each kernel."""
    found = {}
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stack, stores, loads, registers, rest in re.findall(pattern, log, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = {
            "registers": int(registers),
            "spills": int(stores) + int(loads),
            "stack": int(stack),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def instruction_counts(sass):
    """Instructions of each kernel, by kind; float atomics as a list."""
    counts, current = {}, None
    patterns = {kind: re.compile(pattern) for kind, pattern in COUNTED.items()}
    for line in sass.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([\w$]+),", line):
            current = counts.setdefault(section[1], {"instructions": 0, "float_atomics": []})
        elif current is not None and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)", line)):
            opcode = match[1]
            if opcode == "NOP":
                continue
            current["instructions"] += 1
            for kind, pattern in patterns.items():
                if pattern.match(opcode):
                    current[kind] = current.get(kind, 0) + 1
            if FLOAT_ATOMIC.match(opcode):
                current["float_atomics"].append(opcode)
    return counts


def compile_kernels(source, arch, folder, tools):
    """The entries of one file's kernels for one architecture, and what is wrong with them whatever the ledger says."""
    nvcc, disassembler = tools
    base = folder / f"{source.stem}_{arch}"
    ptx, cubin = base.with_suffix(".ptx"), base.with_suffix(".cubin")
    run(nvcc / "nvcc", "-std=c++17", "-O3", f"-arch=compute_{arch}", "-ptx", source, "-o", ptx)
    log = run(nvcc / "ptxas", f"-arch=sm_{arch}", "-v", "-warn-spills", "-warn-lmem-usage", ptx, "-o", cubin)[1]
    counts = instruction_counts(run(disassembler, "-c", cubin)[0])
    blocks, used = block_sizes(ptx.read_text()), resources(log)
    names = short_names(sorted(blocks))
    entries, faults = {}, []
    for line in log.splitlines():
        if "warning" in line and not re.search("Local memory used|Registers are spilled", line):  # those are in entries
            faults.append(f"{source.stem} sm_{arch}: {line}")
    for mangled, name in names.items():
        entry = used[mangled] | {"block": blocks[mangled], **counts[mangled]}
        key = f"{name} sm_{arch}"
        float_atomics = entry.pop("float_atomics")
        needs, dynamic = promised(name)
        local = [f"{kind} {entry[kind]}" for kind in ("spills", "stack", "LDL", "STL") if entry.get(kind)]
        faults += [f"{key}: local memory: {', '.join(local)}"] if local else []
        faults += [f"{key}: float atomics: {', '.join(sorted(set(float_atomics)))}"] if float_atomics else []
        faults += [f"{key}: promises {need}, has none" for need in sorted(needs) if need not in entry]
        faults += beyond_plan(key, entry["registers"])
        if not entry["block"]:
            faults.append(f"{key}: no launch bounds")
            entry["block"] = 1024
        if dynamic:
            entry["dynamic_shared"] = dynamic
        entry["warps"], entry["limit"] = occupancy(arch, entry["block"], entry["registers"], entry["shared"] + dynamic)
        if not entry["warps"] and not re.match(OPTIONAL, name):
            faults.append(f"{key}: cannot be launched for want of {entry['limit']}")
        entries[key] = entry
    return entries, faults


def compile_all(sources):
    tools = toolkit(), nvdisasm()
    version = re.search(r"V([\d.]+)", run(tools[0] / "nvcc", "--version")[0])[1]
    jobs = [(source, arch) for source in sorted(sources, key=lambda path: -path.stat().st_size) for arch in ARCHS]
    kernels, faults = {}, []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for entries, wrong in pool.map(lambda job: compile_kernels(*job, Path(folder), tools), jobs):
            kernels |= entries
            faults += wrong
    faults += [f"the promise of {p[0]} is no kernel's" for p in PROMISES if not any(re.match(p[0], k) for k in kernels)]
    return {"nvcc": version, "kernels": dict(sorted(kernels.items()))}, faults


def compare(recorded, current):
    """Everything that got worse since the ledger was written."""
    faults = [f"{key}: not in the ledger" for key in current.keys() - recorded.keys()]
    for key, old in recorded.items():
        new = current.get(key)
        if new is None:
            faults.append(f"{key}: in the ledger, but not compiled")
            continue
        if new["registers"] > 1.1 * old["registers"]:
            faults.append(f"{key}: registers {old['registers']} -> {new['registers']}")
        if new["warps"] < old["warps"]:
            faults.append(f"{key}: warps an SM {old['warps']} -> {new['warps']} (limit: {new['limit']})")
        for kind in KEPT:
            if new.get(kind, 0) < old.get(kind, 0):
                faults.append(f"{key}: {kind} {old[kind]} -> {new.get(kind, 0)}")
    return sorted(faults)


def dump(ledger):
    """JSON with one entry a line, so that a diff is read kernel by kernel."""
    parts = [f'  "nvcc": {json.dumps(ledger["nvcc"])}']
    for part in ("kernels", "access"):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in ledger[part].items())
        parts.append(f'  "{part}": {{\n{lines}\n  }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the ledger instead of writing it")
    parser.add_argument("--build", type=Path, help="a build with the target cuda_access")
    parser.add_argument("--folder", type=Path, default=LEDGER.parent, help="where the .cu files are")
    arguments = parser.parse_args()
    start = time.monotonic()
    recorded = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    current, faults = compile_all(arguments.folder.glob("*.cu"))
    current["access"], sites = recorded.get("access", {}), 0
    if arguments.build:
        ratios, sites, launched = ledger_access.measure(arguments.build, short_names)
        current["access"], unreasoned = ledger_access.entries(ratios)
        faults += unreasoned
        compiled = {re.split("[< ]", key)[0] for key in current["kernels"]}
        faults += [f"{name}: not launched by cpp_tests/cuda/access.cpp" for name in sorted(compiled - launched)]
    if not arguments.check:
        LEDGER.write_text(dump(current))
    elif recorded["nvcc"] == current["nvcc"]:
        faults += compare(recorded["kernels"], current["kernels"])
        faults += ledger_access.compare(recorded["access"], current["access"])
    else:
        print(f"The ledger is of nvcc {recorded['nvcc']}, this is {current['nvcc']}: numbers are not compared")
    for fault in faults:
        print(fault)
    kernels = len(current["kernels"])
    print(f"{kernels} cubins of kernels, {sites} accesses, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
