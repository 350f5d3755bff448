"""Models judged in the background: they outlive pages and tabs, and what was judged lies on disk."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from app import lab, model_files
from prunedm import failure, imports, seed_sheets
from prunedm.comparison import Judged
from prunedm.jobs import load_engine
from prunedm.recipe import Eval

MODES = {
    "recorded": "by each run itself",
    "quick": "128 images, 10 steps",
    "standard": "the recipes' settings",
    "full": "2,048 images",
}
Key = tuple[tuple[str, ...], str, tuple[str, ...]]


@dataclass
class Task:
    """One judgement at work or ended."""

    future: Future
    text: str = "waiting"
    done: int = 0
    of: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def error(self) -> str:
        """Why it failed, in one line; empty while it runs and when it went well."""
        failed = self.future.exception() if self.future.done() else None
        return failure.plain_words(failed) if failed else ""

    def tell(self, text: str, done: int, of: int) -> None:
        self.text, self.done, self.of = text, done, of


class Judgements:
    """The judgements of this server, one at a time: each takes the whole machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(1, "prunedm-judge")
        self._lock = threading.Lock()
        self._tasks: dict[Any, Task] = {}

    def judge(self, sources: list[str], mode: str) -> Task:
        """Judge these models alike, unless that is done or at work. Sources as for ``prunedm compare``."""
        return self._start(_key(sources, mode), _judge, sources, mode, self.folder)

    def draw(self, wanted: list[tuple[str, int]], settings: Eval) -> Task:
        """Draw sheets of samples: of each model from the seed at a place on. What lies there already costs nothing.

        settings: how models that are of no run are sampled.
        """
        key = ("draw", tuple(wanted), settings.model_dump_json())
        return self._start(key, _draw, wanted, settings, self.folder, again=True)

    def found(self, sources: list[str], mode: str) -> Task | None:
        """What was begun for these models, if anything was since the server started."""
        with self._lock:
            return self._tasks.get(_key(sources, mode))

    def at_work(self) -> list[Task]:
        """Judgements that wait or run, and those that failed in the last minutes."""
        with self._lock:
            return [task for task in self._tasks.values() if not task.future.done()]

    def _start(self, key: Any, work: Any, *arguments: Any, again: bool = False) -> Task:
        """The task that is at this already, or (unless ``again``) was done well; else a new one."""
        with self._lock:
            known = self._tasks.get(key)
            if known is not None and not known.error and not (again and known.future.done()):
                return known
            task = Task(Future())
            self._tasks[key] = task
            task.future = self._pool.submit(work, task, *arguments)
            return task


def _key(sources: list[str], mode: str) -> Key:
    """Models and mode, and what changes when a folder that belongs to nobody here does."""
    return tuple(sources), mode, tuple(model_files.stamps(Path(s)) for s in sources if s.startswith("/"))


def _judge(task: Task, sources: list[str], mode: str, folder: Path) -> list[Judged]:
    load_engine()
    from prunedm import judging

    for source in sources:
        _require(source)
    found = judging.entries(sources, folder)
    return judging.judge(found, judging.Request(mode), task.tell)


def _draw(task: Task, wanted: list[tuple[str, int]], settings: Eval, folder: Path) -> None:
    """All that can be drawn; then ValueError in one line for what could not."""
    load_engine()
    failed: dict[str, str] = {}
    for i, (source, start) in enumerate(wanted):
        task.tell(Path(source).name if source.startswith("/") else source, i, len(wanted))
        try:
            _require(source)
            seed_sheets.draw(source, start, folder, settings)
        except Exception as error:  # noqa: BLE001  (one model that cannot be drawn costs the others nothing)
            failed[source] = failure.plain_words(error)
    if failed:
        raise ValueError("; ".join(f"{Path(source).name}: {why}" for source, why in failed.items()))


def _require(source: str) -> None:
    """A folder that belongs to nobody here may have changed since it was chosen: looked at before it is loaded."""
    if source.startswith("/"):
        imports.look(Path(source))


@st.cache_resource(show_spinner=False)
def _judgements(folder: Path) -> Judgements:
    return Judgements(folder)


def judgements() -> Judgements:
    """The judgements of this server, shared by all tabs."""
    return _judgements(lab.runs_dir())
