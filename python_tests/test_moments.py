"""Second moments of the layers' inputs: against unfolding in float64, whatever the geometry, the shard or the fault."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmd_ext import CMDConv2d, CMDLinear, moments, second_moments, windows
from cmd_ext.moments import output_error, paired_moments

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
ALL = {"positions": 1 << 20}

CONV = {
    "plain": {},
    "padding": {"padding": (2, 1)},
    "stride": {"stride": (2, 3), "padding": 1},
    "dilation": {"dilation": (2, 1), "padding": 2},
    "groups": {"groups": 3, "padding": 1},
    "depthwise": {"groups": 6, "out_channels": 12},
    "same": {"kernel_size": 2, "padding": "same"},
    "same, dilated": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "groups": 2},
    "1x1": {"kernel_size": 1, "stride": 2},
    "several blocks": {"in_channels": 48, "kernel_size": 3, "groups": 2},
}


def conv_of(case: str, **more) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": (3, 2)} | CONV[case] | more)


def unfolded(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Rows [groups, rows, n] in float64, by F.unfold."""
    x, mode = x.double(), conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode)
    columns = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)
    n = columns.shape[1] // conv.groups
    return columns.view(len(x), conv.groups, n, -1).permute(1, 0, 3, 2).reshape(conv.groups, -1, n)


def expected(rows: torch.Tensor) -> torch.Tensor:
    h = rows.mT @ rows / rows.shape[1]
    return h[0] if len(h) == 1 else h


def check(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert ((got.double() - want).norm() / want.norm()).item() < tolerance


@pytest.mark.parametrize("case", CONV)
def test_every_geometry(case):
    conv = conv_of(case)
    data = [torch.randn(2, conv.in_channels, 9, 10) + 0.5 for _ in range(3)]
    want = expected(torch.cat([unfolded(conv, x) for x in data], 1))
    check(second_moments(conv, data, **ALL)[""], want)
    rank_sparse = CMDConv2d.from_dense(conv, rank=1, density=0.2)
    check(second_moments(rank_sparse, data, **ALL)[""], want)
    check(second_moments(conv, [x.to(memory_format=torch.channels_last) for x in data], **ALL)[""], want)
    check(second_moments(conv, [x[i] for x in data for i in range(2)], **ALL)[""], want)  # images without a batch
    diagonal = second_moments(conv, data, max_features=1, **ALL)[""]
    check(diagonal, want.diagonal(dim1=-2, dim2=-1))


def test_the_moment_is_that_of_the_layers_own_product():
    """E ||W x||^2 = tr(W H W^T) for the layer's outputs: the order (channel, kernel row, column) and the groups."""
    for case in CONV:
        conv = conv_of(case, bias=False)
        x = torch.randn(3, conv.in_channels, 9, 10)
        y = conv(x)
        h = second_moments(conv, [x], **ALL)[""]
        w = conv.weight.detach().view(conv.groups, -1, h.shape[-1])
        energy = ((w @ h.view(conv.groups, *h.shape[-2:])) * w).sum().item()
        assert energy == pytest.approx(y.square().sum().item() / (y.numel() // y.shape[1]), rel=1e-4), case


@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 4, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "cmd"])
def test_linear_layers_take_inputs_of_any_rank(shape, kind):
    linear = nn.Linear(5, 4) if kind == "dense" else CMDLinear(5, 4, rank=1, density=0.2)
    data = [torch.randn(shape) for _ in range(3)]
    rows = torch.cat([x.double().view(-1, 5) for x in data])
    check(second_moments(linear, data)[""], expected(rows[None]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    conv = nn.Conv2d(4, 4, 3, padding=1).to(dtype)
    x = (300 * torch.randn(8, 4, 9, 9)).to(dtype)  # squares beyond the range of float16
    got = second_moments(conv, [x], **ALL)[""]
    want = expected(unfolded(conv, x))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert ((got.double() - want).norm() / want.norm()).item() < tolerance


def test_autocast_does_not_round_the_moments():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    x = torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = second_moments(model, [x])
        with torch.no_grad():
            inner = model[0](x)
    assert inner.dtype == torch.bfloat16
    check(got["0"], expected(x.double()[None]))
    check(got["1"], expected(inner.double()[None]))


def test_a_large_offset_costs_no_digits():
    """The sum over many rows of nearly equal products: chunks in float32, their sums in float64."""
    linear, x = nn.Linear(3, 2), 100 + torch.randn(200_000, 3)
    check(second_moments(linear, x.split(50_000))[""], expected(x.double()[None]), 1e-6)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.tied(input=self.again(self.first(x)))


def test_shared_modules_sum_over_all_calls(caplog):
    model, x = Shared(), torch.randn(6, 4)
    with torch.no_grad():
        y = model.first(x)
        z = model.first(y)
    got = second_moments(model, [x])
    assert [*got] == ["first", "tied"]  # in the order of the calls
    assert "no batch reaches unused" in caplog.text
    check(got["first"], expected(torch.cat([x, y]).double()[None]))
    check(got["tied"], expected(z.double()[None]))
    both = second_moments(model, [x], ["again", "first"])
    assert torch.equal(both["again"], got["first"])
    assert torch.equal(both["first"], got["first"])


def test_positions_are_drawn_from_all_over_the_image_and_always_the_same():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    x = torch.randn(64, 2, 20, 20)
    full = second_moments(conv, [x], **ALL)[""]
    some = second_moments(conv, [x], positions=50)[""]
    assert torch.equal(some, second_moments(conv, [x], positions=50)[""])
    assert not torch.equal(some, second_moments(conv, [x], positions=50, seed=1)[""])
    assert not torch.equal(some, full)
    assert ((some - full).norm() / full.norm()).item() < 0.1
    places = windows.Moment("", conv, 50, 100, 0)._drawn(4000, 400)[1]
    counts = torch.bincount(places, minlength=400).double()
    assert counts.min() > 380  # 500 expected of each place
    assert counts.max() < 620
    tail = windows.Moment("", conv, 7, 100, 0)._drawn(3, 8)[1]
    assert tail.min() >= 0
    assert tail.max() < 8


def test_the_rows_of_a_layer_do_not_depend_on_the_other_layers():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3))
    data = [torch.randn(4, 2, 12, 12) for _ in range(2)]
    both, one = second_moments(model, data, positions=9), second_moments(model, data, ["1"], positions=9)
    assert torch.equal(both["1"], one["1"])


def test_wide_layers_keep_the_diagonal_and_say_so(caplog):
    caplog.set_level(logging.INFO, "cmd_ext.windows")
    model, x = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 3)), torch.randn(9, 12)
    got = second_moments(model, [x], max_features=8)
    check(got["0"], x.double().square().mean(0))
    assert got["1"].shape == (5, 5)
    assert [r.message for r in caplog.records] == [
        "second_moments: 0 has 1 groups of 12 features, beyond max_features = 8: only the diagonal is kept"
    ]


