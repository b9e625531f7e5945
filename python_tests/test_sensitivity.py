"""sensitivity(): what its rows say, checked against fits of the very sizes; its tables and pictures."""

import copy
import csv
import io
import sys
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from small_net import Net, smooth_images
from torch import nn

import cmd_ext
from cmd_ext import Plan, dispatch, sensitivity
from cmd_ext.calibrate import divergence, outputs
from cmd_ext.moments import output_error, second_moments

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
LAYERS = ["first", "second", "grouped", "head"]
module = sys.modules["cmd_ext.sensitivity"]


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    return smooth_images()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.out.weight *= 300  # else all classes are as likely, whatever becomes of the layers
    return model


@pytest.fixture(scope="module")
def rows(net, images):
    return sensitivity(net, images[0], calibration=images, progress=False)


@pytest.fixture(scope="module")
def plain(net, images):
    return sensitivity(net, images[0], progress=False)


def alone(net: nn.Module, row: dict, images: list) -> nn.Module:
    """The network with the layer of a row alone compressed."""
    dense = net.get_submodule(row["layer"])
    entry = {"rank": row["rank"], "nnz": row["nnz"], "shape": [len(dense.weight), dense.weight[0].numel()]}
    entry |= {"groups": getattr(dense, "groups", 1)}
    if row["form"] != "channel" and row["rank"]:
        entry["form"] = row["form"]
    return cmd_ext.apply_plan(copy.deepcopy(net), Plan({row["layer"]: entry}), calibration=images or None)


def test_a_row_for_every_layer_and_budget(rows, plain):
    for found in (rows, plain):
        assert [(row["layer"], row["budget"]) for row in found] == [(name, b) for name in LAYERS for b in BUDGETS]
        assert found.skipped == {
            "stem": "too small: 432 weights, fewer than min_size = 1024",
            "out": "too small: 640 weights, fewer than min_size = 1024",
        }
        for row in found:
            assert tuple(row) == module.COLUMNS
            assert all(type(value) in (str, int, float, type(None)) for value in row.values()), row
            assert 0.9 * row["budget"] * row["dense_params"] <= row["params"] <= row["budget"] * row["dense_params"]
            assert row["sparse_coefficient"] == row["nnz"] / row["params"]
            assert row["predicted_ms"] > 0
            assert row["dense_ms"] > 0
        for name in LAYERS:
            for key in ("output_error", "loss"):
                values = [row[key] for row in found if row["layer"] == name]
                if values[0] is not None:
                    assert values == sorted(values, reverse=True), (name, key)
    assert {row["kind"] for row in rows} == {"Conv2d", "Linear"}
    assert all(row["loss"] is None and row["error_of"] == "weight" for row in plain)
    assert all(row["loss"] > 0 and row["error_of"] == "outputs" for row in rows)
    assert all(row["form"] == "channel" for row in rows)
    assert any(row["form"] == "spatial" for row in plain)


def test_costs_are_those_of_the_compressed_layer(net, images, rows, plain):
    whole = {row.name: row for row in cmd_ext.profile(net, images[0])}
    for row in [*rows[::3], *plain[::3]]:
        bias = len(net.get_submodule(row["layer"]).bias)
        cost = cmd_ext.profile(alone(net, row, []), images[0])[row["layer"]]
        assert (row["params"], row["bytes"], row["macs"]) == (cost.params - bias, cost.bytes - 4 * bias, cost.macs)
        dense = whole[row["layer"]]
        assert row["dense_params"] == dense.params - bias
        assert row["dense_bytes"] == dense.bytes - 4 * bias
        assert row["dense_macs"] == dense.macs
        assert row["shape"] == dense.shape


def test_errors_and_losses_are_those_of_fits(net, images, rows, plain):
    moments = second_moments(net, images)
    batches = [(x, None) for x in images]
    reference = outputs(net, batches)
    for row in rows:
        dense, compressed = net.get_submodule(row["layer"]), alone(net, row, images)
        weight = compressed.get_submodule(row["layer"]).dense_weight()
        groups = getattr(dense, "groups", 1)
        error = output_error(dense.weight, weight.view_as(dense.weight), moments[row["layer"]], groups)
        assert 0.75 * error < row["output_error"] < 1.3 * error, row  # the fits of curves are quick ones
        loss = divergence(reference, outputs(compressed, batches))
        near = 1.6 if row["budget"] == 0.2 else 4  # one of those at which losses are measured
        assert loss / near < row["loss"] < loss * near, row
    for row in plain:
        dense = net.get_submodule(row["layer"])
        weight = alone(net, row, []).get_submodule(row["layer"]).dense_weight().view_as(dense.weight)
        error = ((dense.weight - weight).norm() / dense.weight.norm()).item()
        assert row["output_error"] == pytest.approx(error, rel=0.15), row


