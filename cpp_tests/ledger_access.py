"""The part of the kernel ledger about memory accesses: sectors and wavefronts over their ideal, a line of source each.

They are counted by cuda_access (cpp_tests/cuda/access.cpp), which runs the kernels' PTX with full and aligned tiles. A
ratio of 1 is perfect; a line of source above it needs a reason here.
"""

import re
import subprocess
import sys
from collections import defaultdict

PERFECT = 1.005
SLACK = 1.15  # of recorded ratios: those of gathers depend on the random support

GATHER = "follows the pattern of S"
ROWS = "rows of S begin anywhere in a sector"
PITCH = "rows of a pitch that is no multiple of 32 bytes begin anywhere in a sector"
ONCE = "once a block, outside of the inner loop"
SEARCH = "a binary search a thread"
COMPACTED = "places of the kept elements, which follow a"
PAIR = "four doubles are two instructions, the second of which finds its sectors in L1"
# Kernel, space and kind, and source line: why the ratio may be above 1. The first that matches counts.
REASONS = [
    (r"row_idx\[middle\]|col_idx\[middle\]|lower_bound", SEARCH),
    (r"add_sparse_kernel", GATHER),
    (r"cholesky_inverse_kernel", "rows of a packed triangle: any length, begun at any bank"),
    (r"conv::channel_rows_kernel", GATHER),
    (r"conv::.* global load: cell\[u\]\.tile", PITCH),
    (r"conv::.* global load: (col\[r\]|const int end|if \(kWithValues)", ROWS),
    (r"conv::.* shared (load|store): (const int offset|entry\.offset|if \(kWithValues)", GATHER),
    (r"conv::grad_values_tile_kernel global (load|store): to = pack", ROWS),
    (r"conv::conv_direct_kernel global load: (const int col|entries)", ROWS),
    (r"conv::conv_direct_kernel global load: row_at", "a tap shifts the pixels that the lanes read"),
    (r"reduce_splits_kernel global load", PITCH),
    (r"csr_transpose::\w+ (shared|global) (load|store): (const int )?(place|perm|row_idx)", GATHER),
    (r"csr_transpose::\w+ global", ROWS),
    (r"fix_signs_kernel", "8 columns of a row-major factor; a column of doubles fills half of a sector pair"),
    (
        r"gemm_\w+ (global|shared) \w+: (\*reinterpret_cast<T\*>\(tile|const int end|for \(int i = first|int first)",
        GATHER,
    ),
    (r"gemm_\w+ global load: if \(bias", ONCE),
    (r"gemm_\w+ shared \w+: (float sum|lane % 4|pixels\[i\]|\*reinterpret_cast<T\*>\(tile \+ swizzled\(row)", ONCE),
    (r"jacobi_\w+ global", PITCH),
    (r"rebuild_kernel (global|shared) \w+: (for \(int at|tile\[)", GATHER),
    (r"rebuild_kernel shared store: for \(int j", ONCE),
    (r"sddmm_tile_kernel global store", ROWS),
    (r"spmm(_few)?_kernel global load: (const A value|const int k|const T\* column)", ROWS),
    (r"spmm_few_kernel global load: if \(t < count\)", GATHER),
    (r"threshold::compact_kernel global store", COMPACTED),
    (r"threshold::pick_digit_kernel global", "a thread owns neighbouring buckets; 2048 of them a matrix"),
    (r"threshold::residual_histogram_kernel global", PAIR),
    (r"threshold::residual_histogram_kernel shared load", "four doubles are two instructions, 32 bytes apart"),
    (
        r"threshold::residual_histogram_kernel shared store: shared\.u",
        "u is turned around on its way in, once 16 steps",
    ),
    (r"threshold::scan_tiles_kernel global", "a thread owns one tile's pair of counts"),
]


def locate_lines(folder):
    """{(mangled kernel, line of PTX): (file, line)} by the .loc directives of nvcc -lineinfo."""
    located = {}
    for path in sorted(folder.glob("*_90.ptx")):
        text = path.read_text()
        files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
        kernel, source = None, None
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.search(r"\.entry\s+([\w$]+)", line):
                kernel = match[1]
            elif match := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
                source = files.get(match[1]), int(match[2])
            elif kernel:
                located[kernel, number] = source
    return located


def source_text(location, cache={}):  # noqa: B006
    """The stripped source line, so that a site keeps its name when lines above it come and go."""
    path, line = location
    if path not in cache:
        with open(path, encoding="utf-8") as file:
            cache[path] = file.read().splitlines()
    return cache[path][line - 1].strip()


def measure(build, short_names):
    """{site: ratio} of the sites above 1, the worst template instance of each; the number of all sites; the kernels."""
    result = subprocess.run([str(build / "cuda_access")], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"cuda_access failed\n{result.stderr}")
    rows = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("ACCESS ")]
    names, located = short_names(sorted({row[0] for row in rows})), locate_lines(build / "ptx")
    sums = defaultdict(lambda: [0, 0])
    for mangled, line, space, kind, _, _, got, ideal in rows:
        site = names[mangled], space, kind, source_text(located[mangled, int(line)])
        sums[site][0] += int(got)
        sums[site][1] += int(ideal)
    worst = defaultdict(float)
    for (name, space, kind, text), (got, ideal) in sums.items():
        key = f"{name.split('<')[0]} {space} {kind}: {text}"
        worst[key] = max(worst[key], got / ideal)
    above = {key: round(ratio, 2) for key, ratio in sorted(worst.items()) if ratio > PERFECT}
    return above, len(worst), {name.split("<")[0] for name in names.values()}


def entries(ratios):
    """The ledger's part; sites that have no reason, and reasons that have no site."""
    part, faults = {}, []
    for key, ratio in ratios.items():
        reason = next((reason for pattern, reason in REASONS if re.search(pattern, key)), None)
        if not reason:
            faults.append(f"{key}: {ratio} times the ideal, for no reason in ledger_access.py")
        part[key] = {"ratio": ratio, "reason": reason}
    for pattern, _ in REASONS:
        if not any(re.search(pattern, key) for key in ratios):
            faults.append(f"the reason for {pattern} is no access's")
    return part, faults


def compare(recorded, current):
    return [
        f"{key}: {new['ratio']} times the ideal, was {recorded.get(key, {'ratio': 1.0})['ratio']}"
        for key, new in current.items()
        if new["ratio"] > SLACK * recorded.get(key, {"ratio": 1.0})["ratio"]
    ]
