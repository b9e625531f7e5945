"""gpu-check without a GPU: its checks on the CPU and the CUDA path under the emulator, its figures on canned rows."""

import json
import sys
import time

import pytest
import torch

from cmd_ext import dispatch
from cmd_ext.__main__ import main
from cmd_ext.gpu_check import command, correctness, figures, processes, runtime, sessions, timing
from cmd_ext.gpu_check.command import CHECKS
from cmd_ext.gpu_check.samples import F32, STRICT, Target, linear_args, settings
from cmd_ext.gpu_check.timing import Layer

CPU = torch.device("cpu")


def run_checks(part: str, native: bool, *words: str) -> list[str]:
    """The names of a part's checks that have one of the words, after running them."""
    names = []
    with settings(STRICT):
        for name, check in CHECKS[part](Target(CPU, native)):
            if not words or any(word in name for word in words):
                torch.manual_seed(0)
                assert check()
                names.append(name)
    assert names
    return names


@pytest.mark.parametrize("part", ["selection", "svd", "layers", "runtime", "sanitizer"])
def test_checks_pass(part, device):
    if device == "cuda":
        pytest.skip("gpu-check itself runs there")
    words = {"selection": ("bfloat16", "residual", "transpose"), "svd": ("30x20", "7x96")} if device == "simt" else {}
    run_checks(part, device == "simt", *words.get(part, ()))


def test_gradient_checks_pass():
    names = run_checks("gradients", False, "gradcheck of lrs", "opcheck of csr_transpose", "opcheck of lrs_linear")
    assert len(names) == 4


def test_every_operator_is_checked():
    names = " ".join(name for part in CHECKS for name, _ in CHECKS[part](Target(CPU, True)))
    registered = [n for n in torch._C._dispatch_get_registrations_for_dispatch_key("CPU") if n.startswith("cmd_ext::")]
    registered = [n for n in registered if "plan" not in n and "grad_weights" not in n]  # of the CPU alone
    assert len(registered) >= 10
    for name in registered:
        op = name.removeprefix("cmd_ext::")
        for row in (f"opcheck of {op}", f"repeated: {op}", f"graph: {op}", f"stream: {op}"):
            assert row in names


def broken(name: str, change):
    """Replaces the CPU kernel of an operator by one whose results are changed."""
    kernels = torch.library.Library("cmd_ext", "IMPL")
    kernel = torch.library.get_kernel(f"cmd_ext::{name}", "CPU")

    def wrong(keys, *args):
        return change(kernel.call_boxed(keys, *args))

    kernels.impl(name, wrong, "CPU", with_keyset=True, allow_override=True)
    return kernels


def a_little_off(y):
    return y * (1 + 1e-3)