def test_the_model_and_the_random_state_stay_as_they_were(net, images):
    torch.manual_seed(11)
    state, net = torch.random.get_rng_state(), copy.deepcopy(net).train()
    before = copy.deepcopy(net.state_dict())
    options = {"calibration": images[:1], "budgets": [0.2], "progress": False}
    first = sensitivity(net, images[0], **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(part.training for part in net.modules())
    torch.rand(3)
    timed = {"dense_ms", "predicted_ms"}
    second = sensitivity(net, images[0], **options)
    for one, other in zip(first, second, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="NaN or Inf"):
        sensitivity(net, images[0], **{**options, "calibration": [images[0] * float("nan")]})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_overrides_fix_a_size_or_leave_a_layer_out(net, images):
    overrides = {"first": {"rank": 3, "nnz": 100}, "second": "dense", "stem": {"budget": 0.4, "form": "spatial"}}
    for calibration in (images, None):
        found = sensitivity(net, images[0], calibration=calibration, overrides=overrides, budgets=[0.2], progress=False)
        assert [row["layer"] for row in found] == ["stem", "first", "grouped", "head"]
        assert [row["decided_by"] for row in found] == ["overrides", "overrides", "budget", "budget"]
        assert found.skipped["second"] == "dense by overrides"
        row = found[1]
        assert (row["rank"], row["nnz"], row["params"]) == (3, 100, 3 * (16 + 144) + 100)
        assert row["budget"] == row["params"] / row["dense_params"]
        compressed = alone(net, row, calibration)
        weight, dense = compressed.first.dense_weight(), net.first.weight
        if calibration:
            batches = [(x, None) for x in images]
            error = output_error(dense, weight.view_as(dense), second_moments(net, images)["first"])
            loss = divergence(outputs(net, batches), outputs(compressed, batches))
            assert row["loss"] == pytest.approx(loss, rel=0.05)
        else:
            error = ((dense - weight.view_as(dense)).norm() / dense.norm()).item()
            assert row["loss"] is None
        assert row["output_error"] == pytest.approx(error, rel=1e-3)
        assert found[0]["form"] == "spatial"
        assert "20 %" in str(found)


def test_what_is_left_out_and_rounded(net, images):
    found = sensitivity(
        net, images[0], filter_fn=lambda name, _: name == "head", round_to=8, budgets=[0.3, 0.3, 0.8], progress=False
    )
    assert [(row["layer"], row["budget"]) for row in found] == [("head", 0.3), ("head", 0.8)]
    assert all(row["rank"] % 8 == 0 for row in found)
    assert found.skipped["first"] == "excluded by filter_fn"
    none = sensitivity(net, images[0], min_size=10**6, progress=False)
    assert none == []
    assert str(none).startswith("no layer may be compressed\n\nstay dense:\n  stem: too small")
    tiny = sensitivity(nn.Linear(8, 5), torch.randn(2, 8), min_size=1, budgets=[0.02, 0.5], progress=False)
    assert [(row["layer"], row["budget"]) for row in tiny] == [("Linear", 0.5)]


def test_a_layer_that_the_data_miss_is_fitted_to_its_weight(images):
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(64, 64)

    found = sensitivity(Idle().eval(), images[0], calibration=images[:1], budgets=[0.2], progress=False)
    idle = found[-1]
    assert (idle["layer"], idle["error_of"], idle["dense_ms"], idle["predicted_ms"]) == ("idle", "weight", None, None)
    assert {row["error_of"] for row in found[:-1]} == {"outputs"}
    unaware = sensitivity(
        Idle().eval(), images[0], calibration=images[:1], data_aware=False, budgets=[0.2], progress=False
    )
    assert all(row["error_of"] == "weight" and row["loss"] is not None for row in unaware)


def test_without_a_model_of_times_there_are_none(net, images, monkeypatch):
    monkeypatch.setattr(dispatch, "predicted", lambda *_: {})
    found = sensitivity(net, images[0], budgets=[0.2], progress=False)
    assert all(row["predicted_ms"] is None for row in found)
    assert "times as fast" not in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": []}, r"budgets must lie in \[0.01, 0.8\], at least one, got \[\]"),
        ({"budgets": [0.2, 0.9]}, r"got \[0.2, 0.9\]"),
        ({"budgets": [0.001]}, r"got \[0.001\]"),
        ({"budgets": [float("nan")]}, r"got \[nan\]"),
        ({"round_to": 0}, "sensitivity: round_to must be >= 1, got 0"),
        ({"calibration": []}, "calibration: want an iterable"),
        ({"overrides": {"frist": "dense"}}, "overrides names no layer 'frist'; did you mean 'first'"),
        ({"overrides": {"first": {"rank": 99}}}, r"wants rank in \[0, 16\]"),
        ({"memory": 0, "calibration": "images", "overrides": {"first": {"rank": 2}}}, "memory must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(net, images, options, message):
    if options.get("calibration") == "images":
        options["calibration"] = images
    with pytest.raises(ValueError, match=message):
        sensitivity(net, images[0], progress=False, **options)


def test_tables_of_layers_and_budgets(rows, plain):
    text = str(rows)
    assert text.count("layer   ") == 3
    assert "relative error of a layer's outputs, at a share of its parameters:\nlayer" in text
    line = next(line for line in text.splitlines() if line.startswith("second"))
    errors = [f"{row['output_error']:.3f}" for row in rows if row["layer"] == "second"]
    assert line.split() == ["second", "16x144", "2.3", "k", *errors]
    assert text.endswith("  out: too small: 640 weights, fewer than min_size = 1024")
    assert "loss" not in str(plain)
    assert "relative error of a layer's weight" in str(plain)


def test_csv(rows):
    read = [*csv.DictReader(io.StringIO(rows.to_csv()))]
    assert [{key: str(value) for key, value in row.items()} for row in rows] == read


def test_rows_make_a_data_frame(rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    assert list(frame.columns) == list(module.COLUMNS)
    table = frame.pivot(index="layer", columns="budget", values="loss")
    assert table.loc["second", 0.2] == next(r["loss"] for r in rows if (r["layer"], r["budget"]) == ("second", 0.2))


def test_pictures(rows, plain, tmp_path):
    pytest.importorskip("matplotlib")
    many = [{**row, "budget": row["budget"] * factor} for row in rows for factor in (0.8, 1, 1.2)]
    for found, panels in ((rows, 3), (plain, 2), (many, 5)):  # with scales of colours where cells have no numbers
        file = tmp_path / "a.svg"
        cmd_ext.plot_sensitivity(found, file)
        root = ElementTree.parse(file).getroot()
        ids = [element.get("id") or "" for element in root.iter()]
        assert root.tag.endswith("svg")
        assert len([i for i in ids if i.startswith("axes_")]) == panels
        drawn = " ".join(element.tail or "" for element in root.iter()) + file.read_text()
        assert all(name in drawn for name in LAYERS)
    cmd_ext.plot_sensitivity([dict(row) for row in rows if row["layer"] == "head"], tmp_path / "b.PNG")
    with Image.open(tmp_path / "b.PNG") as picture:
        assert picture.width > 300
    hole = [row for row in rows if (row["layer"], row["budget"]) != ("head", 0.05)]
    cmd_ext.plot_sensitivity(hole, tmp_path / "c.svg")
    same = [{**row, "loss": 0.0, "output_error": 0.0} for row in rows]
    cmd_ext.plot_sensitivity(same, tmp_path / "d.svg")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.svg", "b.PNG", "c.svg", "d.svg"]


def test_a_picture_that_cannot_be_drawn_is_refused(rows, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"path must end in .svg, .png, .pdf, got a.gif"):
        cmd_ext.plot_sensitivity(rows, "a.gif")
    with pytest.raises(OSError, match="No such file"):
        cmd_ext.plot_sensitivity(rows, tmp_path / "no" / "a.svg")
    with pytest.raises(ValueError, match="rows must hold at least one layer, got none"):
        cmd_ext.plot_sensitivity([], tmp_path / "a.svg")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="matplotlib is not installed; run `pip install matplotlib`"):
        cmd_ext.plot_sensitivity(rows, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
