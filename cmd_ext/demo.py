"""python -m cmd_ext demo: train, compress, fine-tune and reload a small network on scikit-learn's digits."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import cmd_ext
from cmd_ext import models
from cmd_ext.calibrate import accuracy


def _digits(split: str, batch_size: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """scikit-learn's 1797 digits as batches of 1x32x32 images; every fifth is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.5
    test = torch.arange(len(images)) % 5 == 0
    chosen = test if split == "test" else ~test
    images = F.interpolate(images[chosen], size=32, mode="bilinear")
    targets = torch.tensor(digits.target)[chosen]
    return list(zip(images.split(batch_size), targets.split(batch_size), strict=True))


def run(args: argparse.Namespace) -> None:
    test = _digits("test")
    if args.reload:  # the new process
        model = cmd_ext.load(args.reload, models.create("resnet20", in_channels=1)).eval()
        print(json.dumps({"score": accuracy(model, test), "sum": model(test[0][0]).double().sum().item()}))
        return
    start = time.perf_counter()
    torch.manual_seed(0)
    train = _digits("train")
    model = models.create("resnet20", in_channels=1)

    def evaluate(network: torch.nn.Module) -> float:
        return accuracy(network, test)

    print("training ResNet-20 on 1437 digits ...")
    cmd_ext.finetune(model, train, epochs=6, lr=0.05, evaluate=evaluate, clip_norm=5.0, seed=0)
    print("compressing to 25 % of the parameters ...")
    result = cmd_ext.compress(
        model, test[0][0], constraints={"params": "25%"}, calibration=train[:4], evaluate=evaluate, n_trials=20
    )
    print("fine-tuning ...")
    history = cmd_ext.finetune(
        result.model, train, epochs=3, lr=0.01, teacher=model, evaluate=evaluate, clip_norm=5.0, seed=0
    )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "digits.safetensors"
    cmd_ext.save(result.model, path)
    command = [sys.executable, "-m", "cmd_ext", "demo", "--reload", str(path)]
    reloaded = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    here = result.model.eval()(test[0][0]).double().sum().item()
    if here != reloaded["sum"]:
        raise ValueError(f"demo: the reloaded network gives other outputs (sum {reloaded['sum']}, want {here})")
    print(result.stats)
    print(
        f"after fine-tuning: {history.best_score:.4f}; "
        f"reloaded in a new process: {reloaded['score']:.4f}, the same outputs"
    )
    print(f"{path}: {path.stat().st_size:,} bytes; all in {time.perf_counter() - start:.0f} s")
