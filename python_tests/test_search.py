"""compress(search="cmd"): trials that correct the allocation, their storage, the front."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_net import Net
from small_net import smooth_images as images
from torch import nn

import cmd_ext
from cmd_ext import UnsatisfiableError, curves, search, tables, trials
from cmd_ext.allocation import Candidate, Layer, allocate
from cmd_ext.calibrate import accuracy, batches_of, outputs
from cmd_ext.search import Assembly, Correction, stages

optuna = pytest.importorskip("optuna")

TRIALS = 12


def make_net() -> nn.Module:
    torch.manual_seed(3)
    net = Net().eval()
    net.train()(torch.cat(images()))  # statistics of the batch norm
    with torch.no_grad():
        net.out.weight *= 30  # so that the outputs tell something, of several classes
        net.out.bias -= net.eval()(torch.cat(images())).mean(0)
    return net


def labelled(net: nn.Module) -> list:
    return [(x, y.argmax(1)) for x, y in zip(images(), outputs(net, batches_of(images())), strict=True)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return make_net()


def run(net: nn.Module, data: list | None = None, **options):
    how = {"constraints": {"params": "30%"}, "n_trials": TRIALS, "n_iter": 4, "progress": False, **options}
    return cmd_ext.compress(net, images()[0], calibration=images() if data is None else data, search="cmd", **how)


@pytest.fixture(scope="module")
def found(net):
    return run(net, labelled(net))


def sizes(plan: cmd_ext.Plan) -> dict:
    return {name: (entry["rank"], entry["nnz"]) for name, entry in plan.layers.items()}


def loss_of(net: nn.Module, plan: cmd_ext.Plan) -> float:
    """What trials minimise, of a plan's network."""
    batches = batches_of(images())
    reference, model = outputs(net, batches), cmd_ext.apply_plan(make_net(), plan, calibration=images())
    return search.distance(reference, outputs(cmd_ext.recalibrate_batchnorm(model, images(), reference=net), batches))


def test_no_worse_than_the_allocation(net, found):
    start = run(net, n_trials=1)
    other = cmd_ext.compress(
        net,
        images()[0],
        calibration=images(),
        constraints={"params": "30%"},
        search="allocate",
        n_iter=4,
        progress=False,
    )
    assert found.search == "cmd"
    assert other.search == "allocate"
    assert loss_of(net, found.plan) <= loss_of(net, start.plan) * (1 + 1e-6)
    assert loss_of(net, found.plan) <= loss_of(net, other.plan) * (1 + 1e-6)
    assert found.stats.params[1] <= 0.3 * found.stats.params[0]


def test_every_trial_is_told(found):
    assert [row["trial"] for row in found.trials] == [*range(TRIALS)]
    first, *others = found.trials
    assert first["correction"]["coefficient"] == 0
    assert first["correction"]["power"] == 1
    assert not any(first["correction"]["shifts"].values())
    best = min(row["loss"] for row in found.trials if row["loss"] is not None)
    assert best < first["loss"]
    for row in found.trials:
        if row["loss"] is not None:
            assert row["costs"]["params"] <= 0.3 * found.stats.params[0]
    assert any("move" in row for row in others)


def test_same_seed_same_plan(net, found):
    again = run(net, labelled(net))
    assert again.plan == found.plan
    assert [row["loss"] for row in again.trials] == [row["loss"] for row in found.trials]
    other = run(net, labelled(net), seed=1)
    assert [row["loss"] for row in other.trials] != [row["loss"] for row in found.trials]


def test_the_front_falls_in_every_cost(found):
    assert len(found.front) >= 5
    for row in found.front:
        for other in found.front:
            better = all(other[kind] <= row[kind] for kind in ("params", "macs", "bytes", "loss"))
            assert other is row or not better
    assert [row["params"] for row in found.front] == sorted(row["params"] for row in found.front)
    assert all(0 <= row["accuracy"] <= 1 for row in found.front)
    json.dumps(found.front)
    json.dumps(found.trials)


