"""cmd_ext.bench: its command line, checks before timing, quantiles, comparison with an earlier run, every group."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import cmd_ext
from cmd_ext import _C, ops
from cmd_ext.bench import __main__ as command
from cmd_ext.bench import latency, machine, network, report, timing
from cmd_ext.bench.shapes import Conv, Matrix, networks, parse, vgg16
from cmd_ext.bench.timing import Case, Goal, Mismatch, Row, Run, Times

ROOT = Path(__file__).parent.parent
CONV, MATRIX = "N2:8->8@5", "N3:16x24"
SHAPES = {
    "conv": CONV,
    "backward": CONV,
    "dispatch": f"{CONV},{MATRIX}",
    "model": f"{CONV},{MATRIX}",
    "network": None,
    "latency": None,
}
# Where a wrong result is planted for each group.
CULPRITS = {
    "svd": (ops, "truncated_svd"),
    "topk": (ops, "topk_csr"),
    "linear": (cmd_ext.CMDLinear, "forward"),
    "conv": (cmd_ext.CMDConv2d, "forward"),
    "backward": (cmd_ext.CMDConv2d, "forward"),
    "decompose": (cmd_ext, "decompose"),
    "network": (cmd_ext.CMDConv2d, "forward"),
    "latency": (cmd_ext.CMDConv2d, "forward"),
    "dispatch": (cmd_ext.CMDLinear, "forward"),
    "model": (cmd_ext.CMDLinear, "forward"),
}


@pytest.fixture
def small_network(monkeypatch):
    monkeypatch.setattr(network, "SIDE", 32)
    monkeypatch.setattr(network, "vgg16", lambda side: vgg16(width=8, side=side, classes=10))
    sizes = (3, 64), (64, 256), (256, 64)  # of which the kernels make less than the dense time on any machine
    build = lambda: nn.Sequential(*(nn.Conv2d(*pair, 3, padding=1) for pair in sizes))  # noqa: E731
    monkeypatch.setattr(latency, "NETWORKS", {"small": (build, 16)})
    monkeypatch.setattr(latency, "SHARE", 0.9)


def arguments(group: str, *more: str) -> list[str]:
    shapes = SHAPES.get(group, MATRIX)
    return [group, "--quick", "--threads", "1", *(["--shapes", shapes] if shapes else []), *map(str, more)]


def refused(capsys, *argv: str) -> str:
    """The one line with which the command line refuses, before anything runs."""
    with pytest.raises(SystemExit) as stop:
        command.main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


# Command line -------------------------------------------------------------------------------------------------------


def test_shapes():
    assert parse("512x4608,N16:10x20") == [Matrix(512, 4608), Matrix(10, 20, 16)]
    assert parse("64x64@56, N8:64->128@56s2") == [Conv(1, 64, 64, 56), Conv(8, 64, 128, 56, 2)]
    conv = parse("3->64@224k11s4p2")[0]
    assert (conv.kernel, conv.pad, conv.out_side, conv.n) == (11, 2, 55, 363)


@pytest.mark.parametrize("text", ["", "512", "64->64", "axb", "8x8,", "0x8", "8x8@0", "8x8@2k5p0", "N0:8x8", "8x8@5s0"])
def test_no_shapes(text):
    with pytest.raises(ValueError, match="wanted"):
        parse(text)


def test_networks_have_their_known_operations():
    known = {"ResNet-18 at 224": 1.814, "VGG-16 at 224": 15.47, "AlexNet at 224": 0.714, "ResNet-56 at 32": 0.1255}
    for name, giga in known.items():
        macs = sum(count * shape.m * shape.n * shape.tokens for shape, count in networks()[name].items())
        assert macs / 1e9 == pytest.approx(giga, rel=2e-3), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "group must be one of svd, topk, .*, ops, got nonsense"),
        (["--op", "topk,foo"], "got foo"),
        (["topk", "--shapes", "512"], "--shapes: wanted MxN .* got '512'"),
        (["topk", "--shapes", CONV], "--shapes of group topk must hold MxN, got N2"),
        (["network", "--shapes", CONV], "--shapes of group network must hold nothing"),
        (["svd", "--dtype", "float16"], "--dtype of group svd must be one of float32, float64, got float16"),
        (["topk", "--dtype", "int8"], "--dtype"),
        (["topk", "--threads", "0"], r"--threads must lie in \[1, 4096\], got 0"),
        (["topk", "--threads", "x"], "--threads"),
        (["topk", "--device", "tpu"], "--device"),
        (["topk", "--plot", "a.png"], "--plot must name a file ending in .svg, got a.png"),
        (["topk", "--json", "/no/such/folder/a.json"], "No such file"),
        (["topk", "--json", "/"], "is a folder"),
        (["topk", "--compare", "/no/such/file.json"], "No such file"),
        (["topk", "--nonsense"], "--nonsense"),
    ],
)
def test_bad_arguments_end_with_one_line(capsys, argv, message):
    assert re.search(message, refused(capsys, *argv))


def test_a_file_of_something_else_cannot_be_compared_with(capsys, tmp_path):
    for text in (
        "nonsense",
        "[]",
        "{}",
        '{"rows": [{"name": "a"}]}',
        '{"rows": [{"name": "a", "unit": "ms", "ours": 0}]}',
    ):
        (tmp_path / "a.json").write_text(text)
        assert "does not hold the rows" in refused(capsys, "topk", "--compare", tmp_path / "a.json")


def test_plot_without_matplotlib_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(capsys, "topk", "--plot", tmp_path / "a.svg")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert "needs a GPU" in refused(capsys, "topk", "--device", "cuda")


def test_groups_are_named_in_either_way():
    def groups(*argv: str) -> list[str]:
        args = command.parser().parse_args(argv)
        return command.chosen_groups(args, command.run_of(args))

    assert groups() == list(command.GROUPS)
    assert groups("ops") == ["topk", "linear"]
    assert groups("conv", "--op", "topk,conv", "--op", "svd") == ["conv", "topk", "svd"]
    assert groups("--shapes", "8x8@5") == ["conv", "backward", "model", "dispatch"]
    assert groups("--dtype", "bfloat16", "--shapes", "8x8") == ["topk", "linear", "dispatch"]


# Groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", command.GROUPS)
def test_every_group_runs(capsys, small_network, tmp_path, group):
    assert command.main(arguments(group, "--json", tmp_path / "a.json")) == 0
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["machine"]["dtype"] == "float32"
    assert content["rows"]
    for row in content["rows"]:
        assert 0 < row["p20"] <= row["ours"] <= row["p80"]
        assert row["theirs"] == min((times["p50"] for times in row["rivals"].values()), default=None)
        assert row["absent"] == {}, "a rival that every torch has must run"
        if group in ("linear", "conv", "backward") and row["gflop"]:
            assert 0 < row["fraction_of_peak"] < 1
    assert [*tmp_path.iterdir()] == [tmp_path / "a.json"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes(dtype):
    shapes = f"{CONV},{MATRIX}"
    argv = ["topk", "linear", "conv", "backward", "--quick", "--threads", "1", "--dtype", dtype, "--shapes", shapes]
    assert command.main(argv) == 0


@pytest.mark.parametrize("group", command.GROUPS)
def test_a_wrong_result_ends_the_run(capsys, monkeypatch, small_network, tmp_path, group):
    where, name = CULPRITS[group]
    right = getattr(where, name)

    def off(result):
        if isinstance(result, torch.Tensor):
            return result * 1.05 if result.is_floating_point() else result
        if isinstance(result, cmd_ext.Decomposition):
            return replace(result, u=result.u * 1.05)
        return tuple(map(off, result))

    monkeypatch.setattr(where, name, lambda *args, **kwargs: off(right(*args, **kwargs)))
    assert command.main(arguments(group, "--json", tmp_path / "a.json")) == 1
    err = capsys.readouterr().err
    assert "WRONG RESULT: " in err
    assert "relative error" in err.splitlines()[-1]
    assert [*tmp_path.iterdir()] == []


def test_no_check_is_lost_under_python_O():
    for file in (ROOT / "cmd_ext" / "bench").glob("*.py"):
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(file.read_text()))), file.name


def test_threads_are_those_asked_for_and_restored(capsys):
    before = torch.get_num_threads()
    assert command.main(arguments("topk", "--threads", before + 1)) == 0
    assert f"threads {before + 1};" in capsys.readouterr().out
    assert torch.get_num_threads() == before


def test_missing_packages_are_named_in_the_header(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", {"no-such-package": "no_such_package"})
    assert machine.machine(torch.device("cpu"))["no-such-package"] == "not installed"


def test_accuracy_rows_without_data_are_skipped_with_a_line(capsys, monkeypatch, small_network):
    monkeypatch.delenv("CMD_EXT_DATA", raising=False)
    rows = list(network.bench_network(Run(seconds=0.01)))
    assert len(rows) == 2
    assert "CMD_EXT_DATA is not set" in capsys.readouterr().err


# Timing -------------------------------------------------------------------------------------------------------------


def test_quantiles():
    times = Times.of([float(8 * i % 21) for i in range(21)], 2.0)  # 0 to 20, not in order
    assert times == Times(8.0, 20.0, 32.0, 21)
    assert Times.of([5.0]) == Times(5.0, 5.0, 5.0, 1)
    assert Times.total([(Times(1, 2, 3, 9), 2), (Times(1, 1, 1, 4), 1)]) == Times(3, 5, 7, 4)


def test_contenders_run_in_turn_by_their_share():
    now, order = [0.0], []

    def call(name: str, seconds: float):
        def run() -> None:
            now[0] += seconds
            order.append(name)

        return run

    calls = {"fast": call("fast", 0.01), "slow": call("slow", 0.1), "endless": call("endless", 5.0)}
    times = timing.interleaved(calls, 1.5, clock=lambda: now[0])
    assert {name: len(list_) for name, list_ in times.items()} == {"fast": 50, "slow": 5, "endless": 1}
    assert times["slow"] == pytest.approx([0.1] * 5)
    gaps = "".join(name[0] for name in order[3:]).split("s")
    assert [len(gap) for gap in gaps] == [10, 10, 10, 10, 10, 0]


def case(name: str = "case", **changes) -> Case:
    options = {"ours": {"": lambda: torch.ones(3)}, "rivals": {"torch": lambda: torch.ones(3)}, **changes}
    want = torch.ones(3, dtype=torch.float64)
    return Case(name=name, check=lambda got: timing.error_of(got, want), tolerance=1e-6, **options)


def test_a_row_of_each_kind_of_rival():
    def missing() -> None:
        raise NotImplementedError("not in this build\nand more")

    rivals = {"wrong": lambda: torch.zeros(3), "missing": missing, "right": lambda: torch.ones(3)}
    row = Run(seconds=0.01).measure(case(rivals=rivals, references={"part": lambda: torch.zeros(1)}))
    assert row.rival == "right"
    assert [*row.rivals, *row.references] == ["right", "part"]
    assert row.absent == {"wrong": "wrong result: relative error 1.00e+00", "missing": "not in this build"}
    alone = Run(seconds=0.01).measure(case(rivals={}))
    assert alone.ratio is None
    assert "-" in report.cells(alone)


@pytest.mark.parametrize("result", [torch.full((3,), 1 + 1e-5), torch.full((3,), torch.nan), torch.ones(2)])
def test_a_wrong_result_of_any_way_to_call_us_raises(result):
    with pytest.raises(Mismatch, match="case: relative error"):
        Run(seconds=0.01).measure(case(ours={"right": lambda: torch.ones(3), "wrong": lambda: result}))


def test_peak():
    assert _C.fma_peak(1) > 0.1
    with pytest.raises(ValueError, match="fma_peak: threads must be >= 1, got 0"):
        _C.fma_peak(0)


# Report -------------------------------------------------------------------------------------------------------------


def measured(ours: float, theirs: float = 8.0, spread: float = 0.1, name: str = "row", goals=()) -> Row:
    def times(value: float) -> Times:
        return Times((1 - spread) * value, value, (1 + spread) * value, 9)

    return Row(name, "ms", times(ours), {"dense NCHW": times(theirs), "other": times(2 * theirs)}, goals=goals)


def content(*rows: Row) -> dict:
    return {"machine": {"cpu": "a", "threads": "2"}, "rows": [row.to_dict() for row in rows]}


def old_format(row: Row) -> dict:
    names = ("name", "ours", "theirs", "unit", "rival", "wanted", "note", "ratio")
    return {name: value for name, value in row.to_dict().items() if name in names}


@pytest.mark.parametrize(
    ("before", "after", "slower"),
    [
        (measured(1.0), measured(1.0), False),
        (measured(1.0), measured(1.2), False),  # p20 1.08 is below p80 1.1
        (measured(1.0), measured(1.3), True),
        (measured(1.0), measured(0.5), False),
        (measured(1.0, spread=0.4), measured(1.3), False),  # a noisy row
        (measured(1.0), measured(2.0, theirs=16.0), False),  # the machine got slower
        (measured(1.0), measured(3.0, theirs=16.0), True),
        (measured(1.0, theirs=16.0), measured(1.0, theirs=8.0), False),  # only the rival was slow
    ],
)
def test_what_counts_as_slower(before, after, slower):
    assert report.is_slower(before.to_dict(), after.to_dict()) == slower
    lines, fine = report.compare(content(before), content(after))
    assert fine is not slower
    assert any(line.startswith("SLOWER") and ": row: " in line for line in lines) == slower


def test_old_files_are_compared_with_a_fixed_tolerance():
    old = {**content(), "rows": [old_format(measured(1.0))]}
    lines, fine = report.compare(old, content(measured(1.24)))
    assert fine
    assert "25%" in lines[0]
    assert not report.compare(old, content(measured(1.26)))[1]


def test_the_files_in_the_repository_can_be_compared_with():
    for file in (ROOT / "bench" / "results").glob("*.json"):
        rows = report.load(file)["rows"]
        assert rows


def test_nothing_in_common_is_no_success():
    lines, fine = report.compare(content(measured(1.0, name="a")), content(measured(1.0, name="b")))
    assert not fine
    assert lines == ["compare: 0 of 0 rows got slower, 1 have no twin"]


def test_another_machine_is_told():
    new = {**content(measured(1.0)), "machine": {"cpu": "b", "threads": "2"}}
    assert "compare: cpu was a, is b" in report.compare(content(measured(1.0)), new)[0]


def test_json_compare_and_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    old, new, picture = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "a.svg"
    assert command.main(arguments("topk", "--json", old)) == 0
    rows = json.loads(old.read_text())

    def compare_with(factor: float) -> int:
        scaled = [{**row, **{key: factor * row[key] for key in ("ours", "p20", "p80")}} for row in rows["rows"]]
        old.write_text(json.dumps({**rows, "rows": scaled}))
        return command.main(arguments("topk", "--json", new, "--plot", picture, "--compare", old))

    assert compare_with(1e4) == 0
    assert "0 of 1 rows got slower" in capsys.readouterr().out
    assert compare_with(1e-4) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert "<svg" in picture.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"old.json", "new.json", "a.svg"}


def test_a_failed_write_leaves_the_earlier_file(monkeypatch, tmp_path):
    file = tmp_path / "a.json"
    file.write_text("earlier")

    def full(self, text: str, encoding: str) -> None:
        Path.open(self, "w").close()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        report.write(file, "later")
    assert file.read_text() == "earlier"
    assert [*tmp_path.iterdir()] == [file]


def test_targets_show_their_worst_row_and_who_misses():
    speed, time = Goal("2", "over dense", 4.0), Goal("h", "ms", 1.5, lambda row: row.ours.p50, at_most=True)
    rows = [measured(1.0, goals=(speed, time)), measured(4.0, name="late", goals=(speed,))]
    rows.append(measured(1.0, goals=(Goal("", "only in its row", 3.0), Goal("10", "absent", 1.0, timing.over("x")))))
    assert report.targets(rows) == [
        "target 2: 2 / 4  over dense; 1 of 2 rows miss it",
        "    2  late",
        "target h: 1 / <= 1.5  ms: reached",
    ]


def test_the_note_of_a_row_tells_the_ways_to_call_us():
    ways = {"NCHW": Times(3, 3, 3, 9), "channels_last": Times(2, 2, 2, 9)}
    row = replace(measured(2.0), ours=ways["channels_last"], ways=ways)
    assert row.told().note == "channels_last, NCHW 3 ms"
    assert row.to_dict()["ways"] == {"NCHW": 3, "channels_last": 2}
    assert replace(row, note="its own").told().note == "its own"


def test_a_total_takes_the_best_rival_of_each_layer():
    first, second = measured(1.0, 8.0), measured(2.0, 6.0)
    second.rivals["dense NCHW"], second.rivals["dense packed"] = Times(9, 9, 9), Times(5, 5, 5)
    first.gflop = second.gflop = 1.0
    first.errors = second.errors = {"ours": 0.0}
    row = timing.total("network", [(first, 3), (second, 1)], "dense")
    assert row.ours.p50 == 5.0
    assert row.rival == "dense, best of each layer"
    assert row.theirs == 3 * 8 + 5
    assert row.over("dense") == 29 / 5
    assert row.rivals["dense NCHW"].p50 == 3 * 8 + 9
    assert "dense packed" not in row.rivals


def test_a_row_of_latency_tells_target_and_measurement(monkeypatch, small_network):
    row = latency.latency_row(Run(seconds=0.1), "small")
    assert row.name == "small, batch 8, latency=90%"
    assert re.match(
        r"target [\d.]+ ms, predicted [\d.]+ ms, measured .* layers compressed, 0 of them to nothing, 0 slower",
        row.note,
    )
    far, slower = row.reached()
    assert far["reached"] == pytest.approx(abs(row.ours.p50 / (0.9 * row.theirs) - 1))
    assert slower["reached"] == 0
    monkeypatch.setattr(latency, "SHARE", 0.01)
    refused = latency.latency_row(Run(), "small")
    assert "cannot be met" in refused.note
    (goal,) = refused.goals
    assert goal.value(refused) > goal.wanted  # a target that is missed, not one that is not listed
