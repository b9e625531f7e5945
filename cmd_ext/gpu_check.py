"""`python -m cmd_ext gpu-check`: are the CUDA kernels right on this machine's GPU, how fast are they, what should run.

Checks (gpu_correctness.py) and measurements (gpu_timing.py) run in processes of their own, one for each part, which
append what they find to a file. A kernel that crashes, corrupts the GPU's state or hangs so costs one check: the next
process goes on behind it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

import cmd_ext
from cmd_ext import dispatch, gpu_correctness, gpu_timing

CHECKS = ("selection", "svd", "layers", "gradients", "runtime")
PARTS = (*CHECKS, "sanitizer", "bench")
STALL = 90  # seconds without a new record after which a process counts as hung
RESTARTS = 8
# What a clean summary of each tool says, and its options: torch probes with calls that fail, which is no fault of ours.
SANITIZERS = {"memcheck": (": 0 errors", ("--report-api-errors", "no")), "racecheck": (": 0 hazards", ())}


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch, then cmd_ext again"
    if not dispatch.has_cuda_kernels():
        return "this build of cmd_ext has no CUDA kernels; FORCE_CUDA=1 pip install . says what it lacks"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen = torch.cuda.is_available()
    if not seen:
        why = str(told[0].message).splitlines()[0] if told else "is there a driver, and what is CUDA_VISIBLE_DEVICES?"
        return f"torch {torch.__version__} sees no GPU: {why}"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}, torch sees {torch.cuda.device_count()} GPU(s)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU has capability {'.'.join(map(str, capability))}, the kernels need 8.0 or more"
    return None


def header(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    from cmd_ext import _C

    facts = {"cmd_ext": cmd_ext.__version__, "built with": ", ".join(f"{k} {v}" for k, v in _C.build_info().items())}
    facts["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} SMs"
        facts["memory"] = f"{gpu.total_memory / 2**30:.1f} GiB, L2 {getattr(gpu, 'L2_cache_size', 0) / 2**20:.0f} MiB"
        facts["driver"] = _driver(str(getattr(gpu, "uuid", "")))
    return facts


def _driver(uuid: str) -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        told = subprocess.run([*query, f"--id=GPU-{uuid}"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not tell"
    version, clock, power = (told.stdout.strip().split(", ") + ["?"] * 3)[:3]
    return f"{version}, up to {clock}, {power}"


# In the process of a part -------------------------------------------------------------------------------------------


def attempt(task: Callable[[], object], device: torch.device) -> dict:
    """Runs one check (which returns words) or measurement (which returns rows) to its end on the device."""
    torch.manual_seed(0)
    start = time.monotonic()
    try:
        found = task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        record = {"state": "ok", **({"rows": found} if isinstance(found, list) else {"detail": found})}
    except gpu_timing.OutOfTimeError as reason:
        record = {"state": "skipped", "detail": str(reason)}
    except Exception as error:  # whatever it is, it belongs into the report
        record = {"state": "FAILED", "detail": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    return {**record, "seconds": time.monotonic() - start}


def context_lost(device: torch.device) -> bool:
    """Whether an earlier error has left the GPU unusable for this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def work(tasks: Iterable[tuple[str, Callable[[], object]]], log: Path, skip: int, device: torch.device) -> int:
    """Runs the tasks behind the first `skip` and appends a record before and after each. Returns the exit code."""
    with log.open("a", encoding="utf-8") as file:

        def tell(**record: object) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        for index, (name, task) in enumerate(tasks):
            if index < skip:
                continue
            tell(index=index, name=name, state="start")
            record = attempt(task, device)
            tell(index=index, name=name, **record)
            if record["state"] == "FAILED" and context_lost(device):
                return 3
        tell(state="end")
    return 0


def _work_on(part: str, args: argparse.Namespace) -> int:
    on = gpu_correctness.target(args.device)
    torch.set_num_threads(min(4, torch.get_num_threads()))  # the references are small
    if part == "bench":
        tasks = gpu_timing.tasks(on.device, args.quick, time.monotonic() + args.seconds)
        return work(tasks, args.log, args.skip, on.device)
    with gpu_correctness.settings(gpu_correctness.STRICT):
        return work(gpu_correctness.PARTS[part](on), args.log, args.skip, on.device)


