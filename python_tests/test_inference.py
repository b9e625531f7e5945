"""fuse(): folded batch norms and ReLUs give the outputs of the network as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cmd_ext
from cmd_ext import CMDConv2d, CMDLinear, fuse, models

LAST = torch.channels_last


def trained(module: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights that matter, signs included."""
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module.eval()


def conv(channels: int, out: int, bias: bool = True, **options) -> CMDConv2d:
    return CMDConv2d(channels, out, 3, padding=1, bias=bias, rank=2, density=0.2, **options)


def kinds(network: nn.Module) -> list[str]:
    return sorted(type(m).__name__ for m in network.modules() if not list(m.children()))


def check(network: nn.Module, x: torch.Tensor, dtype=torch.float64) -> nn.Module:
    network, x = network.to(dtype), x.to(dtype)
    before = copy.deepcopy(network.state_dict())
    fused = fuse(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        want = network(x)
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        for memory in (torch.contiguous_format, LAST):
            given = x.contiguous(memory_format=memory)
            kept = given.clone(memory_format=torch.preserve_format)
            torch.testing.assert_close(fused(given), want, **tolerance)
            torch.testing.assert_close(fused(given), want, **tolerance)  # by the plan that the first call made
            assert torch.equal(given, kept)  # nothing was done in place to what was given
    return fused


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_chain(dtype):
    net = nn.Sequential(
        conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        conv(8, 8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12, affine=False), nn.ReLU(),
        conv(12, 8, groups=2), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), CMDLinear(8, 7, rank=2, density=0.5), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip
    fused = check(trained(net), torch.randn(4, 3, 9, 10), dtype)
    assert kinds(fused) == sorted(
        ["CMDConv2d", "CMDConv2d", "Conv2d", "CMDConv2d", "AdaptiveAvgPool2d", "Flatten", "CMDLinear", "Linear"]
    )
    assert [m.activation for m in fused.modules() if isinstance(m, (CMDConv2d, CMDLinear))] == [
        "relu", "relu", None, "relu",
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["fused", "dense", "lowrank"])
def test_every_backend_activates(backend):
    density = 0 if backend == "lowrank" else 0.2
    for layer, x in (
        (CMDConv2d(4, 6, 3, rank=2, density=density), torch.randn(2, 4, 7, 8)),
        (CMDLinear(5, 6, rank=2, density=density), torch.randn(3, 5)),
    ):
        layer.backend = backend
        plain = layer(x).detach()
        layer.activation = "relu"
        assert (plain < 0).any()
        torch.testing.assert_close(layer(x), F.relu(plain))  # with gradients
        layer(x).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.relu(plain))
        assert "activation=relu" in repr(layer)
        torch.testing.assert_close(layer.to_dense()(x), F.relu(plain))
        layer.activation = None
        with torch.no_grad():
            torch.testing.assert_close(layer(x), plain)


def test_a_fused_relu_keeps_nan():
    layer = conv(3, 4).requires_grad_(False)
    layer.activation, layer.backend = "relu", "fused"
    x = torch.randn(8, 3, 6, 6)
    x[0, :, 2, 2] = torch.nan
    y = layer(x)
    assert y[0].isnan().any()
    assert not y[1:].isnan().any()
    assert (y[1:] >= 0).all()


class Block(nn.Module):
    """What must stay: a ReLU after an addition, a norm or a ReLU of a shared output, layers and norms called twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.twice, self.read = conv(4, 4), conv(4, 4), conv(4, 4), conv(4, 4)
        self.norm, self.shared, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.norm(self.one(x)))
        y = self.relu(self.two(y) + x)
        y = self.shared(self.twice(y)) + torch.relu(self.shared(self.twice(x)))
        z = self.read(y)
        return z.relu() + F.relu(self.read(y)) + z


def test_what_others_read_stays():
    fused = check(trained(Block()), torch.randn(2, 4, 6, 6))
    assert fused.one.activation == "relu"
    assert not hasattr(fused, "norm")
    assert [getattr(fused, name).activation for name in ("two", "twice", "read")] == [None] * 3
    assert isinstance(fused.shared, nn.BatchNorm2d)


def test_resnet_and_vgg():
    for name in ("resnet20", "vgg16"):
        net = trained(models.create(name))
        result = cmd_ext.compress(net, torch.randn(2, 3, 32, 32), constraints={"params": "40%"}, search="uniform",
                                  progress=False)  # fmt: skip
        fused = check(result.model, torch.randn(2, 3, 32, 32))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def test_a_fused_network_can_be_compiled_and_exported():
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    fused = check(trained(net), x, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), fused(x))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_errors(tmp_path):
    fused = fuse(nn.Sequential(conv(3, 4), nn.ReLU()))
    with pytest.raises(ValueError, match="^save: layer '0' must not be fused with a ReLU; save the network before"):
        cmd_ext.save(fused, tmp_path / "fused.safetensors")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="^fuse: torch.fx must be able to trace Branching, got TraceError: "):
        fuse(Branching())
    with pytest.raises(ValueError, match="^CMDConv2d: activation must be None or 'relu', got 'gelu'$"):
        conv(3, 4).activation = "gelu"
