"""The final fit to the layers' outputs: what compress and apply_plan do with calibration data, and eval --budget."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
from small_net import Net, smooth_images
from torch import nn

import cmd_ext
from cmd_ext import CMDConv2d, Plan, data, models, refit, second_moments, uniform
from cmd_ext.calibrate import accuracy, batches_of
from cmd_ext.moments import output_error, paired_moments, row_energies, row_gains
from cmd_ext.refit import fit_layers

SIZES = {"first": (16, 144), "second": (16, 144), "grouped": (32, 72), "head": (64, 32)}


def plan_of(rank: int = 2, share: float = 0.15, names=SIZES, **options) -> Plan:
    layers = {
        name: {"rank": rank, "nnz": int(share * m * n), "shape": [m, n], "groups": 2 if name == "grouped" else 1}
        for name, (m, n) in SIZES.items()
        if name in names
    }
    return Plan(layers, **options)


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


def outputs_error(dense: nn.Module, got: nn.Module, batches: list[torch.Tensor]) -> float:
    with torch.no_grad():
        y, z = (torch.cat([model(x) for x in batches]) for model in (dense, got))
    return ((y - z).norm() / y.norm()).item()


def test_fits_to_data_lower_every_output_error(net):
    batches = batches_of(smooth_images())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    by_weights = fit_layers(net, plan_of().layers, batches, data_aware=False)
    by_data = fit_layers(net, plan_of().layers, batches)
    assert [*by_data] == [*SIZES]
    for name, fit in by_data.items():
        assert fit.data_aware
        assert not by_weights[name].data_aware
        assert fit.output_error < 0.8 * by_weights[name].output_error, name
        h = second_moments(net, [x for x, _ in batches], [name])[name]
        weight, groups = net.get_submodule(name).weight, plan_of().layers[name]["groups"]
        assert fit.output_error == pytest.approx(output_error(weight, fit.decomposition.to_dense(), h, groups))
        assert (fit.decomposition.rank, fit.decomposition.nnz) == (2, plan_of().layers[name]["nnz"])
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_fits_to_data_keep_the_energy_of_the_outputs(net, monkeypatch):
    batches = batches_of(smooth_images())
    x = [inputs for inputs, _ in batches]
    scaled = fit_layers(net, plan_of().layers, batches)
    monkeypatch.setattr(refit, "row_gains", lambda energies, *_: torch.ones_like(energies))
    plain = fit_layers(net, plan_of().layers, batches)
    for name, fit in scaled.items():
        module = net.get_submodule(name)
        h, groups = second_moments(net, x, [name])[name], getattr(module, "groups", 1)
        a, b, w = fit.decomposition.to_dense(), plain[name].decomposition.to_dense(), module.weight.detach()
        energies = row_energies(w, h, groups)
        gains = row_gains(energies, b, h, groups)
        torch.testing.assert_close(a, b * gains[:, None].to(b))
        some = (gains - 1).abs() < 0.2  # others lose digits, or are at the limit
        assert some.sum() > len(w) / 2
        assert (row_gains(energies, a, h, groups)[some] - 1).abs().max() < 1e-3
        assert gains.mean() > 1.001
        assert fit.output_error < 1.1 * plain[name].output_error + 1e-4, name
    dead = row_gains(energies, torch.zeros_like(w), h)
    assert torch.equal(dead, torch.ones_like(dead))
    assert row_gains(energies, 0.1 * w, h).tolist() == pytest.approx([1.5] * len(w))


def test_sequential_fits_have_the_energy_of_the_dense_outputs(net):
    batches = batches_of(smooth_images())
    fits = fit_layers(net, plan_of().layers, batches, sequential=True)
    compressed = copy.deepcopy(net)
    with torch.no_grad():
        for name, fit in fits.items():
            weight = compressed.get_submodule(name).weight
            weight.copy_(fit.decomposition.to_dense().view_as(weight))
    for name, pair in paired_moments(compressed, net, batches, dict.fromkeys(fits, 1)).items():
        ours = row_energies(fits[name].decomposition.to_dense(), pair.moment, plan_of().layers[name]["groups"])
        near = (ours / pair.energies - 1).abs() < 1e-3  # others are at the limit of the factors
        assert near.sum() > len(ours) / 2, name


def test_one_image_and_batches_that_end_early(net):
    (image,) = smooth_images(1, 1)
    fits = fit_layers(net, plan_of().layers, batches_of(x for x in [image]))
    assert all(fit.decomposition.to_dense().isfinite().all() for fit in fits.values())
    assert all(0 <= fit.output_error < 1 for fit in fits.values())
    one, few = (copy.deepcopy(net) for _ in range(2))
    cmd_ext.recalibrate_batchnorm(one, iter(smooth_images(2)), n_batches=50)  # as many as there are
    cmd_ext.recalibrate_batchnorm(few, smooth_images(2))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), few.buffers(), strict=True))
    with pytest.raises(ValueError, match="empty"):
        cmd_ext.recalibrate_batchnorm(one, iter([]))


def test_the_network_comes_closer_on_images_that_the_fit_did_not_see(net):
    fitting, unseen = smooth_images(12)[:8], smooth_images(12)[8:]
    plain = cmd_ext.apply_plan(copy.deepcopy(net), plan_of())
    aware = cmd_ext.apply_plan(copy.deepcopy(net), plan_of(), calibration=fitting)
    assert outputs_error(net, aware, unseen) < 0.7 * outputs_error(net, plain, unseen)


def test_the_better_of_the_two_fits_is_kept(net, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "cmd_ext.refit")
    fits = refit.decompose_batch

    def spoilt(weights, *, second_moments=None, **options):
        if second_moments is not None and weights[0].shape[0] == 16:
            return fits([torch.zeros_like(w) for w in weights], **options)
        return fits(weights, second_moments=second_moments, **options)

    monkeypatch.setattr(refit, "decompose_batch", spoilt)
    got = fit_layers(net, plan_of().layers, batches_of(smooth_images()))
    assert {name: fit.data_aware for name, fit in got.items()} == {
        "first": False, "second": False, "grouped": True, "head": True,
    }  # fmt: skip
    assert got["first"].output_error < 1
    assert "the one to the weights alone was as good for first, second" in caplog.text


def test_layers_of_one_shape_and_size_share_a_batch(net, monkeypatch):
    sizes, fits = [], refit.decompose_batch

    def counting(weights, **options):
        sizes.append((len(weights), "second_moments" in options))
        return fits(weights, **options)

    monkeypatch.setattr(refit, "decompose_batch", counting)
    fit_layers(net, plan_of().layers, batches_of(smooth_images()))
    assert sorted(sizes) == sorted([(2, False), (2, True), (1, False), (1, True), (1, False), (1, True)])


def test_little_memory_takes_more_passes_and_gives_the_same(net, monkeypatch):
    passes = []

    def recording(model, batches, names, **options):
        moments = second_moments(model, batches, names, **options)
        passes.append({name: moments[name].dim() for name in names})
        return moments

    monkeypatch.setattr(refit, "second_moments", recording)
    batches, layers = batches_of(smooth_images()), plan_of().layers
    whole = fit_layers(net, layers, batches)
    assert passes == [{"first": 2, "second": 2, "grouped": 3, "head": 2}]
    passes.clear()
    parts = fit_layers(net, layers, batches, memory=8 * (144**2 + 2 * 72**2))
    assert passes == [{"first": 2}, {"second": 2, "grouped": 3}, {"head": 2}]
    for name, fit in parts.items():
        assert fit.output_error == pytest.approx(whole[name].output_error, rel=1e-3)
    passes.clear()
    least = fit_layers(net, layers, batches, memory=8 * 110**2)  # less than a 144x144 moment: its diagonal
    assert passes == [{"first": 1, "second": 1, "grouped": 3, "head": 2}]
    assert least["first"].output_error != pytest.approx(whole["first"].output_error, rel=1e-2)
    assert least["head"].output_error == pytest.approx(whole["head"].output_error, rel=1e-3)
    with pytest.raises(ValueError, match="memory must be at least 1 byte, got 0"):
        fit_layers(net, layers, batches, memory=0)


def test_a_layer_that_no_batch_reaches_is_fitted_to_its_weight(net):
    net.idle = nn.Linear(32, 64)
    layers = plan_of(names=("first",)).layers
    layers["idle"] = {"rank": 2, "nnz": 9, "shape": [64, 32], "groups": 1}
    fits = fit_layers(net, layers, batches_of(smooth_images()))
    assert (fits["idle"].data_aware, fits["idle"].output_error) == (False, None)
    assert fits["first"].data_aware
    assert {*fit_layers(net, layers, batches_of(smooth_images()), sequential=True)} == {"first", "idle"}


def test_sequential_fits_go_from_the_compressed_inputs_to_the_dense_outputs(net):
    batches, plan = smooth_images(), plan_of(rank=1, share=0.05, sequential=1)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    fits = fit_layers(net, dict(reversed(plan.layers.items())), batches_of(batches), sequential=True)
    assert [*fits] == [*reversed(SIZES)]  # given back as asked for, fitted in the order of the calls
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    partly = copy.deepcopy(net)
    for name in SIZES:
        want, _ = recorded(net, name, batches)
        with torch.no_grad():
            weight = partly.get_submodule(name).weight
            weight.copy_(fits[name].decomposition.to_dense().view_as(weight))
        got, bias = recorded(partly, name, batches)
        error = ((got - want).norm() / (want - bias).norm()).item()
        assert fits[name].output_error == pytest.approx(error, rel=1e-3), name
        assert fits[name].data_aware, name
    whole = cmd_ext.apply_plan(copy.deepcopy(net), plan, calibration=batches)
    torch.testing.assert_close(whole(batches[0]), partly(batches[0]), rtol=1e-3, atol=1e-5)
    parallel = cmd_ext.apply_plan(copy.deepcopy(net), plan_of(rank=1, share=0.05), calibration=batches)
    (want, _), got, other = (recorded(network, "grouped", batches) for network in (net, whole, parallel))
    assert (got[0] - want).norm() < 0.95 * (other[0] - want).norm()


def recorded(model: nn.Module, name: str, batches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's outputs on all batches, and its bias in their shape."""
    got, layer = [], model.get_submodule(name)
    handle = layer.register_forward_hook(lambda *args: got.append(args[2]))
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    return torch.cat(got), layer.bias.detach().view(-1, *[1] * (got[0].dim() - 2))


