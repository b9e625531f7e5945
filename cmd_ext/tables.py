"""Decomposition tables: the fits of every layer at many sizes (rank, nnz), with what the network loses by some of them.

A search assembles its trials from them, and networks of other constraints start with them. A table is one safetensors
file, named after a hash of all that it follows from (weights, data, sizes, options, version), written at once and never
changed: a folder of them only grows, may be shared by processes and machines, and is as good after a crash as before.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import fingerprints
from .allocation import Layer
from .cpu_model import cache_folder
from .decompose import Decomposition

VERSION = 3  # of the fits and of the files: a table of another one is not found
PARTS = ("u", "v", "values", "row_ptr", "col_idx")

Point = tuple[int, int]  # rank, nnz


@dataclass
class Table:
    """The fits of one layer.

    Attributes:
        errors: (rank, nnz) -> relative error: of the outputs, or of the weight without data.
        losses: (squared error, loss of the network) of some of them, ascending.
        fits: (rank, nnz) -> fit, where they are held in memory.
        path: where they are otherwise.
    """

    errors: dict[Point, float]
    losses: list[tuple[float, float]]
    groups: int = 1
    fits: dict[Point, Decomposition] = field(default_factory=dict)
    path: Path | None = None

    def dense(self, point: Point) -> Tensor:
        """U V + S of a fit, [m, n]."""
        if point in self.fits:
            return self.fits[point].to_dense()
        with safe_open(self.path, framework="pt") as file:
            parts = [file.get_tensor(f"{point[0]} {point[1]} {part}") for part in PARTS]
        return Decomposition(*parts, self.errors[point], [], self.groups).to_dense()


class Tables:
    """The tables of a network's layers, in a folder or in memory."""

    def __init__(self, folder: Path | None = None, *facts: object) -> None:
        """
        Args:
            folder: where the files are; None: in memory.
            facts: what all tables follow from, such as fingerprints and options.
        """
        self.folder, self.facts = folder, facts
        self.tables: dict[str, Table] = {}
        if folder is not None:
            folder.mkdir(parents=folder.parent.name == "cmd_ext", exist_ok=True)  # a cache may be the first

    def find(self, layer: Layer, points: Sequence[Point]) -> Table | None:
        """The table of a layer at these points, if there is one."""
        if layer.name not in self.tables and self.folder is not None:
            table = _read(self._path(layer, points), layer.groups)
            if table is not None:
                self.tables[layer.name] = table
        return self.tables.get(layer.name)

    def keep(self, layer: Layer, points: Sequence[Point], fits: Sequence[Decomposition], losses: list) -> Table:
        """Adds the table of a layer. `losses` as in Table."""
        by_point = dict(zip(points, fits, strict=True))
        errors = {p: f.relative_error if f.output_error is None else f.output_error for p, f in by_point.items()}
        table = Table(errors, sorted(losses), layer.groups, by_point)
        if self.folder is not None:
            table.path, table.fits = self._path(layer, points), {}
            _write(table, by_point)
        self.tables[layer.name] = table
        return table

    def files(self) -> dict[str, tuple[Path, int]]:
        """name -> file and groups, of the tables that are in files."""
        return {name: (table.path, table.groups) for name, table in self.tables.items() if table.path is not None}

    def open(self, files: dict[str, tuple[Path, int]]) -> bool:
        """Takes the tables that another process has kept; whether all of them are there."""
        found = {name: _read(path, groups) for name, (path, groups) in files.items()}
        self.tables |= {name: table for name, table in found.items() if table is not None}
        return None not in found.values()

    def _path(self, layer: Layer, points: Sequence[Point]) -> Path:
        about = layer.name, [*layer.weight.shape], layer.groups, str(layer.weight.dtype), layer.weight.device.type
        return self.folder / f"{fingerprints.of_facts(VERSION, *self.facts, about, list(points))}.safetensors"


def folder_of(checkpoint: str | os.PathLike) -> Path:
    """Where the tables of a search's storage are: beside its file, or in the user's cache for that of a URL."""
    text = os.fspath(checkpoint)
    if "://" in text and not text.startswith("sqlite:///"):
        return cache_folder() / "tables"
    path = Path(text.removeprefix("sqlite:///"))
    return path.with_name(path.name + ".tables")


def _write(table: Table, fits: dict[Point, Decomposition]) -> None:
    tensors = {
        f"{rank} {nnz} {part}": getattr(fit, part).detach().cpu().clone().contiguous()
        for (rank, nnz), fit in fits.items()
        for part in PARTS
    }
    content = {"errors": [[*point, error] for point, error in table.errors.items()], "losses": table.losses}
    handle, temporary = tempfile.mkstemp(prefix=f".{table.path.name}.", dir=table.path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, {"cmd_ext_table": json.dumps(content)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, table.path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read(path: Path, groups: int) -> Table | None:
    """A table from its file; None where there is none or a damaged one, which is then made anew."""
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["cmd_ext_table"])
            names = {*file.keys()}
        errors = {(int(rank), int(nnz)): float(error) for rank, nnz, error in content["errors"]}
        losses = [(float(error), float(loss)) for error, loss in content["losses"]]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    if names != {f"{rank} {nnz} {part}" for rank, nnz in errors for part in PARTS}:
        return None
    return Table(errors, losses, groups, path=path)