class Restless(nn.Module):
    """Counts its calls, draws random numbers and fails on request, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.fails = False

    def forward(self, x):
        self.calls += 1
        y = self.norm(self.linear(x)) + torch.rand(4)
        if self.fails:
            raise KeyError("stop")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Restless().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fails, state = fails, torch.random.get_rng_state()
    if fails:
        with pytest.raises(KeyError):
            second_moments(model, [torch.randn(3, 4)])
        with pytest.raises(KeyError):
            moments.call_order(model, torch.randn(3, 4), ["linear"])
    else:
        second_moments(model, [torch.ones(3, 4)])
        assert moments.call_order(model, torch.ones(3, 4), ["linear"]) == {"linear": 1}
    if not fails:
        assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (model.training, model.linear.training, model.norm.training) == (True, True, False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batches_may_hold_targets_end_early_or_be_empty():
    linear, x = nn.Linear(4, 2), torch.randn(6, 4)
    want = second_moments(linear, [x])[""]
    assert torch.equal(second_moments(linear, iter([(x, torch.zeros(6)), (x[:0], None)]))[""], want)
    assert torch.equal(second_moments(linear, [{"input": x, "labels": x}])[""], want)
    assert second_moments(linear, [x[:0]]) == {}
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="second_moments: want an iterable of inputs .* got an empty one"):
            second_moments(linear, nothing)

    def breaks():
        yield x
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        second_moments(linear, breaks())
    assert not linear._forward_hooks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value):
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    good, bad = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    bad[1, 1, 2, 3] = value
    with pytest.raises(ValueError, match="got NaN or Inf in batch 1, first in the input of layer '0'"):
        second_moments(model, [good, bad], positions=1)  # also where no drawn row sees it
    with torch.no_grad():
        model[0].bias[0] = value  # the first layer's input is fine, the next one's is not
    with pytest.raises(ValueError, match="got NaN or Inf in batch 0, first in the input of layer '2'"):
        second_moments(model, [good])
    with pytest.raises(ValueError, match="squares of the inputs of layer '0' overflow"):
        second_moments(model, [good * 1e25], ["0"])


def test_degenerate_data():
    conv = nn.Conv2d(3, 4, 3)
    x = torch.ones(1, 3, 3, 3)
    x[:, 1] = 0  # a dead channel; one image, one position
    h = second_moments(conv, [x])[""]
    assert torch.equal(h, unfolded(conv, x).float()[0].mT @ unfolded(conv, x).float()[0])
    assert torch.linalg.matrix_rank(h) == 1
    assert output_error(conv.weight, conv.weight, h) == 0
    dead = torch.zeros(27, 27)
    assert output_error(conv.weight, 0 * conv.weight, dead) == 0
    assert output_error(0 * conv.weight, conv.weight, h) == float("inf")


@pytest.mark.parametrize("groups", [1, 2])
def test_output_error_is_that_of_the_outputs(groups):
    conv = nn.Conv2d(4, 6, 3, groups=groups, bias=False).requires_grad_(False)
    x = torch.randn(5, 4, 8, 8)
    other = nn.Conv2d(4, 6, 3, groups=groups, bias=False).requires_grad_(False)
    want = ((conv(x) - other(x)).norm() / conv(x).norm()).item()
    h = second_moments(conv, [x], **ALL)[""]
    assert output_error(conv.weight, other.weight, h, groups) == pytest.approx(want, rel=1e-5)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    kept = torch.diag_embed(diagonal)
    by_diagonal = output_error(conv.weight, other.weight, diagonal, groups)
    assert by_diagonal == pytest.approx(output_error(conv.weight, other.weight, kept, groups), rel=1e-5)
    assert by_diagonal != pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": ["frist"]}, ValueError, "names has no layer 'frist'; did you mean 'first'"),
        ({"names": ["norm"]}, TypeError, "'norm' must be a Conv2d, Linear, CMDConv2d or CMDLinear, got BatchNorm1d"),
        ({"positions": 0}, ValueError, "must be >= 1, got 0 and"),
        ({"max_features": 0}, ValueError, "must be >= 1, got 256 and 0"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    model = Shared()
    model.norm = nn.BatchNorm1d(4)
    with pytest.raises(error, match=message):
        second_moments(model, [torch.randn(3, 4)], **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
def test_transformer_layers_call_their_linears(masked):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 2] = masked
    batch = {"src": torch.randn(2, 3, 8), "src_key_padding_mask": mask}
    got = second_moments(model, [batch])
    for layer, part in itertools.product("01", ("linear1", "linear2")):
        assert got[f"layers.{layer}.{part}"].isfinite().all()


# Pairs ----------------------------------------------------------------------------------------------------------------


def pair_of(conv: nn.Conv2d) -> tuple[nn.Module, nn.Module]:
    """A dense network and one whose first layer is another, so that the second layer gets other inputs."""
    dense = nn.Sequential(nn.Conv2d(3, conv.in_channels, 1), conv, nn.ReLU(), Breaks())
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[0].weight += 0.2 * torch.randn_like(model[0].weight)
    return dense, model


class Breaks(nn.Module):
    def forward(self, x):
        raise AssertionError("the call must end with the last layer wanted")


@pytest.mark.parametrize("case", ["plain", "stride", "groups", "same, dilated", "reflect", "several blocks"])
def test_pairs_are_rows_of_the_same_places(case):
    dense, model = pair_of(conv_of(case))
    conv, data = dense[1], [torch.randn(3, 3, 9, 10) for _ in range(2)]
    with torch.no_grad():
        x, y = (torch.cat([unfolded(conv, network[0](batch)) for batch in data], 1) for network in (model, dense))
    got = paired_moments(model, dense, data, {"1": 1}, **ALL)["1"]
    check(got.moment, expected(x))
    cross = y.mT @ x / x.shape[1]
    check(got.cross, cross if conv.groups > 1 else cross[0], 5e-6)
    w = conv.weight.detach().double().view(conv.groups, -1, x.shape[2])
    check(got.energies.float(), (y @ w.mT).square().mean(1).flatten())
    a = w + 0.1 * torch.randn_like(w)
    error = ((y @ w.mT - x @ a.mT).norm() / (y @ w.mT).norm()).item()
    assert got.output_error(conv.weight, a.view(len(conv.weight), -1), conv.groups) == pytest.approx(error, rel=1e-4)
    some = paired_moments(model, dense, data, {"1": 1}, positions=5)["1"]
    assert torch.equal(some.moment, second_moments(nn.Sequential(*model[:2]), data, ["1"], positions=5)["1"])


@pytest.mark.parametrize("case", ["plain", "groups"])
def test_the_target_is_the_best_weight_for_the_other_inputs(case):
    dense, model = pair_of(conv_of(case))
    conv, data = dense[1], [torch.randn(40, 3, 9, 10)]
    pair = paired_moments(model, dense, data, {"1": 1}, **ALL)["1"]

    def error(weight: torch.Tensor) -> float:
        return pair.output_error(conv.weight, weight, conv.groups)

    best = pair.target(conv.weight, conv.groups, damping=1e-9)
    assert best.shape == conv.weight.shape
    assert error(best) < 0.6 * error(conv.weight)
    for _ in range(5):
        assert error(best) <= error(best + 1e-2 * torch.randn_like(best))
    assert error(best) < error(pair.target(conv.weight, conv.groups)) < error(conv.weight)
    same = paired_moments(copy.deepcopy(dense), dense, data, {"1": 1}, **ALL)["1"]
    torch.testing.assert_close(same.target(conv.weight, conv.groups), conv.weight.detach(), rtol=1e-3, atol=1e-4)
    assert same.output_error(conv.weight, conv.weight, conv.groups) < 1e-3
    diagonal = paired_moments(model, dense, data, {"1": 1}, max_features=3, **ALL)["1"]
    check(diagonal.moment, pair.moment.double().diagonal(dim1=-2, dim2=-1))
    check(diagonal.cross, pair.cross.double().diagonal(dim1=-2, dim2=-1), 1e-5)
    w = conv.weight.detach().double().view(conv.groups, -1, diagonal.moment.shape[-1])
    h, c = (t.double().view(conv.groups, 1, -1) for t in (diagonal.moment, diagonal.cross))
    torch.testing.assert_close(
        diagonal.target(conv.weight, conv.groups, 0.0).view_as(w).double(), w * c / h, rtol=1e-4, atol=1e-6
    )
    target = diagonal.target(conv.weight, conv.groups)
    assert diagonal.output_error(conv.weight, target, conv.groups) == 0


def test_pairs_of_dead_inputs_leave_the_weight_alone():
    linear, x = nn.Linear(4, 3), torch.zeros(5, 4)
    for limit in (8, 1):
        pair = paired_moments(linear, copy.deepcopy(linear), [x], {"": 1}, max_features=limit)[""]
        torch.testing.assert_close(pair.target(linear.weight, 1), linear.weight.detach())
        assert pair.output_error(linear.weight, 0 * linear.weight, 1) == 0


def test_pairs_of_modules_that_are_called_twice():
    dense = Shared()
    model, x = copy.deepcopy(dense), torch.randn(6, 4)
    with torch.no_grad():
        model.first.weight *= 1.5
        rows = [(network.first(x), x) for network in (model, dense)]
    calls = moments.call_order(model, x, ["first", "tied", "unused"])
    assert calls == {"first": 2, "tied": 1}
    got = paired_moments(model, dense, [x], {"first": 2})["first"]
    x, y = (torch.cat([x, after]).double() for after, x in rows)
    check(got.moment, expected(x[None]))
    check(got.cross, y.T @ x / len(x))
    assert "unused" not in paired_moments(model, dense, [rows[0][1]], {"tied": 1, "unused": 0})


SHARDS = """
import copy, sys, torch, torch.distributed as dist
from torch import nn
from cmd_ext import second_moments
from cmd_ext.moments import paired_moments
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 3))
data = [torch.randn(5, 2, 4, 4) for _ in range(5)]
def close(a, b):
    assert list(a) == list(b), (list(a), list(b))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
