"""Whole networks compressed to a share of their measured time: what was asked for, and what the clock says."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import nn

import cmd_ext
from cmd_ext import UnsatisfiableError, models, targets
from cmd_ext.bench.network import dense_twin
from cmd_ext.bench.timing import Case, Goal, Row, Run, Times, error_of

BATCH, SHARE = 8, 0.4
NEAR = 0.1  # of the target


def resnet18_at_224() -> nn.Module:
    """ResNet-18 with the stem of ImageNet: 7x7, stride 2, then pooling."""
    net = models.resnet18(1000)
    net.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    net.layer1 = nn.Sequential(nn.MaxPool2d(3, 2, 1), *net.layer1)
    return net


def resnet56_at_32() -> nn.Module:
    """With trained weights where CMD_EXT_DATA has them."""
    net, folder = models.resnet56(), os.environ.get("CMD_EXT_DATA")
    file = Path(folder or ".") / "pretrained" / "resnet56.safetensors"
    return models.load_weights(net, file) if folder and file.exists() else net


NETWORKS = {"ResNet-56 at 32": (resnet56_at_32, 32), "ResNet-18 at 224": (resnet18_at_224, 224)}


def bench_latency(run: Run) -> Iterator[Row]:
    for name in [*NETWORKS][:1] if run.quick else NETWORKS:
        yield latency_row(run, name)


def latency_row(run: Run, name: str) -> Row:
    """compress(constraints={"latency": "40%"}), fitted to the weights: times do not depend on how."""
    build, side = NETWORKS[name]
    torch.manual_seed(0)
    net = build().eval().requires_grad_(False).to(run.device, run.dtype)
    x = run.randn(BATCH, 3, side, side)
    title, limit = f"{name}, batch {BATCH}, latency={SHARE:.0%}", {"latency": f"{SHARE:.0%}"}
    try:
        result = cmd_ext.compress(net, x, constraints=limit, search="allocate", n_iter=4, progress=False)
    except UnsatisfiableError as error:
        off = error.closest / (SHARE * cmd_ext.profile(net, x).total.ms) - 1
        goal = Goal("latency", f"{title}: how far off", NEAR, lambda row: off, True)
        return Row(title, "ms", Times.of([error.closest]), {}, goals=(goal,), note=str(error))
    print(result.stats, file=sys.stderr)
    want = dense_twin(result.model).double()(x[:1].double())  # of one image: a float64 network takes its time
    layers = [row for row in result.stats.layers if row.rank is not None]
    off = median(abs(row.predicted_ms / row.ms[1] - 1) for row in layers)
    slower = sum(row.ms[1] > row.ms[0] for row in layers)
    goals = (
        Goal("latency", f"{title}: how far off", NEAR, lambda row: abs(1 / row.ratio / SHARE - 1), True),
        Goal("slower", f"{title}: layers slower than dense", 0.0, lambda row: float(slower), True),
    )
    gone = sum(row.rank == row.nnz == 0 for row in layers)
    counts = f"{len(layers)} layers compressed, {gone} of them to nothing, {slower} slower than dense"
    note = f"{targets.latency_text(result.stats.latency)}; {counts}"
    case = Case(
        title,
        {"": lambda: result.model(x)},
        lambda y: error_of(y[:1], want),
        10 * run.tolerance,  # as many roundings as layers
        {"dense": lambda: net(x)},
        checked=False,
        goals=goals,
        note=f"{note}; predicted times of layers are off by {off:.0%}",
    )
    return run.measure(case)
