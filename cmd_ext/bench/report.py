"""What a run prints and keeps: the table, the list of targets, a comparison with an earlier run, a plot."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmd_ext import report
from cmd_ext.bench.timing import SCALE, Row
from cmd_ext.report import check_writable as check_writable
from cmd_ext.report import write

HEADER = ("row", "ours", "p20..p80", "best rival", "unit", "against", "ratio", "of peak", "reached / wanted", "note")
TOLERANCE = 0.25  # slower by more counts, where an earlier file has no quantiles


def cells(row: Row) -> list[str]:
    goal = next(iter(row.reached()), None)
    many = row.ours.runs > 1
    return [
        row.name,
        f"{row.ours.p50:.4g}",
        f"{row.ours.p20:.3g}..{row.ours.p80:.3g}" if many else "-",
        f"{row.theirs:.4g}" if row.rivals else "-",
        row.unit,
        row.rival or "-",
        f"{row.ratio:.2f}x" if row.rivals else "-",
        f"{row.fraction:.0%}" if row.fraction else "-",
        f"{goal['reached']:.3g} / {'<= ' if goal['at_most'] else ''}{goal['wanted']:g}" if goal else "-",
        row.note,
    ]


def table(rows: Sequence[Row]) -> str:
    return report.table(HEADER, [cells(row) for row in rows])


# Targets ------------------------------------------------------------------------------------------------------------


def targets(rows: Iterable[Row]) -> list[str]:
    """One line per target that the rows measured: its worst row; below it the rows that miss it, if it has several."""
    found = defaultdict(list)
    for row in rows:
        for goal in row.reached():
            if goal["target"]:
                found[goal["target"], goal["what"]].append((_shortfall(goal), goal, row.name))
    lines = []
    for (target, what), entries in sorted(found.items(), key=lambda item: _rank(item[0][0])):
        entries.sort(key=lambda entry: -entry[0])
        missed = [entry for entry in entries if entry[0] > 1]
        worst = entries[0][1]
        limit = f"<= {worst['wanted']:g}" if worst["at_most"] else f"{worst['wanted']:g}"
        count = f"; {len(missed)} of {len(entries)} rows miss it" if len(entries) > 1 else ""
        lines.append(f"target {target}: {worst['reached']:.3g} / {limit}  {what}{count}{'' if missed else ': reached'}")
        if len(entries) > 1:
            lines += [f"    {goal['reached']:.3g}  {name}" for _, goal, name in missed]
    return lines


def _shortfall(goal: dict) -> float:
    """Above 1 if the goal is missed."""
    parts = goal["reached"], goal["wanted"]
    over, under = parts if goal["at_most"] else parts[::-1]
    return over / under if under > 0 else float("inf")


def _rank(target: str) -> tuple[int, int, str]:
    """Numbers by size, then letters."""
    return (0, int(target), "") if target.isdigit() else (1, 0, target)


# Files --------------------------------------------------------------------------------------------------------------


def load(file: Path) -> dict:
    """An earlier --json. Raises ValueError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        timed = [row for row in content["rows"] if row["unit"] in SCALE]
        if all(row["name"] and row["ours"] > 0 for row in timed):
            return content
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{file} does not hold the rows of an earlier --json")


# Comparison ---------------------------------------------------------------------------------------------------------


def compare(old: dict, new: dict) -> tuple[list[str], bool]:
    """Lines about the rows that both files have, and whether none of them got slower and there are any.

    A row got slower if its p20 is above the earlier p80. Where its rival got slower between the files too, the machine
    did, and the earlier time is scaled by that.
    """
    before = {row["name"]: row for row in old["rows"] if row["unit"] in SCALE}
    pairs = [(before[row["name"]], row) for row in new["rows"] if row["name"] in before and row["unit"] in SCALE]
    lines = [
        f"compare: {key} was {old['machine'][key]}, is {new['machine'][key]}"
        for key in ("cpu", "gpu", "threads", "kernels", "torch", "dtype")
        if key in old.get("machine", {}) and key in new["machine"] and old["machine"][key] != new["machine"][key]
    ]
    if any("p80" not in row for row, _ in pairs):
        lines.append(f"compare: rows without p20 and p80 in the earlier file may be {TOLERANCE:.0%} slower")
    slower = [(old_row, row) for old_row, row in pairs if is_slower(old_row, row)]
    for old_row, row in slower:
        rise = row["ours"] / old_row["ours"] - 1
        lines.append(
            f"SLOWER by {rise:.0%}: {row['name']}: {old_row['ours']:.4g} -> {row['ours']:.4g} {row['unit']} "
            f"(rival {_milliseconds(old_row)} -> {_milliseconds(row)})"
        )
    lines.append(
        f"compare: {len(slower)} of {len(pairs)} rows got slower, {len(new['rows']) - len(pairs)} have no twin"
    )
    return lines, bool(pairs) and not slower


def is_slower(old: dict, new: dict) -> bool:
    quantiles = "p80" in old
    now, limit = (new["p20"], old["p80"]) if quantiles else (new["ours"], (1 + TOLERANCE) * old["ours"])
    return now > limit * max(1.0, _drift(old, new))


def _drift(old: dict, new: dict) -> float:
    """How much slower the earlier row's rival is now."""
    if not old["theirs"] or not new["theirs"]:
        return 1.0
    twin = new["rivals"].get(old["rival"])
    return (twin["p50"] if twin else new["theirs"]) / old["theirs"]


def _milliseconds(row: dict) -> str:
    return f"{row['theirs']:.4g}" if row["theirs"] else "-"


# Plot ---------------------------------------------------------------------------------------------------------------


def plot(file: Path, rows: Sequence[Row], title: str) -> None:
    """Bars of the speed-up over the best rival, p20 to p80, as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.rivals and row.unit in SCALE]
    figure = Figure(figsize=(10, 1.2 + 0.22 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    ratios = [row.ratio for row in shown]
    spans = [[r - row.theirs / row.ours.p80 for r, row in zip(ratios, shown, strict=True)]]
    spans.append([row.theirs / row.ours.p20 - r for r, row in zip(ratios, shown, strict=True)])
    colours = ["tab:blue" if ratio >= 1 else "tab:red" for ratio in ratios]
    axes.barh(range(len(shown)), ratios, xerr=spans, color=colours, error_kw={"elinewidth": 0.7})
    axes.set_yticks(range(len(shown)), [f"{row.name} (over {row.rival})" for row in shown], fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    if shown:
        axes.set_xscale("log")
    axes.set(xlabel="times faster than the best rival", title=title)
    FigureCanvasSVG(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="svg")
    write(file, picture.getvalue())
