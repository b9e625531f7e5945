"""CMDLinear and CMDConv2d against the dense layers that they replace."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import cmd_ext
from cmd_ext import CMDConv2d, CMDLinear

# Torch itself warns of the copy that an even kernel under padding="same" needs.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.")

CONVS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "padding": (2, 3), "dilation": (2, 3)},
    "grouped": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": 1},
    "pointwise": {"kernel_size": 1, "bias": False},
    "valid": {"kernel_size": 5, "padding": "valid"},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": 4, "padding": "same", "dilation": (1, 2)},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2},
}


def conv_of(name: str) -> nn.Conv2d:
    return nn.Conv2d(8, 16, **CONVS[name])


def full_rank(conv: nn.Conv2d) -> int:
    return min(conv.out_channels // conv.groups, conv.weight[0].numel())


@pytest.mark.parametrize("name", CONVS)
def test_conv_full_rank_or_full_s_is_the_dense_layer(name):
    conv, x = conv_of(name), torch.randn(3, 8, 15, 14)
    want = conv(x)
    low_rank = CMDConv2d.from_dense(conv, rank=full_rank(conv))
    sparse = CMDConv2d.from_dense(conv, rank=0, density=1.0)
    assert (low_rank.nnz, sparse.rank, sparse.density) == (0, 0, 1.0)
    for layer in (low_rank, sparse):
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x[0]), want[0], rtol=1e-4, atol=1e-5)  # unbatched


@pytest.mark.parametrize("name", CONVS)
def test_conv_backends_agree_forward_and_backward(name):
    conv = conv_of(name).double()
    fused = CMDConv2d.from_dense(conv, rank=1, density=0.3)
    dense = copy.deepcopy(fused)
    fused.backend, dense.backend = "fused", "dense"
    assert (fused.backend, dense.backend) == ("fused", "dense")
    x = torch.randn(2, 8, 11, 13, dtype=torch.float64, requires_grad=True)
    gradients = []
    for layer in (fused, dense, fused.to_dense()):
        y = layer(x)
        gradients.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [x])])
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-9, atol=1e-9)
    for layer in (fused, dense):
        layer(x).sin().sum().backward()
    for p, q in zip(fused.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def test_the_dense_backend_runs_under_autocast():
    for layer, x in (
        (CMDLinear(12, 9, rank=3, density=0.2), torch.randn(2, 12)),
        (CMDConv2d(8, 16, 3, rank=2, density=0.2), torch.randn(2, 8, 6, 6)),
    ):
        layer.backend = "dense"
        want = layer(x)
        for grad in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
                y = layer(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)


def test_linear_is_the_dense_layer_and_backends_agree():
    linear, x = nn.Linear(40, 24), torch.randn(5, 7, 40)
    for sizes in ({"rank": 24}, {"rank": 0, "density": 1.0}):
        layer = CMDLinear.from_dense(linear, **sizes)
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.to_dense().weight, linear.weight, rtol=1e-4, atol=1e-5)
    layer = CMDLinear.from_dense(linear, budget=0.5, sparse_coefficient=0.5)
    want = layer(x)
    layer.backend = "dense"
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_backends_of_an_empty_s_agree():
    for layer, x in (
        (CMDLinear.from_dense(nn.Linear(12, 9), rank=3), torch.randn(2, 12)),
        (CMDConv2d.from_dense(conv_of("grouped"), rank=2), torch.randn(2, 8, 6, 6)),
        (CMDConv2d.from_dense(conv_of("plain"), rank=0, density=0.0), torch.randn(2, 8, 6, 6)),
    ):
        want = layer.to_dense()(x)
        for backend in ("auto", "lowrank", "fused", "dense"):
            layer.backend = backend
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_lowrank_backend_is_chosen_for_an_empty_s_of_a_large_layer():
    layer = CMDLinear(512, 512, rank=16, density=0)
    layer(torch.randn(64, 512))
    assert layer.backend == "lowrank"


def test_a_sparse_branch_that_would_be_slower_than_w_is_computed_densely():
    x = torch.randn(2, 64, 28, 28)
    for density, backend in ((0.05, "fused"), (1.0, "dense")):
        layer = CMDConv2d(64, 64, 3, padding=1, rank=1, density=density)
        want = layer(x)
        assert layer.backend == backend
        layer.backend = "fused"
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        layer.backend = "auto"
        assert layer.backend == backend
    small = CMDConv2d(8, 8, 3, padding=1, rank=1, density=0.1)
    small(x[:1, :8, :4, :4])
    assert small.backend == "dense", "a call of the fused kernels costs more than so few pixels"


def test_backend_refuses_what_it_cannot_do():
    layer = CMDLinear(8, 8, rank=1, density=0.5)
    with pytest.raises(ValueError, match="backend must be one of auto, fused, lowrank, dense, got 'cuda'"):
        layer.backend = "cuda"
    with pytest.raises(ValueError, match="'lowrank' needs an empty S, got nnz = 32"):
        layer.backend = "lowrank"


def test_budget_and_coefficient_give_the_documented_sizes():
    linear = nn.Linear(60, 40)
    layer = CMDLinear.from_dense(linear, budget=0.5, sparse_coefficient=0.6)
    assert layer.nnz == int(0.6 * 0.5 * 40 * 60)
    assert layer.rank == int(0.4 * 0.5 * 40 * 60 / (40 + 60))
    assert layer.density == layer.nnz / 2400


@pytest.mark.parametrize(("rank", "density"), [(0, 0.0), (0, 0.1), (5, 0.0), (7, 0.3), (64, 1.0)])
def test_fresh_layers_have_the_statistics_of_torch_layers(rank, density):
    linear = CMDLinear(256, 64, rank=rank, density=density)
    conv = CMDConv2d(32, 64, 3, rank=rank, density=density)
    assert linear.nnz == round(density * 64 * 256)
    for layer, reference in ((linear, nn.Linear(256, 64)), (conv, nn.Conv2d(32, 64, 3))):
        assert layer.bias.abs().max() <= reference.bias.abs().max() * 1.3
        if rank or density:
            assert layer.dense_weight().std().item() == pytest.approx(reference.weight.std().item(), rel=0.25)
        columns = layer.col_idx.float()
        if layer.nnz > 1000:  # the support covers the matrix evenly
            assert columns.mean().item() == pytest.approx(layer.matrix_shape[1] / 2, rel=0.05)


def test_same_seed_gives_the_same_layer():
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layers.append(CMDConv2d(4, 8, 3, rank=2, density=0.2).state_dict())
    assert all(torch.equal(layers[0][k], layers[1][k]) for k in layers[0])


def test_state_dict_adopts_another_rank_and_support():
    conv = conv_of("grouped")
    source, target = CMDConv2d.from_dense(conv, rank=2, density=0.4), CMDConv2d.from_dense(conv, rank=1, density=0.1)
    parameters = list(target.parameters())
    assert set(source.state_dict()) == {"u", "v", "values", "bias", "row_ptr", "col_idx"}
    target.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    assert torch.equal(source(x), target(x))
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))  # optimizers keep their hold
    grads = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in (source, target)]
    assert torch.equal(*grads)  # the transposed support is rebuilt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"col_idx": lambda t: t + 1000}, r"col_idx must lie in \[0, 72\)"),
        ({"row_ptr": lambda t: t.flip(0)}, "row_ptr must rise from 0"),
        ({"row_ptr": lambda t: t[:-1]}, r"row_ptr, values and col_idx must be \[17\]"),
        ({"u": lambda t: t[:-1]}, r"u and v must be \[16, r\]"),
        ({"col_idx": lambda t: t * 0}, "must ascend strictly within each row"),
    ],
)
def test_a_damaged_state_dict_is_refused_and_nothing_is_loaded(change, message):
    layer = CMDConv2d(8, 16, 3, rank=2, density=0.2)
    state = {k: v.clone() for k, v in CMDConv2d(8, 16, 3, rank=2, density=0.2).state_dict().items()}
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for name, damage in change.items():
        state[name] = damage(state[name])
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items() if k != "bias")


def test_missing_keys_are_reported():
    layer = CMDLinear(8, 8, rank=2, density=0.2)
    state = layer.state_dict()
    del state["values"]
    with pytest.raises(RuntimeError, match="Missing key.*values"):
        layer.load_state_dict(state)


def test_deepcopy_pickle_dtype_and_meta():
    layer = CMDConv2d.from_dense(conv_of("strided"), rank=3, density=0.2)
    x = torch.randn(2, 8, 9, 9)
    want = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), want)
    double = copy.deepcopy(layer).to(torch.float64)
    assert (double.col_idx.dtype, double(x.double()).dtype) == (torch.int32, torch.float64)
    half = copy.deepcopy(layer).bfloat16()
    torch.testing.assert_close(half(x.bfloat16()).float(), want, rtol=0.05, atol=0.05)
    meta = CMDConv2d(8, 16, 3, rank=2, density=0.5, device="meta")
    assert meta.values.device.type == "meta"
    assert meta.nnz == 8 * 16 * 9 // 2


def test_from_dense_keeps_mode_dtype_and_requires_grad():
    conv = conv_of("plain").half().eval()
    conv.weight.requires_grad_(False)
    layer = CMDConv2d.from_dense(conv, rank=2, density=0.1)
    assert not layer.training
    assert layer.u.dtype == layer.values.dtype == torch.float16
    assert not layer.u.requires_grad
    assert layer.bias.requires_grad
    assert layer.to_dense().weight.dtype == torch.float16


def test_frozen_branches_get_no_gradient():
    layer = CMDConv2d(8, 16, 3, rank=2, density=0.1)
    layer.u.requires_grad_(False)
    layer.v.requires_grad_(False)
    layer(torch.randn(2, 8, 6, 6)).sum().backward()
    assert layer.u.grad is None
    assert layer.v.grad is None
    assert layer.values.grad.abs().sum() > 0


def test_repr_tells_geometry_and_sizes():
    layer = CMDConv2d(8, 16, 3, padding=1, groups=2, bias=False, rank=2, density=0.25)
    assert repr(layer) == (
        "CMDConv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=False, "
        "rank=2, nnz=144, density=0.25)"
    )
    assert repr(CMDLinear(8, 4, rank=1, density=0.5)) == (
        "CMDLinear(in_features=8, out_features=4, rank=1, nnz=16, density=0.5)"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CMDLinear(8, 4, rank=5, density=0),
            r"CMDLinear: rank must lie in \[0, min\(m, n\)\] = \[0, 4\], got 5",
        ),
        (lambda: CMDConv2d(8, 4, 3, rank=-1, density=0), "CMDConv2d: rank must lie in .* got -1"),
        (lambda: CMDLinear(8, 4, rank=1, density=1.5), r"density must lie in \[0, 1\], got 1.5"),
        (lambda: CMDLinear.from_dense(nn.Linear(8, 4), rank=1, density=-0.1), "density must lie in .* got -0.1"),
        (lambda: CMDLinear.from_dense(nn.Linear(8, 4)), "give rank and/or nnz, or a budget"),
        (lambda: CMDLinear.from_dense(nn.Linear(8, 4), rank=1, budget=0.5), "got both"),
        (lambda: CMDConv2d(8, 4, 3, groups=3, rank=1, density=0), "in_channels must be divisible by groups"),
        (lambda: CMDConv2d(8, 4, 3, padding_mode="mirror", rank=1, density=0), "padding_mode must be one of"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_input_names_both_sizes():
    linear, conv = CMDLinear(8, 4, rank=0, density=0.1), CMDConv2d(8, 4, 3, rank=1, density=0.1)
    linear.backend = conv.backend = "fused"
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., n\] with n = v.size\(1\) = 8, got \[2, 9\]"):
        linear(torch.randn(2, 9))
    with pytest.raises(ValueError, match=r"= 8 channels, got \[2, 7, 5, 5\]"):
        conv(torch.randn(2, 7, 5, 5))
    with torch.no_grad(), pytest.raises(ValueError, match=r"x_size must be \[batch > 0, 8, .*, got \[2, 7, 5, 5\]"):
        conv(torch.randn(2, 7, 5, 5))


def test_compiles_without_graph_breaks():
    model = nn.Sequential(
        CMDConv2d(3, 8, 3, rank=2, density=0.2), nn.ReLU(), nn.Flatten(), CMDLinear(72, 5, rank=2, density=0.2)
    )
    model[0].backend = model[3].backend = "fused"
    x = torch.randn(2, 3, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


DDP_SCRIPT = """
import torch, torch.distributed as dist
from torch import nn
from cmd_ext import CMDConv2d, CMDLinear
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(CMDConv2d(3, 8, 3, rank=2, density=0.2), nn.Flatten(), CMDLinear(72, 5, rank=2, density=0.0))
model[0].backend = "fused"
ddp = nn.parallel.DistributedDataParallel(model)
torch.manual_seed(1)
x = torch.randn(4, 3, 5, 5)
ddp(x[dist.get_rank()::2]).square().sum().backward()
mine = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
(model(x).square().sum() / 2).backward()
for p, q in zip(mine, model.parameters()):
    torch.testing.assert_close(p, q.grad)
print("agree")
"""


def test_distributed_data_parallel_averages_gradients(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.stdout.count("agree") == 2, done.stderr


def test_weight_property_serves_code_that_reads_it():
    layer = CMDLinear(8, 4, rank=2, density=0.3)
    assert torch.equal(layer.weight, layer.dense_weight())
    assert cmd_ext.to_dense(layer).weight.shape == (4, 8)
