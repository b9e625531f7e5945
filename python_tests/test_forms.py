"""The spatial form of k x k convolutions: the fit, the layer against its dense weight, costs, files and plans."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cmd_ext
from cmd_ext import CMDConv2d, CMDLinear, Plan, cpu_model, decompose, decompose_batch, dispatch, forms, models, ref
from cmd_ext.allocation import Layer
from cmd_ext.cost import kept_bytes, kept_macs, kept_parameters, stored_bytes
from cmd_ext.decompose import split_budget
from cmd_ext.weight_curves import error_curves

# Torch itself warns of the copy that an even kernel under padding="same" needs.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.")

CONVS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "strided the other way": {"kernel_size": 3, "stride": (1, 2), "padding": (0, 1)},
    "row": {"kernel_size": (1, 3), "padding": (0, 1)},
    "column": {"kernel_size": (3, 1), "stride": 2, "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "padding": (2, 3), "dilation": (2, 3)},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1},
    "grouped, 5x5": {"kernel_size": 5, "groups": 4, "padding": 2, "stride": 2, "dilation": (1, 2)},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same", "bias": False},
    "same, even kernel": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2},
}
F64 = torch.float64


def conv_of(name: str, dtype=F64) -> nn.Conv2d:
    return nn.Conv2d(8, 16, **CONVS[name]).to(dtype)


def layer_of(name: str, rank: int = 1, density: float = 0.2, dtype=F64) -> CMDConv2d:
    return CMDConv2d.from_dense(conv_of(name, dtype), rank=rank, density=density, form="spatial")


def dense_matrix(layer: CMDConv2d) -> torch.Tensor:
    """U V + S by its definition: W[o, c, i, j] = sum_r U[o, i, r] V[r, c, j], group by group, plus S."""
    (kh, kw), g, (m, n) = layer.kernel_size, layer.groups, layer.matrix_shape
    u, v = layer.u.view(g, m // g, kh, layer.rank), layer.v.view(g, layer.rank, n // (kh * kw), kw)
    low = torch.einsum("goir,grcj->gocij", u, v).reshape(m, n)
    return low + ref.csr_to_dense(layer.values, layer.row_ptr, layer.col_idx, n)


def double_layer(layer: CMDConv2d, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes, by torch's own layer with the rebuilt weight."""
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
    conv = nn.Conv2d(8, 16, *geometry, layer.bias is not None, layer.padding_mode, dtype=x.dtype)
    with torch.no_grad():
        conv.weight.copy_(dense_matrix(layer).view_as(conv.weight))
        if layer.bias is not None:
            conv.bias.copy_(layer.bias)
    return conv(x)


