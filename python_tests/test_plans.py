"""Plans of the fused convolution: what inference keeps between calls, when it must not, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_bounds import DTYPES, F32, F64
from test_ops import CONV, LAST, conv_args
from torch._subclasses.fake_tensor import FakeTensorMode

from cmd_ext import CMDConv2d, CMDLinear, modules, ops, ref

LAYERS = ["linear", "conv2d"]


def planned(x, u, v, values, pattern, bias, *geometry) -> torch.Tensor:
    return ops.planned_lrs_conv2d(x, ops.plan_lrs_conv2d(u, v, values, pattern, x.shape, False, *geometry), bias)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in CONV if name != "batch 0"])
def test_a_plan_changes_nothing(case, dtype, memory_format):
    args = conv_args(case, dtype, memory_format)
    y = planned(*args)
    assert torch.equal(y, ops.lrs_conv2d(*args))
    assert y.stride() == ops.lrs_conv2d(*args).stride()
    assert torch.equal(planned(*args[:5], None, *args[6:]), ops.lrs_conv2d(*args[:5], None, *args[6:]))


def fused_layer(**options) -> CMDConv2d:
    layer = CMDConv2d(6, 8, 3, padding=1, rank=2, density=0.3, **options)
    layer.backend = "fused"
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_second_call_takes_the_short_way(kind, bias, monkeypatch):
    layer = CMDLinear(6, 8, bias, rank=2, density=0.3) if kind == "linear" else fused_layer(bias=bias)
    x = torch.randn(2, 6) if kind == "linear" else torch.randn(2, 6, 9, 7)
    with torch.no_grad():
        want = layer(x)
        monkeypatch.setattr(type(layer), "_forward", lambda *_: pytest.fail("the long way"))
        assert torch.equal(layer(x), want)
    assert ("bias" in layer.state_dict()) == bias


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 3), (200, 180)], ids=["one thread", "threads"])
def test_a_layer_without_branches_never_reads_its_input(shape, memory_format):
    layer = CMDConv2d(6, 8, 3, stride=2, padding=1, rank=0, density=0)
    layer.backend = "fused"
    x = torch.full((3, 6, *shape), torch.nan).contiguous(memory_format=memory_format)
    with torch.no_grad():
        layer.bias[:2] = torch.tensor([-1.0, torch.nan])
        for activation in (None, "relu"):
            layer.activation = activation
            want = layer.bias.relu() if activation else layer.bias
            y = layer(x)
            torch.testing.assert_close(y, want.view(1, 8, 1, 1).expand_as(y), rtol=0, atol=0, equal_nan=True)
            assert y.is_contiguous(memory_format=memory_format)


def expected(layer: CMDConv2d, x: torch.Tensor) -> torch.Tensor:
    geometry = (layer.kernel_size, layer.stride, layer._inner_padding, layer.dilation, layer.groups)
    return ops.lrs_conv2d(x, layer.u, layer.v, layer.values, layer.pattern, layer.bias, *geometry)


def test_plans_are_kept_until_a_parameter_changes():
    layer, x = fused_layer(), torch.randn(2, 6, 9, 7)
    with torch.no_grad():
        layer(x)
        (call,) = layer._kept[1].values()
        layer(x)
        assert [*layer._kept[1].values()] == [call]
        for name in ("u", "v", "values"):
            getattr(layer, name).mul_(2)
            assert torch.equal(layer(x), expected(layer, x)), name
        layer.v = torch.nn.Parameter(torch.randn(2, 54))
        assert torch.equal(layer(x), expected(layer, x))
        layer.load_state_dict(fused_layer().state_dict())
        assert torch.equal(layer(x), expected(layer, x))
        layer.bias.add_(1)  # no part of a plan
        assert torch.equal(layer(x), expected(layer, x))
        layer.backend = "dense"
        torch.testing.assert_close(layer(x), expected(layer, x))
        layer.backend = "fused"
        with pytest.raises(TypeError, match="u must have the dtype of x"):
            layer(x.double())
        layer.double()
        assert torch.equal(layer(x.double()), expected(layer, x.double()))


def test_plans_of_several_sizes():
    layer = fused_layer()
    with torch.no_grad():
        for height in (*range(4, 4 + 2 * modules.MOST_KEPT), 4, 5, 4):
            x = torch.randn(1 + height % 2, 6, height, 5)
            assert torch.equal(layer(x), expected(layer, x))
            assert len(layer._kept[1]) <= modules.MOST_KEPT
        assert layer(torch.randn(0, 6, 4, 5)).shape == (0, 8, 4, 5)
        assert layer(torch.randn(6, 4, 5)).shape == (8, 4, 5)


def test_threads_may_share_a_layer():
    layer, xs = fused_layer(), [torch.randn(1, 6, 5 + i % 5, 6) for i in range(40)]
    with torch.no_grad():
        want = [expected(layer, x) for x in xs]

    def call(x):
        with torch.no_grad():
            return layer(x)

    with ThreadPoolExecutor(4) as pool:
        for y, same in zip(pool.map(call, xs * 5), want * 5, strict=True):
            assert torch.equal(y, same)


def test_gradients_go_through_frozen_layers():
    layer = fused_layer().requires_grad_(False)
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer._kept is None


@pytest.mark.parametrize("backend", ["fused", "dense"])
@pytest.mark.parametrize("make", [lambda: CMDLinear(6, 8, rank=2, density=0.3), lambda: fused_layer()], ids=LAYERS)
def test_a_trained_bias_gets_its_gradient_though_the_weights_are_frozen(make, backend):
    layer = make()
    layer.backend = backend
    layer.requires_grad_(False).bias.requires_grad_()
    layer(torch.randn(2, 6, 5, 6)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), layer.bias.grad[0].item()))
    assert layer.bias.grad[0] > 0


@pytest.mark.parametrize("backend", ["fused", "dense", "lowrank"])
def test_a_linear_layer_keeps_what_depends_on_its_weights(backend):
    layer, x = CMDLinear(12, 9, rank=2, density=0.0 if backend == "lowrank" else 0.3), torch.randn(3, 12)
    layer.backend = backend

    def check():
        torch.testing.assert_close(
            layer(x), ref.lrs_linear(x, layer.u, layer.v, layer.values, layer.pattern, layer.bias)
        )

    for mode in (torch.no_grad(), torch.inference_mode()):
        other, u, v = CMDLinear(12, 9, rank=1, density=0.0).state_dict(), torch.randn(9, 2), torch.randn(2, 12)
        u = torch.nn.Parameter(u)
        changes = (
            lambda: layer.u.mul_(2),
            lambda v=v: setattr(layer.v, "data", v),
            lambda u=u: setattr(layer, "u", u),
            lambda: layer.bias.add_(1),
            lambda other=other: layer.load_state_dict(other),
        )
        with mode:
            layer(x)
            kept, count = layer._kept, len(layer._kept[1])
            check()
            assert layer._kept is kept, "not even inference mode builds anew"
            assert len(kept[1]) == count
            for change in changes:
                change()
                check()
        layer.load_state_dict(CMDLinear(12, 9, rank=2, density=layer.density).state_dict())


def linear_weights(dtype=F32, m=17, n=300, rank=3) -> tuple:
    layer = CMDLinear(n, m, rank=rank, density=0.2, dtype=dtype)
    return layer.u.detach(), layer.v.detach(), layer.values.detach(), layer.pattern, layer.bias.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1,), (7,), (16,), (3, 11), (65,), (0,), ()], ids=str)
def test_a_plan_of_a_linear_layer_changes_nothing(size, dtype):
    u, v, values, pattern, bias = linear_weights(dtype)
    x = torch.randn(300, *size).to(dtype).movedim(0, -1)
    plan = ops.plan_lrs_linear(values, pattern, 300, x.numel() // 300 <= ops.FEW_SAMPLES)
    for b in (bias, None):
        assert torch.equal(ops.planned_lrs_linear(x, u, v, plan, b), ops.lrs_linear(x, u, v, values, pattern, b))


def test_what_a_plan_of_a_linear_layer_does_not_fit_is_refused():
    u, v, values, pattern, bias = linear_weights()
    few, many = (ops.plan_lrs_linear(values, pattern, 300, few) for few in (True, False))
    x = torch.randn(40, 300)
    with pytest.raises(ValueError, match="the plan is for smaller batches, got 40"):
        ops.planned_lrs_linear(x, u, v, few, bias)
    with pytest.raises(ValueError, match="the plan is for larger batches, got 32"):
        ops.planned_lrs_linear(x[:32], u, v, many, bias)
    with pytest.raises(ValueError, match=r"x must be \[..., n\] with n = 300, got \[40, 299\]"):
        ops.planned_lrs_linear(x[:, :299], u, v, many, bias)
    with pytest.raises(ValueError, match=r"v must be \[r, n\] = \[3, 300\], got \[2, 300\]"):
        ops.planned_lrs_linear(x, u, v[:2], many, bias)
    with pytest.raises(ValueError, match="x must have the plan's precision"):
        ops.planned_lrs_linear(x.double(), u.double(), v.double(), many, None)
    with pytest.raises(TypeError, match="u must have the dtype of x"):
        ops.planned_lrs_linear(x, u.double(), v, many, bias)
    for wrong in (many[:-1], many[:3], many.float(), torch.zeros_like(many)):
        with pytest.raises(ValueError, match="plan must be what _plan_lrs_linear returns"):
            ops.planned_lrs_linear(x, u, v, wrong, bias)
    with pytest.raises(ValueError, match=r"col_idx must lie in \[0, 7\)"):
        ops.plan_lrs_linear(values, pattern, 7, True)


def test_autocast_casts_the_weights_of_a_linear_plan():
    layer, x = CMDLinear(300, 17, rank=3, density=0.2), torch.randn(5, 300)
    layer.backend = "fused"
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            want = ops.lrs_linear(x, layer.u, layer.v, layer.values, layer.pattern, layer.bias)
            assert torch.equal(layer(x), want)
            assert want.dtype == torch.bfloat16
        assert torch.equal(layer(x), plain)


def test_empty_weights_change_their_dtype():
    layer, x = CMDLinear(5, 3, rank=0, density=0.0), torch.randn(2, 5)
    layer.backend = "dense"
    with torch.no_grad():
        assert torch.equal(layer(x), layer.bias.expand(2, 3))
        assert torch.equal(layer.double()(x.double()), layer.bias.expand(2, 3))


def test_parametrized_weights_are_read_anew():
    layer, x = CMDLinear(12, 9, rank=2, density=0.3), torch.randn(3, 12)
    for name in ("u", "bias"):
        torch.nn.utils.parametrize.register_parametrization(layer, name, torch.nn.Tanh())
    for backend in ("fused", "dense"):
        layer.backend = backend
        for _ in range(3):
            with torch.no_grad():
                want = ref.lrs_linear(x, layer.u, layer.v, layer.values, layer.pattern, layer.bias)
                torch.testing.assert_close(layer(x), want)
                layer.parametrizations.u.original.mul_(2)


def test_a_plan_stays_out_of_copies_and_files():
    layer, x = fused_layer(), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        y = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._kept is None
            assert torch.equal(other(x), y)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_traced_calls_use_no_plan():
    layer, x = fused_layer(), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        other = torch.randn(3, 6, 8, 4)
        assert torch.equal(traced(other), layer(other))
        layer._kept = None
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == (2, 8, 5, 5)
        assert layer._kept is None
    with torch.inference_mode():
        other = fused_layer()
        other(x)
        assert other._kept is None, "tensors of inference mode have no version"


def test_autocast_casts_the_weights_of_a_plan():
    layer, x = fused_layer(), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected(layer, x))
            assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), plain)


def test_what_a_plan_does_not_fit_is_refused():
    x, u, v, values, pattern, bias, *geometry = conv_args("7x7 maps", F32)
    plan = ops.plan_lrs_conv2d(u, v, values, pattern, x.shape, False, *geometry)
    with pytest.raises(ValueError, match=r"x must be of the plan's sizes = \[3, 8, 7, 7\], got \[2, 8, 7, 7\]"):
        ops.planned_lrs_conv2d(x[:2], plan, bias)
    with pytest.raises(ValueError, match="x must have the plan's precision"):
        ops.planned_lrs_conv2d(x.double(), plan, bias.double())
    with pytest.raises(ValueError, match=r"bias must be \[m\] = \[17\], got \[16\]"):
        ops.planned_lrs_conv2d(x, plan, bias[:16])
    for wrong in (plan[:-1], plan[:3], plan.float(), torch.zeros_like(plan), plan[::2]):
        with pytest.raises(ValueError, match="plan must be what _plan_lrs_conv2d returns"):
            ops.planned_lrs_conv2d(x, wrong, bias)
    with pytest.raises(ValueError, match=r"x_size must be \[batch > 0, 8, height, width\], got \[3, 9, 7, 7\]"):
        ops.plan_lrs_conv2d(u, v, values, pattern, (3, 9, 7, 7), False, *geometry)
    with pytest.raises(ValueError, match="smaller than the kernel's span"):
        ops.plan_lrs_conv2d(u, v, values, pattern, (3, 8, 0, 7), False, *geometry)
    with pytest.raises(TypeError, match="v must have the dtype of u"):
        ops.plan_lrs_conv2d(u, v.to(F64), values, pattern, x.shape, False, *geometry)
