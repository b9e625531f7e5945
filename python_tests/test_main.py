"""The command line, and the README's example."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cmd_ext
from cmd_ext import models
from cmd_ext.__main__ import main


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    g = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 3)):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (32, 32, 3), generator=g, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root


def test_compress_finetune_and_eval(images, tmp_path, capsys):
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    save_file(models.create("resnet20").state_dict(), weights)
    network = ["--model", "resnet20", "--weights", str(weights), "--data", str(images), "--batch-size", "20"]
    assert main(["compress", *network, "--constraint", "params=40%", "--search", "uniform", "--finetune-epochs", "1",
                 "--calibration", "40", "--out", str(out)]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "finetune.pt", "model.safetensors", "plan.json", "report.html", "report.txt", "stats.json",
    ]  # fmt: skip
    assert "smaller / faster by" in printed
    assert "epoch 1: loss" in printed
    stats = json.loads((out / "stats.json").read_text())["stats"]
    assert stats["params"][1] <= 0.4 * stats["params"][0]
    again = tmp_path / "again.html"
    title = ["--title", "resnet20, params=40%"]
    assert main(["report", "--stats", str(out / "stats.json"), "--out", str(again), *title]) == 0
    assert again.read_text() == (out / "report.html").read_text()
    assert main(["eval", *network, "--compressed", str(out / "model.safetensors")]) == 0
    assert re.search(r"top-1 \d+\.\d\d % of 30 images", capsys.readouterr().out)
    assert main(["profile", "--model", "resnet20", "--compressed", str(out / "model.safetensors")]) == 0
    assert "CMDConv2d" in capsys.readouterr().out


def test_constraints_reach_compress(images, tmp_path, monkeypatch):
    seen = {}

    def compress(model, inputs, **options):
        seen.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(cmd_ext, "compress", compress)
    wanted = ["--constraint", "latency=40%", "--constraint", "score_drop=0.01", "--constraint", "bytes=5e4"]
    network = ["--model", "resnet20", "--data", str(images), "--out", str(tmp_path / "out"), "--limit", "5"]
    assert main(["compress", *network, *wanted]) == 1
    assert seen["constraints"] == {"latency": "40%", "score_drop": 0.01, "bytes": 5e4}
    assert seen["evaluate"](models.create("resnet20").eval()) <= 1


def test_search_writes_plans_and_the_front(images, tmp_path, capsys):
    pytest.importorskip("optuna")
    network = ["--model", "resnet20", "--data", str(images), "--batch-size", "20", "--calibration", "20"]
    more = ["--trials", "2", "--checkpoint", str(tmp_path / "trials.db"), "--out", str(tmp_path / "out")]
    assert main(["search", *network, "--constraint", "params=30%", "--at", "params=15%", *more]) == 0
    printed = capsys.readouterr().out
    assert "share" in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "plan-at-params=15.json",
        "plan.json",
        "search.json",
    ]
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [row["trial"] for row in found["trials"]] == [0, 1]
    for name, share in (("plan.json", 0.3), ("plan-at-params=15.json", 0.15)):
        plan = cmd_ext.Plan.from_json((tmp_path / "out" / name).read_text())
        model = cmd_ext.apply_plan(models.create("resnet20"), plan)
        assert cmd_ext.profile(model, torch.randn(1, 3, 32, 32)).total.params <= share * 272474
    assert main(["search", *network, "--constraint", "params=30%", *more[:-4], "--checkpoint", "/no/t.db",
                 "--out", str(tmp_path / "other")]) == 1  # fmt: skip
    assert "there is no folder /no" in capsys.readouterr().err


def test_eval_at_one_budget(images, capsys):
    network = ["--model", "resnet20", "--data", str(images), "--batch-size", "20", "--calibration", "40"]
    printed = {}
    for key, more in {
        "aware": ["--sequential"],
        "plain": ["--no-data-aware", "--recalibrate", "never"],
        "always": ["--recalibrate", "always"],
    }.items():
        assert main(["eval", *network, "--budget", "30%", "--sparse-coefficient", "0.85", *more]) == 0
        printed[key] = capsys.readouterr().out
    lines = printed["aware"].splitlines()
    assert re.fullmatch(r"top-1 \d+\.\d\d % of 30 images", lines[0])
    assert re.fullmatch(
        r"compressed: 80\d{3} of 267264 values \(30\.0 %\) of 18 convolutions, 18 fitted to 40 training images",
        lines[1],
    )
    errors = {key: float(re.search(r"mean output error (\d\.\d{4})", text).group(1)) for key, text in printed.items()}
    assert errors["aware"] < 0.9 * errors["plain"]
    assert re.fullmatch(r"CPU seconds: \d+\.\d fits, \d+\.\d with the passes over these images", lines[3])
    assert re.fullmatch(r"without recalibration: top-1 \d+\.\d\d %", lines[4])
    loss = r"\(calibration loss \d+\.\d{4} > \d+\.\d{4}\): top-1 \d+\.\d\d %"
    assert re.fullmatch(r"recalibration (kept|undone) " + loss, lines[5])
    assert "0 fitted to 40 training images" in printed["plain"]
    assert "recalibration" not in printed["plain"].splitlines()[-1].removeprefix("without recalibration")
    assert re.search(r"recalibration kept regardless " + loss, printed["always"])


def test_eval_with_an_allocation(images, capsys):
    network = ["--model", "resnet20", "--data", str(images), "--batch-size", "20", "--calibration", "20"]
    assert main(["eval", *network, "--budget", "30%", "--search", "allocate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = re.fullmatch(r"compressed: (\d+) of 267264 values .* of \d+ convolutions, .*", lines[1])
    assert 79000 < int(kept.group(1)) <= 0.3 * 267264
    assert re.fullmatch(r"CPU seconds: \d+\.\d search, \d+\.\d fits, .* these images", lines[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparse-coefficient", "0.5"], "--sparse-coefficient divides a budget, got it without --budget"),
        (["--search", "allocate"], "--search allocate divides a budget, got it without --budget"),
        (
            ["--search", "allocate", "--budget", "30%", "--sparse-coefficient", "0.5"],
            "--search allocate chooses the sparse coefficients, got --sparse-coefficient too",
        ),
        (["--budget", "30%", "--compressed", "x"], "--budget compresses a dense network, got --compressed too"),
        (["--budget", "30%", "--sparse-coefficient", "2"], "sparse_coefficient must lie in [0, 1], got 2.0"),
    ],
)
def test_bad_budgets_give_one_line(images, capsys, arguments, message):
    assert main(["eval", "--model", "resnet20", "--data", str(images), *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("cmd_ext eval: ")
    assert error.endswith(message)
    for budget in ("0", "2", "few"):
        with pytest.raises(SystemExit):
            main(["eval", "--model", "resnet20", "--data", str(images), "--budget", budget])
        assert f"--budget: must be a share like 30% or 0.3, got '{budget}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--constraint", "params"], "--constraint must be KIND=VALUE like params=30%, got 'params'"),
        (["--constraint", "score_drop=1%"], "score_drop must be a number >= 0, got '1%'"),
        (["--constraint", "latency=0"], "latency must be milliseconds > 0 or a share like '25%', got 0.0"),
        (["--constraint", "params=few"], "--constraint params must be a number or a share like 30%, got 'few'"),
        (["--constraint", "joules=30%"], "one of params, macs, bytes, latency, score_drop, got 'joules'"),
        (["--constraint", "params=30%", "--model", "resnet21"], "resnet21"),
        (["--constraint", "params=30%", "--data", "/no/such/folder"], "/no/such/folder"),
        (["--constraint", "params=30%", "--weights", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_arguments_give_one_line(images, tmp_path, capsys, arguments, message):
    defaults = ["--model", "resnet20", "--data", str(images), "--out", str(tmp_path / "out")]
    assert main(["compress", *defaults, *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cmd_ext compress: ")
    assert message in error


def test_inspect_with_and_without_data(images, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"a.{kind}" for kind in ("csv", "json", "svg")}
    written = ["--csv", str(files["csv"]), "--json", str(files["json"]), "--plot", str(files["svg"])]
    data = ["--data", str(images), "--batch-size", "20", "--calibration", "20"]
    assert main(["inspect", "--model", "resnet20", *data, "--budgets", "10%", "0.3", *written]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^layer1.0.conv1 +Conv2d +16x144 +- +- +2.3 k +9.22 k +47.2 M ", printed, re.M)  # of 20 images
    assert "relative error of a layer's outputs, at a share of its parameters" in printed
    assert re.search(r"^layer +shape +params +10 % +30 %$", printed, re.M)
    assert "loss of the network with this layer alone compressed" in printed
    assert "stay dense:\n  conv1: too small: 432 weights" in printed
    with files["csv"].open(newline="") as file:
        lines = [*csv.DictReader(file)]
    content = json.loads(files["json"].read_text())
    assert len(lines) == len(content["sensitivity"]) == 36
    assert [line["layer"] for line in lines] == [row["layer"] for row in content["sensitivity"]]
    assert [float(line["loss"]) for line in lines] == [row["loss"] for row in content["sensitivity"]]
    assert set(content["skipped"]) == {"conv1", "linear"}
    assert content["profile"]["total"]["macs"] == sum(row["macs"] for row in content["profile"]["rows"])
    assert "<svg" in files["svg"].read_text()
    assert sorted(tmp_path.iterdir()) == sorted(files.values())

    assert main(["inspect", "--model", "resnet20", "--input", "2x3x16x16", "--budgets", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^layer1.0.conv1 +Conv2d +16x144 +- +- +2.3 k +9.22 k +1.18 M ", printed, re.M)
    assert "relative error of a layer's weight, at a share of its parameters" in printed
    assert "loss" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", "/no/such/folder/a.csv"], "No such file or directory: '/no/such/folder/a.csv'"),
        (["--json", "/"], "/ is a folder"),
        (["--plot", "/no/such/folder/a.svg"], "No such file or directory: '/no/such/folder/a.svg'"),
        (["--plot", "a.gif"], "path must end in .svg, .png, .pdf, got a.gif"),
        (["--input", "1xx3"], "--input must be a shape like 1x3x32x32, got '1xx3'"),
        (["--input", "1x5x32x32"], "--input must be a shape that the network takes, got '1x5x32x32': Given groups=1"),
        (["--budgets", "90%"], "budgets must lie in [0.01, 0.8], at least one, got [0.9]"),
        (["--model", "resnet21"], "resnet21"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--weights", "/no/such/file"], "/no/such/file"),
    ],
)
def test_inspect_refuses_in_one_line(capsys, monkeypatch, arguments, message):
    if "--budgets" not in arguments:
        monkeypatch.setattr(cmd_ext, "sensitivity", None)  # none of it is reached
    assert main(["inspect", "--model", "resnet20", *arguments]) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("cmd_ext inspect: ")
    assert message in error


def test_report_refuses_in_one_line(tmp_path, capsys):
    file, page = tmp_path / "stats.json", tmp_path / "a.html"
    for text, out, message in (
        ("[]", page, "report: want what compress writes to stats.json, got something else"),
        ("{", page, f"report: --stats {file} is not JSON"),
        ("{}", "/no/such/folder/a.html", "No such file or directory: '/no/such/folder/a.html'"),
        (None, page, "No such file"),
    ):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        assert main(["report", "--stats", str(file), "--out", str(out)]) == 1
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("cmd_ext report: ")
        assert message in error
        assert not page.exists()


def test_doctor_names_what_there_is(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "torch",
        torch.__version__,
        "cpu",
        "built with",
        "CUDA kernels",
        "operators",
        "lrs_conv2d",
        "compiler here",
        "nvcc here",
    ):
        assert word in printed


def test_the_readme_example_runs_as_shown(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "net.safetensors").exists()
