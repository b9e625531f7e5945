import copy
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cmd_ext import models

PARAMETERS = {
    "alexnet": 23_272_266,
    "vgg16": 14_724_042,
    "resnet18": 11_173_962,
    "resnet20": 269_722,
    "resnet56": 853_018,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert sum(p.numel() for p in models.create(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("in_channels", [3, 1])
@pytest.mark.parametrize("name", PARAMETERS)
def test_forward_shape(name, in_channels):
    model = models.create(name, num_classes=7, in_channels=in_channels).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, in_channels, 32, 32))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_pad_shortcut_subsamples_and_centres_the_channels():
    x = torch.randn(2, 4, 6, 6)
    y = models.PadShortcut(4, 8, 2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_resnet_clones(clone):
    model = models.resnet20().eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(clone(model)(x), model(x))


def test_resnet_compiles_without_graph_breaks():
    model = models.resnet20().eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_load_weights_casts_to_the_model(tmp_path):
    source, target = models.resnet20().half(), models.resnet20()
    save_file(source.state_dict(), tmp_path / "half.safetensors")
    assert models.load_weights(target, tmp_path / "half.safetensors") is target
    assert target.conv1.weight.dtype == torch.float32
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name].to(value.dtype)), name


def test_load_weights_accepts_a_file_without_batch_norm_counters(tmp_path):
    state = {k: v for k, v in models.resnet20().state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "old.safetensors")
    models.load_weights(models.resnet20(), tmp_path / "old.safetensors")


def test_load_weights_names_every_problem_and_changes_nothing(tmp_path):
    state = {name: torch.full_like(value, 7) for name, value in models.resnet20().state_dict().items()}
    del state["bn1.bias"]
    state["extra"] = torch.zeros(1)
    state["linear.weight"] = torch.zeros(10, 65)
    save_file(state, tmp_path / "wrong.safetensors")
    model = models.resnet20()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"does not fit ResNet: .*") as caught:
        models.load_weights(model, tmp_path / "wrong.safetensors")
    message = str(caught.value)
    assert "1 missing: bn1.bias" in message
    assert "1 unexpected: extra" in message
    assert "1 misshapen: linear.weight (want [10, 64], got [10, 65])" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_load_weights_refuses_another_format(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        models.load_weights(models.resnet20(), tmp_path / "x.safetensors")


def test_create_resolves_a_callable_of_any_module():
    model = models.create("torch.nn:Linear", in_features=3, out_features=2)
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet21", ValueError, "wanted one of alexnet, .*resnet56, .* got 'resnet21'"),
        ("torch.nn:Linaer", ValueError, "wanted a callable of module torch.nn, got 'torch.nn:Linaer'"),
        ("no_such_module:net", ImportError, "needs the module 'no_such_module', .* cannot be imported"),
        (":net", ImportError, "needs the module ''"),
        ("torch:arange", TypeError, r"must return a torch.nn.Module, got Tensor"),
    ],
)
def test_create_says_what_was_wanted(name, error, message):
    kwargs = {"end": 3} if name == "torch:arange" else {}
    with pytest.raises(error, match=message) as caught:
        models.create(name, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_create_without_the_package(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"'{package}:resnet18' needs the module '{package}'"):
        models.create(f"{package}:resnet18")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_create_from_a_package(package):
    pytest.importorskip(package)
    assert models.create(f"{package}:resnet18", num_classes=5).fc.out_features == 5
    with pytest.raises(ValueError, match=f"{package}.*list_models.*got '{package}:resnet0'"):
        models.create(f"{package}:resnet0")


def test_normalization_is_on_the_unit_scale():
    assert set(models.NORMALIZATION) <= set(PARAMETERS)
    for mean, std in models.NORMALIZATION.values():
        assert all(0.3 < value < 0.6 for value in mean)
        assert all(0.2 < value < 0.3 for value in std)
