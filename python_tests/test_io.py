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
    assert "num_batches_tracked" in " ".join(tensors)  # buffers are part of the file and of the count
    assert tensors["layer3.0.conv2.bitmap"].shape == (64 * 576 // 8,)
    assert "layer3.0.conv2.row_ptr" not in tensors


def test_every_form_is_read_back_and_counted(tmp_path):
    path = tmp_path / "x.safetensors"
    forms = {0.0: [], 0.02: ["col_idx", "row_counts"], 0.5: ["bitmap"], 1.0: []}
    for density, names in forms.items():
        for rank in (0, 2):
            layer = CMDConv2d(32, 24, 3, groups=2, rank=rank, density=density).half()
            cmd_ext.save(layer, path)
            tensors = load_file(path)
            assert sorted(tensors) == sorted(["u", "v", "values", "bias", *names])
            assert sum(t.nbytes for t in tensors.values()) == stored_bytes(layer)
            assert 8 + int.from_bytes(path.read_bytes()[:8], "little") + stored_bytes(layer) == path.stat().st_size
            fresh = cmd_ext.load(path, nn.Conv2d(32, 24, 3, groups=2).half())
            assert all(torch.equal(a, b) for a, b in zip(fresh.pattern, layer.pattern, strict=True))
            assert torch.equal(fresh.dense_weight(), layer.dense_weight())


def test_a_layer_with_several_names_is_stored_once_and_stays_one(tmp_path):
    def twice(layer):
        return nn.Sequential(layer, nn.ReLU(), layer)

    path, model = tmp_path / "x.safetensors", twice(CMDLinear(64, 64, rank=3, density=0.02))
    cmd_ext.save(model, path)
    assert sum(t.nbytes for t in load_file(path).values()) == stored_bytes(model) == stored_bytes(model[0])
    for fresh in (twice(nn.Linear(64, 64)), twice(CMDLinear(64, 64, rank=0, density=0.5))):
        cmd_ext.load(path, fresh)
        assert fresh[0] is fresh[2]
        x = torch.randn(2, 64)
        assert torch.equal(fresh(x), model(x))
    model[2] = CMDLinear(64, 64, rank=2, density=0.03)
    cmd_ext.save(model, path)
    fresh = cmd_ext.load(path, twice(nn.Linear(64, 64)))
    assert torch.equal(fresh(x), model(x))


def test_shared_memory_is_counted_once(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8))
    model[1].weight = nn.Parameter(model[0].weight.data)  # not the same parameter
    model[3].running_mean = model[2].running_mean
    cmd_ext.save(model, tmp_path / "x.safetensors")
    stored = sum(t.nbytes for t in load_file(tmp_path / "x.safetensors").values())
    assert stored == stored_bytes(model) == 4 * (64 + 2 * 8 + 2 * 16 + 8 + 2 * 8) + 2 * 8
    with torch.device("meta"):
        assert stored_bytes(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) == 4 * 2 * 72


def write_version_1(model, path):
    """The file as version 1 of the format had it."""
    tensors, layers = {key: value.clone() for key, value in model.state_dict().items()}, {}
    for name, module in model.named_modules():
        if isinstance(module, (CMDConv2d, CMDLinear)):
            kind = "conv2d" if isinstance(module, CMDConv2d) else "linear"
            layers[name] = {"kind": kind, "shape": list(module.matrix_shape), "groups": module.groups}
            key = f"{name}.col_idx".lstrip(".")
            tensors[key] = tensors[key].to(torch.uint16 if module.matrix_shape[1] <= 1 << 16 else torch.int32)
    save_file(tensors, path, {"cmd_ext": json.dumps({"version": 1, "layers": layers, "aliases": {}})})


def test_files_of_version_1_are_read(compressed, tmp_path):
    write_version_1(compressed, tmp_path / "x.safetensors")
    fresh = cmd_ext.load(tmp_path / "x.safetensors", models.create("resnet56")).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(x), compressed(x))


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


def rewrite_layer(path, **changes):
    rewrite(path, change_content=lambda c: c["layers"]["layer1.0.conv1"].update(changes))


DAMAGED = r"layer 'layer1.0.conv1' in .* is damaged \("

