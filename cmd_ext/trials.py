"""Numbered trials in an Optuna study: each is made once, by whichever process takes it, and outlives a crash.

A trial is taken by creating it, in one write that holds its number, its parameters and its owner; of two processes that
take the same number the first one keeps it. What a killed process had taken is open again at once on its own host, and
after a while elsewhere. The proposal of a number depends on the seed and on the finished trials alone, so one process
that was killed and started again makes the same trials as one that was not.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from . import distributed

STARTUP = 8  # random trials before the estimator takes over, and before any is stopped early
RACES = "already exists", "no such table", "UNIQUE constraint", "database is locked"
WORST = 1e30
PATIENCE = timedelta(hours=1)  # how long a trial of another host may run
JOURNALS = (".log", ".journal", ".jsonl")

_log = distributed.logger(__name__)


@dataclass(frozen=True)
class Trial:
    """A trial.

    Attributes:
        index: its number, from 0.
        params: the values of the space.
        proposal: what was evaluated.
        loss: what is minimised; None if it was pruned or is under way.
        result: what the evaluation told besides.
        finished: False while it is under way.
    """

    index: int
    params: dict[str, float]
    proposal: dict[str, Any]
    loss: float | None = None
    result: dict[str, Any] = field(default_factory=dict)
    finished: bool = True


class Pruned(Exception):
    """Raised by an evaluation that stops early."""


Propose = Callable[[int, list[Trial]], tuple[dict[str, float], dict[str, Any]]]
Evaluate = Callable[[dict[str, Any], Callable[[int, float], None]], tuple[float, dict[str, Any]]]


def available() -> bool:
    """Whether Optuna is installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        return False
    return True


class Study:
    """The trials of one problem.

    Attributes:
        space: parameter -> (lowest, highest) value.
    """

    def __init__(self, checkpoint: str | os.PathLike | None, name: str, space: dict[str, tuple], seed: int) -> None:
        """
        Args:
            checkpoint: SQLite file, journal file (.log, .journal, .jsonl) or URL of a database; None: memory alone.
            name: of the study in the storage; two problems must not share one.
            space: parameter -> (lowest, highest) value.
            seed: of the proposals.

        Raises:
            OSError: the storage cannot be opened.
        """
        import optuna

        self.space, self.seed = space, seed
        self._optuna = optuna
        self._distributions = {key: optuna.distributions.FloatDistribution(*ends) for key, ends in space.items()}
        self._name, self._owner = name, _owner(os.getpid())
        with self._quiet():
            self._study = optuna.create_study(
                storage=open_storage(checkpoint),
                sampler=optuna.samplers.RandomSampler(seed=0),
                pruner=optuna.pruners.PercentilePruner(50, n_startup_trials=STARTUP),
                study_name=name,
                load_if_exists=True,
            )

    def trials(self) -> list[Trial]:
        """Those that are finished or under way, by number; what nobody works on any more is marked as failed."""
        states = self._optuna.trial.TrialState
        found: dict[int, Trial] = {}
        for trial in self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.RUNNING)):
            attrs, running = trial.user_attrs, trial.state == states.RUNNING
            if running and self._dead(trial):
                self._tell(trial.number, state=states.FAIL)
                _log.info("compress: trial %d was left by a process that ended", attrs["index"])
                continue
            loss = trial.value if trial.state == states.COMPLETE else None
            what = Trial(
                attrs["index"], dict(trial.params), attrs["proposal"], loss, attrs.get("result", {}), not running
            )
            found.setdefault(what.index, what)
        return [found[index] for index in sorted(found)]

    def suggest(self, index: int) -> dict[str, float]:
        """Values of the space for a trial, by the tree-structured Parzen estimator on the finished ones."""
        optuna, names = self._optuna, sorted(self.space)
        sampler = optuna.samplers.TPESampler(
            seed=_mixed(self.seed, index), multivariate=True, n_startup_trials=STARTUP, constant_liar=False
        )
        space = {name: self._distributions[name] for name in names}
        blank = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
        with self._quiet():
            params = sampler.sample_relative(self._study, blank, space)
            for name in names:
                if name not in params:
                    params[name] = sampler.sample_independent(self._study, blank, name, space[name])
        return {name: float(params[name]) for name in names}

    def run(self, count: int, propose: Propose, evaluate: Evaluate, done: Callable[[Trial], None]) -> list[Trial]:
        """Makes the trials 0 ... count - 1 that are missing; returns when all are finished, here or elsewhere.

        Args:
            propose: (index, trials so far) -> values of the space ({}: none) and what `evaluate` gets.
            evaluate: (proposal, report) -> loss and what to keep with it. report(step, loss so far) raises Pruned
                where it is not worth going on.
            done: called after each trial that was made here.
        """
        wait = 0.05
        with self._quiet():
            while True:
                trials = [trial for trial in self.trials() if trial.index < count]
                index = next((i for i in range(count) if i not in {trial.index for trial in trials}), None)
                if index is None:
                    if all(trial.finished for trial in trials):
                        return trials
                    time.sleep(wait)  # others are at work
                    wait = min(2.0, 1.5 * wait)
                    continue
                wait = 0.05
                params, proposal = propose(index, trials)
                number = self._take(index, params, proposal)
                if number is not None:
                    done(self._make(number, index, params, proposal, evaluate))

    def _dead(self, trial: Any) -> bool:
        owner = trial.user_attrs.get("owner", "")
        host, _, process = owner.partition("/")
        if host != socket.gethostname():
            return trial.datetime_start is not None and datetime.now() - trial.datetime_start > PATIENCE
        return _owner(int(process.partition("/")[0])) != owner

    def _take(self, index: int, params: dict[str, float], proposal: dict) -> int | None:
        """The Optuna number of a new trial; None where another process was faster."""
        optuna, mark = self._optuna, f"{self._owner}/{time.time_ns()}"
        attrs = {"index": index, "owner": self._owner, "mark": mark, "proposal": proposal}
        states = optuna.trial.TrialState
        distributions = {name: self._distributions[name] for name in params}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=states.RUNNING, params=params, distributions=distributions, user_attrs=attrs
            )
        )
        rivals = [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.user_attrs.get("index") == index and trial.state != states.FAIL
        ]
        mine = next(trial.number for trial in rivals if trial.user_attrs["mark"] == mark)
        if min(trial.number for trial in rivals) < mine:
            self._tell(mine, state=states.FAIL)
            return None
        return mine

    def _make(self, number: int, index: int, params: dict, proposal: dict, evaluate: Evaluate) -> Trial:
        states, trial = self._optuna.trial.TrialState, self._handle(number)

        def report(step: int, loss: float) -> None:
            trial.report(loss, step)
            if trial.should_prune():
                raise Pruned

        try:
            loss, result = evaluate(proposal, report)
        except Pruned:
            self._tell(number, state=states.PRUNED)
            return Trial(index, params, proposal)
        except BaseException:
            self._tell(number, state=states.FAIL)
            raise
        loss = loss if loss < WORST else WORST  # NaN too, which Optuna takes for a failure
        trial.set_user_attr("result", result)
        self._tell(number, values=loss)
        return Trial(index, params, proposal, loss, result)

    def _handle(self, number: int) -> Any:
        frozen = next(trial for trial in self._study.get_trials(deepcopy=False) if trial.number == number)
        return self._optuna.trial.Trial(self._study, frozen._trial_id)

    def _tell(self, number: int, **what: Any) -> None:
        self._study.tell(number, skip_if_finished=True, **what)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without Optuna's lines about every trial, and its word that options may change."""
        optuna = self._optuna
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                yield
        finally:
            optuna.logging.set_verbosity(before)


