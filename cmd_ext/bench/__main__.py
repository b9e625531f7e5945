"""python -m cmd_ext.bench [group ...]: our rows beside the best rival that a user has, and the targets they reach."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from cmd_ext.bench import report
from cmd_ext.bench.conv import bench_backward, bench_conv
from cmd_ext.bench.decompose import bench_decompose
from cmd_ext.bench.dispatch import bench_dispatch
from cmd_ext.bench.latency import bench_latency
from cmd_ext.bench.linear import bench_linear
from cmd_ext.bench.machine import machine
from cmd_ext.bench.matrix import bench_svd, bench_topk
from cmd_ext.bench.model import bench_model
from cmd_ext.bench.network import bench_network
from cmd_ext.bench.shapes import GRAMMAR, Conv, Matrix, parse
from cmd_ext.bench.timing import TOLERANCE, Mismatch, Row, Run, threads_of
from cmd_ext.dispatch import has_cuda_kernels

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
WIDE = ("float32", "float64")


@dataclass(frozen=True)
class Group:
    rows: Callable[[Run], Iterator[Row]]
    what: str
    kinds: tuple[type, ...] = ()  # of the shapes that it takes
    dtypes: tuple[str, ...] = tuple(DTYPES)


GROUPS = {
    "svd": Group(bench_svd, "truncated_svd, cold and warm", (Matrix,), WIDE),
    "topk": Group(bench_topk, "topk_csr", (Matrix,)),
    "linear": Group(bench_linear, "CMDLinear: S, U V + S, overhead of a call", (Matrix,)),
    "conv": Group(bench_conv, "CMDConv2d: S, U V, U V + S over the 3x3 layers of networks", (Conv,)),
    "backward": Group(bench_backward, "gradients of CMDConv2d", (Conv,)),
    "decompose": Group(bench_decompose, "decompose and decompose_path, in CPU seconds", (Matrix,), WIDE),
    "network": Group(bench_network, "VGG-16 as a whole; with CMD_EXT_DATA the accuracy of ResNet-56", (), WIDE[:1]),
    "latency": Group(bench_latency, "ResNet-56 and ResNet-18 compressed to 40 % of their measured time", (), WIDE[:1]),
    "model": Group(bench_model, "predicted and measured milliseconds of held-out layers", (Conv, Matrix), WIDE[:1]),
    "dispatch": Group(bench_dispatch, "backend auto beside the dense twin, every layer (long)", (Conv, Matrix)),
}
ALIASES = {"ops": ("topk", "linear")}

EPILOG = f"""groups:
{chr(10).join(f"  {name:<10} {group.what}" for name, group in GROUPS.items())}
  {"ops":<10} {" and ".join(ALIASES["ops"])}

A shape is one of
{GRAMMAR}

Every row is checked against float64 before it is timed; a wrong result ends the run with exit status 1. Ours and the
rivals run in turn; figures are medians, and --json keeps p20 and p80 of each. For --compare a row is slower if its p20
is above the earlier p80 times what its rival got slower by; where the earlier file has no quantiles, if it is more than
{report.TOLERANCE:.0%} slower."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    p = Parser(
        "python -m cmd_ext.bench",
        description=__doc__.partition(": ")[2],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("groups", nargs="*", metavar="group", help="what to measure (below); default: all")
    p.add_argument("--op", action="append", default=[], metavar="NAME[,NAME]", help="the same as groups")
    p.add_argument("--shapes", metavar="SHAPE[,SHAPE]", help="instead of each group's own; groups without any rest")
    p.add_argument("--dtype", choices=DTYPES, default="float32", metavar="|".join(DTYPES), help="default float32")
    p.add_argument("--threads", type=int, metavar="N", help="default: torch's own number")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", metavar="cpu|cuda", help="default cpu")
    p.add_argument("--quick", action="store_true", help="fewest shapes, short timing; all groups in 2 minutes")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    p.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw them (needs matplotlib)")
    p.add_argument("--compare", type=Path, metavar="OLD.json", help="exit status 1 if a row is slower than there")
    return p


