#!/usr/bin/env python3
"""Recomputes the roofline lines in the heads of csrc/cuda/*.cuh and fails where one is off by more than 1 %.

    // roofline LAUNCHER LAYER DTYPE [KEY=VALUE ..]: BYTES MB, OPERATIONS GFLOP, TIME us, FRACTION

Bytes are what must cross HBM: inputs and outputs once, what a launcher reads in several passes once a pass, its
workspaces once a write and once a read; re-reads of tiles come from L2 and are not counted. A multiply-add is two
operations. The time is that of the slower of the two at H100's 3.0 TB/s and peak; the fraction of it that the kernel is
predicted to reach, in (0, 1], is the author's. Keys: d density, r rank, t tokens, beta, l and s sizes of truncated_svd,
splits of a sum, sweeps.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).resolve().parent.parent / "csrc/cuda"
BANDWIDTH = 3.0e12
SIZES = {"fp64": 8, "fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
CORES = {"fp64": 33.5e12, "fp32": 67e12, "bf16": 67e12, "fp16": 67e12}  # 16-bit types accumulate in fp32
TENSOR_CORES = {"tf32": 400e12, "bf16": 798e12, "fp16": 798e12}


@dataclass
class Layer:
    """W [m, n], the columns (tokens or output pixels) that it is multiplied by, and elements of input and output."""

    m: int
    n: int
    columns: int
    taps: int = 1

    @property
    def x(self):
        return self.n // self.taps * self.columns

    @property
    def y(self):
        return self.m * self.columns


LAYERS = {
    "layer3": Layer(256, 2304, 64 * 14 * 14, 9),  # ResNet-18, batch 64
    "conv4": Layer(512, 4608, 32 * 28 * 28, 9),  # VGG-16, batch 32
    "linear4096": Layer(4096, 4096, 2048),
}


@dataclass
class Case:
    """A line's subject: the layer, bytes of an element and of a partial sum, nnz, and the other keys."""

    layer: Layer
    dtype: str
    d: float = 0
    r: int = 0
    t: int = 0
    beta: int = 0
    splits: int = 1
    l: int = 0
    s: int = 0
    sweeps: int = 0

    @property
    def size(self):
        return SIZES[self.dtype]

    @property
    def partial(self):
        """Bytes an entry of partial sums, written and read once, if a sum is split."""
        return 2 * self.splits * max(self.size, 4) if self.splits > 1 else 0

    @property
    def columns(self):
        return self.t or self.layer.columns

    @property
    def nnz(self):
        return round(self.d * self.layer.m * self.layer.n)

    @property
    def csr(self):
        return self.nnz * (self.size + 4) + 4 * (self.layer.m + 1)

    @property
    def transposed(self):
        """The transposed pattern, row_idx and perm, and the values in their own order."""
        return self.nnz * (self.size + 8) + 4 * (self.layer.n + 1)


# (bytes, operations) of each launcher ---------------------------------------------------------------------------------


def transpose(c):
    return 2 * c.layer.n * c.columns * c.size, 0


def spmm(c):
    return (c.layer.n + (1 + c.beta) * c.layer.m) * c.columns * c.size + c.csr, 2 * c.nnz * c.columns


def sddmm(c):
    pattern = c.csr - c.nnz * c.size
    moved = (c.layer.m + c.layer.n) * c.columns * c.size + pattern + c.nnz * (c.size + c.partial)
    return moved, 2 * c.nnz * c.columns


def rebuild(c):
    m, n = c.layer.m, c.layer.n
    return (c.r * (m + n) + m * n) * c.size + c.csr, 2 * m * n * c.r


def sparse_conv2d(c):
    return (c.layer.x + (1 + c.beta) * c.layer.y) * c.size + c.csr, 2 * c.nnz * c.columns


def sparse_conv2d_grad_input(c):
    reordered = 2 * c.nnz * (c.size + 4)  # written and read
    return (c.layer.y + (1 + c.beta) * c.layer.x) * c.size + c.transposed + reordered, 2 * c.nnz * c.columns


def sparse_conv2d_grad_values(c):
    pattern = c.csr - c.nnz * c.size
    return (c.layer.x + c.layer.y) * c.size + pattern + c.nnz * (c.size + c.partial), 2 * c.nnz * c.columns


def passes(c):
    """Reads of a matrix that the selection makes: a histogram for each 11-bit digit, a count, the compaction."""
    return {2: 2, 4: 3, 8: 6}[c.size] + 2


def topk_csr(c):
    return passes(c) * c.layer.m * c.layer.n * c.size + c.csr, 0


