"""The one process-wide set of jobs, and cached readers of run folders. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from prunedm import files, store
from prunedm.executors import Choice, Chosen
from prunedm.jobs import load_engine
from prunedm.jsonl import Lines, Tail
from prunedm.recipe import Recipe
from prunedm.records import ACTIVE, RunState
from prunedm.steps import Columns, Steps
from prunedm.store import EVENTS, Run

ROOT = Path(__file__).resolve().parent.parent


def page(name: str) -> Path:
    """The script of a page, for links to it."""
    return ROOT / "pages" / f"{name}.py"


def runs_dir() -> Path:
    """``PRUNEDM_RUNS`` or ``runs`` beside the project."""
    return Path(os.environ.get("PRUNEDM_RUNS") or ROOT / "runs").absolute()


@st.cache_resource(show_spinner=False)
def _jobs(folder: Path) -> Chosen:
    made = Chosen(folder, Choice.read(folder, os.environ))
    made.warm_up(cards)  # the first list of many runs need not wait for their recipes
    return made


def jobs() -> Chosen:
    """The executor of this server's runs, shared by all tabs."""
    return _jobs(runs_dir())


def position(run_id: str) -> int | None:
    """A run's place in the queue, 1 for the next; None when it does not wait in this server, or nothing can: that the
    folder takes no runs is said by the pages that queue them."""
    with suppress(ValueError, OSError):
        return jobs().position(run_id)
    return None


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


class Kept:
    """What was read of one run, each for as long as its file looks the same. 200 runs through Streamlit's own cache
    would cost half a second a rerun. Treat what it gives as read-only: all tabs share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, tuple[Any, Any]] = {}

    def get(self, file: str, read: Callable[[], Any], what: str = "", more: Any = None) -> Any:
        """The value that ``read`` gives, read anew when the file's stamp or ``more`` has changed."""
        stamp_, what = (stamp(self.folder / file), more), what or file
        known = self._found.get(what)
        if known is None or known[0] != stamp_:
            known = self._found[what] = (stamp_, read())
        return known[1]


_KEPT: dict[Path, Kept] = {}


def kept(run: Run) -> Kept:
    """What was read of this run, shared by all tabs."""
    return _KEPT.get(run.folder) or _KEPT.setdefault(run.folder, Kept(run.folder))


def all_runs() -> list[Run]:
    """All runs, newest first; what was read of those that are gone is forgotten."""
    found = store.all_runs(runs_dir())
    there = {run.folder for run in found}
    for gone in [folder for folder in list(_KEPT) if folder not in there]:
        _KEPT.pop(gone, None)
    return found


def card(run: Run) -> Card:
    """A run's recipe, state and figures; a broken folder is a card that says so."""
    known = kept(run)
    try:
        files.require_own(run.folder)
        recipe = known.get("recipe.yaml", run.recipe)
        results = known.get("evaluation.json", run.evaluation)
        return Card(run, recipe, run.state(), results)
    except (ValueError, OSError) as error:
        return Card(run, problem=str(error).replace(f"{run.folder}{os.sep}", ""))


def cards() -> list[Card]:
    """All runs, newest first."""
    return [card(run) for run in all_runs()]


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file does; empty when it is not there."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


@st.cache_resource(show_spinner=False, max_entries=96)
def _lines(path: Path) -> Tail[list[dict[str, Any]]]:
    return Tail(path, Lines)


@st.cache_resource(show_spinner=False, max_entries=48)
def _steps(path: Path) -> Tail[Steps]:
    return Tail(path, Columns)


def lines(run: Run, name: str) -> list[dict[str, Any]]:
    """The records of one growing file of the run so far. Treat them as read-only: all tabs share them."""
    return _lines(run.folder / name).read()


def steps(run: Run) -> Steps:
    """The run's step records so far."""
    return _steps(run.metrics_path).read()


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    """The run's events of one kind."""
    return [event for event in lines(run, EVENTS) if event.get("kind") == kind]


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
    st.switch_page(page("monitor"), query_params={"run": run.id})