def test_at_answers_without_a_search(net, found, monkeypatch):
    monkeypatch.setattr(curves, "network_curves", None)
    monkeypatch.setattr(search, "search", None)
    total = found.stats.params[0]
    for share in ("20%", "45%", 0.3 * total):
        plan = found.at(params=share)
        model = cmd_ext.apply_plan(make_net(), plan)
        limit = share if isinstance(share, float) else float(share[:-1]) / 100 * total
        assert 0.9 * limit < cmd_ext.profile(model, images()[0]).total.params <= limit
    both = found.at(params="45%", macs="25%")
    assert cmd_ext.profile(cmd_ext.apply_plan(make_net(), both), images()[0]).total.macs <= 0.25 * found.stats.macs[0]
    with pytest.raises(UnsatisfiableError, match="params <= 1 parameters cannot be met"):
        found.at(params=1)
    with pytest.raises(ValueError, match="constraint must be one of"):
        found.at(size="20%")


def test_at_a_drop_of_the_score_takes_the_smallest_measured_network(net, found):
    plan = found.at(score_drop=0.1)
    row = next(row for row in found.front if row["accuracy"] >= 0.9)
    model = cmd_ext.apply_plan(make_net(), plan)
    assert cmd_ext.profile(model, images()[0]).total.params == row["params"]
    with pytest.raises(ValueError, match="stands alone"):
        found.at(score_drop=0.1, params="20%")
    with pytest.raises(ValueError, match="needs search='cmd' with class targets"):
        run(net, n_trials=1).at(score_drop=0.1)


def test_at_of_the_other_searches(net):
    for kind in ("allocate", "uniform"):
        result = cmd_ext.compress(net, images()[0], constraints={"params": "60%"}, search=kind, progress=False)
        smaller = cmd_ext.apply_plan(make_net(), result.at(params="30%"))
        assert cmd_ext.profile(smaller, images()[0]).total.params <= 0.3 * result.stats.params[0]


def test_the_model_and_the_random_state_are_left_alone(net):
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    run(net, n_trials=3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_filters_overrides_and_round_to_hold_in_every_trial(net):
    seen = []
    original = Assembly.measure

    def measure(self, choice, *args):
        seen.append(choice)
        return original(self, choice, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assembly, "measure", measure)
        options = {"filter_fn": lambda name, _: name != "second", "overrides": {"head": {"rank": 3, "nnz": 7}}}
        result = run(net, constraints={"params": "60%"}, round_to=4, **options)
    assert len(seen) > 5
    for choice in seen:
        assert "second" not in choice
        assert "head" not in choice
        assert all(c.rank is None or c.rank % 4 == 0 for c in choice.values())
    assert result.plan.skipped["second"] == "excluded by filter_fn"
    assert sizes(result.plan)["head"] == (3, 7)


def test_a_drop_of_the_score(net):
    data = labelled(net)
    small = run(net, data, constraints={"score_drop": 0.2}, n_trials=3)
    dense, score = small.stats.score
    assert dense - score <= 0.2
    assert small.stats.params[1] < small.stats.params[0]


def test_the_allocation_stands_in_where_the_corrections_cannot_meet_the_goal(net, monkeypatch):
    job, tried = sys.modules["cmd_ext.compress"]._Job, []  # cmd_ext.compress is the function
    solve = job.solve

    def failing(self, problem):
        tried.append(problem)
        if len(tried) <= failures:
            raise UnsatisfiableError("latency cannot be met", 1.0, "latency")
        return solve(self, problem)

    monkeypatch.setattr(job, "solve", failing)
    failures = 1
    assert run(net).stats.params[1] <= 0.3 * run(net).stats.params[0]
    assert tried[0].curves != tried[1].curves
    tried.clear()
    failures = 2
    with pytest.raises(UnsatisfiableError):
        run(net)


def test_without_data_or_optuna_it_is_the_allocation(net, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "cmd_ext"):
        result = cmd_ext.compress(net, images()[0], constraints={"params": "50%"}, progress=False)
    assert result.search == "allocate"
    assert "without: 'allocate'" in caplog.text
    monkeypatch.setattr(trials, "available", lambda: False)
    with caplog.at_level(logging.WARNING, "cmd_ext"):
        result = run(net)
    assert result.search == "allocate"
    assert "needs Optuna, `pip install 'cmd_ext[search]'`" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_trials": 0}, ValueError, "n_trials must be >= 1, got 0"),
        ({"checkpoint": "/nowhere/at/all.db"}, OSError, "there is no folder /nowhere/at"),
        ({"checkpoint": "nothing://host/base"}, OSError, "checkpoint nothing://host/base cannot be opened"),
    ],
)
def test_bad_arguments_are_named(net, options, error, message):
    with pytest.raises(error, match=message):
        run(net, **options)


