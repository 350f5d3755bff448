"""The one process-wide set of jobs, and cached readers of run folders. Nothing here imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from prunedm import store
from prunedm.jobs import Jobs
from prunedm.recipe import Recipe
from prunedm.records import RunState
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
    problem: str = ""

    @property
    def status(self) -> str:
        return self.state.status if self.state else "unreadable"


def card(run: Run) -> Card:
    """A run's recipe and state; a broken folder is a card that says so."""
    try:
        return Card(run, _recipe(str(run.folder), _stamp(run.folder / "recipe.yaml")), run.state())
    except (store.StoreError, ValueError) as error:
        return Card(run, problem=str(error))


def cards() -> list[Card]:
    """All runs, newest first."""
    return [card(run) for run in store.all_runs(runs_dir())]


@st.cache_data(show_spinner=False, max_entries=512)
def _recipe(folder: str, stamp: tuple[int, int]) -> Recipe:
    return Run(Path(folder)).recipe()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)


def metrics(run: Run) -> list[dict[str, Any]]:
    """The run's step records, read again only when the file has changed."""
    return _metrics(str(run.folder), _stamp(run.folder / "metrics.jsonl"))


@st.cache_data(show_spinner=False, max_entries=8)
def _metrics(folder: str, stamp: tuple[int, int]) -> list[dict[str, Any]]:
    return Run(Path(folder)).metrics()


@st.cache_data(show_spinner="Pruning a copy in memory to predict the sizes…", max_entries=64)
def preview(recipe_json: str, folder: str) -> dict[str, Any]:
    """What a recipe would prune and mask (JSON, so that the cache sees its content)."""
    from prunedm import pipeline

    return pipeline.preview(Recipe.model_validate_json(recipe_json), Path(folder))


def start(recipe: Recipe) -> None:
    """Queue a run and go to its Monitor; ValueError when it cannot run."""
    run = jobs().submit(recipe)
    st.session_state["monitor_run"] = run.id
    st.switch_page(ROOT / "pages" / "monitor.py", query_params={"run": run.id})