def test_layers_of_a_sequential_fit_share_passes_and_moments_in_memory(net, monkeypatch):
    passes, pairs = [], refit.paired_moments

    def recording(model, dense, batches, calls, **options):
        passes.append({**calls})
        return pairs(model, dense, batches, calls, **options)

    monkeypatch.setattr(refit, "paired_moments", recording)
    batches, layers = batches_of(smooth_images()), plan_of().layers
    fit_layers(net, layers, batches, sequential=3)
    assert passes == [{"first": 1, "second": 1, "grouped": 1}, {"head": 1}]
    passes.clear()
    fit_layers(net, layers, batches, sequential=4, memory=2 * 8 * 144**2)
    assert passes == [{"first": 1}, {"second": 1}, {"grouped": 1, "head": 1}]


@pytest.mark.parametrize("sequential", [False, True])
def test_an_error_in_the_middle_leaves_the_network_alone(net, monkeypatch, sequential):
    state, fits = copy.deepcopy(net.state_dict()), refit.decompose_batch

    def fails(weights, **options):
        if weights[0].shape[0] == 64:
            raise KeyError("stop")
        return fits(weights, **options)

    monkeypatch.setattr(refit, "decompose_batch", fails)
    with pytest.raises(KeyError):
        cmd_ext.apply_plan(net, plan_of(sequential=sequential), calibration=smooth_images())
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert type(net.first) is nn.Conv2d
    monkeypatch.undo()
    bad = [*smooth_images(), torch.full((1, 3, 12, 12), float("nan"))]
    with pytest.raises(ValueError, match="NaN or Inf in batch 4, first in the input of layer 'first'"):
        cmd_ext.apply_plan(net, plan_of(sequential=sequential), calibration=bad)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("sequential", [False, True])
