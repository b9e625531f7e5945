"""`python -m cmd_ext gpu-check`: are the CUDA kernels right on this GPU, how fast are they, which way is best."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

import cmd_ext
from cmd_ext import dispatch
from cmd_ext.gpu_check import correctness, figures, processes, runtime, samples, sessions

CHECKS = {**correctness.PARTS, **runtime.PARTS}
PARTS = (*CHECKS, "bench")


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


def _work_on(part: str, args: argparse.Namespace, device: torch.device) -> int:
    on = samples.target(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(min(4, torch.get_num_threads()))  # the references are small
    if part == "bench":
        tasks = sessions.tasks(device, args.quick, time.monotonic() + args.seconds)
        return processes.work(tasks, args.log, args.skip, device)
    with samples.settings(samples.STRICT):
        return processes.work(CHECKS[part](on), args.log, args.skip, device)


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
    rates = figures.fit(rows)
    return {
        "header": facts,
        "summary": {state: states.count(state) for state in ("ok", "FAILED", "skipped")},
        "checks": checks,
        "rows": rows,
        "rates": asdict(rates) if rates else None,
        "choices": figures.choices(rows, rates) if rates else {},
    }


class _Printer:
    """Prints records as they come; rows with their share of the roofline, once the peaks are known."""

    peaks: dict | None = None

    def __call__(self, record: dict) -> None:
        rows = record.get("rows", [])
        if record["state"] != "ok" or not rows:
            print(f"{record['state']:<8}{record['name']}: {record.get('detail', '')}", flush=True)
        for row in rows:
            self.peaks = row if row["layer"] == "peaks" else self.peaks
            print(f"        {figures.describe(row, self.peaks)}", flush=True)


def _records_of(part: str, args: argparse.Namespace, device: torch.device, left: float, show: _Printer) -> list[dict]:
    """What a part finds in its processes, in at most `left` seconds."""
    command = [sys.executable, "-m", "cmd_ext", "gpu-check", "--device", str(device), "--parts", part]
    command += ["--quick"] * args.quick
    if part != "sanitizer":
        seconds = left if part == "bench" else min(150.0, left)
        deadline = time.monotonic() + seconds + 20
        return processes.supervise(part, [*command, "--seconds", str(seconds)], deadline, show)
    records, program = [], processes.sanitizer()
    for tool in processes.SANITIZERS:
        found = {"name": tool, "state": "skipped", "detail": "compute-sanitizer is not installed"}
        if program and device.type == "cuda":
            found = processes.sanitized(program, tool, command, max(10.0, min(60.0, left / 4)))
        records.append({"part": part, **found})
        show(records[-1])
    return records


def _keep_rates(device: torch.device, content: dict) -> str:
    if content["summary"]["FAILED"]:
        return "are not kept, as a check failed"
    try:
        return f"are kept in {dispatch.save_rates(device, dispatch.DeviceRates(**content['rates']))}"
    except OSError as error:
        return f"cannot be kept: {error}"


def _examine(args: argparse.Namespace, device: torch.device) -> dict:
    """All parts; the file is written after each, so that an interrupted run leaves what it found."""
    start, facts, show = time.monotonic(), header(device), _Printer()
    print("\n".join(f"{name:<10}  {value}" for name, value in facts.items()), flush=True)
    records: list[dict] = []
    content = report(facts, records)
    for part in args.parts or PARTS:
        print(f"{part}:", flush=True)
        records += _records_of(part, args, device, start + args.seconds - time.monotonic(), show)
        content = report(facts, records)
        write_atomically(args.out, json.dumps(content, indent=1) + "\n")
    if args.pytest:
        records.append(_pytest(600))
        show(records[-1])
        content = report(facts, records)
        write_atomically(args.out, json.dumps(content, indent=1) + "\n")
    told = ", ".join(f"{count} {state}" for state, count in content["summary"].items())
    print(f"{told}; {time.monotonic() - start:.0f} s; written to {args.out}")
    return content


def run(args: argparse.Namespace) -> int:
    """The command. Returns 0 if every check passed, 1 if one failed, 2 if the kernels cannot run here."""
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"--parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    reason = missing(device) if device.type == "cuda" else None
    if reason:
        print(f"cmd_ext gpu-check: {reason}", file=sys.stderr)
        return 2
    if args.log:
        return _work_on(args.parts[0], args, device)
    if not args.out.absolute().parent.is_dir():
        raise OSError(f"--out: no folder {args.out.absolute().parent}")
    content = _examine(args, device)
    found = content["choices"]
    if found:
        print(
            f"dispatch by these rates picks the fastest backend in {found['right']:.0%} of {found['rows']} rows; "
            f"its choice takes {found['mean']:.2f}x the fastest on average, {found['worst']:.2f}x at worst"
        )
    if content["rates"] and device.type == "cuda":
        print(f"the rates of this GPU {_keep_rates(device, content)}")
    return 1 if content["summary"]["FAILED"] else 0
