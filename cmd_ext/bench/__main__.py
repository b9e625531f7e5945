"""python -m cmd_ext.bench [group ...] [--json FILE]: rows of ours against the best rival a user has.

Every operator is checked against ref.py before it is timed. `network` needs the images and weights in CMD_EXT_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import cmd_ext
from cmd_ext import data, models, ops, ref, report
from cmd_ext.bench.conv import bench_backward, bench_conv
from cmd_ext.bench.timing import HEADER, Row, cpu_seconds, interleaved, machine
from cmd_ext.calibrate import accuracy
from cmd_ext.decompose import split_budget


def structured(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Low rank, plus noise with heavy tails: what trained weights look like."""
    g = torch.Generator().manual_seed(seed)
    rank = max(1, min(m, n) // 20)
    low = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    return torch.randn(m, n, generator=g) * torch.randn(m, n, generator=g).abs() + 0.3 * low


def bench_decompose() -> Iterator[Row]:
    for m, n in ((384, 384), (384, 1536)):
        w = structured(m, n)
        rank, nnz = split_budget(m, n, 0.5, 0.5)
        ours, fit = cpu_seconds(lambda w=w: cmd_ext.decompose(w, budget=0.5, sparse_coefficient=0.5))
        theirs, error = cpu_seconds(lambda w=w, r=rank, k=nnz: ref.alternation(w, r, k, 100))
        note = f"relative error {fit.relative_error:.4f} against {error:.4f}"
        if fit.relative_error > 1.005 * error:
            note += ": WORSE by more than 0.5 %"
        yield Row(
            f"decompose {m}x{n}, budget .5, coefficient .5", ours, theirs, "cpu s", "100 passes, full SVDs", 10.0, note
        )


def bench_ops() -> Iterator[Row]:
    w = structured(512, 4608)
    values, _, col_idx = ops.topk_csr(w, w.numel() // 20)
    want = ref.topk_csr(w, w.numel() // 20)
    assert torch.equal(values, want[0])
    assert torch.equal(col_idx, want[2])
    times = interleaved([lambda: ops.topk_csr(w, w.numel() // 20), lambda: w.abs().flatten().topk(w.numel() // 20)])
    yield Row("topk_csr 512x4608, 5 %", *times, "ms", "torch.topk")

    for m, n, batch in ((1024, 4096, 16), (1024, 4096, 128)):
        fit = cmd_ext.decompose(structured(m, n), rank=m // 8, nnz=m * n // 20, n_iter=1)
        pattern = ops.Pattern.from_csr(fit.row_ptr, fit.col_idx, n)
        x, dense = torch.randn(batch, n), fit.to_dense()
        call = (x, fit.u, fit.v, fit.values, pattern)
        _check(ops.lrs_linear(*call), ref.lrs_linear(*call))
        times = interleaved([lambda c=call: ops.lrs_linear(*c), lambda x=x, d=dense: F.linear(x, d)])
        yield Row(f"lrs_linear {m}x{n}, batch {batch}, r = m/8, 5 %", *times, "ms", "F.linear")


def _check(got: torch.Tensor, want: torch.Tensor) -> None:
    error = ((got - want).norm() / want.norm()).item()
    assert error < 1e-5, f"wrong result: relative error {error:.2e}"


def bench_network(folder: Path) -> Iterator[Row]:
    """ResNet-56 at 50 % of its parameters, before and after one epoch, beside a dense net that was trained equally."""
    train = data.open_dataset(folder / "cifar10.tar", "train", *models.NORMALIZATION["resnet56"])
    test = data.open_dataset(folder / "cifar10.tar", "test", *models.NORMALIZATION["resnet56"])
    tests = data.loader(test, 250)
    dense = models.load_weights(models.create("resnet56"), folder / "pretrained" / "resnet56.safetensors").eval()
    calibration = list(data.loader(train, 128, limit=512))

    def evaluate(model: torch.nn.Module) -> float:
        return accuracy(model, tests)

    def tuned(model: torch.nn.Module) -> float:
        loader = data.loader(train, 128, shuffle=True, augment=True, seed=0)
        history = cmd_ext.finetune(model, loader, epochs=1, lr=0.01, evaluate=evaluate, clip_norm=5.0, seed=0)
        return history.best_score

    result = cmd_ext.compress(
        dense, calibration[0][0], constraints={"params": "50%"}, calibration=calibration, evaluate=evaluate
    )
    print(result.stats)
    before, compressed = result.stats.score
    yield Row("ResNet-56 dense, top-1", before, 0.8320, "", "published weights", None, "reproduces the dense figure")
    yield Row(
        "ResNet-56 at 50 % of params, no fine-tuning", compressed, before, "top-1", "dense", None, "wanted >= 0.78"
    )
    after = tuned(result.model)
    yield Row("the same, one epoch", after, before, "top-1", "dense as published", None, "wanted > 0.8320")
    dense_after = tuned(models.load_weights(models.create("resnet56"), folder / "pretrained" / "resnet56.safetensors"))
    note = f"behind by {100 * (dense_after - after):.2f} points, wanted <= 1.5"
    yield Row("the same, one epoch", after, dense_after, "top-1", "dense, one epoch", None, note)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cmd_ext.bench", description=__doc__.splitlines()[0])
    groups = {
        "decompose": bench_decompose,
        "ops": bench_ops,
        "conv": bench_conv,
        "backward": bench_backward,
        "network": bench_network,
    }
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(groups)}; default: all but network")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    unknown = set(args.groups) - groups.keys()
    if unknown:
        parser.error(f"group must be one of {', '.join(groups)}, got {', '.join(sorted(unknown))}")
    folder = os.environ.get("CMD_EXT_DATA")
    if "network" in args.groups and not folder:
        parser.error("network needs CMD_EXT_DATA, the folder with cifar10.tar and pretrained/resnet56.safetensors")

    facts, rows = machine(), []
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    for name in args.groups or [group for group in groups if group != "network"]:
        for row in bench_network(Path(folder)) if name == "network" else groups[name]():
            rows.append(row)
            print(f"{row.name}: {row.ratio:.2f}x", file=sys.stderr)
    print(report.table(HEADER, [row.cells() for row in rows]))
    if args.json:
        command = "python -m cmd_ext.bench " + " ".join(argv if argv is not None else sys.argv[1:])
        content = {"command": command, "machine": facts, "rows": [row.to_dict() for row in rows]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
