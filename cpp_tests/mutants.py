#!/usr/bin/env python3
# ruff: noqa: E501  (the text of a kernel cannot be wrapped)
"""Plants one fault at a time in a copy of the CUDA kernels and requires that their tests turn red.

    python cpp_tests/mutants.py [--jobs 2] [--only TEXT]

A mutant is one replacement in one file; it must match exactly once, so that a changed kernel shows here. The tests of
its family are built from the copy and run under the emulator, fast first, then with the race detector. Ends with 1 when
fewer than 95 % are caught or when a survivor is not one of those explained below.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
WANTED = 0.95


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in csrc/cuda/`file`; `survives` says why the tests may pass."""

    fault: str
    file: str
    old: str
    new: str
    survives: str = ""

    @property
    def stem(self) -> str:
        """The family whose tests see this file."""
        return {"csr_transpose.cuh": "threshold", "scan.cuh": "threshold"}.get(
            self.file, self.file.partition(".")[0].partition("_")[0]
        )


MUTANTS = [
    # linear
    Mutant("removed barrier before a staged tile is read", "linear.cuh",
           "    gpu::cp_async_wait<1>();\n    __syncthreads();", "    gpu::cp_async_wait<1>();"),
    Mutant("removed barrier before a stage is overwritten", "linear.cuh",
           "      }\n    }\n    __syncthreads();\n  }\n  gpu::cp_async_wait<0>();",
           "      }\n    }\n  }\n  gpu::cp_async_wait<0>();"),
    Mutant("missing wait for the copy of the current tile", "linear.cuh",
           "    gpu::cp_async_wait<1>();", "    gpu::cp_async_wait<2>();"),
    Mutant("off-by-one bound of the features", "linear.cuh",
           "token_in && k0 + k < features", "token_in && k0 + k <= features"),
    Mutant("one nonzero of each tile forgotten", "linear.cuh",
           "for (int j = 0; j < count; ++j)", "for (int j = 0; j < count - 1; ++j)"),
    Mutant("swapped stride of the output", "linear.cuh",
           "y[token * s.rows + row] = gpu::narrow<T>(sum);", "y[row * tokens + token] = gpu::narrow<T>(sum);"),
    Mutant("partial sums of SDDMM at the wrong split", "linear.cuh",
           "partial[blockIdx.y * pattern.nnz + first + lane]", "partial[blockIdx.x * pattern.nnz + first + lane]"),
    Mutant("removed barrier after a tile of SDDMM is staged", "linear.cuh",
           "  gpu::cp_async_wait<0>();\n  __syncthreads();\n\n  const Vec16<T>* tile", "  gpu::cp_async_wait<0>();\n\n  const Vec16<T>* tile"),
    Mutant("removed barrier between the tile of sums and S", "linear.cuh",
           "  __syncthreads();\n  add_sparse_tile(", "  add_sparse_tile("),
    # gemm
    Mutant("wrong fragment index of the weights", "gemm.cuh",
           "out0 + 8 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2",
           "out0 + 8 * j + lane % 8 + lane / 8 % 2 * 8, 2 * k + lane / 16"),
    Mutant("wrong fragment row of the sums", "gemm.cuh", "lane / 4 + 8 * half", "lane / 4 + 4 * half"),
    Mutant("missing wait of the pipelined copies", "gemm.cuh",
           "gpu::cp_async_wait<Tile::kStages - 2>();", "gpu::cp_async_wait<Tile::kStages - 1>();"),
    Mutant("removed barrier of the main loop", "gemm.cuh",
           "    gpu::cp_async_wait<Tile::kStages - 2>();\n    __syncthreads();",
           "    gpu::cp_async_wait<Tile::kStages - 2>();"),
    Mutant("removed barrier between clearing and filling S", "gemm.cuh",
           "    clear_weights<kOuts>(stage(step) + Tile::kPixelBytes);\n    __syncthreads();",
           "    clear_weights<kOuts>(stage(step) + Tile::kPixelBytes);"),
    Mutant("copies run one stage ahead of the ring", "gemm.cuh",
           "    load(step + Tile::kStages - 1);\n    fill(step + 1);",
           "    load(step + Tile::kStages);\n    fill(step + 1);"),
    Mutant("kernel tap decoded by the wrong side", "gemm.cuh", "tap % shape.kernel_w", "tap % shape.kernel_h"),
    Mutant("divisibility of strided gradients ignored", "gemm.cuh",
           "    if (at % stride != 0) return -1;\n", ""),
    Mutant("pixel beyond the last one loaded", "gemm.cuh",
           "const bool in_range = p < shape.batch * plane;", "const bool in_range = p <= shape.batch * plane;"),
    Mutant("Z used before all warps have stored it", "gemm.cuh",
           "  store_z<T>(shared, z, pixel0, rank_half);\n  gpu::cp_async_wait<0>();\n  __syncthreads();",
           "  store_z<T>(shared, z, pixel0, rank_half);\n  gpu::cp_async_wait<0>();"),
    # threshold
    Mutant("removed barrier between counting and adding a histogram", "threshold.cuh",
           "uint32_t* histogram, Count* total) {\n  __syncthreads();", "uint32_t* histogram, Count* total) {"),
    Mutant("removed barrier after a histogram is cleared", "threshold.cuh",
           "histogram[i] = 0;\n  __syncthreads();\n}\n__device__ __forceinline__ void flush",
           "histogram[i] = 0;\n}\n__device__ __forceinline__ void flush"),
    Mutant("all ties kept", "threshold.cuh", "(packed != 0 && equal < wanted)", "(packed != 0 && equal <= wanted)"),
    Mutant("sums of a tile over the warps before and this one", "threshold.cuh",
           "for (int w = 0; w < int(threadIdx.x / 32); ++w) earlier", "for (int w = 0; w <= int(threadIdx.x / 32); ++w) earlier"),
    Mutant("matrices of a batch at the wrong stride", "threshold.cuh",
           "  row_ptr += matrix * (m + 1);", "  row_ptr += matrix * m;"),
    Mutant("removed barrier before the factors of a residual are multiplied", "threshold.cuh",
           "    __syncthreads();\n#pragma unroll\n    for (int k = 0; k < kDepth; ++k) {", "#pragma unroll\n    for (int k = 0; k < kDepth; ++k) {"),
    Mutant("removed barrier between the rows of a transpose", "csr_transpose.cuh",
           "        if (k < ends[2 * i + 1]) col = col_idx[k];\n      }\n      __syncthreads();",
           "        if (k < ends[2 * i + 1]) col = col_idx[k];\n      }"),
    Mutant("bounds of a strip read before they are found", "csr_transpose.cuh",
           "      ends[threadIdx.x] = begin;\n    }\n    __syncthreads();", "      ends[threadIdx.x] = begin;\n    }"),
    # svd
    Mutant("removed barrier between scaling and elimination", "svd.cuh",
           "    __syncthreads();\n    for (int i = j + warp; i < s;", "    for (int i = j + warp; i < s;"),
    Mutant("removed barrier between the rotations of two steps", "svd.cuh",
           "          any |= rotate_rows(w + i * s, w + j * s, h + i * s, h + j * s, s);\n      }\n      __syncthreads();",
           "          any |= rotate_rows(w + i * s, w + j * s, h + i * s, h + j * s, s);\n      }"),
    Mutant("one step of the tournament left out", "svd.cuh",
           "(across ? width : 2 * width - 1)", "(across ? width : 2 * width - 2)"),
    Mutant("rows staged before they are there", "svd.cuh",
           "        staged[(2 * width + i) * s + k] = h[row_of(i) * s + k];\n      }\n    __syncthreads();",
           "        staged[(2 * width + i) * s + k] = h[row_of(i) * s + k];\n      }"),
    Mutant("signs flipped before they are known", "svd.cuh",
           "negative[threadIdx.x] = flip;\n  __syncthreads();", "negative[threadIdx.x] = flip;"),
    # conv2d
    Mutant("removed barrier before staged planes are read", "conv2d_tile.cuh",
           "    stage(source + int64_t(channel) * pixels, channels, shared, p);\n    __syncthreads();",
           "    stage(source + int64_t(channel) * pixels, channels, shared, p);"),
    Mutant("staged planes overwritten while they are read", "conv2d_tile.cuh",
           "    if (!__syncthreads_or(any)) continue;\n", ""),
    Mutant("entries of a warp read before all lanes wrote", "conv2d_tile.cuh",
           "        __syncwarp();\n        visit(", "        visit("),
    Mutant("entries of a warp overwritten while they are read", "conv2d_tile.cuh",
           "__shfl_sync(~0u, cursor, r));\n        __syncwarp();", "__shfl_sync(~0u, cursor, r));"),
    Mutant("padding read as pixels of the line before", "conv2d_tile.cuh",
           "                          unsigned(x) < unsigned(p.w.source);", "                          x < p.w.source;"),
    Mutant("sums of the splits added before all are written", "conv2d.cuh",
           "  sums[part][lane] = sum;\n  __syncthreads();", "  sums[part][lane] = sum;"),
    Mutant("kernel row and column swapped without tiles", "conv2d.cuh",
           "place_of(p.h, h, tap_h), at_w = place_of(p.w, w, tap - tap_h * p.w.kernel)",
           "place_of(p.h, h, tap - tap_h * p.w.kernel), at_w = place_of(p.w, w, tap_h)"),
]  # fmt: skip

