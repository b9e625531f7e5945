"""The report of a compression as one HTML file: nothing to load, no script, so that it opens and mails anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import report, targets
from .allocation import UNITS

COSTS = {"params": "parameters", "bytes": "bytes", "macs": "MACs", "ms": "ms"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 70, 16, 12, 46  # of a chart and its margins, pixels

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 2em auto; max-width: 76em;
  padding: 0 1.2em }
h1 { font-size: 1.6em } h2 { font-size: 1.15em; margin-top: 2em }
.cards { display: flex; flex-wrap: wrap; gap: .8em }
.card { border: 1px solid #d5dde5; border-radius: 6px; padding: .6em 1em; min-width: 9em }
.card b { display: block; font-size: 1.5em } .card span { color: #5b6b7b }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85em; white-space: nowrap }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e6ebf0 }
th:first-child, td:first-child, td.text, th.text { text-align: left }
tfoot td, th { font-weight: 600; border-bottom: 1px solid #93a1b0 }
td.share { background: linear-gradient(to right, #cfe3f5 var(--kept), transparent var(--kept)) }
tr.dense td { color: #7b8794 }
svg { max-width: 100%; font: 12px system-ui, sans-serif } svg text { fill: #41505f }
"""


def save_report(
    result: Any, path: str | Path, *, history: Sequence[dict] = (), title: str = "Compression report"
) -> None:
    """Writes what compress did as one HTML file without scripts or anything to load.

    Args:
        result: of compress.
        path: file to write; after an error it is as before.
        history: of finetune, if it followed.
        title: heading of the page.

    Raises:
        OSError: the file cannot be written.
    """
    content = {"stats": result.stats.to_dict(), "front": result.front, "history": list(history)}
    report.write(Path(path), page(content, title))


def page(content: dict, title: str) -> str:
    """The HTML of {"stats": Stats.to_dict(), "front": rows, "history": rows}, which stats.json holds.

    Raises:
        ValueError: it does not hold these.
    """
    try:
        stats, front, history = content["stats"], content.get("front") or [], content.get("history") or []
        parts = [
            _summary(stats, history), *_front(stats, front), _layers(stats), *_skipped(stats), *_probes(stats),
            *_history(history),
        ]  # fmt: skip
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"report: want what compress writes to stats.json, got something else ({error!r})") from None
    meta = '<meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>'
    head = f"{meta}<title>{escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


# Sections -------------------------------------------------------------------------------------------------------------


def _text(kind: str, value: float | None) -> str:
    return report.milliseconds(value) if kind == "ms" else "-" if value is None else report.count(value)


def _pair(kind: str, values: Sequence) -> str:
    return f"{_text(kind, values[0])} → {_text(kind, values[1])}"


def _summary(stats: dict, history: Sequence[dict]) -> str:
    cards = []
    for kind, name in COSTS.items():
        before, after = stats[kind]
        gain = f"{before / after:.2f}×" if before and after else "-"
        cards.append((gain, f"{'faster' if kind == 'ms' else 'fewer'}: {_pair(kind, (before, after))} {name}"))
    dense, compressed = stats["score"]
    if compressed is not None:
        cards.append((f"{compressed:.4f}", f"score; dense {dense:.4f}"))
    tuned = [row["score"] for row in history if row.get("score") is not None]
    if tuned:
        cards.append((f"{max(tuned):.4f}", f"score after fine-tuning, best of {len(history)} epochs"))
    lines = [f'<div class="card"><b>{value}</b><span>{escape(words)}</span></div>' for value, words in cards]
    notes = []
    if stats.get("latency"):
        notes.append(f"Latency: {targets.latency_text(stats['latency'])}.")
    if stats.get("batchnorm"):
        before, after = stats["batchnorm"]
        kept = "kept" if after < before else "undone"
        notes.append(f"Batch-norm recalibration {kept}: calibration loss {before:.4f} → {after:.4f}.")
    return "\n".join(['<div class="cards">', *lines, "</div>", *(f"<p>{escape(note)}</p>" for note in notes)])


def _front(stats: dict, front: Sequence[dict]) -> list[str]:
    kind = next((key for key in UNITS if front and key in front[0]), None)
    if kind is None:
        return []
    cost = "ms" if kind == "latency" else kind
    before, after = stats[cost]
    here = 100 * after / before if before else None
    name = f"{COSTS[cost]} kept, % of the dense network"
    parts = ["<h2>Trade-off</h2>"]
    for key, words in (("loss", "loss"), ("accuracy", "accuracy on the calibration data")):
        points = [
            (100 * row["share"], row[key], f"{_text(cost, row[kind])} {COSTS[cost]}: {words} {row[key]:.4g}")
            for row in front
            if row.get(key) is not None
        ]
        if points:
            mark = "this network" if here else ""
            parts.append(f'<figure class="wide">{chart(points, name, words, here, mark, log=key == "loss")}</figure>')
    return parts