def residual_topk_csr(c):
    m, n = c.layer.m, c.layer.n
    return ((passes(c) + 1) * m * n + c.r * (m + n)) * c.size + c.csr, 2 * m * n * c.r


def transpose_csr(c):
    tables = 4 * 4 * -(-c.layer.m // 32) * c.layer.n  # counts of tiles of 32 rows: written, read, written, read
    return 16 * c.nnz + 2 * 4 * (c.layer.m + 1) + 4 * (c.layer.n + 1) + tables, 0


def gemm(c):
    """[X_S | Z] . [S | U]^T. S is held sparse and multiplied dense."""
    sparse = (c.layer.x * c.size + c.transposed, 2 * c.layer.m * c.layer.n * c.columns) if c.d else (0, 0)
    dense = c.r * (c.columns + c.layer.m) * c.size
    return sparse[0] + dense + c.layer.y * (c.size + c.partial), sparse[1] + 2 * c.layer.y * c.r


def gemm_onepass(c):
    """The same and Z = X V^T, computed anew for every 128 outputs."""
    m, n = c.layer.m, c.layer.n
    moved = (c.layer.x + c.layer.y + c.r * (m + n)) * c.size + (c.transposed if c.d else 0)
    sparse = 2 * m * n * c.columns if c.d else 0
    return moved, sparse + 2 * c.columns * c.r * (n * -(-m // 128) + m)


def normalize_columns(c):
    return c.layer.m * c.l * (c.size + 8), 0


def cholesky_inverse(c):
    return 2 * 8 * c.s * c.s, 2 * c.s**3 / 3


def jacobi_svd(c):
    pairs = c.s * (c.s - 1) / 2
    return c.s * c.s * 8 + c.r * (2 * c.s + 1) * c.size, c.sweeps * pairs * 22 * c.s  # dot products 6 s, rotations 16 s


def fix_signs(c):
    return 2 * c.r * (c.layer.m + c.layer.n) * c.size, 0


FORMULAS = {
    **{name: (globals()[name], CORES) for name in (
        "transpose", "spmm", "sddmm", "rebuild", "sparse_conv2d", "sparse_conv2d_grad_input",
        "sparse_conv2d_grad_values", "topk_csr", "residual_topk_csr", "transpose_csr", "normalize_columns",
        "cholesky_inverse", "jacobi_svd", "fix_signs",
    )},
    "spmm_few": (spmm, CORES),
    "gemm": (gemm, TENSOR_CORES),
    "gemm_onepass": (gemm_onepass, TENSOR_CORES),
}  # fmt: skip


def roofline(launcher, layer, dtype, keys):
    """Megabytes, GFLOP and microseconds."""
    formula, peaks = FORMULAS[launcher]
    moved, operations = formula(Case(LAYERS[layer], dtype, **keys))
    return moved / 1e6, operations / 1e9, max(moved / BANDWIDTH, operations / peaks[dtype]) * 1e6


LINE = re.compile(r"^// roofline (\w+) (\w+) (\w+)((?: \w+=[\d.]+)*): (.*)$", re.M)
NUMBERS = re.compile(r"([\d.]+) MB, ([\d.]+) GFLOP, ([\d.]+) us, ([\d.]+)")


def check(path, needed):
    """Prints a head's lines with what they should say, and returns the number of faults."""
    text = path.read_text()
    found = LINE.findall(text)
    faults = int(len(found) < len(re.findall(r"^// roofline ", text, re.M)) or (needed and not found))
    if faults:
        print(f"{path.name}: {'a line of another form' if found else 'no line'}")
    for launcher, layer, dtype, keys, said in found:
        keys = {key: float(value) if "." in value else int(value) for key, value in re.findall(r"(\w+)=(\S+)", keys)}
        try:
            want = roofline(launcher, layer, dtype, keys)
        except (KeyError, TypeError) as error:
            print(f"{path.name}: {launcher} {layer} {dtype}: unknown: {error}")
            faults += 1
            continue
        numbers = NUMBERS.fullmatch(said)
        *got, fraction = map(float, numbers.groups()) if numbers else (0, 0, 0, 0)
        right = all(abs(a - b) <= 0.01 * b + 1e-9 for a, b in zip(got, want, strict=True)) and 0 < fraction <= 1
        faults += not right
        expected = "{:.3g} MB, {:.3g} GFLOP, {:.3g} us".format(*want)
        print(f"{'' if right else 'WRONG '}{launcher} {layer} {dtype} {keys}: {said}; formulas: {expected}")
    return faults


def main():
    heads = sorted(CUDA.glob("*.cuh"))
    faults = sum(check(path, path.with_suffix(".cu").exists()) for path in heads)
    print(f"{len(heads)} heads, {faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