def test_weights_only_fits_are_assembled_too(net):
    result = run(net, data_aware=False, n_trials=4)
    assert not result.plan.data_aware
    assert [row["trial"] for row in result.trials] == [0, 1, 2, 3]


# Corrections ----------------------------------------------------------------------------------------------------------


def curve(*points: tuple[int, int, float]) -> list[Candidate]:
    dense = Candidate(None, None, 0.0, 0.0, {"params": 100.0})
    return [dense, *(Candidate(r, k, loss, loss, {"params": 10.0 * r + k}) for r, k, loss in points)]


def test_a_correction_shifts_and_bends_the_losses():
    given = {"a": curve((1, 0, 0.5), (0, 10, 0.25)), "b": curve((0, 20, 0.1))}
    got = Correction({"a": 1.0}, coefficient=0.5, power=2.0).apply(given)
    assert got["a"][0] == given["a"][0]
    assert got["a"][1].loss == pytest.approx(0.5**2 * 2.718281828 ** (1.0 - 0.5))
    assert got["a"][2].loss == pytest.approx(0.25**2 * 2.718281828)
    assert got["b"][1].loss == pytest.approx(0.01)
    assert got["a"][1].error == given["a"][1].error
    assert Correction().apply(given) == given


def test_a_shift_moves_budget_between_layers():
    points = [(0, k, 1.0 / k) for k in range(1, 90)]
    given = {name: curve(*points) for name in "ab"}
    fixed, limits = {"params": 0.0}, {"params": 60.0}
    even = allocate(given, fixed, limits)
    moved = allocate(Correction({"a": 1.0}).apply(given), fixed, limits)
    assert even["a"].nnz == pytest.approx(even["b"].nnz, abs=1)
    assert moved["a"].nnz > 1.3 * moved["b"].nnz
    assert Correction().moved("a", 0.5).moved("a", -0.25).shifts == {"a": 0.25}


def layer(name: str, positions: int, size: int = 10) -> Layer:
    return Layer(name, torch.empty(size, 10), size, 10, 1, positions)


def test_stages_are_parts_of_one_map_size():
    names = [[*"abc"], [*"de"], ["f"]]
    layers = [layer(n, p) for part, p in zip(names, (64, 16, 1), strict=True) for n in part]
    assert stages(layers) == names
    assert stages([layer(n, 4) for n in "abcdefgh"]) == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    assert stages([layer("a", 4)]) == [["a"]]
    assert stages([]) == []
    many = stages([layer(str(i), i + 1) for i in range(20)])
    assert len(many) == search.STAGES
    assert [n for part in many for n in part] == [str(i) for i in range(20)]


# Storage --------------------------------------------------------------------------------------------------------------

NAMES = ("trials.db", "trials.log")