def chosen_groups(args: argparse.Namespace, run: Run) -> list[str]:
    """The groups to run, each once. Raises ValueError if one is unknown or cannot run as asked."""
    named = [*args.groups, *(name.strip() for text in args.op for name in text.split(","))]
    unknown = sorted({*named} - {*GROUPS, *ALIASES})
    if unknown:
        raise ValueError(f"group must be one of {', '.join((*GROUPS, *ALIASES))}, got {', '.join(unknown)}")
    chosen = []
    for name in dict.fromkeys(member for word in named or GROUPS for member in ALIASES.get(word, (word,))):
        group = GROUPS[name]
        problem = None
        if args.dtype not in group.dtypes:
            problem = f"--dtype of group {name} must be one of {', '.join(group.dtypes)}, got {args.dtype}"
        elif run.shapes and not any(isinstance(shape, group.kinds) for shape in run.shapes):
            kinds = {Matrix: "MxN", Conv: "C->M@S"}
            wanted = " or ".join(kinds[kind] for kind in group.kinds)
            problem = f"--shapes of group {name} must hold {wanted or 'nothing: it has its own'}, got {args.shapes}"
        if problem and named:
            raise ValueError(problem)
        if not problem:
            chosen.append(name)
    if not chosen:
        raise ValueError(f"no group runs with --dtype {args.dtype} and --shapes {args.shapes}")
    return chosen


def run_of(args: argparse.Namespace) -> Run:
    """What the rows share. Raises ValueError for what cannot be."""
    try:
        shapes = tuple(parse(args.shapes)) if args.shapes is not None else ()
    except ValueError as error:
        raise ValueError(f"--shapes: {error}") from None
    if args.threads is not None and not 1 <= args.threads <= 4096:
        raise ValueError(f"--threads must lie in [1, 4096], got {args.threads}")
    if args.device == "cuda" and not (torch.cuda.is_available() and has_cuda_kernels()):
        raise ValueError(
            "--device cuda needs a GPU and a build with CUDA kernels; `python -m cmd_ext doctor` tells more"
        )
    return Run(DTYPES[args.dtype], torch.device(args.device), 0.15 if args.quick else 1.0, args.quick, shapes)


def earlier(args: argparse.Namespace) -> dict | None:
    """The file of --compare. Raises ValueError or OSError for it or for a file that could not be written."""
    if args.plot:
        if args.plot.suffix != ".svg":
            raise ValueError(f"--plot must name a file ending in .svg, got {args.plot}")
        if not find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib, which is not installed; run `pip install matplotlib`")
    for file in (args.json, args.plot):
        if file:
            report.check_writable(file)
    return report.load(args.compare) if args.compare else None


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    p = parser()
    args = p.parse_args(argv)
    try:
        run = run_of(args)
        groups, old = chosen_groups(args, run), earlier(args)
    except (ValueError, OSError) as error:
        p.error(str(error))
    with threads_of(args.threads) as threads:
        facts = {**machine(run.device), "dtype": args.dtype}
        if peak := run.peak(threads):
            facts["peak"] = f"{peak:.0f} GFLOP/s"
        print("; ".join(f"{name} {value}" for name, value in facts.items()))
        rows = []
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")  # torch, of its own sparse tensors
                rows.extend(measured(groups, run))
        except Mismatch as error:
            print(red(f"WRONG RESULT: {error}"), file=sys.stderr)
            return 1
    print(report.table(rows))
    print("\n".join(report.targets(rows)))
    content = {
        "command": " ".join(["python -m cmd_ext.bench", *argv]),
        "machine": facts,
        "rows": [row.to_dict() for row in rows],
    }
    if args.json:
        report.write(args.json, json.dumps(content, indent=2) + "\n")
    if args.plot:
        report.plot(args.plot, rows, f"cmd_ext on {facts['cpu']}, {facts['threads']} threads, {args.dtype}")
    if old:
        lines, fine = report.compare(old, content)
        print("\n".join(lines))
        return 0 if fine else 1
    return 0


def measured(groups: list[str], run: Run) -> Iterator[Row]:
    """The rows of the groups, with progress on stderr."""
    for name in groups:
        for row in GROUPS[name].rows(run):
            ratio = f"{row.ratio:.2f}x {row.rival}" if row.rivals else "no rival"
            print(f"{row.name}: {ratio}", file=sys.stderr)
            yield row


def red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


if __name__ == "__main__":
    sys.exit(main())