COMMON = ["g++", "-std=c++17", "-DCMD_EXT_SIMT", "-Wno-unknown-pragmas", "-Wno-psabi", "-w", "-ffp-contract=off"]
MODES = {
    "fast": (["-O1"], []),
    "race": (["-O1", "-g", "-DSIMT_RACE"],
             ["-fsanitize=thread,alignment", "-fsanitize-recover=alignment", "--param=tsan-distinguish-volatile=0",
              "--param=tsan-instrument-func-entry-exit=0", "-fno-builtin-memcpy", "-fno-builtin-memmove",
              "-fno-builtin-memset"]),
}  # fmt: skip


def cuda_include() -> str:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    for home in filter(None, homes):
        if Path(home, "include", "cuda_bf16.h").is_file():
            return f"{home}/include"
    raise SystemExit("mutants: no CUDA toolkit; set CUDA_HOME to a folder with include/cuda_bf16.h")


def compile_one(source: Path, out: Path, kernels: Path, *flags: str) -> None:
    includes = [f"-I{kernels}", f"-I{ROOT}/cpp_tests/simt", f"-I{ROOT}/cpp_tests", "-isystem", cuda_include()]
    subprocess.run([*COMMON, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)


class Builder:
    """Objects that every mutant shares: the emulator and the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared: dict[tuple[str, str], list[Path]] = {}

    def prepare(self, stem: str, mode: str) -> None:
        flags = MODES[mode][0]
        sources = sorted(ROOT.glob("cpp_tests/simt/simt*.cpp"))
        objects = []
        for source in [*sources, ROOT / "cpp_tests" / "cuda" / f"test_{stem}.cpp"]:
            out = self.folder / f"{source.parent.name}_{source.stem}_{mode}.o"
            if not out.exists():
                compile_one(source, out, KERNELS, *flags)
            objects.append(out)
        self.shared[stem, mode] = objects

    def turns_red(self, stem: str, mode: str, kernels: Path) -> str:
        """How the tests of the kernels in this folder fail; empty if they pass."""
        out = kernels / f"{stem}_{mode}"
        flags, instrument = MODES[mode]
        compile_one(kernels / f"{stem}.cu", out.with_suffix(".o"), kernels, *flags, *instrument)
        link = [str(path) for path in [out.with_suffix(".o"), *self.shared[stem, mode]]]
        subprocess.run(["g++", "-rdynamic", *link, "-o", str(out), "-ldl", "-lpthread"], check=True)
        try:
            run = subprocess.run([str(out)], capture_output=True, text=True, errors="replace", timeout=300)
        except subprocess.TimeoutExpired:
            return f"{mode}: did not end"
        if run.returncode == 0:
            return ""
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        return f"{mode}: {lines[0][:100] if lines else f'exit {run.returncode}'}"


def try_mutant(builder: Builder, mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory(dir=builder.folder) as folder:
        kernels = Path(folder) / "cuda"
        shutil.copytree(KERNELS, kernels)
        file = kernels / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise SystemExit(
                f"mutants: {mutant.file} holds {text.count(mutant.old)} times, wanted once: {mutant.old!r}"
            )
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        return builder.turns_red(mutant.stem, "fast", kernels) or builder.turns_red(mutant.stem, "race", kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="mutants whose file or fault contains this text")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in m.file or args.only in m.fault]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        builder = Builder(Path(folder))
        for stem in sorted({m.stem for m in chosen}):
            for mode in MODES:
                builder.prepare(stem, mode)
            untouched = Mutant("none", f"{stem}.cuh", "#pragma once", "#pragma once")
            if red := try_mutant(builder, untouched):
                raise SystemExit(f"mutants: the tests of the unchanged {stem} fail: {red}")
        caught, unexplained = 0, []
        for mutant, how in zip(chosen, pool.map(lambda m: try_mutant(builder, m), chosen), strict=True):
            caught += bool(how)
            state = how or ("survives: " + mutant.survives if mutant.survives else "SURVIVES")
            if not how and not mutant.survives:
                unexplained.append(mutant)
            print(f"{mutant.file}: {mutant.fault}: {state}", flush=True)
    print(f"{caught} of {len(chosen)} mutants caught (wanted {WANTED:.0%})")
    return int(bool(unexplained) or caught < WANTED * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
