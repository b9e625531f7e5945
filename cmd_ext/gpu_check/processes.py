"""Checks and measurements in processes of their own, which append what they find to a file.

A kernel that crashes, hangs or corrupts the state of the GPU so costs one check: the next process goes on behind it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from cmd_ext.gpu_check.sessions import OutOfTimeError

STALL = 90  # seconds without a new record after which a process counts as hung
RESTARTS = 8
# What a clean summary of each tool says, and its options: torch probes with calls that fail, which is no fault of ours.
SANITIZERS = {"memcheck": (": 0 errors", ("--report-api-errors", "no")), "racecheck": (": 0 hazards", ())}

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
    except OutOfTimeError as reason:
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
