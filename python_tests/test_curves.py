"""Error curves from calibration data, and what allocate makes of them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from small_net import Net
from small_net import smooth_images as images
from torch import nn

import cmd_ext
from cmd_ext import UnsatisfiableError, allocation, candidates, curves, data, models, uniform
from cmd_ext.allocation import Candidate, Layer
from cmd_ext.calibrate import accuracy, batches_of, divergence, outputs
from cmd_ext.curves import network_curves, sizes

KINDS = ("params", "macs", "bytes")


NAMES = ("first", "second", "grouped", "head")


def layers_of(net: nn.Module, names=NAMES, forms=("channel",)) -> list[Layer]:
    found = []
    for name in names:
        module = net.get_submodule(name)
        weight, groups = module.weight, getattr(module, "groups", 1)
        found.append(Layer(name, weight, len(weight), weight[0].numel(), groups, 1, forms))
    return found


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    net = Net().eval()
    with torch.no_grad():
        net.out.weight *= 30  # so that the outputs tell something
    return net


@pytest.fixture(scope="module")
def found(net) -> tuple[dict, dict, list, list]:
    """Curves of fits to data, of fits to the weights, and the data with the outputs."""
    batches = batches_of(images())
    reference = outputs(net, batches)
    aware = network_curves(net, layers_of(net), batches, reference)
    plain = network_curves(net, layers_of(net), batches, reference, data_aware=False)
    return aware, plain, batches, reference


def facts(found: dict[str, list[Candidate]]) -> dict:
    return {name: [(c.rank, c.nnz, c.error, c.loss) for c in curve] for name, curve in found.items()}


def test_a_curve_falls_from_all_to_nothing(found):
    for curve in found[0].values():
        dense, *others = curve
        assert (dense.rank, dense.loss, dense.error) == (None, 0.0, 0.0)
        assert len(others) > 30
        assert all(0 < c.error <= 1 and c.costs["params"] < dense.costs["params"] for c in others)
        for b in others:  # whatever costs more has a lower error
            assert all(a.error > b.error for a in others if all(a.costs[k] < b.costs[k] for k in KINDS))
        by_error = sorted(others, key=lambda c: c.error)
        assert [c.loss for c in by_error] == sorted(c.loss for c in others)
        assert by_error[0].error < 0.1 < 0.2 < by_error[-1].error


class Shortcut(nn.Module):
    """Past the middle layer leads a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        return self.last((x + self.middle(x)).relu()).mean((2, 3))


@pytest.fixture(scope="module")
def shortcut() -> Shortcut:
    torch.manual_seed(0)
    return Shortcut().eval()


def test_a_layer_that_something_leads_past_may_go(shortcut):
    x, names = torch.randn(12, 8, 6, 6), ["first", "middle", "last"]
    before = {name: tensor.clone() for name, tensor in shortcut.state_dict().items()}
    assert candidates.bypassed(shortcut, names, x) == {"middle"}
    assert candidates.bypassed(shortcut, names, (x,)) == {"middle"}
    assert candidates.bypassed(shortcut, names, x[:1]) == set(), "one input tells nothing"
    assert all(torch.equal(before[name], tensor) for name, tensor in shortcut.state_dict().items())


@pytest.mark.parametrize("data_aware", [True, False])
def test_the_loss_without_a_layer_is_measured(shortcut, data_aware):
    batches = batches_of([torch.randn(16, 8, 6, 6) for _ in range(2)])
    layers, reference, steps = layers_of(shortcut, ["first", "middle"]), outputs(shortcut, batches), []
    layers[1].removable = True
    how = {"data_aware": data_aware, "step": lambda: steps.append(1)}
    found = network_curves(shortcut, layers, batches, reference, **how)
    assert len(steps) == 2 * curves.STEPS
    without = copy.deepcopy(shortcut)
    without.middle.weight.data.zero_()
    (gone,) = [c for c in found["middle"] if c.rank == c.nnz == 0]
    assert gone.loss == pytest.approx(divergence(reference, outputs(without, batches)), rel=1e-4)
    assert (gone.error, gone.costs["params"], gone.costs["macs"]) == (1.0, 0, 0)
    assert gone.loss >= max(c.loss for c in found["middle"])
    assert not [c for c in found["first"] if c.rank == c.nnz == 0]
    assert [c for c in sizes(layers)["middle"] if c.rank == c.nnz == 0]


def test_every_kind_of_split_is_offered(net):
    batches = batches_of(images())
    points = curves._points(layers_of(net, ["grouped"])[0], 1)
    assert {coefficient for _, coefficient in points} == set(curves.COEFFICIENTS)
    for (budget, coefficient), (rank, nnz) in points.items():
        kept = rank * (32 + 2 * 72) + nnz
        assert kept <= budget * 32 * 72
        assert coefficient == 0 or kept == int(budget * 32 * 72 + 1e-9)
        assert (rank == 0, nnz == 0) == (coefficient == 1, coefficient == 0)
    even = network_curves(net, layers_of(net), batches, outputs(net, batches), round_to=2)
    assert all(c.rank % 2 == 0 for curve in even.values() for c in curve[1:])
    assert any(c.rank > 0 for curve in even.values() for c in curve[1:])