# In the process of the user -----------------------------------------------------------------------------------------


def follow(process: subprocess.Popen, log: Path, deadline: float, handle: Callable[[dict], None]) -> str:
    """Hands over the records that a process appends, until it ends or is ended. Returns how it ended."""
    position, last = 0, time.monotonic()
    while True:
        running = process.poll() is None
        if log.exists():
            with log.open("rb") as file:
                file.seek(position)
                lines = file.read()
            complete = lines.rfind(b"\n") + 1
            position += complete
            for line in lines[:complete].splitlines():
                handle(json.loads(line))
                last = time.monotonic()
        now = time.monotonic()
        if not running:
            code = process.returncode
            return f"the process died of signal {-code}" if code < 0 else f"the process ended with code {code}"
        if now > deadline or now - last > STALL:
            process.kill()
            process.wait()
            return "out of time" if now > deadline else f"hung: nothing for {STALL} seconds"
        time.sleep(0.1)


def supervise(
    part: str, command: list[str], deadline: float, show: Callable[[dict], None], env: dict[str, str] | None = None
) -> list[dict]:
    """Runs a part's process, and another one behind the check at which one ended, until the part is done."""
    records: list[dict] = []
    done, open_record, ended = 0, None, False

    def keep(record: dict) -> None:
        records.append({"part": part, **record})
        show(records[-1])

    def handle(record: dict) -> None:
        nonlocal done, open_record, ended
        if record["state"] == "end":
            ended = True
        elif record["state"] == "start":
            open_record = record
        else:
            done, open_record = record["index"] + 1, None
            keep(record)

    with tempfile.TemporaryDirectory(prefix="cmd_ext-") as folder:
        for turn in range(RESTARTS):
            log, before = Path(folder) / f"{turn}.jsonl", done
            process = subprocess.Popen([*command, "--log", str(log), "--skip", str(done)], env=env)
            try:
                reason = follow(process, log, deadline, handle)
            finally:
                process.kill()
                process.wait()
            if ended:
                return records
            state = "skipped" if reason == "out of time" else "FAILED"
            if open_record:
                done = open_record["index"] + 1
                keep({**open_record, "state": state, "detail": reason})
                open_record = None
            if state == "skipped" or done == before:
                break
    keep({"name": "the rest", "state": state, "detail": f"not run: {reason}"})
    return records


def sanitizer() -> str | None:
    """The program compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def sanitized(program: str, tool: str, command: list[str], seconds: float) -> dict:
    """One call of every kernel under a tool of compute-sanitizer, which looks at our kernels only."""
    text = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    option = "--kernel-name" if "--kernel-name" in text else "--kernel-regex"
    clean_summary, options = SANITIZERS[tool]
    prefix = [program, "--tool", tool, *options, option, "kns=cmd_ext", "--print-limit", "20"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cmd_ext-") as folder:
        log = Path(folder) / "log.jsonl"
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation with bounds of its own
        try:
            told = subprocess.run(
                [*prefix, *command, "--log", str(log)], capture_output=True, text=True, timeout=seconds, env=env
            )
        except subprocess.TimeoutExpired:
            return {"name": tool, "state": "skipped", "detail": f"not done in {seconds:.0f} seconds"}
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = (told.stdout + told.stderr).splitlines()
    summary = next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), "no summary")
    failed = [record["name"] for record in calls if record["state"] == "FAILED"]
    clean = clean_summary in summary and not failed and bool(calls) and calls[-1]["state"] == "end"
    found = [line for line in lines if line.startswith("=========")][:40]
    detail = summary + (f"; failed: {', '.join(failed)}" if failed else "")
    record = {"name": tool, "state": "ok" if clean else "FAILED", "detail": detail, "seconds": time.monotonic() - start}
    return record if clean else {**record, "output": found}


def _pytest(seconds: float) -> dict:
    """The operators' tests of the checkout that this package lies in."""
    folder = Path(cmd_ext.__file__).parent.parent / "python_tests"
    record = {"part": "pytest", "name": "python_tests on cuda", "state": "skipped"}
    if not (folder / "test_ops.py").is_file() or not importlib.util.find_spec("pytest"):
        return {**record, "detail": "needs pytest, and the package in its checkout"}
    files = [str(folder / name) for name in ("test_ops.py", "test_cuda_paths.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cuda", *files]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=folder.parent)
    except subprocess.TimeoutExpired:
        return {**record, "detail": f"not done in {seconds:.0f} seconds"}
    last = told.stdout.strip().splitlines()[-1:] or ["no output"]
    return {**record, "state": "FAILED" if told.returncode else "ok", "detail": last[0]}


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def report(facts: dict[str, str], records: list[dict]) -> dict:
    """What the file holds: header, checks, rows, the rates for dispatch.py and how well it chooses by them."""
    rows = [row for record in records for row in record.get("rows", [])]
    checks = [{key: value for key, value in record.items() if key != "rows"} for record in records]
    states = [record["state"] for record in records]
    rates = gpu_timing.fit(rows)
    return {
        "header": facts,
        "summary": {state: states.count(state) for state in ("ok", "FAILED", "skipped")},
        "checks": checks,
        "rows": rows,
        "rates": asdict(rates) if rates else None,
        "choices": gpu_timing.choices(rows, rates) if rates else {},
    }