def spy_fits(monkeypatch) -> list:
    calls, original = [], curves.decompose_path_batch

    def fits(weights, *args, **options):
        calls.append(len(weights))
        return original(weights, *args, **options)

    monkeypatch.setattr(curves, "decompose_path_batch", fits)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_taken_up(net, found, tmp_path, monkeypatch, name):
    calls, path, data = spy_fits(monkeypatch), tmp_path / name, labelled(net)
    first = run(net, data, checkpoint=path)
    assert first.plan == found.plan
    assert calls
    calls.clear()
    measured = []
    monkeypatch.setattr(Assembly, "measure", lambda *_: measured.append(1))
    again = run(net, data, checkpoint=path)
    assert again.plan == first.plan
    assert again.trials == first.trials
    assert again.front == first.front
    assert not calls
    assert not measured


def test_another_target_takes_the_fits_and_other_weights_none(net, tmp_path, monkeypatch):
    calls, path = spy_fits(monkeypatch), tmp_path / "trials.db"
    run(net, checkpoint=path, n_trials=2)
    files = {file.name for file in tables.folder_of(path).iterdir()}
    calls.clear()
    other = run(net, checkpoint=path, n_trials=2, constraints={"macs": "40%"})
    assert not calls
    assert [row["trial"] for row in other.trials] == [0, 1]
    changed = make_net()
    with torch.no_grad():
        changed.out.bias += 1e-3  # the losses of every layer follow from all weights
    run(changed, checkpoint=path, n_trials=2)
    assert calls
    calls.clear()
    run(net, [x + 1e-3 for x in images()], checkpoint=path, n_trials=2)
    assert calls
    assert len({file.name for file in tables.folder_of(path).iterdir()}) == 3 * len(files)


def test_a_damaged_table_is_made_anew(net, tmp_path, monkeypatch):
    path = tmp_path / "trials.db"
    first = run(net, checkpoint=path, n_trials=2)
    victim = sorted(tables.folder_of(path).iterdir())[0]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    calls = spy_fits(monkeypatch)
    assert run(net, checkpoint=path, n_trials=2).plan == first.plan
    assert calls
    assert victim.read_bytes() == content


def test_more_trials_go_on_from_the_old_ones(net, tmp_path):
    path = tmp_path / "trials.db"
    few = run(net, checkpoint=path, n_trials=4)
    many = run(net, checkpoint=path, n_trials=8)
    assert many.trials[:4] == few.trials
    assert len(many.trials) == 8


def test_an_unfinished_line_of_a_journal_is_cut_off(tmp_path):
    path = tmp_path / "trials.log"
    study = trials.Study(path, "one", {"x": (0.0, 1.0)}, 0)
    study.run(2, lambda i, _: (study.suggest(i), {}), lambda *_: (1.0, {}), lambda _: None)
    with open(path, "ab") as file:
        file.write(b'{"op_code": 5, "half')
    again = trials.Study(path, "one", {"x": (0.0, 1.0)}, 0)
    again.run(3, lambda i, _: (again.suggest(i), {}), lambda *_: (2.0, {}), lambda _: None)
    assert [trial.loss for trial in trials.Study(path, "one", {}, 0).trials()] == [1.0, 1.0, 2.0]


def test_an_error_in_a_trial_leaves_its_number_open(tmp_path):
    study = trials.Study(tmp_path / "t.db", "one", {"x": (0.0, 1.0)}, 0)

    def fails(*_):
        raise FloatingPointError("no luck")

    with pytest.raises(FloatingPointError, match="no luck"):
        study.run(1, lambda i, _: ({}, {}), fails, lambda _: None)
    assert study.trials() == []
    done = study.run(1, lambda i, _: ({}, {}), lambda *_: (1.0, {"more": 2}), lambda _: None)
    assert [(t.index, t.loss, t.result) for t in done] == [(0, 1.0, {"more": 2})]


def test_a_loss_that_is_no_number_is_the_worst(tmp_path):
    study = trials.Study(tmp_path / "t.db", "one", {"x": (0.0, 1.0)}, 0)
    losses = iter([float("nan"), 1.0, float("inf")])
    done = study.run(3, lambda i, _: (study.suggest(i), {}), lambda *_: (next(losses), {}), lambda _: None)
    assert [trial.loss for trial in done] == [trials.WORST, 1.0, trials.WORST]
    assert search.best_of(done).index == 1