shared = second_moments(model, data[rank::2])
shared_diagonal = second_moments(model, data[rank::2], max_features=4)
twin = copy.deepcopy(model)
twin[0].weight.data += 0.3 * torch.randn(4, 1, 3, 3)
pair = paired_moments(model, twin, data[rank::2], {"2": 1})["2"]
one_empty = second_moments(model, data if rank else [])
messages = []
for batches, names in ((data[:2 * rank], None), ([], None), ([data[0] * (1 if rank else float("nan"))], None),
                       (data, ["0", "2"][rank:])):
    try:
        second_moments(model, batches, names)
    except (ValueError, RuntimeError) as error:
        messages.append(f"{type(error).__name__} {error}")
dist.destroy_process_group()
close(shared, second_moments(model, data))
close(shared_diagonal, second_moments(model, data, max_features=4))
alone = paired_moments(model, twin, data, {"2": 1})["2"]
torch.testing.assert_close(pair.cross, alone.cross, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(pair.energies, alone.energies, rtol=1e-5, atol=0)
close(one_empty, second_moments(model, data))
assert "empty" in messages[0], messages
assert "batch 0, first in the input of layer '0'" in messages[1], messages
assert messages[1].startswith("RuntimeError second_moments: rank 0 failed" if rank else "ValueError"), messages
assert "must want the same layers" in messages[2], messages
print("agree")
"""


def test_shards_give_the_moments_of_all_data(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert out.strip() == "agree", error