def test_the_error_of_a_candidate_is_that_of_its_fit(net, found):
    h = cmd_ext.second_moments(net, [x for x, _ in found[2]], NAMES)
    for layer in layers_of(net):
        within = [c for c in found[0][layer.name][1:] if c.costs["params"] >= curves.GRID[0] * layer.size]
        for candidate in within[::9]:
            fit = cmd_ext.decompose(
                layer.weight,
                rank=candidate.rank,
                nnz=candidate.nnz,
                groups=layer.groups,
                second_moment=h[layer.name],
            )
            least, most = 0.8 * fit.output_error - 0.01, 1.1 * fit.output_error + 0.01  # a path may be the better one
            assert least < candidate.error**0.5 < most, (layer.name, candidate)


def test_fits_to_data_have_the_lower_curves(net, found):
    """At equal size the network's outputs move less."""
    aware, plain = found[:2]

    def at(curve: list[Candidate], share: float) -> float:
        return min(c.loss for c in curve[1:] if c.costs["params"] <= share * curve[0].costs["params"])

    for name in NAMES:
        for share in (0.1, 0.2, 0.4):
            assert at(aware[name], share) < 0.7 * at(plain[name], share), (name, share)


def test_losses_are_those_of_the_network_with_one_layer_compressed(net, found):
    *_, batches, reference = found
    for share in (0.08, 0.2, 0.4):
        candidate = min(found[0]["second"][1:], key=lambda c: abs(c.costs["params"] / 2304 - share))
        plan = {"rank": candidate.rank, "nnz": candidate.nnz, "shape": [16, 144], "groups": 1}
        alone = cmd_ext.apply_plan(Net(), cmd_ext.Plan({})).eval()
        alone.load_state_dict(net.state_dict())
        cmd_ext.apply_plan(alone, cmd_ext.Plan({"second": plan}, data_aware=True), calibration=batches)
        got = divergence(reference, outputs(alone, batches))
        assert 0.4 * got < candidate.loss < 2.5 * got, share


def test_the_model_and_the_random_state_are_left_alone_and_the_seed_decides(net, found):
    batches, reference = found[2:]
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    again = network_curves(net, layers_of(net), batches, reference)
    assert facts(again) == facts(found[0])
    assert torch.equal(random, torch.random.get_rng_state())
    large = batches_of([nn.functional.interpolate(x, 32) for x in images(size=2)])  # more than 256 positions an image
    options = {"reference": outputs(net, large)}
    one, other = (network_curves(net, layers_of(net), large, seed=seed, **options) for seed in (0, 1))
    assert facts(one) == facts(network_curves(net, layers_of(net), large, seed=0, **options))
    assert facts(one)["first"] != facts(other)["first"]
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_a_failing_measurement_leaves_the_weights(net, found, monkeypatch):
    monkeypatch.setattr(curves, "divergence", lambda *_: 1 / 0)
    before = net.first.weight.clone()
    with pytest.raises(ZeroDivisionError):
        network_curves(net, layers_of(net), *found[2:])
    assert torch.equal(before, net.first.weight)


def test_little_memory_takes_more_passes_and_gives_the_like(net, found, monkeypatch):
    passes, collect = [], curves.second_moments

    def counted(model, batches, names, **options):
        passes.append(names)
        return collect(model, batches, names, **options)

    monkeypatch.setattr(curves, "second_moments", counted)
    got = network_curves(net, layers_of(net), *found[2:], memory=8 * 144**2)
    assert passes == [["first"], ["second"], ["grouped", "head"]]
    for name in NAMES:
        assert [c.error for c in got[name]] == pytest.approx([c.error for c in found[0][name]], rel=0.05)


def test_steps_and_time_are_told(net, found, caplog):
    caplog.set_level(logging.INFO, "cmd_ext.curves")
    steps = []
    network_curves(net, layers_of(net), *found[2:], step=lambda: steps.append(1))
    assert len(steps) == curves.STEPS * len(NAMES)
    assert "error curves: 4 layers, 4 of them by" in caplog.text
    assert "16 losses measured in" in caplog.text
    steps.clear()
    network_curves(net, layers_of(net), [], [], step=lambda: steps.append(1))
    assert len(steps) == len(NAMES)


def test_layers_that_are_fitted_to_their_weights_have_such_curves(net, found, caplog):
    caplog.set_level(logging.INFO, "cmd_ext.curves")
    net.aside = nn.Linear(64, 32)  # no batch reaches it
    try:
        mixed = [*layers_of(net, ["first"]), *layers_of(net, ["second"], ("spatial",)), *layers_of(net, ["aside"])]
        got = network_curves(net, mixed, *found[2:])
    finally:
        del net.aside
    assert [*got] == ["first", "second", "aside"]
    assert {c.form for c in got["second"][1:] if c.rank} == {"spatial"}
    assert len(got["first"]) > 30
    assert max(c.loss for c in got["aside"]) < 1e-6
    assert "error curves: 3 layers, 1 of them" in caplog.text


