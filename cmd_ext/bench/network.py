"""Whole networks: milliseconds of VGG-16, and the accuracy of ResNet-56 on real images."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import mkldnn

import cmd_ext
from cmd_ext import data, models, ref
from cmd_ext.bench.shapes import vgg16
from cmd_ext.bench.timing import Call, Case, Goal, Row, Run, Times, error_of
from cmd_ext.calibrate import accuracy
from cmd_ext.modules import CMDConv2d, replace

LAST = torch.channels_last
BATCHES, WANTED = (1, 8), 3.3
SIDE = 224


def bench_network(run: Run) -> Iterator[Row]:
    for batch in BATCHES[:1] if run.quick else BATCHES:
        yield run.measure(vgg_case(run, batch))
    folder = os.environ.get("CMD_EXT_DATA")
    if run.quick or not folder:
        why = "left out by --quick" if run.quick else "CMD_EXT_DATA is not set (cifar10.tar, pretrained/*.safetensors)"
        print(f"network: the accuracy rows of ResNet-56 are skipped: {why}", file=sys.stderr)
        return
    yield from resnet56_rows(Path(folder))


# VGG-16 -------------------------------------------------------------------------------------------------------------


def compressed(network: nn.Module, part: int, density: float) -> nn.Module:
    """The network with U V + S of random weights, rank = out_channels / part, in place of every 3x3 convolution."""
    for name, conv in list(network.named_modules()):
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            rank = min(conv.out_channels // part, conv.weight[0].numel())
            sizes = (conv.in_channels, conv.out_channels, 3, conv.stride, conv.padding)
            options = {"device": conv.weight.device, "dtype": conv.weight.dtype, "rank": rank, "density": density}
            replace(network, name, CMDConv2d(*sizes, **options))
    return network.eval().requires_grad_(False)


def dense_twin(network: nn.Module) -> nn.Module:
    """The same network with the convolutions that ref.py builds from U, V and S in float64."""
    dense = cmd_ext.to_dense(network)
    for name, layer in network.named_modules():
        if isinstance(layer, CMDConv2d):
            factors = (layer.u.double(), layer.v.double(), layer.values.double())
            conv = dense.get_submodule(name)
            conv.weight.copy_(ref.dense_weight(*factors, layer.pattern).view_as(conv.weight))
    return dense.requires_grad_(False)


def vgg_case(run: Run, batch: int) -> Case:
    torch.manual_seed(0)
    with torch.device(run.device):
        plain = compressed(vgg16(side=SIDE).to(run.dtype), 8, 0.02)
    dense, ours = dense_twin(plain), cmd_ext.fuse(plain)
    x = run.randn(batch, 3, SIDE, SIDE)
    last = x.contiguous(memory_format=LAST)
    one = x[:1].double()
    want = dense.double()(one)  # of one image: a float64 network takes its time
    dense.to(run.dtype)
    name = f"VGG-16 at {SIDE}, batch {batch}, r = c/8, 2% in its 3x3 convolutions"
    return Case(
        name,
        {"channels_last": lambda: ours(last), "NCHW": lambda: ours(x)},
        lambda y: error_of(y[:1], want),
        4 * run.tolerance,  # sixteen layers of roundings
        dense_networks(dense, x, last),
        goals=(Goal("g", f"{name}, over the dense network frozen and packed", WANTED),),
        note=f"{sum(isinstance(m, CMDConv2d) for m in ours.modules())} layers compressed; cmd_ext.fuse",
    )


def dense_networks(dense: nn.Module, x: Tensor, last: Tensor) -> dict[str, Call]:
    """The network as it is, and by each way that torch has to prepare it for oneDNN ahead of time."""
    rivals: dict[str, Call] = {"nn.Module NCHW": lambda: dense(x), "nn.Module channels_last": lambda: dense(last)}
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return rivals
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit speaks of its age
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(dense, x)))
        rivals["torch.jit frozen NCHW"] = lambda: frozen(x)
        rivals["torch.jit frozen channels_last"] = lambda: frozen(last)
        if torch.backends.mkldnn.is_available():
            packed = mkldnn.to_mkldnn(dense)
            rivals["to_mkldnn"] = lambda: packed(x.to_mkldnn()).to_dense()
    return rivals


# ResNet-56 ----------------------------------------------------------------------------------------------------------


def resnet56_rows(folder: Path) -> Iterator[Row]:
    """At 50 % of its parameters, before and after one epoch, beside a dense net that was trained equally."""
    train = data.open_dataset(folder / "cifar10.tar", "train", *models.NORMALIZATION["resnet56"])
    test = data.open_dataset(folder / "cifar10.tar", "test", *models.NORMALIZATION["resnet56"])
    tests = data.loader(test, 250)

    def pretrained() -> nn.Module:
        return models.load_weights(models.create("resnet56"), folder / "pretrained" / "resnet56.safetensors")

    def evaluate(model: nn.Module) -> float:
        return accuracy(model, tests)

    def tuned(model: nn.Module) -> float:
        loader = data.loader(train, 128, shuffle=True, augment=True, seed=0)
        history = cmd_ext.finetune(model, loader, epochs=1, lr=0.01, evaluate=evaluate, clip_norm=5.0, seed=0)
        return history.best_score

    calibration = list(data.loader(train, 128, limit=512))
    result = cmd_ext.compress(
        pretrained().eval(),
        calibration[0][0],
        constraints={"params": "50%"},
        calibration=calibration,
        evaluate=evaluate,
        search="allocate",
    )
    print(result.stats)
    before, after = result.stats.score
    yield scores("ResNet-56 dense, top-1", before, 0.8320, "", "published weights", "reproduces the dense figure")
    yield scores("ResNet-56 at 50 % of params, no fine-tuning", after, before, "top-1", "dense", "wanted >= 0.78")
    after = tuned(result.model)
    yield scores("the same, one epoch", after, before, "top-1", "dense as published", "wanted > 0.8320")
    dense = tuned(pretrained())
    note = f"behind by {100 * (dense - after):.2f} points, wanted <= 1.5"
    yield scores("the same, one epoch", after, dense, "top-1", "dense, one epoch", note)


def scores(name: str, ours: float, theirs: float, unit: str, rival: str, note: str) -> Row:
    return Row(name, unit, Times.of([ours]), {rival: Times.of([theirs])}, note=note)
