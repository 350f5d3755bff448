"""The one process-wide set of jobs, and cached readers of run folders. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from prunedm import store
from prunedm.jobs import Jobs, load_engine
from prunedm.recipe import Recipe
from prunedm.records import ACTIVE, RunState
from prunedm.store import Run

ROOT = Path(__file__).resolve().parent.parent


def runs_dir() -> Path:
    """``PRUNEDM_RUNS`` or ``runs`` beside the project."""
    return Path(os.environ.get("PRUNEDM_RUNS") or ROOT / "runs").absolute()


@st.cache_resource(show_spinner=False)
def _jobs(folder: Path) -> Jobs:
    made = Jobs(folder)
    made.warm_up()
    return made


def jobs() -> Jobs:
    """The jobs of this server, shared by all tabs."""
    return _jobs(runs_dir())


@dataclass
class Card:
    """One run as lists show it; ``problem`` says why an unreadable folder cannot be shown."""

    run: Run
    recipe: Recipe | None = None
    state: RunState | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""

    @property
    def status(self) -> str:
        return self.state.status if self.state else "unreadable"

    @property
    def active(self) -> bool:
        return self.status in ACTIVE


def card(run: Run) -> Card:
    """A run's recipe, state and figures; a broken folder is a card that says so."""
    try:
        folder = str(run.folder)
        recipe = _recipe(folder, stamp(run.folder / "recipe.yaml"))
        results = _results(folder, stamp(run.folder / "evaluation.json"))
        return Card(run, recipe, run.state(), results)
    except (ValueError, OSError) as error:
        return Card(run, problem=str(error))


def cards() -> list[Card]:
    """All runs, newest first."""
    return [card(run) for run in store.all_runs(runs_dir())]


@st.cache_data(show_spinner=False, max_entries=512)
def _recipe(folder: str, stamp: tuple[int, ...]) -> Recipe:
    return Run(Path(folder)).recipe()


@st.cache_data(show_spinner=False, max_entries=512)
def _results(folder: str, stamp: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    return Run(Path(folder)).evaluation()


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file does; empty when it is not there."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


@dataclass
class _Tail:
    """A growing file of JSON lines, of which only what is new is parsed."""

    inode: int = 0
    offset: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@st.cache_resource(show_spinner=False, max_entries=48)
def _tail(path: str) -> _Tail:
    return _Tail()


def lines(run: Run, name: str) -> list[dict[str, Any]]:
    """The records of one growing file of the run so far. Treat as read-only: all tabs share the list."""
    path = run.folder / name
    tail = _tail(str(path))
    if not path.exists():
        return []
    with tail.lock, path.open("rb") as file:
        stat = os.fstat(file.fileno())
        if stat.st_ino != tail.inode or stat.st_size < tail.offset:  # rewritten by a resume
            tail.inode, tail.offset, tail.records = stat.st_ino, 0, []
        file.seek(tail.offset)
        whole, newline, _ = file.read().rpartition(b"\n")
        tail.offset += len(whole) + len(newline)
        new = [json.loads(line) for line in whole.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
        tail.records = [*tail.records, *new]
        return tail.records


def metrics(run: Run) -> list[dict[str, Any]]:
    """The run's step records."""
    return lines(run, "metrics.jsonl")


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    """The run's events of one kind."""
    return [event for event in lines(run, "events.jsonl") if event.get("kind") == kind]


@st.cache_data(show_spinner="Pruning a copy in memory to predict the sizes…", max_entries=64)
def preview(recipe_json: str, folder: str) -> dict[str, Any]:
    """What a recipe would prune and mask (JSON, so that the cache sees its content)."""
    load_engine()
    from prunedm import inputs

    return inputs.preview(Recipe.model_validate_json(recipe_json), Path(folder))


def start(recipe: Recipe) -> None:
    """Queue a run and go to its Monitor; ValueError or OSError when it cannot run."""
    with st.spinner("Preparing the run…"):
        run = jobs().submit(recipe)
    st.session_state["run_shown"] = run.id
    st.switch_page(ROOT / "pages" / "monitor.py", query_params={"run": run.id})