# The fit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 3, 1, 3), (5, 3, 3, 1), (4, 2, 5, 2)])
def test_arrange_and_back(shape):
    w = torch.randn(shape)
    matrix = forms.arrange(w)
    m, c, kh, kw = shape
    for o, channel, i, j in ((0, 0, 0, 0), (m - 1, c - 1, kh - 1, kw - 1), (1, 2 % c, kh // 2, kw // 2)):
        assert matrix[o * kh + i, channel * kw + j] == w[o, channel, i, j]
    assert torch.equal(forms.restore(matrix, (kh, kw)), w.flatten(1))
    fit = decompose(matrix, nnz=w.numel() // 3)
    sparse = forms.restore_csr(fit.values, fit.row_ptr, fit.col_idx, (kh, kw), c * kw)
    want = forms.restore(ref.csr_to_dense(fit.values, fit.row_ptr, fit.col_idx, c * kw), (kh, kw))
    assert torch.equal(ref.csr_to_dense(*sparse, c * kh * kw), want)
    assert sparse[1].dtype == sparse[2].dtype == torch.int32
    cmd_ext.ops.Pattern.from_csr(*sparse[1:], c * kh * kw)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_the_spatial_fit_is_the_fit_of_the_arranged_matrix(groups, dtype):
    w = torch.randn(12, 5, 3, 2).to(dtype)
    sizes = {"rank": 3, "nnz": 60, "groups": groups}
    fit, matrix = decompose(w, form="spatial", **sizes), decompose(forms.arrange(w), **sizes)
    assert (fit.form, fit.kernel_size, matrix.form) == ("spatial", (3, 2), "channel")
    assert (fit.u.shape, fit.v.shape, fit.u.dtype) == ((36, 3), (groups * 3, 10), dtype)
    assert torch.equal(fit.to_dense(), forms.restore(matrix.to_dense(), (3, 2)))
    assert (fit.relative_error, fit.history) == (matrix.relative_error, matrix.history)
    error = (fit.to_dense().double() - w.double().flatten(1)).norm() / w.double().norm()
    assert error.item() == pytest.approx(fit.relative_error, abs=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert decompose(w, rank=min(36 // groups, 10), groups=groups, form="spatial").relative_error < 1e-2


def test_batches_keep_kernels_of_one_area_apart():
    weights = [torch.randn(6, 4, 3, 2), torch.randn(6, 4, 2, 3), torch.randn(6, 4, 3, 2)]
    for w, fit in zip(weights, decompose_batch(weights, budget=0.5, form="spatial", tol=0.0), strict=True):
        assert fit.kernel_size == (*w.shape[2:],)
        error = ((fit.to_dense() - w.flatten(1)).norm() / w.norm()).item()
        assert error == pytest.approx(fit.relative_error, rel=1e-5)
        assert error < 0.75


def test_a_budget_counts_the_parameters_of_the_form():
    w = torch.randn(32, 16, 3, 3)
    for groups in (1, 2):
        fit = decompose(w, budget=0.4, sparse_coefficient=0.5, groups=groups, form="spatial")
        assert fit.nnz == int(0.2 * w.numel() + 1e-9)
        assert fit.rank == int(0.2 * w.numel() / (32 * 3 + groups * 16 * 3) + 1e-9)
        assert (fit.rank, fit.nnz) == split_budget(96, 48, 0.4, 0.5, groups)
        kept = fit.u.numel() + fit.v.numel() + fit.nnz
        assert kept == kept_parameters(32, 144, groups, fit.rank, fit.nnz, 3) <= 0.4 * w.numel()


def test_auto_takes_the_form_of_the_lower_error_at_the_budget():
    conv = nn.Conv2d(16, 16, 3)
    for form in forms.FORMS:
        with torch.no_grad():
            low = torch.randn(16, 2) @ torch.randn(2, 144) if form == "channel" else None
            if low is None:
                low = forms.restore(torch.randn(48, 2) @ torch.randn(2, 48), (3, 3))
            conv.weight.copy_(low.view_as(conv.weight) + 0.01 * torch.randn_like(conv.weight))
        layer = CMDConv2d.from_dense(conv, budget=0.2, sparse_coefficient=0.0, form="auto")
        assert layer.form == form
        kept = layer.u.numel() + layer.v.numel() + layer.nnz
        assert kept <= 0.2 * conv.weight.numel()
    assert CMDConv2d.from_dense(nn.Conv2d(16, 16, 1), budget=0.3, form="auto").form == "channel"
    assert CMDConv2d.from_dense(nn.Conv2d(16, 16, (1, 3)), budget=0.3, form="auto").form == "channel"
    assert CMDConv2d.from_dense(conv, density=0.3, form="auto").form == "channel"  # without a rank there is one form
    assert CMDLinear.from_dense(nn.Linear(16, 16), budget=0.5, form="auto").form == "channel"


POINT = nn.Conv2d(8, 16, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: decompose(torch.ones(4, 6), rank=1, form="spatial"),
            "decompose: form 'spatial' needs .* got a matrix",
        ),
        (lambda: decompose(torch.ones(4, 6, 1, 1), rank=1, form="spatial"), "larger than 1x1, got 1x1"),
        (lambda: decompose(torch.ones(4, 6, 3, 3), rank=1, form="tucker"), "channel, spatial, got 'tucker'"),
        (
            lambda: decompose(torch.ones(4, 6, 3, 3), rank=13, form="spatial"),
            r"rank must lie in \[0, min\(m \* kernel_h, n / kernel_h\)\] = \[0, 12\], got 13",
        ),
        (lambda: CMDConv2d(8, 16, 1, rank=1, density=0, form="spatial"), "CMDConv2d: form 'spatial' needs .* got 1x1"),
        (
            lambda: CMDConv2d(8, 16, 3, rank=1, density=0, form="auto"),
            "form must be one of channel, spatial, got 'auto'",
        ),
        (
            lambda: CMDConv2d(8, 16, 3, rank=25, density=0, form="spatial"),
            r"CMDConv2d: rank must lie in \[0, min\(m \* kernel_h, n / kernel_h\)\] = \[0, 24\], got 25",
        ),
        (lambda: CMDConv2d.from_dense(POINT, rank=1, form="spatial"), "from_dense: form 'spatial' needs .* got 1x1"),
        (lambda: CMDConv2d.from_dense(POINT, rank=1, form="x"), "form must be one of channel, spatial, auto, got 'x'"),
        (lambda: CMDConv2d.from_dense(POINT, rank=1, form="auto"), "form 'auto' needs a budget .* got rank = 1"),
        (lambda: CMDLinear.from_dense(nn.Linear(4, 4), rank=1, form="spatial"), "form 'spatial' needs .* got a matrix"),
        (
            lambda: CMDConv2d.from_dense(conv_of("plain"), rank=1, form="spatial", second_moment=torch.eye(72)),
            "from_dense: second_moment needs form 'channel', got 'spatial'",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("rank", "density"), [(1, 0.2), (2, 0.0), (0, 0.3), (0, 0.0)])
def test_every_backend_is_the_convolution_with_the_rebuilt_weight(name, rank, density):
    layer, x = layer_of(name, rank, density), torch.randn(2, 8, 13, 12, dtype=F64)
    assert (layer.form, layer.rank, layer.matrix_shape) == ("spatial", rank, (16, conv_of(name).weight[0].numel()))
    want = double_layer(layer, x)
    torch.testing.assert_close(layer.dense_weight().flatten(1), dense_matrix(layer), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.to_dense()(x), want, rtol=1e-10, atol=1e-10)
    for backend in ("auto", "fused", "dense", *(["lowrank"] if density == 0 else [])):
        layer.backend = backend
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            with torch.no_grad():
                results = [layer(image), layer(image), layer(image[0])[None]]
            results.append(layer(image))
            for got, expected in zip(results, (want, want, want[:1], want), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONVS)
def test_full_rank_reproduces_the_dense_layer(name):
    conv, x = conv_of(name), torch.randn(2, 8, 13, 12, dtype=F64)
    m, _, kh, kw = conv.weight.shape
    full = min(m * kh // conv.groups, 8 // conv.groups * kw)
    layer = CMDConv2d.from_dense(conv, rank=full, form="spatial")
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["strided", "dilated", "grouped, 5x5", "column", "circular"])
@pytest.mark.parametrize(("rank", "density"), [(1, 0.2), (2, 0.0), (0, 0.1)])
def test_gradients(name, rank, density):
    layer = CMDConv2d.from_dense(conv_of(name), rank=rank, density=density, form="spatial")
    x = torch.randn(1, 8, 10, 9, dtype=F64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    got = {}
    for backend in ("fused", "dense"):
        layer.backend = backend
        got[backend] = torch.autograd.grad(layer(x).sin().sum(), wanted)
    for a, b, p in zip(*got.values(), wanted, strict=True):
        assert a.shape == p.shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["fused", "dense"])
def test_gradcheck(backend):
    conv = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, groups=2).double()
    layer = CMDConv2d.from_dense(conv, rank=1, density=0.4, form="spatial")
    layer.backend = backend
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = [torch.randn(1, 2, 5, 4, dtype=F64), *parameters]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_every_parameter_gets_a_gradient():
    """DistributedDataParallel waits for all of them."""
    for rank, density in ((2, 0.1), (0, 0.1), (2, 0.0), (0, 0.0)):
        layer = CMDConv2d(4, 6, 3, rank=rank, density=density, form="spatial")
        for backend in ("fused", "dense"):
            layer.backend = backend
            layer.zero_grad()
            layer(torch.randn(2, 4, 6, 6)).sum().backward()
            assert all(p.grad is not None for p in layer.parameters()), (rank, density, backend)


def test_kept_kernels_follow_the_parameters():
    for density in (0.2, 0.0):
        layer, x = layer_of("strided", 2, density), torch.randn(2, 8, 9, 9, dtype=F64)
        layer.backend = "fused"
        with torch.no_grad():
            for change in (
                lambda: None,
                lambda p=layer: p.u.mul_(2),
                lambda p=layer: p.v.add_(1),
                lambda p=layer: p.values.mul_(3),
            ):
                change()
                for _ in range(2):
                    torch.testing.assert_close(layer(x), double_layer(layer, x), rtol=1e-10, atol=1e-10)


def test_memory_format_autocast_half_and_copies():
    x = torch.randn(2, 8, 9, 10)
    last = x.contiguous(memory_format=torch.channels_last)
    for density in (0.2, 0.0):
        layer = layer_of("grouped", 2, density, torch.float32)
        layer.backend = "fused"
        want = double_layer(layer, x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert layer(x).is_contiguous()
                assert layer(last).is_contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    half = layer(x)
                assert half.dtype == torch.bfloat16
                torch.testing.assert_close(half.float(), want, rtol=0.05, atol=0.05)
                assert layer(x[:0]).shape == (0, *want.shape[1:])
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert (twin.form, torch.equal(twin(x), layer(x))) == ("spatial", True)
        half = copy.deepcopy(layer).bfloat16()
        torch.testing.assert_close(half(x.bfloat16()).float(), want, rtol=0.05, atol=0.05)
        weight = half.dense_weight()
        assert weight.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.dense_weight(), layer.to_dense().weight)


def test_a_wrong_input_is_named():
    layer = CMDConv2d(8, 4, 3, rank=1, density=0.1, form="spatial")
    layer.backend = "fused"
    with pytest.raises(ValueError, match=r"= 8 channels, got \[2, 7, 5, 5\]"):
        layer(torch.randn(2, 7, 5, 5))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["auto", "fused", "dense"])
@pytest.mark.parametrize("density", [0.2, 0.0])
def test_compiles_and_exports(backend, density):
    layer, x = CMDConv2d(3, 8, 3, padding=1, rank=2, density=density, form="spatial"), torch.randn(2, 3, 6, 5)
    layer.backend = backend
    want = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},))
    torch.testing.assert_close(program.module()(x), want)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), want)
        torch.testing.assert_close(torch.func.vmap(layer)(x[None]), want[None])