def test_compress_reports_the_output_errors_and_the_plan_repeats_the_fit(net, sequential):
    batches = smooth_images()
    options = {"constraints": {"params": "50%"}, "calibration": batches, "progress": False, "search": "uniform"}
    result = cmd_ext.compress(net, batches[0], sequential=sequential, **options)
    plain = cmd_ext.compress(net, batches[0], data_aware=False, **options)
    rows = {row.name: row for row in result.stats.layers}
    assert {*result.plan.layers} == {*SIZES}
    for name in result.plan.layers:
        assert 0 < rows[name].output_error < 1
        assert rows[name].fitted_to == "data"
    assert (rows["stem"].output_error, rows["stem"].fitted_to) == (None, None)
    table = str(result.stats)
    assert "output error" in table.splitlines()[0]
    assert f"{rows['first'].output_error:.4f}" in table
    mean = sum(rows[name].output_error for name in result.plan.layers) / len(result.plan.layers)
    assert f"mean {mean:.4f}" in table
    assert [row.output_error for row in plain.stats.layers] == [None] * len(plain.stats.layers)
    assert outputs_error(net, result.model, batches) < outputs_error(net, plain.model, batches)
    assert (result.plan.data_aware, result.plan.sequential) == (True, int(sequential))
    assert (plain.plan.data_aware, plain.plan.sequential) == (False, 0)
    plan = Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    again = cmd_ext.apply_plan(copy.deepcopy(net), plan, calibration=iter(batches))
    for name in plan.layers:
        got, want = again.get_submodule(name), result.model.get_submodule(name)
        assert torch.equal(got.dense_weight(), want.dense_weight())


