"""From a case to a row: our result is checked, then we and every rival run in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from cmd_ext import _C
from cmd_ext.bench.shapes import Shape

Call = Callable[[], object]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the norm
SCALE = {"ms": 1e3, "us": 1e6, "cpu s": 1.0}  # units of time, from seconds
LOOSER = 10  # times our tolerance: what a rival is granted
LEAST, MOST = 3, 300  # runs of a contender
CPU = torch.device("cpu")
SLOW = 2.0  # seconds from which the first run of a contender is its only one


class Mismatch(Exception):
    """A result of ours that is wrong."""


# Rows ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Quantiles of a contender's times, in the unit of its row."""

    p20: float
    p50: float
    p80: float
    runs: int = 1

    @classmethod
    def of(cls, times: Sequence[float], scale: float = 1.0) -> Times:
        ordered, last = sorted(times), len(times) - 1
        return cls(*(scale * ordered[round(last * share)] for share in (0.2, 0.5, 0.8)), len(ordered))

    @classmethod
    def total(cls, parts: Iterable[tuple[Times, int]]) -> Times:
        """Of the same layers one after another: the sums of the quantiles, each part so many times."""
        parts = list(parts)
        sums = (sum(count * getattr(times, name) for times, count in parts) for name in ("p20", "p50", "p80"))
        return cls(*sums, min(times.runs for times, _ in parts))


@dataclass
class Row:
    """One comparison; `theirs` is the fastest rival that computes the same, `references` compute something else."""

    name: str
    unit: str
    ours: Times
    rivals: dict[str, Times]
    references: dict[str, Times] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # relative, of "ours" and of the rivals that were checked
    absent: dict[str, str] = field(default_factory=dict)  # rivals that do not run here, and why
    gflop: float | None = None
    peak: float | None = None  # GFLOP/s
    note: str = ""
    goals: tuple[Goal, ...] = ()
    ways: dict[str, Times] = field(default_factory=dict)  # to call us; `ours` is the fastest

    @property
    def rival(self) -> str | None:
        return min(self.rivals, key=lambda name: self.rivals[name].p50, default=None)

    @property
    def theirs(self) -> float | None:
        return self.rivals[self.rival].p50 if self.rivals else None

    @property
    def ratio(self) -> float | None:
        return self.theirs / self.ours.p50 if self.rivals else None

    @property
    def fraction(self) -> float | None:
        """Of the peak that the row's useful operations reach."""
        seconds = self.ours.p50 / SCALE.get(self.unit, 1.0)
        return self.gflop / seconds / self.peak if self.gflop and self.peak else None

    def over(self, contender: str) -> float | None:
        """How many times faster we are than the fastest rival or reference whose name begins like this."""
        found = [times.p50 for name, times in (self.rivals | self.references).items() if name.startswith(contender)]
        return min(found) / self.ours.p50 if found else None

    def told(self) -> Row:
        """With a note, which if there is none tells the ways to call us, the fastest first."""
        ways = sorted(self.ways.items(), key=lambda way: way[1].p50)
        told = [name if times is self.ours else f"{name} {times.p50:.3g} {self.unit}" for name, times in ways]
        return self if self.note else replace(self, note=", ".join(told))

    def reached(self) -> list[dict]:
        """The row's goals that could be measured."""
        values = [(goal, goal.value(self)) for goal in self.goals]
        return [{**goal.facts(), "reached": value} for goal, value in values if value is not None]

    def to_dict(self) -> dict:
        def times(of: dict[str, Times]) -> dict:
            return {name: asdict(value) for name, value in of.items()}

        return {
            "name": self.name,
            "ours": self.ours.p50,
            "p20": self.ours.p20,
            "p80": self.ours.p80,
            "runs": self.ours.runs,
            "theirs": self.theirs,
            "unit": self.unit,
            "ways": {name: times.p50 for name, times in self.ways.items()},
            "rival": self.rival,
            "wanted": next((goal.wanted for goal in self.goals if not goal.at_most), None),
            "note": self.note,
            "ratio": self.ratio,
            "gflop": self.gflop,
            "fraction_of_peak": self.fraction,
            "rivals": times(self.rivals),
            "references": times(self.references),
            "errors": self.errors,
            "absent": self.absent,
            "targets": self.reached(),
        }