def run(args: argparse.Namespace) -> int:
    """The command. Returns 0 if every check passed, 1 if one failed, 2 if the kernels cannot run here."""
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"--parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    device = torch.device(args.device)
    reason = missing(device) if device.type == "cuda" else None
    if reason:
        print(f"cmd_ext gpu-check: {reason}", file=sys.stderr)
        return 2
    if args.log:
        return _work_on(args.parts[0], args)
    if not args.out.absolute().parent.is_dir():
        raise OSError(f"--out: no folder {args.out.absolute().parent}")

    start, peaks = time.monotonic(), None
    facts = header(device)
    print("\n".join(f"{name:<10}  {value}" for name, value in facts.items()), flush=True)

    def show(record: dict) -> None:
        nonlocal peaks
        rows = record.get("rows", [])
        peaks = next((row for row in rows if row["layer"] == "peaks"), peaks)
        if record["state"] != "ok" or not rows:
            print(f"{record['state']:<8}{record['name']}: {record.get('detail', '')}", flush=True)
        for row in rows:
            print(f"        {gpu_timing.describe(row, peaks)}", flush=True)

    records: list[dict] = []
    for part in args.parts or PARTS:
        left = start + args.seconds - time.monotonic()
        command = [sys.executable, "-m", "cmd_ext", "gpu-check", "--device", args.device, "--parts", part]
        command += ["--quick"] * args.quick
        print(f"{part}:", flush=True)
        if part == "sanitizer":
            for tool in SANITIZERS:
                program = sanitizer()
                found = {"name": tool, "state": "skipped", "detail": "compute-sanitizer is not installed"}
                if program and device.type == "cuda":
                    found = sanitized(program, tool, command, max(10.0, min(60.0, left / 4)))
                records.append({"part": part, **found})
                show(records[-1])
            continue
        seconds = left if part == "bench" else min(150.0, left)
        records += supervise(part, [*command, "--seconds", str(seconds)], time.monotonic() + seconds + 20, show)
    if args.pytest:
        records.append(_pytest(600))
        show(records[-1])

    content = report(facts, records)
    good = not content["summary"]["FAILED"]
    if content["choices"]:
        found = content["choices"]
        print(f"dispatch by these rates picks the fastest backend in {found['right']:.0%} of {found['rows']:.0f} rows, "
              f"at worst {found['worst']:.2f}x the fastest")  # fmt: skip
    if content["rates"] and good and device.type == "cuda":
        file = dispatch.save_rates(device, dispatch.DeviceRates(**content["rates"]))
        print(f"rates of this GPU are kept in {file}")
    write_atomically(args.out, json.dumps(content, indent=1) + "\n")
    told = ", ".join(f"{count} {state}" for state, count in content["summary"].items())
    print(f"{told}; {time.monotonic() - start:.0f} s; written to {args.out}")
    return 0 if good else 1