def test_the_smallest_sizes_are_those_of_the_curves(net, found):
    least = sizes(layers_of(net))
    for name in NAMES:
        for kind in KINDS:
            assert min(c.costs[kind] for c in least[name]) == min(c.costs[kind] for c in found[0][name])


@pytest.mark.parametrize("kind", KINDS)
def test_compress_meets_its_limit_and_spends_it(net, kind):
    how = {"constraints": {kind: "50%"}, "calibration": images(), "search": "allocate", "progress": False}
    result = cmd_ext.compress(net, images()[0], **how)
    dense, kept = getattr(result.stats, kind)
    assert 0.485 * dense < kept <= 0.5 * dense
    shares = [row["share"] for row in result.front]
    losses = [row["loss"] for row in result.front]
    assert shares == sorted(shares)
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(UnsatisfiableError, match=f"{kind} <= "):
        cmd_ext.compress(net, images()[0], constraints={kind: 1}, calibration=images(), progress=False)


def test_a_limit_out_of_reach_is_told_before_any_fit(net, monkeypatch):
    monkeypatch.setattr(curves, "network_curves", lambda *_, **__: pytest.fail("fitted"))
    with pytest.raises(UnsatisfiableError):
        cmd_ext.compress(net, images()[0], constraints={"params": "1%"}, calibration=images(), progress=False)


def test_allocation_gives_more_to_the_layer_that_matters(net, found, monkeypatch):
    measure, limits = curves.Meter.losses_of, {"params": 0.2 * 2 * 2304}

    def kept(factor: float) -> float:
        def scaled(meter, name, fits):
            return [loss * (factor if name == "second" else 1.0) for loss in measure(meter, name, fits)]

        monkeypatch.setattr(curves.Meter, "losses_of", scaled)
        got = network_curves(net, layers_of(net, ["first", "second"]), *found[2:])
        choice = allocation.allocate(got, {"params": 0.0}, limits)
        assert 0.97 * limits["params"] < allocation.total_costs(choice, {"params": 0.0})["params"] <= limits["params"]
        return choice["second"].costs["params"]

    assert kept(0.1) < kept(1.0) < kept(10.0)


def test_budget_trial_allocates_the_values_that_uniform_keeps(net):
    batches = [(x, torch.randint(10, (8,), generator=torch.Generator().manual_seed(1))) for x in images()]
    trials = {
        kind: uniform.budget_trial(net, batches, lambda _: 0.0, budget=0.2, search=kind, recalibrate="never")
        for kind in ("uniform", "allocate")
    }
    (even, whole), (kept, same) = trials["uniform"].values, trials["allocate"].values
    assert whole == same == 3 * 2304
    assert 0.96 * even < kept <= 0.2 * whole
    assert trials["allocate"].search_seconds > trials["uniform"].search_seconds

    def distance(trial: uniform.Trial) -> float:
        return divergence(outputs(net, batches), outputs(trial.model, batches))

    assert distance(trials["allocate"]) < distance(trials["uniform"])
    whole_again = uniform.budget_trial(net, batches, lambda _: 0.0, budget=1.0, search="allocate", recalibrate="never")
    assert whole_again.values == (whole, whole)
    assert not whole_again.output_errors
    for options, message in (
        ({"search": "some"}, "search must be one of cmd, allocate, uniform, got 'some'"),
        ({"search": "allocate", "sparse_coefficient": 0.5}, "sparse_coefficient is for search='uniform', got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            uniform.budget_trial(net, batches, lambda _: 0.0, budget=0.2, **options)


@pytest.mark.data
def test_allocation_of_a_tenth_of_a_trained_network(data_dir):
    mean_std = models.NORMALIZATION["resnet20"]
    train, test = (data.open_dataset(data_dir / "cifar10.tar", split, *mean_std) for split in ("train", "test"))
    net = models.load_weights(models.create("resnet20"), data_dir / "pretrained" / "resnet20.safetensors").eval()
    calibration = list(data.loader(train, 128, shuffle=True, seed=0, limit=512))

    def evaluate(model: nn.Module) -> float:
        return accuracy(model, data.loader(test, 250, limit=2000))

    even = uniform.budget_trial(net, calibration, evaluate, budget=0.1, sparse_coefficient=0.85)
    allocated = uniform.budget_trial(net, calibration, evaluate, budget=0.1, search="allocate")
    assert allocated.values[0] <= even.values[0] + 18
    assert allocated.scores[0] > even.scores[0] + 0.06
    assert allocated.scores[1] > even.scores[1] - 0.015
    assert allocated.losses[1] < even.losses[1]
