"""Sweeps at work in this server, one thread each, and what pages show of any sweep. They outlive pages and tabs; what
they found lies in their databases, so that a new server goes on with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from app import lab
from prunedm import charts, store, sweep, sweep_worker
from prunedm.jobs import Executor, through
from prunedm.recipe import RecipeError
from prunedm.records import ACTIVE
from prunedm.sweep_spec import Sweep, SweepError
from prunedm.sweep_spec import build as build_spec

if TYPE_CHECKING:
    from optuna import Study

LINES = 200  # of a worker's account that are kept
FIRST = 5  # trials that the form shows before anything runs
LIVE = ("running", "stopping")


@dataclass
class Task:
    """One sweep's worker in this server, at work or ended."""

    name: str
    stopping: threading.Event = field(default_factory=threading.Event)
    status: str = "running"  # then done, stopped or failed
    error: str = ""
    lines: list[str] = field(default_factory=list)

    def tell(self, line: str) -> None:
        self.lines = [*self.lines, line][-LINES:]


class Sweeps:
    """The sweeps of this server. Their runs wait in its queue, behind those that were launched by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._tasks: dict[str, Task] = {}

    def start(self, spec: Sweep, jobs: Executor, trials: int | None = None) -> Task:
        """Begin a sweep, or go on with it, unless it is at work. ValueError or OSError where it cannot be.

        trials: how many in all, where that is not what the specification says.
        """
        with self._lock:
            known = self._tasks.get(spec.name)
            if known is not None and known.status == "running":
                raise SweepError(f"sweep {spec.name} is at work; watch it, or stop it first")
            with one_line():
                sweep.start(spec, self.folder, trials=trials)
            task = self._tasks[spec.name] = Task(spec.name)
            name = f"prunedm-sweep-{spec.name}"
            threading.Thread(target=self._work, args=(task, jobs), name=name, daemon=True).start()
            return task

    def stop(self, name: str, study: Study) -> None:
        """Ask its workers, those of other processes too, to stop after the step at hand."""
        task = self.found(name)
        if task is not None:
            task.stopping.set()
        with one_line():
            sweep.request_stop(study, self.folder)

    def found(self, name: str) -> Task | None:
        """What was begun of this name since the server started."""
        with self._lock:
            return self._tasks.get(name)

    def _work(self, task: Task, jobs: Executor) -> None:
        """In a thread of its own, with a study of its own."""
        status = "failed"
        try:
            study = sweep.start(sweep.spec_of(sweep.load(task.name, self.folder)), self.folder)
            execute = through(jobs)
            worker = sweep_worker.Worker(study, self.folder, execute=execute, stop=task.stopping.is_set, tell=task.tell)
            status = worker.run()
        except Exception as error:  # noqa: BLE001  (whatever ends a worker is said on the page)
            task.error = " ".join(str(error).split())[:400] or type(error).__name__
        finally:
            task.status = status


@st.cache_resource(show_spinner=False)
def _sweeps(folder: Path) -> Sweeps:
    return Sweeps(folder)


def sweeps() -> Sweeps:
    """The sweeps of this server, shared by all tabs."""
    return _sweeps(lab.runs_dir())


# --- what pages show -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Seen:
    """A sweep as it stands: status is running, stopping, done, stopped or failed."""

    spec: Sweep
    rows: list[dict[str, Any]]
    front: list[int]
    progress: dict[str, Any]
    status: str
    here: bool  # whether a worker of this server is or was on it
    error: str
    lines: list[str]
    study: Study

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def live(self) -> bool:
        return self.status in LIVE

    def complete(self) -> list[dict[str, Any]]:
        """Trials with a result."""
        return [row for row in self.rows if row["state"] == "complete"]


def look(name: str) -> Seen:
    """A sweep's trials and state. :class:`SweepError` in one line where its database cannot be read."""
    task = sweeps().found(name)
    status = task.status if task else ""  # before the trials, so that those of the last moment are not missed
    folder = lab.runs_dir()
    path = sweep.folder(folder, name) / sweep.DATABASE
    with one_line():
        study = _study(folder, name, lab.stamp(path)[-1:])
        spec, rows, front = sweep.spec_of(study), sweep.trials(study), sweep.front(study)
        progress = sweep.progress(study)
    if status == "running":
        status = "stopping" if task.stopping.is_set() else "running"
    else:
        rows = [row | _truth(row, folder) for row in rows]
        status = _status_without_worker(status, rows, progress)
    error, lines = (task.error, task.lines) if task else ("", [])
    return Seen(spec, rows, front, progress, status, task is not None, error, lines, study)


