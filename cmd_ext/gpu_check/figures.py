"""From measured rows to text, to the rates of dispatch.py and to how well it chooses by them."""

from __future__ import annotations

import math

import torch

from cmd_ext.dispatch import DeviceRates, Work, predict


def typical(row: dict, name: str) -> float | None:
    """Median microseconds of a contender, as a graph where it was captured."""
    found = row.get("graph", {}).get(name) or row.get("eager", {}).get(name)
    return found["p50"] if found else None


def ceiling(row: dict, peaks: dict, dense: bool = False) -> float:
    """Microseconds that the row's bytes and operations take at the measured peaks, each byte moved once."""
    m, n, rank, nnz = row["m"], row["n"], row["rank"], row["nnz"]
    element = 2 if row["kind"] in ("bfloat16", "float16") else 8 if row["kind"] == "float64" else 4
    weights = m * n if dense else rank * (m + n) + nnz
    index = 0 if dense else 4 * (nnz + m + 1)
    moved = (row["inputs"] + row["outputs"] + weights) * element + index
    return 1e6 * max(moved / peaks["bandwidth"], 2 * weights * row["tokens"] / peaks["dense"][row["kind"]])


def describe(row: dict, peaks: dict | None) -> str:
    """A row as one line of text."""
    if "tokens" not in row:
        if "dense" in row:
            rates = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in row["dense"].items())
            return f"copy {row['bandwidth'] / 1e9:.0f} GB/s, launch {1e6 * row['launch']:.2f} us, TFLOP/s: {rates}"
        at = f", {100 * row['density']:g} %" if "density" in row else ""
        times = ", ".join(f"{name} {typical(row, name):.1f}" for name in row["eager"])
        return f"{row['layer']}, {row['kind']}{at}: {times} us"
    names = [name for name in row["eager"] if not name.startswith("dense ")]
    parts = [f"{name} {typical(row, name):.1f}" for name in names]
    dense = [typical(row, name) for name in row["eager"] if name.startswith("dense ")]
    ours = [time for time in (typical(row, "csr"), typical(row, "mma")) if time]
    if dense:
        parts.insert(0, f"dense {min(dense):.1f}")
    text = f"{row['layer']}, {row['kind']}, r {row['rank']}, {100 * row['density']:g} %: {', '.join(parts)} us"
    if dense and ours:
        text += f"; {min(dense) / min(ours):.2f}x dense"
    if peaks and ours:
        text += f", {ceiling(row, peaks) / min(ours):.0%} of the roofline"
    return text


def fit(rows: list[dict]) -> DeviceRates | None:
    """The rates that dispatch.py wants, from the measured peaks and the rows of S alone; None if some are missing."""
    peaks = next((row for row in rows if row["layer"] == "peaks"), None)
    if peaks is None:
        return None
    launch = peaks["launch"]

    def rate(flop: float, microseconds: float) -> float:
        elapsed = 1e-6 * microseconds
        return flop / (elapsed - min(launch, elapsed / 2))

    sparse: dict[str, list[float]] = {}
    mma: dict[str, list[float]] = {}
    for row in rows:
        if row.get("alone"):
            if typical(row, "csr"):
                work = 2 * row["nnz"] * row["tokens"]
                sparse.setdefault(row["kind"], []).append(rate(work, typical(row, "csr")))
            if typical(row, "mma"):
                work = 2 * row["m"] * row["n"] * row["tokens"]
                mma.setdefault(row["kind"], []).append(rate(work, typical(row, "mma")))
    if not sparse.keys() >= {"float64", "float32", "float16", "bfloat16"}:
        return None

    def mean(found: dict[str, list[float]]) -> dict[str, float]:
        return {kind: math.exp(sum(map(math.log, rates)) / len(rates)) for kind, rates in found.items()}

    dense = {kind: value for kind, value in peaks["dense"].items() if kind != "tf32"}
    return DeviceRates(peaks["bandwidth"], launch, dense, mean(sparse), mean(mma))


def choices(rows: list[dict], rates: DeviceRates) -> dict[str, float]:
    """How well the model chooses on the measured layers: share of rows where its choice is the fastest, and how many
    times slower than the fastest it is on average and at worst."""
    losses = []
    for row in rows:
        if "tokens" not in row or row.get("alone") or row["kind"] == "tf32":
            continue
        dtype = getattr(torch, row["kind"])
        sizes = (row["m"], row["n"], 1, row["rank"], row["nnz"], row["tokens"], row["inputs"], row["outputs"])
        predicted = predict(Work(*sizes, dtype), rates, rebuild=True)
        fused = [time for time in (typical(row, "csr"), typical(row, "mma")) if time]
        times = {
            "dense": typical(row, "rebuild"),
            "lowrank": typical(row, "composed"),
            "fused": min(fused, default=None),
        }
        times = {name: times[name] for name in predicted if times[name]}
        choice = min(predicted, key=predicted.get)
        if choice in times:
            losses.append(times[choice] / min(times.values()))
    if not losses:
        return {}
    right = sum(loss < 1.05 for loss in losses) / len(losses)
    return {"rows": len(losses), "right": right, "mean": sum(losses) / len(losses), "worst": max(losses)}
