"""What is shown and written: tables, progress bars, files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import distributed


def table(header: Sequence[str], rows: Sequence[Sequence[str]], footer: Sequence[Sequence[str]] = ()) -> str:
    """Columns as wide as they must be; the first to the left, the others to the right; rules around the body."""
    lines = [list(header), *map(list, rows), *map(list, footer)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    parts = [text(header), rule, *map(text, rows)]
    return "\n".join([*parts, rule, *map(text, footer)] if footer else parts)


def count(value: float) -> str:
    """1234567 -> 1.23 M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}" if value < 999 * scale else f"{value / scale:.0f} {unit}"
    return f"{value:.0f}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}x" if after else "-"


def front(rows: Sequence[dict]) -> str:
    """The trade-off of a search as a table."""
    header = ("share", "params", "bytes", "MACs", "loss", "accuracy")
    lines = [
        [
            f"{100 * row['share']:.1f} %",
            *(count(row[kind]) for kind in ("params", "bytes", "macs")),
            f"{row['loss']:.4g}",
            f"{100 * row['accuracy']:.2f} %" if "accuracy" in row else "-",
        ]
        for row in rows
    ]
    return table(header, lines)


class Bar:
    """A tqdm bar where tqdm is installed and wanted, else nothing."""

    def __init__(self, total: int, label: str, show: bool) -> None:
        self._bar = None
        if show and distributed.rank() == 0:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=label, leave=False, disable=None)  # None: only on a terminal

    def step(self, text: str = "") -> None:
        """One more is done; `text` stands behind the time left."""
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()


def check_writable(file: Path) -> None:
    """Raises OSError if the file could not be written; leaves nothing behind."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(file)) from None


def write(file: Path, content: str | bytes) -> None:
    """All of it or, after an error, nothing."""
    part = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, bytes):
            part.write_bytes(content)
        else:
            part.write_text(content, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