def open_storage(checkpoint: str | os.PathLike | None) -> Any:
    """Optuna's storage: a SQLite file, a journal file by its ending, or the database of a URL; None for memory.

    Raises:
        OSError: it cannot be opened.
    """
    if checkpoint is None:
        return None
    for attempt in range(6):
        try:
            return _storage(os.fspath(checkpoint))
        except OSError:
            raise
        except Exception as error:  # whatever the database's driver raises
            # Two processes that make one database at once: the slower one finds it on another look.
            if attempt == 5 or not any(words in str(error) for words in RACES):
                reason = str(error).strip().partition("\n")[0]
                raise OSError(f"compress: checkpoint {checkpoint} cannot be opened: {reason}") from error
            time.sleep(0.2 * 2**attempt)


def check_storage(checkpoint: str | os.PathLike | None) -> None:
    """Raises OSError where a storage cannot be opened."""
    open_storage(checkpoint)


def _storage(text: str) -> Any:
    from optuna import storages

    if "://" in text and not text.startswith("sqlite:///"):
        return storages.RDBStorage(text)
    path = Path(text.removeprefix("sqlite:///"))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"compress: checkpoint {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"compress: checkpoint {path} must be a file or a URL, got a folder")
    if path.suffix in JOURNALS:
        lock = storages.journal.JournalFileOpenLock(str(path), grace_period=10)
        _mend(path, lock)
        return storages.JournalStorage(storages.journal.JournalFileBackend(str(path), lock_obj=lock))
    return storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})


def _mend(path: Path, lock: Any) -> None:
    """Cuts off the line of a journal that a killed process left unfinished."""
    if not path.exists():
        return
    lock.acquire()
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    finally:
        lock.release()


def _owner(pid: int) -> str | None:
    """host/pid/start of a running process, None if there is none."""
    host = socket.gethostname()
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return f"{host}/{pid}/{stat.rpartition(')')[2].split()[19]}"
    except OSError:
        pass
    try:  # no /proc on this system
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return f"{host}/{pid}/" if not Path("/proc/self/stat").exists() else None


def _mixed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:4], "big")