def _truth(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A trial whose run nobody works on is interrupted, whatever the database says until it is gone on with."""
    if row["state"] != "running" or row["run"] is None:
        return {}
    with suppress(ValueError, OSError):
        if store.find(folder, row["run"]).state().status in ACTIVE:
            return {}
    return {"state": "interrupted"}


def _status_without_worker(before: str, rows: list[dict[str, Any]], progress: dict[str, Any]) -> str:
    if any(row["state"] == "running" for row in rows):
        return "running"  # another process is at it
    if before == "failed":
        return before
    return "done" if progress["finished"] >= progress["of"] else "stopped"


@st.cache_resource(show_spinner=False, max_entries=16)
def _study(folder: Path, name: str, inode: tuple[int, ...]) -> Study:
    """Open once: it is asked every two seconds while it works."""
    return sweep.load(name, folder)


def importances(seen: Seen, objective: str) -> dict[str, float]:
    """Shares of the fields in one objective. :class:`SweepError` where there are too few trials."""
    folder = sweep.folder(lab.runs_dir(), seen.name)
    began = [trial.datetime_start for trial in seen.study.get_trials(deepcopy=False)[:1]]  # of another: later
    return _importances(seen, str(folder), str(began), objective, len(seen.complete()))


@st.cache_data(show_spinner=False, max_entries=64)
def _importances(_seen: Seen, folder: str, began: str, objective: str, complete: int) -> dict[str, float]:
    try:
        with one_line():
            return sweep.importances(_seen.study, objective)
    except RuntimeError as error:  # Optuna's word for values that do not differ
        raise SweepError(" ".join(str(error).split())[:200]) from error


@contextmanager
def one_line() -> Iterator[None]:
    """What a database raises becomes a :class:`SweepError` of one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, SweepError | store.StoreError | RecipeError):
            raise
        raise SweepError(_told(error)) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("optuna", "sqlalchemy", "sqlite3", "alembic"):
            raise
        raise SweepError(_told(error)) from error


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return f"this sweep's database cannot be read ({text}); put back a copy of it, or delete its folder"


@st.cache_data(show_spinner="Drawing the first trials…", max_entries=32)
def first_trials(spec_yaml: str, _spec: Sweep) -> list[dict[str, Any]]:
    """What the first trials would be as long as no result is known: params, and why one is no recipe."""
    from prunedm import sweep_sampler

    return sweep_sampler.first_trials(_spec, FIRST)


def spec_of_document(document: dict[str, Any]) -> Sweep:
    """Validated. SweepError or RecipeError in one line."""
    return build_spec(document, lab.ROOT)


def best(seen: Seen, most: int) -> list[dict[str, Any]]:
    """Trials worth comparing: the front, spread evenly where it is long; with one objective the best ones."""
    first = next(iter(seen.spec.objectives.figures))
    rows = sorted(seen.complete(), key=lambda row: row["objectives"][first])
    if len(seen.spec.objectives.figures) == 1:
        return rows[:most]
    return charts.spread([row for row in rows if row["number"] in seen.front], most)


def model_of(run_id: str | None) -> str | None:
    """``RUN/variant`` of the last model of a trial's run; None where the run is gone or unreadable."""
    if run_id is None:
        return None
    try:
        results = lab.card(store.find(lab.runs_dir(), run_id)).results
    except ValueError:
        return None
    last = next((variant for variant in ("nm", "structured", "dense") if variant in results), None)
    return f"{run_id}/{last}" if last else None