DAMAGES = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:1000]), "no complete safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "no complete safetensors file"),
    "text": (lambda p: p.write_text("hello " * 100), "no complete safetensors file"),
    "foreign": (lambda p: save_file({"a": torch.ones(2)}, p), "was not written by cmd_ext.save"),
    "version": (
        lambda p: rewrite(p, change_content=lambda c: c.update(version=9)),
        "format version 9, this cmd_ext reads 1 to 2",
    ),
    "structure": (lambda p: rewrite(p, change_content=lambda c: c.update(layers=3)), "structure in .* is damaged"),
    "kind": (lambda p: rewrite_layer(p, kind="conv3d"), "structure in .* is damaged .*kind 'conv3d'"),
    "sizes": (lambda p: rewrite_layer(p, shape=[16]), r"structure in .* is damaged .*shape \[16\] with groups 1"),
    "form": (lambda p: rewrite_layer(p, support="hash"), DAMAGED + "support must be one of none, columns, bitmap"),
    "no support": (lambda p: rewrite_layer(p, support="none"), DAMAGED + r"values must be \[0\] or \[2304\]"),
    "wrong support": (lambda p: rewrite_layer(p, support="columns"), DAMAGED + "no tensor 'layer1.0.conv1.col_idx'"),
    "popcount": (
        lambda p: rewrite(p, lambda t: t["layer1.0.conv1.bitmap"].fill_(255)),
        DAMAGED + r"bitmap must have \d+ entries as values has, got 2304",
    ),
    "bitmap's size": (
        lambda p: rewrite(p, lambda t: t.update({"layer1.0.conv1.bitmap": torch.zeros(287, dtype=torch.uint8)})),
        DAMAGED + r"bitmap must be \[288\] of uint8, got \[287\]",
    ),
    "factors": (
        lambda p: rewrite(p, lambda t: t.update({"layer1.0.conv1.u": torch.ones(15, 1)})),
        DAMAGED + r"u and v must be \[16, r\] and \[1 \* r, 144\], got \[15, 1\]",
    ),
    "values": (
        lambda p: rewrite(p, lambda t: t.update({"layer1.0.conv1.values": torch.ones(645, dtype=torch.int32)})),
        DAMAGED + "values must have 1 dimensions of floats",
    ),
    "missing": (lambda p: rewrite(p, lambda t: t.pop("bn1.weight")), r"not of this model \(missing: bn1.weight\)"),
    "extra": (lambda p: rewrite(p, lambda t: t.update(x=torch.ones(1))), r"not of this model \(unexpected: x\)"),
    "shape": (
        lambda p: rewrite(p, lambda t: t.update({"linear.bias": torch.ones(11)})),
        r"not of this model \(of another shape: linear.bias\)",
    ),
    "integers": (
        lambda p: rewrite(p, lambda t: t.update({"linear.bias": torch.ones(10, dtype=torch.int32)})),
        r"not of this model \(of other numbers: linear.bias\)",
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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("col_idx", lambda t: t.fill_(200), r"col_idx must lie in \[0, 144\), got 200 to 200"),
        ("col_idx", lambda t: t.flip(0), "col_idx must ascend strictly"),
        ("col_idx", lambda t: t[:-1], r"col_idx must be \[100\] of uint8 or .*, got \[99\] of torch.uint8"),
        ("col_idx", lambda t: t.float(), r"col_idx must be \[100\] of .*got \[100\] of torch.float32"),
        ("row_counts", lambda t: t + 1, "row_counts must have 100 entries as values has, got 132"),
        ("row_counts", lambda t: t.int() - 50, r"row_counts must lie in \[0, 144\], got -"),
        ("row_counts", lambda t: t[None], r"row_counts must be \[32\] of .*got \[1, 32\]"),
    ],
)
def test_damaged_columns_are_named_and_the_model_stays_as_it_was(tmp_path, name, change, message):
    path, net = tmp_path / "x.safetensors", nn.Sequential(nn.Conv2d(16, 32, 3))
    layer = CMDConv2d(16, 32, 3, rank=1, density=100 / (32 * 144))
    cmd_ext.save(nn.Sequential(layer), path)
    rewrite(path, lambda t: t.update({f"0.{name}": change(t[f"0.{name}"]).contiguous()}))
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match="^load: layer '0' in .* is damaged .*" + message) as caught:
        cmd_ext.load(path, net)
    assert "\n" not in str(caught.value)
    assert type(net[0]) is nn.Conv2d
    assert torch.equal(net[0].weight, before)