def test_fresh_layers_have_the_statistics_of_torch_layers():
    reference = nn.Conv2d(32, 64, 3).weight.std().item()
    for rank, density in ((5, 0.0), (7, 0.3), (96, 1.0)):
        layer = CMDConv2d(32, 64, 3, rank=rank, density=density, form="spatial")
        assert layer.dense_weight().std().item() == pytest.approx(reference, rel=0.25)
        assert (layer.u.shape, layer.v.shape) == ((192, rank), (rank, 96))
    assert CMDConv2d(8, 16, 3, rank=2, density=0.5, form="spatial", device="meta").matrix_shape == (16, 72)
    assert "form='spatial', rank=2" in repr(CMDConv2d(8, 16, 3, rank=2, density=0.25, form="spatial"))


# state_dict and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grouped", "strided", "row"])
def test_a_state_dict_brings_its_form(name):
    conv, x = conv_of(name), torch.randn(2, 8, 9, 9, dtype=F64)
    layers = {form: CMDConv2d.from_dense(conv, rank=1, density=0.2, form=form) for form in forms.FORMS}
    for form, source in layers.items():
        for target in (copy.deepcopy(layer) for layer in layers.values()):
            with torch.no_grad():
                target(x)
                target.load_state_dict(source.state_dict())
                torch.testing.assert_close(target(x), source(x))
            assert target.form == form or name == "row", "for a kernel of one row the forms are the same"
            target(x).sum().backward()
            assert target.u.grad.shape == source.u.shape


