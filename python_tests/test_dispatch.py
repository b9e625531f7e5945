"""The choice of a layer's backend: break-even points of the model, stored rates, the rebuilt weight that is kept."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import time

import pytest
import torch

from cmd_ext import CMDConv2d, CMDLinear, cpu_model, dispatch
from cmd_ext.dispatch import DATA_SHEETS, Work, predict

A100, H100 = DATA_SHEETS[8, 0], DATA_SHEETS[9, 0]


def linear(tokens: int, density: float, dtype: torch.dtype, rank: int = 410, size: int = 4096) -> Work:
    return Work(size, size, 1, rank, int(density * size * size), tokens, tokens * size, tokens * size, dtype)


def best(work: Work, rates=H100, rebuild: bool = False) -> str:
    times = predict(work, rates, rebuild)
    return min(times, key=times.get)


@pytest.mark.parametrize("rates", [A100, H100])
def test_break_even_densities_of_large_layers(rates):
    for dtype, pays, loses in ((torch.float32, 0.1, 0.4), (torch.bfloat16, 0.01, 0.1)):
        assert best(linear(8192, pays, dtype), rates) == "fused"
        assert best(linear(8192, loses, dtype), rates) == "dense"


def test_few_tokens_are_bound_by_reading_weights():
    assert best(linear(16, 0.05, torch.bfloat16)) == "fused"
    assert best(linear(16, 0.4, torch.bfloat16)) == "dense"


def test_an_empty_sparse_branch_runs_low_rank_where_the_rank_pays():
    assert best(linear(8192, 0, torch.bfloat16)) == "lowrank"
    assert best(linear(8192, 0, torch.bfloat16, rank=4000)) == "dense"


def test_rebuilding_counts_where_it_must_be_done():
    work = linear(64, 0.05, torch.float32)
    kept, built = predict(work, H100, False), predict(work, H100, True)
    assert built["dense"] > kept["dense"] + H100.launch
    assert built["fused"] == kept["fused"]


def test_small_layers_are_bound_by_launches():
    assert best(linear(32, 0.05, torch.float32, rank=8, size=64)) == "dense"


def test_break_even_on_the_cpu():
    cpu = torch.device("cpu")
    assert dispatch.choose(linear(64, 0.05, torch.float32, rank=64), cpu, False) == "fused"
    assert dispatch.choose(linear(64, 1, torch.float32, rank=4096), cpu, False) == "dense"
    assert dispatch.choose(linear(64, 0, torch.float32, rank=64), cpu, False) == "lowrank"
    assert dispatch.choose(linear(64, 0, torch.float32, rank=4096), cpu, False) == "dense"
    assert dispatch.choose(linear(1, 0.3, torch.float32, rank=16, size=64), cpu, False) == "dense"
    conv = dataclasses.replace(linear(196, 0.05, torch.float32, rank=32, size=256), convolution=True)
    assert dispatch.choose(conv, cpu, False) == "fused"
    assert dispatch.choose(dataclasses.replace(conv, nnz=conv.m * conv.n // 2, rank=256), cpu, False) == "dense"


def test_a_device_without_kernels_computes_densely():
    meta = torch.device("meta")
    assert dispatch.choose(linear(64, 0.05, torch.float32), meta, False) == "dense"
    assert dispatch.choose(linear(64, 0, torch.float32), meta, False) == "lowrank"


@pytest.mark.parametrize(
    ("capability", "like"),
    [((7, 5), (8, 0)), ((8, 9), (8, 0)), ((9, 0), (9, 0)), ((10, 3), (10, 0)), ((13, 0), (12, 0))],
)
def test_unknown_generations_take_the_newest_older_sheet(capability, like):
    assert dispatch.data_sheet(capability) is DATA_SHEETS[like]


def test_rates_are_kept_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Properties:
        name, major, minor = "NVIDIA H100 80GB HBM3", 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    dispatch.load_rates.cache_clear()
    device = torch.device("cuda", 0)
    assert dispatch.load_rates(device) is H100
    measured = dataclasses.replace(H100, launch=5e-6)
    file = dispatch.save_rates(device, measured)
    assert (file.name, [*file.parent.iterdir()]) == ("nvidia-h100-80gb-hbm3.json", [file])
    assert dispatch.load_rates(device) == measured
    file.write_text('{"bandwidth": 1}')
    dispatch.load_rates.cache_clear()
    assert dispatch.load_rates(device) is H100
    dispatch.load_rates.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"bandwidth": "x", "launch": 1, "dense": {}, "sparse": {}, "mma": {}}']
)
def test_a_file_without_rates_counts_as_none(tmp_path, text):
    file = tmp_path / "rates.json"
    file.write_text(text)
    assert dispatch.read_rates(file) is None


def dense_layer() -> CMDLinear:
    layer = CMDLinear(12, 10, rank=2, density=0.3)
    layer.backend = "dense"
    return layer


def test_a_rebuilt_weight_is_kept_until_a_parameter_changes():
    layer, x = dense_layer(), torch.randn(4, 12)
    with torch.no_grad():
        first = layer(x)
        kept = layer._kept[2]["matrix"]
        assert torch.equal(layer(x), first)
        assert layer._kept[2]["matrix"] is kept
        for name in ("u", "v", "values"):
            getattr(layer, name).mul_(2)
            assert torch.equal(layer(x), layer.to_dense()(x)), name
        layer.u = torch.nn.Parameter(torch.randn(10, 2))
        assert torch.equal(layer(x), layer.to_dense()(x))


def test_a_rebuilt_weight_is_never_kept_where_gradients_are_recorded():
    layer, x = dense_layer(), torch.randn(4, 12)
    for _ in range(2):
        layer(x).sum().backward()
    assert layer._kept is None
    assert layer.values.grad.abs().sum() > 0


def test_a_kept_weight_stays_out_of_copies_and_files():
    layer, x = dense_layer(), torch.randn(4, 12)
    with torch.no_grad():
        y = layer(x)
        assert layer._kept is not None
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._kept is None
            assert torch.equal(other(x), y)
    assert "_kept" not in layer.state_dict()


def test_inference_tensors_are_rebuilt():
    with torch.inference_mode():
        layer, x = dense_layer(), torch.randn(4, 12)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        layer.values.mul_(3)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_the_size_of_the_latest_call_is_remembered():
    conv = CMDConv2d(4, 6, 3, stride=2, padding=1, rank=1, density=0.1)
    conv(torch.randn(3, 4, 9, 8))
    assert conv._work() == Work(6, 36, 1, 1, conv.nnz, 3 * 5 * 4, 3 * 4 * 9 * 8, 3 * 5 * 4 * 6, torch.float32, True)
    conv(torch.randn(4, 9, 8))
    assert conv._tokens == 20


@pytest.fixture
def tuning(monkeypatch):
    """Timing is on, the model is that of the defaults."""
    monkeypatch.setenv("CMD_EXT_AUTOTUNE", "1")
    monkeypatch.setattr(cpu_model, "load_rates", lambda: cpu_model.DEFAULTS)
    monkeypatch.setattr(dispatch, "CLOSE", 1e9)


@pytest.mark.parametrize("layer", [CMDLinear(12, 10, rank=2, density=0), CMDConv2d(4, 6, 3, rank=2, density=0.3)])
def test_close_candidates_are_timed_once_for_each_size(layer, tuning, monkeypatch):
    timed = []

    def fastest(calls, layer, x):
        results = {way: call(layer, x) for way, call in calls.items()}
        for result in results.values():
            torch.testing.assert_close(result, layer.to_dense()(x))
        timed.append(tuple(x.shape))
        return sorted(calls)[len(timed) % 2]

    monkeypatch.setattr(dispatch, "fastest", fastest)
    inputs = [torch.randn(n, *((12,) if isinstance(layer, CMDLinear) else (4, 5, 6))) for n in (1, 2, 1, 2)]
    with torch.no_grad():
        chosen = []
        for x in inputs:
            torch.testing.assert_close(layer(x), layer.to_dense()(x))
            chosen.append(layer.backend)
        assert timed == [tuple(x.shape) for x in inputs[:2]]
        assert chosen[:2] == chosen[2:]
        assert chosen[0] != chosen[1]
        layer.u.mul_(2)
        layer(inputs[0])
        assert len(timed) == 3, "what was chosen for other weights"
    layer.backend = "dense"
    with torch.no_grad():
        layer(inputs[0])
    assert (len(timed), layer.backend) == (3, "dense")
    layer.backend = "auto"


def test_the_fastest_candidate_is_taken(tuning):
    def slow(*_):
        time.sleep(0.002)

    assert dispatch.fastest({"dense": slow, "fused": lambda *_: None}, None, None) == "fused"
    assert dispatch.fastest({"fused": lambda *_: None, "dense": slow}, None, None) == "fused"


@pytest.mark.parametrize(("gain", "way"), [(1.0, "dense"), (0.97, "dense"), (1.04, "dense"), (1.1, "fused")])
def test_dense_is_taken_where_the_others_gain_little(gain, way, tuning, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(dispatch.time, "perf_counter", lambda: clock[0])
    calls = {"fused": 1e-3, "dense": gain * 1e-3}

    def call_of(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    calls = {name: call_of(seconds) for name, seconds in calls.items()}
    assert dispatch.fastest(calls) == way


def test_a_weight_built_to_be_timed_is_dropped(tuning, monkeypatch):
    layer = CMDLinear(12, 10, rank=2, density=0.3)
    for way in ("fused", "dense", "fused"):
        monkeypatch.setattr(dispatch, "fastest", lambda calls, layer, x, way=way: way)
        with torch.no_grad():
            layer(torch.randn({"fused": 3, "dense": 4}[way], 12))
            assert ("matrix" in layer._kept[2]) == (way == "dense"), way
            if way == "dense":
                layer(torch.randn(5, 12))
                assert "matrix" in layer._kept[2], "it serves the size before"
                layer.u.mul_(2)


def test_nothing_is_timed_for_deterministic_results(tuning, monkeypatch):
    work, cpu = linear(64, 0.05, torch.float32, rank=64), torch.device("cpu")
    assert len(dispatch.candidates(work, cpu)) == 2
    torch.use_deterministic_algorithms(True)
    try:
        assert len(dispatch.candidates(work, cpu)) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(dispatch.candidates(work, torch.device("meta"))) == 1
    monkeypatch.setattr(dispatch, "CLOSE", 1)
    monkeypatch.setattr(dispatch, "LITTLE", 10)
    assert len(dispatch.candidates(work, cpu)) == 2, "calls that take little are timed"
    monkeypatch.setattr(dispatch, "LITTLE", 0)
    assert dispatch.candidates(work, cpu) == [dispatch.choose(work, cpu, False)]