def test_layers_fitted_to_their_weights_are_named_in_the_table(net, monkeypatch):
    monkeypatch.setattr(refit, "output_error", lambda *_: 0.25)
    batches = smooth_images()
    result = cmd_ext.compress(
        net, batches[0], constraints={"params": "50%"}, calibration=batches, progress=False, search="uniform"
    )
    wanted = "fitted to their weights, which gave no larger output error: first, second, grouped, head"
    assert wanted in str(result.stats)


def test_older_plans_are_read_and_a_missing_calibration_is_logged(net, caplog):
    layer = '{"rank": 1, "nnz": 4, "shape": [16, 144], "groups": 1}'
    old = f'{{"cmd_ext_plan": 1, "n_iter": 3, "layers": {{"first": {layer}}}, "skipped": {{}}}}'
    plan = Plan.from_json(old)
    assert (plan.n_iter, plan.data_aware, plan.sequential) == (3, False, 0)
    cmd_ext.apply_plan(copy.deepcopy(net), plan)
    assert not caplog.text
    plan.data_aware = True
    assert type(cmd_ext.apply_plan(net, plan).first) is CMDConv2d
    assert "the plan was fitted to calibration data; without it" in caplog.text


@pytest.mark.parametrize("kind", ["constant", "one image", "dead channels", "black"])
@pytest.mark.parametrize("coefficient", [0.0, 0.7, 1.0])
def test_degenerate_data_gives_finite_fits(net, kind, coefficient):
    x = smooth_images(1)[0]
    if kind == "constant":
        x = torch.ones_like(x)
    elif kind == "one image":
        x = x[:1]
    elif kind == "black":
        x = torch.zeros_like(x)
    with torch.no_grad():
        if kind in ("dead channels", "black"):
            net.stem.weight[::2] = 0
            net.stem.bias[::2] = -1
            if kind == "black":
                net.stem.bias.fill_(-1)
    plan = uniform.uniform_plan(net, x, 0.3, coefficient)
    fits = fit_layers(net, plan.layers, batches_of([x]))
    for name, fit in fits.items():
        assert fit.decomposition.to_dense().isfinite().all(), name
        assert 0 <= fit.output_error < 1.0001, name
    if kind == "black":
        assert fits["first"].output_error == 0


