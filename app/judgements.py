"""Models judged in the background: they outlive pages and tabs, and what was judged lies on disk."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from app import lab
from prunedm.comparison import Judged
from prunedm.jobs import load_engine

MODES = {
    "recorded": "by each run itself",
    "quick": "128 images, 10 steps",
    "standard": "the recipes' settings",
    "full": "2,048 images",
}
Key = tuple[tuple[str, ...], str]


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
        return " ".join(str(self.future.exception() or "").split()) if self.future.done() else ""

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
        return self._start((tuple(sources), mode), _judge, sources, mode, self.folder)

    def draw(self, sources: list[str], start: int) -> Task:
        """Draw another sheet of samples of these models, from the seed at place ``start`` on."""
        return self._start((tuple(sources), "draw", start), _draw, sources, start, self.folder)

    def found(self, sources: list[str], mode: str) -> Task | None:
        """What was begun for these models, if anything was since the server started."""
        with self._lock:
            return self._tasks.get((tuple(sources), mode))

    def at_work(self) -> list[Task]:
        """Judgements that wait or run, and those that failed in the last minutes."""
        with self._lock:
            return [task for task in self._tasks.values() if not task.future.done()]

    def _start(self, key: Any, work: Any, *arguments: Any) -> Task:
        with self._lock:
            known = self._tasks.get(key)
            if known is not None and not known.error:
                return known
            task = Task(Future())
            self._tasks[key] = task
            task.future = self._pool.submit(work, task, *arguments)
            return task


def _judge(task: Task, sources: list[str], mode: str, folder: Path) -> list[Judged]:
    load_engine()
    from prunedm import judging

    found = judging.entries(sources, folder)
    return judging.judge(found, judging.Request(mode), task.tell)


def _draw(task: Task, sources: list[str], start: int, folder: Path) -> None:
    load_engine()
    from prunedm import judging

    for i, source in enumerate(sources):
        task.tell(source, i, len(sources))
        judging.draw_more(source, start, folder)


@st.cache_resource(show_spinner=False)
def _judgements(folder: Path) -> Judgements:
    return Judgements(folder)


def judgements() -> Judgements:
    """The judgements of this server, shared by all tabs."""
    return _judgements(lab.runs_dir())