def test_a_state_dict_of_another_kernel_is_refused():
    state = CMDConv2d(8, 16, (5, 3), rank=2, density=0.2, form="spatial").state_dict()
    layer = CMDConv2d(8, 16, (3, 5), rank=2, density=0.2, form="spatial")
    with pytest.raises(
        RuntimeError, match=r"u and v must be \[48, r\] and \[1 \* r, 40\] or \[16, r\] and \[1 \* r, 120\]"
    ):
        layer.load_state_dict(state)
    assert layer.form == "spatial"


def net() -> nn.Module:
    """Three convolutions with kernels that a few rows and columns explain, and a linear layer."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()]
    layers = [*layers, nn.Conv2d(24, 32, (3, 1), groups=2), nn.Flatten(), nn.Linear(32 * 4 * 6, 32)]
    with torch.no_grad():
        for conv in (layer for layer in layers if isinstance(layer, nn.Conv2d)):
            m, c, kh, kw = conv.weight.shape
            low = torch.randn(m * kh, 4) @ torch.randn(4, c * kw)
            conv.weight.mul_(0.3).add_(0.5 * conv.weight.std() * forms.restore(low, (kh, kw)).view_as(conv.weight))
    return nn.Sequential(*layers).eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(4))


OPTIONS = {"sparse_coefficient": 0.5, "min_size": 400, "progress": False}


def is_spatial(module: nn.Module) -> bool:
    return getattr(module, "form", "") == "spatial"


def metadata(path) -> dict:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["cmd_ext"])


def test_save_and_load_keep_the_form(tmp_path):
    path, model = tmp_path / "net.safetensors", net()
    model[0] = CMDConv2d.from_dense(model[0], rank=2, density=0.1)
    model[2] = CMDConv2d.from_dense(model[2], rank=3, density=0.1, form="spatial")
    model[4] = CMDConv2d.from_dense(model[4], rank=2, density=0.0, form="spatial")
    cmd_ext.save(model, path)
    assert path.stat().st_size > stored_bytes(model)
    content = metadata(path)
    assert (content["version"], content["layers"]["2"]["form"], content["layers"]["2"]["shape"]) == (
        2,
        "spatial",
        [24, 144],
    )
    for fresh in (net(), copy.deepcopy(model)):
        loaded = cmd_ext.load(path, fresh)
        assert [loaded[i].form for i in (0, 2, 4)] == ["channel", "spatial", "spatial"]
        assert torch.equal(loaded(X), model(X))
    model[2] = model[2].to_dense()
    model[4] = model[4].to_dense()
    cmd_ext.save(model, path)
    assert "form" not in metadata(path)["layers"]["0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "channel"}, r"'2' in .* is damaged \(u and v must be \[24, r\] and \[1 \* r, 144\], got \[72, 3\]"),
        ({"form": "tucker"}, "is damaged .*form must be one of channel, spatial, got 'tucker'"),
    ],
)
def test_a_file_with_another_form_than_its_factors_is_refused(tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    path, model = tmp_path / "net.safetensors", net()
    model[2] = CMDConv2d.from_dense(model[2], rank=3, density=0.1, form="spatial")
    cmd_ext.save(model, path)
    tensors, content = load_file(path), metadata(path)
    content["layers"]["2"].update(change)
    save_file(tensors, path, {"cmd_ext": json.dumps(content)})
    fresh = net()
    with pytest.raises(ValueError, match=message):
        cmd_ext.load(path, fresh)
    assert type(fresh[2]) is nn.Conv2d


# Costs, plans, compress ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVS)
def test_profile_counts_the_multiply_adds_of_both_convolutions(name):
    x = torch.randn(3, 8, 13, 12, dtype=F64)
    layer, low = layer_of(name, 2 if CONVS[name].get("groups", 1) < 8 else 1, 0.25), None
    low = CMDConv2d.from_dense(layer.to_dense(), rank=layer.rank, form="spatial")
    low.backend = "lowrank"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = low(x)
    row = cmd_ext.profile(layer, x, repeats=1)["CMDConv2d"]
    assert row.macs == counter.get_total_flops() // 2 + y.numel() // 16 * layer.nnz
    assert cmd_ext.profile(layer, x[0], repeats=1)["CMDConv2d"].macs * 3 == row.macs
    (m, n), sizes = layer.matrix_shape, (layer.groups, layer.rank, layer.nnz)
    assert row.params == kept_parameters(m, n, *sizes, layer._taps) + (0 if layer.bias is None else m)
    assert row.bytes == kept_bytes(m, n, *sizes, 8, layer._taps) + (0 if layer.bias is None else 8 * m)
    dense = cmd_ext.profile(layer.to_dense(), x, repeats=1)["Conv2d"]
    assert row.macs == kept_macs(m, n, *sizes, dense.positions, layer._taps, dense.between)
    assert row.shape == f"{m}x{n}" + (" spatial" if layer._taps > 1 else "")


@pytest.mark.parametrize("search", ["allocate", "uniform"])
@pytest.mark.parametrize("kind", ["params", "macs", "bytes"])
def test_compress_meets_its_constraint_with_spatial_layers(search, kind):
    options = {"form": "spatial", "search": search, **OPTIONS}
    result = cmd_ext.compress(net(), X, constraints={kind: "60%"}, **options)
    dense, kept = getattr(result.stats, kind)
    assert 0.4 * dense < kept <= 0.6 * dense
    spatial = [name for name, layer in result.model.named_modules() if is_spatial(layer)]
    assert spatial or (kind, search) == ("bytes", "allocate")  # a bitmap makes S the cheaper branch
    assert all(result.plan.layers[name]["form"] == "spatial" for name in spatial)
    assert (" spatial" in str(result.stats)) == bool(spatial)
    torch.testing.assert_close(result.model(X), cmd_ext.to_dense(result.model)(X), rtol=1e-4, atol=1e-5)


def test_a_plan_round_trip_keeps_the_form():
    options = {"form": "spatial", "search": "uniform", **OPTIONS}
    result = cmd_ext.compress(net(), X, constraints={"params": "60%"}, **options)
    text = result.plan.to_json()
    assert json.loads(text)["cmd_ext_plan"] == 2
    assert Plan.from_json(text) == result.plan
    again = cmd_ext.apply_plan(net(), Plan.from_json(text))
    assert torch.equal(again(X), result.model(X))
    channel = cmd_ext.compress(net(), X, constraints={"params": "60%"}, **{**options, "form": "channel"}).plan
    assert json.loads(channel.to_json())["cmd_ext_plan"] == 1
    with pytest.raises(ValueError, match="Plan: want a form channel or spatial, got 'x'"):
        Plan.from_json(text.replace('"spatial"', '"x"'))
    linear = Plan({"6": {"rank": 1, "nnz": 0, "shape": [32, 768], "groups": 1, "form": "spatial"}})
    with pytest.raises(ValueError, match="apply_plan: '6': form 'spatial' needs .*got a matrix"):
        cmd_ext.apply_plan(net(), linear)


def test_overrides_tell_the_form():
    overrides = {
        "2": {"rank": 4, "nnz": 50, "form": "spatial"},
        "4": {"budget": 0.5, "form": "spatial"},
        "0": {"rank": 2},
    }
    model = cmd_ext.compress(net(), X, constraints={"params": "90%"}, overrides=overrides, progress=False).model
    assert [(model[i].form, model[i].rank) for i in (0, 2)] == [("channel", 2), ("spatial", 4)]
    assert (model[4].rank, model[4].nnz) == split_budget(96, 12, 0.5, None, 2)
    for bad, message in (({"form": "spatial"}, "must be 'dense' or a dict"), ({"rank": 1, "form": "x"}, "got 'x'")):
        with pytest.raises(ValueError, match=message):
            cmd_ext.compress(net(), X, constraints={"params": "90%"}, overrides={"2": bad}, progress=False)
    with pytest.raises(ValueError, match="compress: form must be one of auto, channel, spatial, got 'x'"):
        cmd_ext.compress(net(), X, constraints={"params": "90%"}, form="x", progress=False)


def curve_layer(weight: torch.Tensor, kinds=forms.FORMS, positions=(4, 8)) -> Layer:
    return Layer("a", weight, len(weight), weight[0].numel(), 1, positions[0], kinds, positions[1])


def test_curves_hold_the_better_form_and_its_costs():
    low = {"channel": torch.randn(32, 3) @ torch.randn(3, 144), "spatial": torch.randn(96, 3) @ torch.randn(3, 48)}
    low["spatial"] = forms.restore(low["spatial"], (3, 3))
    for form, matrix in low.items():
        layer = curve_layer((matrix + 0.05 * torch.randn(32, 144)).view(32, 16, 3, 3))
        curve = error_curves([layer])["a"]
        near = min(curve[1:], key=lambda c: (abs(c.costs["params"] - 0.2 * layer.size) > 200, c.error))
        assert near.form == form
        fit = decompose(layer.weight, rank=near.rank, nnz=near.nnz, form=form)
        assert fit.relative_error**2 == pytest.approx(near.error, rel=0.3, abs=1e-3)
        for c in curve[1:]:
            taps = 3 if c.form == "spatial" else 1
            assert c.costs["params"] == kept_parameters(32, 144, 1, c.rank, c.nnz, taps)
            factors = c.rank * (96 * 4 + 48 * 8) if taps == 3 else 4 * c.rank * (32 + 144)
            assert c.costs["macs"] == factors + 4 * c.nnz
        alone = error_curves([curve_layer(layer.weight, ("channel",))])["a"]
        assert {c.form for c in alone} == {"channel"}


def test_both_models_of_the_time_know_the_two_convolutions():
    layer, x = (
        CMDConv2d(64, 64, 3, stride=2, padding=1, rank=8, density=0.05, form="spatial"),
        torch.randn(2, 64, 28, 20),
    )
    layer(x)
    work = layer._work()
    assert (work.m, work.n, work.taps, work.between, work.tokens) == (64, 576, 3, 2 * 28 * 10, 2 * 14 * 10)
    assert set(layer.predicted_ms) == {"dense", "fused"}
    channel = cpu_model.Work(64, 576, 1, 8, work.nnz, work.tokens, work.inputs, work.outputs, work.dtype, True)
    products = [cpu_model.lowrank_work(w)[3] for w in (channel, work)]
    assert products == [8 * (64 + 576) * work.tokens, 8 * (192 * work.tokens + 192 * work.between)]
    for rates in dispatch.DATA_SHEETS.values():
        times = dispatch.predict(work, rates, False)
        assert set(times) == {"dense", "fused"}
        assert times["fused"] > dispatch.predict(cpu_model.replace(work, nnz=0), rates, False)["lowrank"]
    empty = CMDConv2d(64, 64, 3, rank=8, density=0, form="spatial")
    empty(x)
    assert set(empty.predicted_ms) == {"dense", "lowrank"}
    none = CMDConv2d(64, 64, 3, rank=0, density=0.1, form="spatial")
    none(x)
    assert none._work().taps == 1
    assert F.conv2d(x, none.dense_weight(), none.bias).shape == none(x).shape


def test_finetuning_trains_a_spatial_network():
    options = {"form": "spatial", "search": "uniform", **OPTIONS}
    model = cmd_ext.compress(net(), X, constraints={"params": "70%"}, **options).model
    data = [(torch.randn(8, 3, 12, 12), torch.randint(32, (8,))) for _ in range(3)]
    before = [p.detach().clone() for p in model.parameters()]
    history = cmd_ext.finetune(model, data, epochs=2, lr=0.05, progress=False)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert any(map(is_spatial, model))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.data
def test_trained_weights_have_the_lower_error_in_the_spatial_form(data_dir):
    """Five convolutions of layer3 of ResNet-56, rank only, 30 % of the parameters: .528 against .600 in the mean."""
    network = models.load_weights(models.create("resnet56"), data_dir / "pretrained" / "resnet56.safetensors")
    weights = [m.weight for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and n.startswith("layer3")]
    weights = [w for w in weights if w.shape[2] == 3][1::4]
    errors = {}
    for form in forms.FORMS:
        fits = decompose_batch(weights, budget=0.3, sparse_coefficient=0.0, form=form)
        errors[form] = sum(fit.relative_error for fit in fits) / len(fits)
    assert errors["spatial"] <= 0.53
    assert 0.59 < errors["channel"] < 0.61
