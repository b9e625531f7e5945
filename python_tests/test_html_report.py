"""The page of a compression: what it shows, that it loads nothing, that no name breaks it."""

import copy
import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from small_net import Net, smooth_images

import cmd_ext
from cmd_ext.html_report import _ticks, chart, page

HISTORY = [{"epoch": i + 1, "lr": 0.1, "train_loss": 1 / (i + 1), "score": 0.5 + 0.1 * i, "seconds": 1} for i in (0, 1)]


@pytest.fixture(scope="module")
def result():
    images = smooth_images()
    return cmd_ext.compress(
        Net().eval(), images[0], constraints={"params": "50%"}, calibration=images, evaluate=lambda _: 0.25,
        search="allocate", progress=False,
    )  # fmt: skip


@pytest.fixture
def content(result) -> dict:
    return copy.deepcopy({"stats": result.stats.to_dict(), "front": result.front, "history": HISTORY})


def parsed(text: str) -> ElementTree.Element:
    """The page is XML, too: every tag is closed."""
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def rows(root: ElementTree.Element, heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    body = [*root.find("body")]
    start = next(i for i, element in enumerate(body) if element.tag == "h2" and element.text.startswith(heading))
    table = next(element.find("table") for element in body[start:] if element.find("table") is not None)
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def test_it_shows_what_was_done(result, content, tmp_path):
    cmd_ext.save_report(result, tmp_path / "a.html", history=HISTORY, title="a net")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text == page(json.loads(json.dumps(content)), "a net")
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]
    root = parsed(text)
    assert root.find("head/title").text == root.find("body/h1").text == "a net"
    header, *layers, total = rows(root, "Layers")
    assert header[:5] == ["layer", "shape", "rank", "nnz", "params"]
    assert header[-1] == "output error"
    for cells, layer in zip(layers, result.stats.layers, strict=True):
        sizes = ["-" if value is None else f"{value:,}" for value in (layer.rank, layer.nnz)]
        assert cells[:4] == [layer.name, layer.shape, *sizes]
        assert cells[5] == f"{100 * layer.params[1] / layer.params[0]:.1f} %"
    assert total[0] == "network"
    assert total[5] == f"{100 * result.stats.params[1] / result.stats.params[0]:.1f} %"
    assert rows(root, "Left dense")[1:] == [[name, reason] for name, reason in result.stats.skipped.items()]
    cards = ["".join(card.itertext()) for card in root.iter("div") if card.get("class") == "card"]
    assert cards[0].startswith(f"{result.stats.params[0] / result.stats.params[1]:.2f}×fewer")
    assert cards[4:] == ["0.2500score; dense 0.2500", "0.6000score after fine-tuning, best of 2 epochs"]
    assert "Batch-norm recalibration" in text
    assert rows(root, "Fine-tuning")[1:] == [["1", "1.0000", "0.5000"], ["2", "0.5000", "0.6000"]]


def test_it_loads_nothing(content):
    text = page(content, "a")
    assert not re.search(r"(?i)\b(?:src|href|onload|action)\s*=|<script|<link|<iframe|@import|url\(|https?:", text)


def test_the_front_and_the_network_on_it(result, content):
    content["front"][2]["accuracy"] = 0.5
    content["front"][3]["accuracy"] = 0.7
    figures = [[*figure.iter("circle")] for figure in parsed(page(content, "a")).iter("figure")]
    drawn = [row for row in result.front if row["loss"] > 0]
    assert [len(circles) for circles in figures] == [len(drawn), 2, 2]  # loss, score, epochs
    heights = [float(circle.get("cy")) for circle in figures[0]]
    assert heights == sorted(heights)  # down the page with more that is kept
    title = figures[0][0].find("title").text
    assert title == f"{cmd_ext.report.count(drawn[0]['params'])} parameters: loss {drawn[0]['loss']:.4g}"
    assert "this network" in page(content, "a")
    content["front"] = []
    assert "Trade-off" not in page(content, "a")
    content["front"] = [{"share": 0.5, "loss": 0.1}]
    assert "Trade-off" not in page(content, "a")