def one_entry_lost(y):
    return y.flatten().scatter(0, torch.tensor([y.numel() // 2]), 0).view_as(y) if y.numel() else y


@pytest.mark.parametrize("change", [a_little_off, one_entry_lost])
@pytest.mark.parametrize("name", ["lrs_linear", "lrs_conv2d", "_lrs_conv2d_grad_values", "dense_weight", "sddmm"])
def test_value_checks_see_a_wrong_result(name, change):
    kernels = broken(name, change)
    try:
        with pytest.raises(AssertionError, match="times its bound"):
            run_checks("layers", False, f"{name} float32")
    finally:
        kernels._destroy()


def test_runtime_checks_see_a_result_that_changes():
    count = iter(range(1000))
    kernels = broken("sddmm", lambda y: y + next(count))
    try:
        for kind in ("repeated", "poison", "graph", "stream", "strides"):
            with pytest.raises(AssertionError, match="differs"):
                run_checks("runtime", False, f"{kind}: sddmm")
    finally:
        kernels._destroy()


def test_graph_check_sees_a_replay_that_keeps_old_results(monkeypatch):
    def stale(call, _device):
        out = call()
        return lambda: out

    monkeypatch.setattr(runtime, "replayable", stale)
    for call in runtime.calls():
        with pytest.raises(AssertionError, match="after replay"):
            run_checks("runtime", False, f"graph: {call.label}")


def test_top_k_check_sees_another_order_of_ties():
    def later_ones(out):
        values, row_ptr, col_idx = out
        return values, row_ptr, col_idx.flip(1)

    kernels = broken("topk_csr", later_ones)
    try:
        with pytest.raises(AssertionError, match="from the reference"):
            run_checks("selection", False, "topk_csr float32")
    finally:
        kernels._destroy()


def test_nan_counts_as_an_error():
    assert correctness.judge([("a", 0.2), ("b", 0.4)]) == "0.4 of the bound at b"
    on = Target(CPU, False)
    args = linear_args(on, ((4,), 7, 96, 3, 40), F32)
    kernels = broken("lrs_linear", lambda y: y * torch.nan)
    try:
        assert correctness.error_ratio(on, "lrs_linear", args, 100) == torch.inf
    finally:
        kernels._destroy()


# Processes ----------------------------------------------------------------------------------------------------------


def child(tmp_path, tasks: str) -> list[str]:
    """A command that works on the tasks in the text, as a part's process does."""
    script = tmp_path / "child.py"
    script.write_text(f"""
import argparse, os, sys, torch
from pathlib import Path
from cmd_ext.gpu_check import processes, sessions

def late():
    raise sessions.OutOfTimeError("out of time")

def wrong():
    raise ValueError("two\\nlines")

parser = argparse.ArgumentParser()
parser.add_argument("--log", type=Path)
parser.add_argument("--skip", type=int, default=0)
args = parser.parse_args()
sys.exit(processes.work({tasks}, args.log, args.skip, torch.device("cpu")))
""")
    return [sys.executable, str(script)]


def stuck_child(tmp_path) -> list[str]:
    """A command whose first task never ends and whose second one ends at once; without the time that torch needs."""
    script = tmp_path / "stuck.py"
    script.write_text("""
import sys, time
log, skip = sys.argv[2], int(sys.argv[4])
with open(log, "a", buffering=1) as file:
    if skip == 0:
        file.write('{"index": 0, "name": "stuck", "state": "start"}\\n')
        time.sleep(1000)
    file.write('{"index": 1, "name": "next", "state": "ok", "detail": "fine"}\\n{"state": "end"}\\n')
""")
    return [sys.executable, str(script)]


def test_a_crash_costs_one_check(tmp_path):
    tasks = """[("good", lambda: "fine"), ("wrong", wrong), ("crash", lambda: os.abort()),
        ("exit", lambda: os._exit(7)), ("rows", lambda: [{"layer": "x"}]), ("late", late)]"""
    shown = []
    records = processes.supervise("part", child(tmp_path, tasks), time.monotonic() + 100, shown.append)
    assert records == shown
    names, states = [r["name"] for r in records], [r["state"] for r in records]
    assert names == ["good", "wrong", "crash", "exit", "rows", "late"]
    assert states == ["ok", "FAILED", "FAILED", "FAILED", "ok", "skipped"]
    assert records[1]["detail"] == "ValueError: two lines"
    assert records[2]["detail"] == "the process died of signal 6"
    assert records[3]["detail"] == "the process ended with code 7"
    assert records[4]["rows"] == [{"layer": "x"}]
    assert {r["part"] for r in records} == {"part"}


def test_a_hung_check_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STALL", 3)
    deadline = time.monotonic() + 200
    hung, following = processes.supervise("part", stuck_child(tmp_path), deadline, lambda record: None)
    assert (hung["name"], hung["state"], hung["detail"]) == ("stuck", "FAILED", "hung: nothing for 3 seconds")
    assert following["state"] == "ok"


def test_the_time_limit_ends_a_part(tmp_path):
    records = processes.supervise("part", stuck_child(tmp_path), time.monotonic() + 3, lambda record: None)
    assert [(r["name"], r["state"]) for r in records] == [("stuck", "skipped"), ("the rest", "skipped")]


def test_a_process_that_does_not_start_is_a_failure():
    dead = [sys.executable, "-c", "raise SystemExit(5)"]
    (record,) = processes.supervise("part", dead, time.monotonic() + 60, lambda record: None)
    assert (record["state"], record["detail"]) == ("FAILED", "not run: the process ended with code 5")


def test_sanitizer_summaries(tmp_path):
    """A stand-in for compute-sanitizer that prints a summary and runs the program."""
    said_by_child = '{"state": "ok", "name": "call"}\\n{"state": "end"}\\n'
    quick = [sys.executable, "-c", f"import sys; open(sys.argv[2], 'w').write('{said_by_child}')"]
    for tool, said, state in (
        ("memcheck", "ERROR SUMMARY: 0 errors", "ok"),
        ("memcheck", "ERROR SUMMARY: 3 errors", "FAILED"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ok"),
        ("racecheck", "RACECHECK SUMMARY: 10 hazards displayed", "FAILED"),
        ("racecheck", "no kernel", "FAILED"),
    ):
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"""#!{sys.executable}
import subprocess, sys
if "--help" in sys.argv:
    print("  --kernel-name arg")
    sys.exit()
at = sys.argv.index("--print-limit") + 2
assert sys.argv[1:3] == ["--tool", "{tool}"]
assert sys.argv[at - 4 : at] == ["--kernel-name", "kns=cmd_ext", "--print-limit", "20"]
subprocess.run(sys.argv[at:], check=True)
print("========= {said}")
""")
        program.chmod(0o755)
        record = processes.sanitized(str(program), tool, quick, 60)
        assert record["state"] == state
        assert said in record["detail"] or record["detail"] == "no summary"


# Figures ------------------------------------------------------------------------------------------------------------


def timed(**microseconds: float) -> dict:
    return {name.replace("_", " "): {"p20": t, "p50": t, "p80": t, "runs": 30} for name, t in microseconds.items()}


PEAKS = {
    "layer": "peaks", "bandwidth": 2e12, "launch": 2e-6,
    "dense": {"float64": 2e13, "float32": 4e13, "tf32": 2e14, "float16": 5e14, "bfloat16": 5e14},
}  # fmt: skip
SIZES = {"m": 1000, "n": 2000, "tokens": 500, "inputs": 10**6, "outputs": 5 * 10**5}


def alone(kind: str, **times: float) -> dict:
    return {"layer": "S", "kind": kind, "alone": True, "rank": 0, "density": 0.05, "nnz": 10**5, **SIZES,
            "eager": timed(**{name: 3 * t for name, t in times.items()}), "graph": timed(**times)}  # fmt: skip


def test_rates_of_canned_rows():
    rows = [PEAKS, alone("float64", csr=102), alone("float32", csr=12), alone("float32", csr=42),
            alone("float16", csr=12, mma=22), alone("bfloat16", csr=12, mma=3)]  # fmt: skip
    rates = figures.fit(rows)
    assert rates.bandwidth == 2e12
    assert rates.launch == 2e-6
    assert rates.dense == {"float64": 2e13, "float32": 4e13, "float16": 5e14, "bfloat16": 5e14}
    assert rates.sparse == pytest.approx({"float64": 1e12, "float32": 5e12, "float16": 1e13, "bfloat16": 1e13})
    # A launch is at most half of a measured time.
    assert rates.mma == pytest.approx({"float16": 1e14, "bfloat16": 2e9 / 1.5e-6})
    assert figures.fit(rows[1:]) is None
    assert figures.fit(rows[:-1]) is None


def test_rates_are_what_dispatch_keeps(tmp_path):
    rows = [PEAKS, *(alone(kind, csr=12, mma=22) for kind in ("float64", "float32", "float16", "bfloat16"))]
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(command.report({}, [{"state": "ok", "rows": rows}])["rates"]))
    assert dispatch.read_rates(file) == figures.fit(rows)


def layer_row(kind: str, nnz: int, **times: float) -> dict:
    return {"layer": "L", "kind": kind, "rank": 100, "density": nnz / 2e6, "nnz": nnz, **SIZES, "eager": timed(**times)}


def test_ceiling_and_text_of_a_row():
    row = layer_row("bfloat16", 20000, dense_contiguous=30, dense_channels_last=20, csr=10, rebuild=25)
    bytes_moved = 2 * (10**6 + 5 * 10**5 + 100 * 3000 + 20000) + 4 * (20000 + 1001)
    assert figures.ceiling(row, PEAKS) == pytest.approx(1e6 * bytes_moved / 2e12)
    assert figures.ceiling({**row, "tokens": 10**6}, PEAKS) == pytest.approx(1e6 * 2 * 320000 * 1e6 / 5e14)
    assert figures.ceiling(row, PEAKS, dense=True) == pytest.approx(1e6 * 2 * 2e6 * 500 / 5e14)
    text = figures.describe(row, PEAKS)
    assert text == "L, bfloat16, r 100, 1 %: dense 20.0, csr 10.0, rebuild 25.0 us; 2.00x dense, 19% of the roofline"


def test_choices_of_the_model():
    rates = dispatch.DeviceRates(2e12, 2e-6, PEAKS["dense"], {"float32": 1e13}, {})
    rows = [
        layer_row("float32", 1000, csr=10, rebuild=60, composed=70),  # the model says fused
        layer_row("float32", 10**6, csr=30, rebuild=60, composed=70),  # the model says dense: twice the time
        layer_row("tf32", 10**6, csr=30, rebuild=60),
        PEAKS,
    ]
    assert figures.choices(rows, rates) == {"rows": 2, "right": 0.5, "mean": 1.5, "worst": 2.0}
    assert figures.choices([], rates) == {}


SMALL = [Layer("linear", 48, 64, 20), Layer("conv", 16, 16, 2, 3, 1, 7), Layer("strided", 16, 3, 2, 7, 2, 12)]


def test_measured_rows(device):
    if device == "cuda":
        pytest.skip("gpu-check itself runs there")
    rows = sessions.peak_rows(CPU, 0.0)
    for layer in SMALL:
        for kind in timing.KINDS:
            rows += sessions.layer_rows(layer, kind, 0.1, (0, 0.05), CPU, 0.0)
    for kind in ("float64", "float32", "float16", "bfloat16"):
        rows += sessions.sparse_rows(SMALL[0], kind, CPU, 0.0)
    rows += sessions.topk_rows(30, 40, CPU, 0.0) + sessions.svd_rows(30, 40, 5, CPU, 0.0)
    rows += sessions.train_rows(SMALL[1], "bfloat16", 0.05, CPU, 0.0)
    measured = [row for row in rows if row["layer"] == "conv"]
    assert [(row["kind"], row["density"]) for row in measured][:2] == [("float32", 0), ("float32", 0.05)]
    assert measured[0]["eager"].keys() == {
        "dense contiguous", "dense channels_last", "csr", "rebuild", "composed"
    }  # fmt: skip
    assert measured[2]["graph"].keys() >= {"dense contiguous", "csr", "mma", "rebuild"}
    assert measured[0]["errors"].keys() == measured[0]["eager"].keys()
    assert all(row["eager"][name]["runs"] == timing.LEAST for row in measured for name in row["eager"])
    for row in json.loads(json.dumps(rows)):
        assert "us" in figures.describe(row, rows[0])
    rates = figures.fit(rows)
    assert rates.mma.keys() == {"float16", "bfloat16"}
    assert figures.choices(rows, rates)["rows"] >= 8


def test_a_wrong_result_is_not_timed():
    kernels = broken("lrs_linear", a_little_off)
    try:
        with pytest.raises(AssertionError, match=r"csr 0.*relative error"):
            sessions.layer_rows(SMALL[0], "float32", 0.1, (0,), CPU, 0.0)
    finally:
        kernels._destroy()


def test_measure_takes_turns_and_keeps_to_its_time():
    calls = []
    contenders = {name: timing.Contender(lambda n=name: calls.append(n)) for name in "ab"}
    times = timing.measure(contenders, CPU, 1.0)
    assert times["a"]["runs"] == times["b"]["runs"] == timing.MOST
    assert calls[4:] == ["a", "b"] * timing.MOST
    slow = {"slow": timing.Contender(lambda: time.sleep(0.01))}
    assert timing.measure(slow, CPU, 0.05)["slow"]["runs"] <= 5


def test_bench_plans_every_row_and_stops_in_time():
    names = [name for name, _ in sessions.sessions(quick=False)]
    assert len(names) == len(set(names)) + 6  # training at two densities
    assert len(sessions.sessions(quick=True)) < len(names) / 4
    for layer in [*timing.MAIN, *timing.RESNET18]:
        assert sum(layer.name in name and "rank" in name for name in names) == 9
    _, task = next(sessions.tasks(CPU, True, time.monotonic() - 1))
    assert processes.attempt(task, CPU)["state"] == "skipped"


def test_shapes_of_the_layers():
    layer = timing.RESNET18[0]
    x = torch.empty(layer.images(CPU, F32)["contiguous"].shape, device="meta")
    y = layer.dense(x, layer.weight(torch.empty(layer.m, layer.n, device="meta"), x))
    assert y.shape == (64, 64, 112, 112)
    assert layer.elements == (x.numel(), y.numel())
    assert layer.tokens == 64 * 112 * 112


# The command --------------------------------------------------------------------------------------------------------


def test_without_a_gpu_there_is_one_line(capsys, monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    reasons = []
    for cuda, kernels in ((None, True), ("13.0", False), ("13.0", True)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(dispatch, "has_cuda_kernels", lambda kernels=kernels: kernels)
        assert main(["gpu-check"]) == 2
        said = capsys.readouterr()
        assert not said.out
        (line,) = said.err.splitlines()
        reasons.append(line)
    assert "is built without CUDA" in reasons[0]
    assert "has no CUDA kernels" in reasons[1]
    assert "sees no GPU" in reasons[2]
    assert not list(tmp_path.iterdir())


def test_the_command_on_the_cpu(capsys, tmp_path):
    out = tmp_path / "report.json"
    arguments = ["gpu-check", "--device", "cpu", "--out", str(out), "--parts"]
    assert main([*arguments, "sanitizer", "svd"]) == 0
    printed = capsys.readouterr().out
    assert "ok      truncated_svd float32, 40x40, rank 5: " in printed
    assert "skipped memcheck: " in printed
    content = json.loads(out.read_text())
    assert content["summary"] == {"ok": 14, "FAILED": 0, "skipped": 2}
    assert content["header"]["cmd_ext"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert main([*arguments, "speed"]) == 1
    assert main(["gpu-check", "--device", "cpu", "--out", str(tmp_path / "no" / "report.json")]) == 1
    assert "no folder" in capsys.readouterr().err


def test_a_failed_check_is_the_exit_code(monkeypatch, tmp_path):
    failed = [{"part": "svd", "name": "x", "state": "FAILED", "detail": "wrong"}]
    monkeypatch.setattr(processes, "supervise", lambda *args, **options: failed)
    out = tmp_path / "report.json"
    assert main(["gpu-check", "--device", "cpu", "--out", str(out), "--parts", "svd"]) == 1
    assert json.loads(out.read_text())["checks"] == failed
