"""A run in a process of its own that dies, as by kill -9, at a moment of its own choosing.

A moment is a place where a run can be hurt: in the middle of each write, before and after a flush to disk, before a
file takes the place of another and after it, and after each step. They are counted from 1; metrics are flushed at
each step, not each second, so that the count is the same in each process.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from prunedm import files, pipeline, progress, stage_training, store
from prunedm.system import SYSTEM

CONTEXT = multiprocessing.get_context("forkserver")  # imports are done once, and no thread is forked
CONTEXT.set_forkserver_preload(["faulty"])


class Moment(NamedTuple):
    """What is done at it (``tear``, ``flush``, ``replace`` or ``step``), to which file, in which stage of the run."""

    what: str
    name: str
    stage: str


class Moments:
    """Counts moments and kills the process at one of them; without a deadly one, ``passed`` lists them.

    Those of the working thread only, as others come by the clock, and those before the run is done, as a process that
    is killed later interrupts nothing.
    """

    def __init__(self, run: store.Run, deadly: int | None) -> None:
        self.run, self.deadly, self.count, self.name = run, deadly, 0, ""
        self.passed: list[Moment] = []
        self.thread = threading.current_thread()

    def is_next_deadly(self) -> bool:
        return self.thread is threading.current_thread() and self.count + 1 == self.deadly

    def pass_one(self, what: str) -> None:
        if self.thread is not threading.current_thread():
            return
        self.count += 1
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.deadly is None and (state := self.run.state()).status != "done":
            self.passed.append(Moment(what, self.name, state.stage))

    def pass_step(self, _: object) -> None:
        self.name = ""
        self.pass_one("step")

    def install(self) -> None:
        append, write, replace, fsync = store.Run.append, store.write_atomic, Path.replace, os.fsync

        def torn_append(run: store.Run, name: str, records: list) -> None:
            records = list(records)
            if records and self.is_next_deadly():
                content = "".join(json.dumps(record) + "\n" for record in records).encode()
                with (run.folder / name).open("ab") as file:
                    file.write(content[: len(content) // 2 + 1])
            if records and name != SYSTEM:
                self.name = name
                self.pass_one("tear")
            append(run, name, records)

        def torn_write(path: Path, content: bytes) -> None:
            if self.is_next_deadly():
                path.with_name(f".{path.name}.part").write_bytes(content[: len(content) // 2])
            if self.thread is threading.current_thread():
                self.name = os.path.relpath(path, self.run.folder)
            self.pass_one("tear")
            write(path, content)

        def watched(what: str, do: Callable) -> Callable:
            def wrapper(*given, **named):
                self.pass_one(what)
                found = do(*given, **named)
                self.pass_one(what)
                return found

            return wrapper

        store.Run.append = torn_append
        store.write_atomic = files.write_atomic = torn_write
        Path.replace, os.fsync = watched("replace", replace), watched("flush", fsync)


def _work(folder: str, deadly: int | None, told: str) -> None:
    run = store.Run(Path(folder))
    run.claim(run.state(), "queued")  # which the process that made it hands over
    stage_training.CHECKPOINT_SECONDS = stage_training.CHECKPOINT_SHARE = 0.0  # each step: many moments are within one
    progress.MetricsWriter.__init__.__defaults__ = (0.0,)
    pipeline.HEARTBEAT = math.inf  # a sign of life comes by the clock
    os.environ["PRUNEDM_CACHE"] = str(run.folder.parent / "cache")  # so that what fills it can be hurt too
    moments = Moments(run, deadly)
    moments.install()
    pipeline.execute(run, on_step=moments.pass_step)
    Path(told).write_text(json.dumps(moments.passed))


def execute(run: store.Run, deadly: int | None = None) -> list[Moment]:
    """Run or resume in another process; its moments, none when it was killed."""
    told = run.folder.parent / "moments.json"
    process = CONTEXT.Process(target=_work, args=(str(run.folder), deadly, str(told)))
    with without_main():
        process.start()
    process.join()
    assert process.exitcode == (0 if deadly is None else -signal.SIGKILL)
    return [Moment(*one) for one in json.loads(told.read_text())] if deadly is None else []


@contextmanager
def without_main() -> Iterator[None]:
    """A new process runs its parent's main file first, and after a page's test that is the lab's."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