def test_names_are_escaped(content):
    name = '<script>alert("&")</script>'
    content["stats"]["layers"][0]["name"] = name
    content["stats"]["skipped"] = {name: name, "": "too small"}
    text = page(content, name)
    assert "<script" not in text
    root = parsed(text)
    assert root.find("body/h1").text == name
    assert rows(root, "Layers")[1][0] == name
    assert rows(root, "Left dense")[1:] == [[name, name], ["the network", "too small"]]


def test_limits_on_time_and_score(content):
    latency = {"target": 2.0, "predicted": 1.9, "measured": 2.1, "dense": 4.0, "networks": 3, "met": True}
    content["stats"]["latency"] = latency
    content["stats"]["probes"] = [{"params": 900.0, "score": 0.5, "drop": 0.1, "kept": True}]
    for row in content["stats"]["layers"]:
        row["predicted_ms"], row["ms"] = 0.5, (None, None)
    content["front"] = [{"latency": 2.1, "share": 0.5, "loss": 0.3}, {"latency": 4.0, "share": 1.0, "loss": 0.1}]
    content["history"] = [{"epoch": 1, "train_loss": 0.5, "score": None}]
    root = parsed(page(content, "a"))
    text = "".join(root.itertext())
    assert "target 2.000 ms, predicted 1.900 ms, measured 2.100 ms (+5.0 %), dense 4.000 ms; 3 timed." in text
    assert "2.100 ms: loss 0.3" in text
    assert rows(root, "Networks tried")[1] == [
        "params <= 900 parameters", "score 0.5000, drop 0.1000, within the drop",
    ]  # fmt: skip
    assert rows(root, "Layers")[1][8:10] == ["- → -", "0.500"]
    assert rows(root, "Fine-tuning")[1] == ["1", "0.5000", "-"]


@pytest.mark.parametrize("broken", [[], {}, {"stats": {}}, {"stats": {"params": [1, 2]}}, "text", {"stats": None}])
def test_something_else_is_refused(broken):
    with pytest.raises(ValueError, match=r"report: want what compress writes to stats.json, got something else"):
        page(broken, "a")


def test_a_page_that_cannot_be_written(result, tmp_path):
    with pytest.raises(FileNotFoundError):
        cmd_ext.save_report(result, tmp_path / "no" / "a.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[], [0.0], [5.0], [1e-9, 2e-9], [1e-7, 1e7], [3.0, 3.0], [math.nan, 1.0], [math.inf, -1.0, 2.0], [1e12, 2e12]],
)
def test_a_chart_of_any_values(values, log):
    svg = ElementTree.fromstring(
        chart([(i, y, str(y)) for i, y in enumerate(values)], "x & y", "<y>", 1.5, "here", log)
    )
    assert len([*svg.iter("circle")]) == sum(math.isfinite(y) and (y > 0 or not log) for y in values)
    for circle in svg.iter("circle"):
        assert 0 <= float(circle.get("cx")) <= 640
        assert 0 <= float(circle.get("cy")) <= 300
    texts = [text.text for text in svg.iter("text")]
    assert {"x & y", "<y>", "here"} <= set(texts)
    assert len(texts) == len({(t.get("x"), t.get("y"), t.text) for t in svg.iter("text")})


def test_ticks_are_round_and_few():
    assert _ticks(0.0, 100.0) == [0, 20, 40, 60, 80, 100]
    assert _ticks(0.8099, 0.8401) == pytest.approx([0.81, 0.815, 0.82, 0.825, 0.83, 0.835, 0.84])
    for low, high in ((1e-20, 9e-20), (1e-9, 3e-9), (-7.0, 1e6), (0.1, 0.7), (5.0, 5.1)):
        ticks = _ticks(low, high)
        assert 2 <= len(ticks) <= 8
        assert all(low <= tick <= high for tick in ticks)


def test_the_page_of_a_single_layer():
    layer = torch.nn.Linear(64, 64)
    result = cmd_ext.compress(layer, torch.randn(4, 64), constraints={"params": "50%"}, progress=False)
    root = parsed(page({"stats": result.stats.to_dict(), "front": result.front}, "one"))
    assert rows(root, "Layers")[1][:2] == ["Linear", "64x64"]
