"""save() and load(): the same outputs in a new process; nothing half-written, nothing half-loaded."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cmd_ext
from cmd_ext import CMDConv2d, CMDLinear, models
from cmd_ext.cost import stored_bytes


@pytest.fixture(scope="module")
def compressed() -> nn.Module:
    torch.manual_seed(0)
    model = models.create("resnet56").eval()
    x = torch.randn(2, 3, 32, 32)
    return cmd_ext.compress(model, x, constraints={"params": "40%"}, search="uniform", progress=False).model


@pytest.fixture
def saved(compressed, tmp_path):
    path = tmp_path / "net.safetensors"
    cmd_ext.save(compressed, path)
    return path


RELOAD = """
import sys, torch, cmd_ext
from cmd_ext import models
x = torch.load(sys.argv[2], weights_only=True)
model = cmd_ext.load(sys.argv[1], models.create("resnet56")).eval()
torch.save(model(x).detach(), sys.argv[3])
"""


def test_a_new_process_gives_bitwise_the_same_outputs(compressed, saved, tmp_path):
    x = torch.randn(3, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", RELOAD, str(saved), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), compressed(x))


def test_loads_into_dense_and_compressed_models_in_place(compressed, saved):
    x = torch.randn(2, 3, 32, 32)
    fresh = models.create("resnet56").eval()
    assert cmd_ext.load(saved, fresh) is fresh
    assert torch.equal(fresh(x), compressed(x))
    assert torch.equal(cmd_ext.load(saved, fresh)(x), compressed(x))


def test_the_file_has_the_reported_size(compressed, saved):
    tensors = load_file(saved)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stored_bytes(compressed)
    assert tensors["layer3.0.conv2.col_idx"].dtype == torch.uint16


def test_dtypes_ties_and_single_layers(tmp_path):
    path = tmp_path / "x.safetensors"
    layer = CMDConv2d(4, 8, 3, rank=2, density=0.3).bfloat16()
    cmd_ext.save(layer, path)
    fresh = cmd_ext.load(path, nn.Conv2d(4, 8, 3).bfloat16())
    assert isinstance(fresh, CMDConv2d)
    assert torch.equal(fresh.dense_weight(), layer.dense_weight())

    def tied():
        model = nn.Sequential(nn.Linear(6, 6), CMDLinear(6, 6, rank=1, density=0.5), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model

    model = tied()
    cmd_ext.save(model, path)
    assert "2.weight" not in load_file(path)
    other = cmd_ext.load(path, tied())
    x = torch.randn(2, 6)
    assert torch.equal(other(x), model(x))
    wide = CMDLinear(1 << 17, 2, rank=0, density=0.001)  # columns beyond 16 bits
    cmd_ext.save(wide, path)
    assert torch.equal(cmd_ext.load(path, nn.Linear(1 << 17, 2)).col_idx, wide.col_idx)


def test_a_compiled_model_is_saved_under_its_own_names(compressed, tmp_path):
    cmd_ext.save(torch.compile(compressed), tmp_path / "x.safetensors")
    assert "conv1.weight" in load_file(tmp_path / "x.safetensors")


def test_an_unwritable_path_is_named_and_leaves_nothing(compressed, tmp_path):
    with pytest.raises(OSError, match="save: cannot write to .*missing/x.safetensors: No such file"):
        cmd_ext.save(compressed, tmp_path / "missing" / "x.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="save: cannot write to"):
        cmd_ext.save(compressed, tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_failed_save_keeps_the_old_file(compressed, saved, monkeypatch):
    before = saved.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cmd_ext.io, "save_file", broken)
    with pytest.raises(OSError, match="No space left on device"):
        cmd_ext.save(compressed, saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def rewrite(path, change_tensors=lambda t: None, change_content=lambda c: None):
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["cmd_ext"])
    change_tensors(tensors)
    change_content(content)
    save_file(tensors, path, {"cmd_ext": json.dumps(content)})


DAMAGES = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:1000]), "no complete safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "no complete safetensors file"),
    "text": (lambda p: p.write_text("hello " * 100), "no complete safetensors file"),
    "foreign": (lambda p: save_file({"a": torch.ones(2)}, p), "was not written by cmd_ext.save"),
    "version": (
        lambda p: rewrite(p, change_content=lambda c: c.update(version=9)),
        "format version 9, this cmd_ext reads 1",
    ),
    "structure": (lambda p: rewrite(p, change_content=lambda c: c.update(layers=3)), "structure in .* is damaged"),
    "support": (
        lambda p: rewrite(p, lambda t: t["layer1.0.conv1.col_idx"].fill_(60000)),
        r"layer 'layer1.0.conv1' in .* is damaged \(CSR: col_idx must lie in \[0, 144\)",
    ),
    "missing": (lambda p: rewrite(p, lambda t: t.pop("bn1.weight")), r"not of this model \(missing: bn1.weight\)"),
    "extra": (lambda p: rewrite(p, lambda t: t.update(x=torch.ones(1))), r"not of this model \(unexpected: x\)"),
    "shape": (
        lambda p: rewrite(p, lambda t: t.update({"linear.bias": torch.ones(11)})),
        r"not of this model \(of another shape: linear.bias\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_and_the_model_stays_as_it_was(saved, name):
    damage, message = DAMAGES[name]
    damage(saved)
    model = models.create("resnet56")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        cmd_ext.load(saved, model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(isinstance(m, (CMDConv2d, CMDLinear)) for m in model.modules())


def test_another_class_and_a_missing_file(saved, tmp_path):
    with pytest.raises(ValueError, match="wants a Conv2d named 'layer1.0.conv1' in the model, got none"):
        cmd_ext.load(saved, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="wants layer 'layer1.0.conv1' to be .*got"):
        cmd_ext.load(saved, models.create("resnet18"))
    with pytest.raises(FileNotFoundError, match="load: no file"):
        cmd_ext.load(tmp_path / "none.safetensors", nn.Linear(2, 2))