def test_16_bit_networks_are_fitted_too(net):
    half, batches = copy.deepcopy(net).to(torch.bfloat16), smooth_images()
    fits = fit_layers(half, plan_of().layers, batches_of([x.bfloat16() for x in batches]))
    full = fit_layers(net, plan_of().layers, batches_of(batches))
    for name, fit in fits.items():
        assert fit.decomposition.values.dtype == torch.bfloat16
        assert fit.output_error == pytest.approx(full[name].output_error, rel=0.1)


# One budget for all ---------------------------------------------------------------------------------------------------


def test_uniform_plan_spends_the_budget_on_all_but_the_first_convolution(net):
    net.pointwise = nn.Conv2d(32, 64, 1)
    plan = uniform.uniform_plan(net, smooth_images()[0], 0.3, 0.6)
    assert [*plan.layers] == ["first", "second", "grouped"]
    for entry in plan.layers.values():
        (m, n), groups = entry["shape"], entry["groups"]
        assert entry["rank"] == int(0.4 * 0.3 * m * n / (m + groups * n))
        assert entry["rank"] * (m + groups * n) + entry["nnz"] == int(0.3 * m * n)
    low_rank = uniform.uniform_plan(net, smooth_images()[0], 0.3, 0.0).layers["first"]
    assert (low_rank["rank"], low_rank["nnz"]) == (4, 0)
    for budget in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"budget must lie in \(0, 1\], got {budget}"):
            uniform.uniform_plan(net, smooth_images()[0], budget)
    with pytest.raises(ValueError, match="must have a convolution of 3x3 or more after its first one, got none"):
        uniform.uniform_plan(nn.Conv2d(3, 4, 3), smooth_images()[0], 0.3)


@pytest.mark.parametrize("recalibrate", ["auto", "never", "always"])
def test_budget_trial_scores_before_and_after_the_recalibration(net, recalibrate):
    batches, seen = [(x, torch.randint(10, (8,))) for x in smooth_images()], []

    def evaluate(model):
        seen.append(model.norm.running_mean.clone())
        return float(len(seen))

    trial = uniform.budget_trial(net, batches, evaluate, budget=0.3, recalibrate=recalibrate)
    assert type(net.first) is nn.Conv2d
    assert torch.equal(seen[0], net.norm.running_mean)
    if recalibrate == "never":
        assert trial.losses is None
    kept = {"never": False, "always": True}.get(recalibrate, trial.losses and trial.losses[1] < trial.losses[0])
    assert trial.recalibrated == kept
    assert trial.scores == ((1.0, 2.0) if kept else (1.0, 1.0))
    assert torch.equal(trial.model.norm.running_mean, seen[0]) != kept
    assert trial.values == (sum(int(0.3 * m * n) for m, n in ((16, 144), (16, 144), (32, 72))), 3 * 2304)
    assert 0 < trial.fit_seconds < trial.total_seconds
    with pytest.raises(ValueError, match="recalibrate must be one of auto, never, always, got 'maybe'"):
        uniform.budget_trial(net, batches, evaluate, budget=0.3, recalibrate="maybe")


# Ranks ----------------------------------------------------------------------------------------------------------------

RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
import cmd_ext
from test_refit import Net, smooth_images
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
def always(model, batches, *_):  # ranks that did it alone would differ
    cmd_ext.recalibrate_batchnorm(model, batches)
    return 1.0, 0.5
sys.modules["cmd_ext.compress"].recalibrate_if_better = always
torch.manual_seed(0)
net, batches = Net().eval(), smooth_images()
options = {"constraints": {"params": "50%"}, "progress": False, "search": "uniform"}
result = cmd_ext.compress(net, batches[0], calibration=batches[rank::2], **options)
assert not torch.equal(result.model.norm.running_mean, net.norm.running_mean)
states = [None, None]
dist.all_gather_object(states, dict(result.model.state_dict()))
dist.destroy_process_group()
assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
alone = cmd_ext.compress(net, batches[0], calibration=batches, **options)
for ours, theirs in zip(result.stats.layers, alone.stats.layers):
    assert ours.fitted_to == theirs.fitted_to
    if ours.output_error is not None:
        assert abs(ours.output_error - theirs.output_error) < 1e-3 * theirs.output_error, (ours, theirs)
print("agree")
"""

ALLOCATED = RANKS.replace('"uniform"', '"allocate"').partition("alone = ")[0] + 'print("agree")'
SEARCHED = ALLOCATED.replace('"allocate"', '"cmd", "n_trials": 6')
SLOW = """
import time
from cmd_ext.search import Assembly
measure = Assembly.measure
Assembly.measure = lambda *args: (time.sleep(0.5), measure(*args))[1]  # so that both find one to make
torch.manual_seed(0)
"""
SHARED = SEARCHED.replace('"n_trials"', '"checkpoint": sys.argv[2] + ".db", "n_trials"').replace(
    "torch.manual_seed(0)\n", SLOW
)
SHARED = SHARED.replace(
    'print("agree")',
    """
import optuna
rows = [row["loss"] for row in result.trials]
storage = "sqlite:///" + sys.argv[2] + ".db"
names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
trials = [t for n in names for t in optuna.load_study(study_name=n, storage=storage).trials if t.state.is_finished()]
assert len(rows) == 6
assert len({t.user_attrs["owner"] for t in trials}) == 2, "one rank made all trials"
print("agree")
""",
)


@pytest.mark.parametrize(
    "script", [RANKS, ALLOCATED, SEARCHED, SHARED], ids=["uniform", "allocate", "cmd", "cmd with a checkpoint"]
)
def test_ranks_with_a_share_of_the_data_get_the_same_network(tmp_path, script):
    folder = os.path.dirname(__file__)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path / "store"), folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        outputs.append((out.strip(), error))
    assert [out for out, _ in outputs] == ["agree", "agree"], outputs


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_a_trained_network_at_a_fifth_of_its_values(data_dir):
    mean_std = models.NORMALIZATION["resnet20"]
    train, test = (data.open_dataset(data_dir / "cifar10.tar", split, *mean_std) for split in ("train", "test"))
    net = models.load_weights(models.create("resnet20"), data_dir / "pretrained" / "resnet20.safetensors").eval()
    calibration = list(data.loader(train, 128, shuffle=True, seed=0, limit=512))

    def evaluate(model: nn.Module) -> float:
        return accuracy(model, data.loader(test, 250, limit=1000))

    options = {"budget": 0.2, "sparse_coefficient": 0.85}
    aware = uniform.budget_trial(net, calibration, evaluate, **options)
    plain = uniform.budget_trial(net, calibration, evaluate, data_aware=False, **options)
    assert not aware.to_weights
    errors = [sum(trial.output_errors.values()) / 18 for trial in (aware, plain)]
    assert errors[0] < 0.19
    assert errors[1] > 0.35
    assert aware.scores[1] > plain.scores[1] + 0.1
    assert aware.scores[1] > 0.74
