"""The model of a layer's milliseconds on the CPU: its fit, its files, and when it measures."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cmd_ext import CMDLinear, cpu_model, dispatch
from cmd_ext.cpu_model import DEFAULTS
from cmd_ext.work import Work

CONV = Work(256, 2304, 1, 32, 29491, 1568, 401408, 401408, torch.float32, True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_model, "_loaded", {})


def test_fit_finds_constants_that_are_not_negative():
    rng = np.random.default_rng(0)
    work, constants = rng.random((40, 5)) * [1, 1e6, 1e4, 1e8, 10], np.array([1e-4, 1e-9, 0, 2e-11, 3e-6])
    found = cpu_model.fit([(row, row @ constants) for row in work])
    np.testing.assert_allclose(found, constants, rtol=1e-3, atol=1e-12)
    assert min(cpu_model.fit([(row, row @ (constants * [1, 1, 1, 1, -1]) + 1e-3) for row in work])) >= 0


def test_fit_weighs_relative_errors():
    """A microsecond and a second of which no constant predicts both: each is off by the same share."""
    small, large = cpu_model.fit([([1.0], 1e-6), ([1.0], 2e-6)]), cpu_model.fit([([1.0], 1.0), ([1.0], 2.0)])
    assert large[0] == pytest.approx(1e6 * small[0])
    assert 1 < large[0] < 1.5


def test_predictions_grow_with_the_work():
    times = cpu_model.predict(CONV, DEFAULTS, False)
    assert set(times) == {"dense", "fused"}
    for changes in ({"rank": 64}, {"nnz": 60000}, {"tokens": 2 * CONV.tokens, "inputs": 802816, "outputs": 802816}):
        assert cpu_model.predict(dataclasses.replace(CONV, **changes), DEFAULTS, False)["fused"] > times["fused"]
    assert cpu_model.predict(CONV, DEFAULTS, True)["dense"] > times["dense"]
    assert cpu_model.predict(CONV, DEFAULTS, True)["fused"] == times["fused"]
    doubled = cpu_model.predict(dataclasses.replace(CONV, dtype=torch.float64), DEFAULTS, False)
    assert doubled["dense"] == pytest.approx(2 * times["dense"])


def test_an_empty_sparse_branch_may_be_low_rank_or_dense():
    cpu = torch.device("cpu")
    thin = dataclasses.replace(CONV, nnz=0)
    assert set(cpu_model.predict(thin, DEFAULTS, False)) == {"dense", "fused", "lowrank"}
    assert dispatch.choose(thin, cpu, False) in ("fused", "lowrank")
    assert dispatch.choose(dataclasses.replace(thin, rank=256), cpu, False) == "dense"


def test_a_layer_without_branches_costs_its_outputs_alone():
    def of(**sizes) -> float:
        work = Work(64, 576, 1, 0, 0, 4096, 1 << 18, 1 << 18, torch.float32, True)
        return cpu_model.predict(dataclasses.replace(work, **sizes), cpu_model.DEFAULTS, False)["lowrank"]

    assert of() == of(inputs=0, tokens=1) < of(outputs=1 << 19)
    assert of() < min(of(rank=1), of(rank=1, inputs=0))


def test_measured_rates_are_kept_for_later_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("CMD_EXT_AUTOTUNE", "1")
    measured = dataclasses.replace(DEFAULTS, conv_dense=(1.0, 2.0, 3.0, 4.0, 5.0))
    fits = []
    monkeypatch.setattr(cpu_model, "fit_rates", lambda: fits.append(1) or measured)
    assert cpu_model.load_rates() == cpu_model.load_rates() == measured
    monkeypatch.setattr(cpu_model, "_loaded", {})
    assert cpu_model.load_rates() == measured
    assert (len(fits), len([*(tmp_path / "cmd_ext").iterdir()])) == (1, 1)


def test_nothing_is_measured_where_it_would_be_in_the_way(monkeypatch):
    monkeypatch.setattr(cpu_model, "fit_rates", lambda: pytest.fail("measured"))
    monkeypatch.setenv("CMD_EXT_AUTOTUNE", "1")
    assert cpu_model.may_measure()
    with FlopCounterMode(display=False):
        assert cpu_model.load_rates() == DEFAULTS
    torch.func.vmap(lambda x: cpu_model.load_rates() and x)(torch.ones(2))
    assert not cpu_model._loaded, "it may be measured later"
    cpu_model._loaded[torch.get_num_threads()] = dataclasses.replace(DEFAULTS, conv_dense=(1.0,) * 5)
    assert cpu_model.load_rates() != DEFAULTS
    monkeypatch.setenv("CMD_EXT_AUTOTUNE", "0")
    assert cpu_model.load_rates() == DEFAULTS


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"conv_dense": 1}', json.dumps({"conv_dense": [1, 2]})])
def test_a_file_without_rates_counts_as_none(tmp_path, text):
    file = tmp_path / "rates.json"
    file.write_text(text)
    assert cpu_model.read_rates(file) is None


@pytest.mark.parametrize("values", [[], [1, 2], [0] * 5, [-1, 1, 1, 1, 1], [float("nan")] * 5, ["x"] * 5])
def test_wrong_constants_count_as_none(tmp_path, values):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({**dataclasses.asdict(DEFAULTS), "conv_dense": values}))
    assert cpu_model.read_rates(file) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cpu_model.save_rates(tmp_path / "file" / "below" / "rates.json", DEFAULTS)


def test_a_measurement_gives_rates_that_can_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_model, "CONVOLUTIONS", ((3, 4, 3, 8, 1, 1), (4, 4, 1, 8, 2, 2)))
    monkeypatch.setattr(cpu_model, "LINEARS", ((8, 4, 1), (8, 16, 3)))
    file = tmp_path / "rates.json"
    rates = cpu_model.fit_rates()
    cpu_model.save_rates(file, rates)
    assert cpu_model.read_rates(file) == rates


def test_measured_calls_compute_the_same_layer():
    for calls, spec in ((cpu_model.conv_calls, (3, 8, 3, 9, 2, 2)), (cpu_model.linear_calls, (16, 8, 3))):
        work, dense, fused = calls(spec, 0.25, 0.1)
        assert dense().shape == fused().shape
        assert work.outputs == dense().numel()
        assert work.tokens * work.m == work.outputs


def test_a_layer_shows_predicted_milliseconds():
    layer = CMDLinear(64, 32, rank=4, density=0.1)
    with torch.no_grad():
        layer(torch.randn(5, 64))
    milliseconds = layer.predicted_ms
    assert set(milliseconds) == {"dense", "fused"}
    assert all(0 < value < 10 for value in milliseconds.values())
    assert layer.backend == min(milliseconds, key=milliseconds.get)