def test_optuna_keeps_its_own_verbosity(tmp_path):
    before = optuna.logging.get_verbosity()
    study = trials.Study(None, "one", {"x": (0.0, 1.0)}, 0)
    study.run(1, lambda i, _: (study.suggest(i), {}), lambda *_: (1.0, {}), lambda _: None)
    assert optuna.logging.get_verbosity() == before


SCRIPT = """
import json, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_search import labelled, make_net, run, sizes
from cmd_ext.search import Assembly
original = Assembly.measure
def slow(self, *args):
    time.sleep({pause})
    return original(self, *args)
Assembly.measure = slow
net = make_net()
print("ready", flush=True)
result = run(net, labelled(net), checkpoint=sys.argv[1], n_trials=int(sys.argv[2]))
print(json.dumps([result.plan.to_json(), [row["loss"] for row in result.trials]]))
"""


def start(path: Path, count: int = TRIALS, pause: float = 0.0) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(Path(__file__).parent), pause=pause)
    environment = {**os.environ, "CMD_EXT_AUTOTUNE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(path), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen) -> list:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def check_storage(path: Path, count: int = TRIALS) -> None:
    """Every number is there once among the trials that count, and no file is broken or left over."""
    storage = trials.open_storage(path)
    for summary in optuna.get_all_study_summaries(storage):
        done = [
            trial.user_attrs["index"]
            for trial in optuna.load_study(study_name=summary.study_name, storage=storage).trials
            if trial.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        ]
        assert len(done) == len(set(done))
        if "front" not in summary.study_name:
            assert sorted(done) == [*range(count)]
    for file in tables.folder_of(path).glob("*.safetensors"):
        assert tables._read(file, 1) is not None


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment_it_ends_with_the_same_plan(tmp_path, name):
    whole = ended(start(tmp_path / f"whole-{name}"))
    generator, path = random.Random(5), tmp_path / name
    for _ in range(5):
        process = start(path, pause=0.1)
        assert process.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.0, 3.0))  # in the profile, the fits, the trials or after them
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert ended(start(path)) == whole
    check_storage(path)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_share_the_trials(tmp_path, name):
    path = tmp_path / name
    both = [start(path, 16, pause=0.2) for _ in range(2)]
    first, second = (ended(process) for process in both)
    assert first == second
    assert len(first[1]) == 16
    check_storage(path, 16)
    storage = trials.open_storage(path)
    study = next(s for s in optuna.get_all_study_summaries(storage) if "front" not in s.study_name)
    owners = {t.user_attrs["owner"] for t in optuna.load_study(study_name=study.study_name, storage=storage).trials}
    assert len(owners) == 2


@pytest.mark.data
def test_a_tenth_of_a_trained_network(data_dir):
    from cmd_ext import data, models, uniform

    model = models.create("resnet20").eval()
    models.load_weights(model, data_dir / "pretrained" / "resnet20.safetensors")
    mean, std = models.NORMALIZATION["resnet20"]
    train, test = (data.open_dataset(data_dir / "cifar10.tar", part, mean, std) for part in ("train", "test"))
    calibration = list(data.loader(train, 128, shuffle=True, seed=0, limit=256))
    tests = list(data.loader(test, 500, limit=1000))

    def score(kind: str) -> tuple[float, float]:
        how = {"budget": 0.1, "search": kind, "seed": 0, "progress": False}
        more = {"n_trials": 8} if kind == "cmd" else {}
        return uniform.budget_trial(model, calibration, lambda net: accuracy(net, tests), **how, **more).scores

    even, found = score("uniform"), score("cmd")
    assert found[0] > even[0] + 0.1
    assert found[1] > even[1]