@dataclass(frozen=True)
class Goal:
    """What a row should reach. `target` is its number or letter in the list at the end; one without is only shown."""

    target: str
    what: str
    wanted: float
    value: Callable[[Row], float | None] = lambda row: row.ratio
    at_most: bool = False

    def facts(self) -> dict:
        return {"target": self.target, "what": self.what, "wanted": self.wanted, "at_most": self.at_most}


def over(contender: str) -> Callable[[Row], float | None]:
    """The value of a goal: Row.over this contender."""
    return lambda row: row.over(contender)


# Cases --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row to be measured.

    Attributes:
        ours: the ways to call us; the fastest one counts, and is noted if there are several.
        check: relative error of a result of ours (and of the rivals', if they are `checked`) against float64.
        rivals, references: calls; those that raise here are left out. Only rivals compute the same as we.
        gflop: useful operations of a call.
        calls: layer calls in one call of a contender.
        threads: of all contenders; None leaves them.
        clock: seconds.
        note: text, or a function of our result and the others' by name.
    """

    name: str
    ours: dict[str, Call]
    check: Callable[[object], float]
    tolerance: float
    rivals: dict[str, Call]
    references: dict[str, Call] = field(default_factory=dict)
    checked: bool = True
    gflop: float | None = None
    goals: tuple[Goal, ...] = ()
    unit: str = "ms"
    calls: int = 1
    threads: int | None = None
    clock: Callable[[], float] = time.perf_counter
    note: str | Callable[[object, dict[str, object]], str] = ""


def error_of(got: Tensor, want: Tensor) -> float:
    """Relative, in the Frobenius norm; infinite where the result is not finite or has another shape."""
    if got.shape != want.shape:
        return float("inf")
    error = (got.double() - want).norm() / want.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return error.nan_to_num(nan=torch.inf).item()


@dataclass(frozen=True)
class Run:
    """What all rows of a run share, and how one is measured."""

    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    seconds: float = 1.0  # of a row
    quick: bool = False
    shapes: tuple[Shape, ...] = ()

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def randn(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device).to(self.dtype)

    def pick(self, kind: type, shapes: Sequence, quick: Sequence) -> Sequence:
        """The user's shapes of this kind, else these."""
        named = [shape for shape in self.shapes if isinstance(shape, kind)]
        return named or (quick if self.quick else shapes)

    def peak(self, threads: int) -> float | None:
        """GFLOP/s of multiply-adds in the dtype that we accumulate in."""
        if self.device.type != "cpu":
            return None
        return fma_peak(threads) / (2 if self.dtype == torch.float64 else 1)

    def measure(self, case: Case) -> Row:
        """Raises Mismatch if a result of ours is wrong."""
        with torch.no_grad(), threads_of(case.threads) as threads:
            results = {name: call() for name, call in case.ours.items()}
            errors = {"ours": max(case.check(result) for result in results.values())}
            if not errors["ours"] <= case.tolerance:
                raise Mismatch(f"{case.name}: relative error {errors['ours']:.2e}, want <= {case.tolerance:.0e}")
            others, absent = self._others(case, errors)
            calls = {("ours", name): call for name, call in case.ours.items()}
            calls.update({("theirs", name): (case.rivals | case.references)[name] for name in others})
            spent = interleaved(calls, self.seconds, case.clock, self._wait)
        times = {key: Times.of(list_, SCALE[case.unit] / case.calls) for key, list_ in spent.items()}
        best = min(case.ours, key=lambda name: times["ours", name].p50)
        note = case.note(results[best], others) if callable(case.note) else case.note
        return Row(
            case.name,
            case.unit,
            times["ours", best],
            {name: times["theirs", name] for name in others if name in case.rivals},
            {name: times["theirs", name] for name in others if name in case.references},
            errors,
            absent,
            case.gflop,
            self.peak(threads),
            note,
            case.goals,
            {name: times["ours", name] for name in case.ours if name},
        ).told()

    def _others(self, case: Case, errors: dict[str, float]) -> tuple[dict[str, object], dict[str, str]]:
        """The first results of the rivals and references that run here; why the others do not."""
        results: dict[str, object] = {}
        absent: dict[str, str] = {}
        for name, call in (case.rivals | case.references).items():
            try:
                results[name] = call()
            except (RuntimeError, TypeError, ValueError, ImportError) as error:
                absent[name] = (str(error) or repr(error)).splitlines()[0][:160]
                continue
            if case.checked and name in case.rivals:
                errors[name] = case.check(results[name])
                if not errors[name] <= LOOSER * case.tolerance:
                    absent[name] = f"wrong result: relative error {errors[name]:.2e}"
                    del results[name]
        return results, absent

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleaved(
    calls: dict, seconds: float, clock: Callable[[], float] = time.perf_counter, wait: Call = lambda: None
) -> dict[object, list[float]]:
    """Seconds of each call, made in turn, each as often as its equal share of `seconds` allows.

    Fewer runs of a slow one are spread evenly over the turns, so that all see the same weather.
    """

    def timed(call: Call) -> float:
        wait()
        start = clock()
        call()
        wait()
        return clock() - start

    first = {name: timed(call) for name, call in calls.items()}
    share = seconds / len(calls)
    runs = {name: 0 if t > SLOW else max(LEAST, min(MOST, int(share / max(t, 1e-7)))) for name, t in first.items()}
    times = {name: [] if runs[name] else [t] for name, t in first.items()}
    turns = max(runs.values())
    for turn in range(turns):
        for name, call in calls.items():
            if (turn + 1) * runs[name] // turns > turn * runs[name] // turns:
                times[name].append(timed(call))
    return times


def total(name: str, parts: list[tuple[Row, int]], best: str, goals: tuple[Goal, ...] = ()) -> Row:
    """The row of several layers one after another, each so many times.

    Among its rivals is the sum of each layer's fastest rival whose name begins with `best`.
    """
    rows = [row for row, _ in parts]

    def sums(of: Callable[[Row], dict[str, Times]]) -> dict[str, Times]:
        common = [name for name in of(rows[0]) if all(name in of(row) for row in rows)]
        return {name: Times.total((of(row)[name], count) for row, count in parts) for name in common}

    def fastest(row: Row) -> Times:
        return min(
            (times for rival, times in row.rivals.items() if rival.startswith(best)), key=lambda times: times.p50
        )

    return Row(
        name,
        rows[0].unit,
        Times.total((row.ours, count) for row, count in parts),
        {
            f"{best}, best of each layer": Times.total((fastest(row), count) for row, count in parts),
            **sums(lambda row: row.rivals),
        },
        sums(lambda row: row.references),
        {"ours": max(row.errors["ours"] for row in rows)},
        gflop=sum(count * row.gflop for row, count in parts),
        peak=rows[0].peak,
        goals=goals,
        ways=sums(lambda row: row.ways),
    ).told()


@contextmanager
def threads_of(count: int | None):
    """So many threads for torch and, where threadpoolctl is installed, for the libraries of scipy; None leaves them."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield before
        return
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        limits = None
    else:
        limits = threadpool_limits(count)
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        if limits:
            limits.restore_original_limits()
        torch.set_num_threads(before)


@lru_cache
def fma_peak(threads: int) -> float:
    """GFLOP/s of float32 multiply-adds from registers, measured once in a process; the best of three."""
    return max(_C.fma_peak(threads) for _ in range(3))