def _layers(stats: dict) -> str:
    timed, data = bool(stats.get("latency")), any(row["output_error"] is not None for row in stats["layers"])
    header = ["layer", "shape", "rank", "nnz", "params", "kept", "bytes", "MACs", "ms"]
    header += ["predicted ms"] * timed + ["output error"] * data
    rows = []
    for row in stats["layers"]:
        cells = [escape(row["name"]), escape(row["shape"])]
        cells += ["-" if row[key] is None else f"{row[key]:,}" for key in ("rank", "nnz")]
        pairs = [_pair(kind, row[kind]) for kind in COSTS]
        cells += [pairs[0], report.share(row["params"][1], row["params"][0]), *pairs[1:]]
        cells += [report.milliseconds(row["predicted_ms"])] * timed
        cells += ["-" if row["output_error"] is None else f"{row['output_error']:.4f}"] * data
        rows.append(_row(cells, row["params"], row["rank"] is None))
    pairs = [_pair(kind, stats[kind]) for kind in COSTS]
    total = ["network", "", "", "", pairs[0], report.share(stats["params"][1], stats["params"][0]), *pairs[1:]]
    total += [report.milliseconds(stats["latency"]["predicted"])] if timed else []
    total += [""] * data
    foot = "".join(f"<td>{cell}</td>" for cell in total)
    head = "".join(f"<th>{cell}</th>" for cell in header)
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot><tr>{foot}</tr></tfoot>"
    return f'<h2>Layers, dense → compressed</h2>\n<div class="wide"><table>{table}</table></div>'


def _row(cells: list[str], params: Sequence[int], dense: bool) -> str:
    """A layer's row; the share of its parameters is a bar, too."""
    kept = 100 * params[1] / params[0] if params[0] else 100
    marked = [f'<td class="share" style="--kept: {kept:.1f}%">' if i == 5 else "<td>" for i in range(len(cells))]
    row = "".join(f"{start}{cell}</td>" for start, cell in zip(marked, cells, strict=True))
    return f'<tr class="dense">{row}</tr>' if dense else f"<tr>{row}</tr>"


def _skipped(stats: dict) -> list[str]:
    rows = [[name or "the network", reason] for name, reason in stats["skipped"].items()]
    return ["<h2>Left dense</h2>", _words(("layer", "reason"), rows)] if rows else []


def _probes(stats: dict) -> list[str]:
    rows = [line.strip().rpartition(": ")[::2] for line in targets.probes_text(stats.get("probes") or [])]
    return ["<h2>Networks tried for the fall of the score</h2>", _words(("limits", "outcome"), rows)] if rows else []


def _history(history: Sequence[dict]) -> list[str]:
    if not history:
        return []
    scored = all(row.get("score") is not None for row in history)
    key, name = ("score", "score") if scored else ("train_loss", "training loss")
    points = [(row["epoch"], row[key], f"epoch {row['epoch']}: {name} {row[key]:.4f}") for row in history]
    rows = [
        [str(row["epoch"]), f"{row['train_loss']:.4f}", "-" if row.get("score") is None else f"{row['score']:.4f}"]
        for row in history
    ]
    parts = ["<h2>Fine-tuning</h2>"]
    if len(points) > 1:
        parts.append(f'<figure class="wide">{chart(points, "epoch", name)}</figure>')
    return [*parts, _words(("epoch", "training loss", "score"), rows)]


def _words(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th class="text">{escape(cell)}</th>' for cell in header)
    lines = ["".join(f'<td class="text">{escape(cell)}</td>' for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# Chart ----------------------------------------------------------------------------------------------------------------


def chart(
    points: Sequence[tuple[float, float, str]],
    x_label: str,
    y_label: str,
    mark: float | None = None,
    mark_label: str = "",
    log: bool = False,
) -> str:
    """A line through points (x, y, what a pointer on it tells) as inline SVG.

    Args:
        points: at least one; those that are not finite, or not positive on a logarithmic axis, are left out.
        mark: x of a vertical line, labelled `mark_label`.
        log: whether y is logarithmic.
    """
    shown = sorted(p for p in points if math.isfinite(p[0]) and math.isfinite(p[1]) and (p[1] > 0 or not log))
    xs = [p[0] for p in shown] + ([] if mark is None else [mark])
    ys = [math.log10(p[1]) if log else p[1] for p in shown]
    (x_low, x_high), (y_low, y_high) = _range(xs), _range(ys)

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    floor, parts = HEIGHT - BOTTOM, []
    for tick in _ticks(x_low, x_high):
        x = across(tick)
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>')
    decades = log and y_high - y_low >= 1
    for tick in range(math.ceil(y_low), math.floor(y_high) + 1) if decades else _ticks(y_low, y_high):
        y, text = down(tick), f"{10**tick:.2g}" if log else f"{tick:g}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6ebf0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    if mark is not None:
        x = across(mark)
        near_end = x > WIDTH / 2
        side, shift = ("end", -5) if near_end else ("start", 5)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}" stroke="#c0392b" stroke-dasharray="4"/>')
        label = f'<text x="{x + shift:.1f}" y="{TOP + 10}" text-anchor="{side}">{escape(mark_label)}</text>'
        parts.append(label)
    places = [(across(p[0]), down(y), p[2]) for p, y in zip(shown, ys, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#2f6f9f" stroke-width="2"/>')
    for x, y, text in places:
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#2f6f9f"><title>{escape(text)}</title></circle>')
    frame = f'<path d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}" fill="none" stroke="#93a1b0"/>'
    middle, height = (LEFT + WIDTH - RIGHT) / 2, (TOP + floor) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="14" y="{height}" text-anchor="middle" transform="rotate(-90 14 {height})">{escape(y_label)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} over {escape(x_label)}">{frame}{"".join(parts)}</svg>'
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """With a margin, and never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers within a range."""
    exponent = math.floor(math.log10((high - low) / most))
    power = 10.0**exponent
    step = next(f * power for f in (1, 2, 5, 10) if (high - low) / (f * power) <= most)
    first = math.ceil(low / step)
    return [round(i * step, 3 - exponent) for i in range(first, math.floor(high / step) + 1)]
