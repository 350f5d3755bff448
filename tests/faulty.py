"""A run in a process of its own that dies, as by kill -9, at a moment of its own choosing.

A moment is a place where a run can be hurt: in the middle of each write, before and after a flush to disk, before a
file takes the place of another and after it, and after each step. They are counted from 1; metrics are flushed at
each step, not each second, so that the count is the same in each process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from prunedm import files, pipeline, progress, stages, store

CONTEXT = multiprocessing.get_context("forkserver")  # imports are done once, and no thread is forked
CONTEXT.set_forkserver_preload(["faulty"])


class Moments:
    """Counts moments and kills the process at one of them; ``stages`` is the run's stage at each."""

    def __init__(self, run: store.Run, deadly: int | None) -> None:
        self.run, self.deadly, self.stages = run, deadly, []

    def pass_one(self, *_: object) -> None:
        self.stages.append(self.run.state().stage if self.deadly is None else "")
        if len(self.stages) == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        append, write, replace, fsync = store.Run.append, store.write_atomic, Path.replace, os.fsync

        def torn_append(run: store.Run, name: str, records: list) -> None:
            records = list(records)
            if records and len(self.stages) + 1 == self.deadly:
                content = "".join(json.dumps(record) + "\n" for record in records).encode()
                with (run.folder / name).open("ab") as file:
                    file.write(content[: len(content) // 2 + 1])
            if records:
                self.pass_one()
            append(run, name, records)

        def torn_write(path: Path, content: bytes) -> None:
            if len(self.stages) + 1 == self.deadly:
                path.with_name(f".{path.name}.part").write_bytes(content[: len(content) // 2])
            self.pass_one()
            write(path, content)

        def watched(do: Callable) -> Callable:
            def wrapper(*given, **named):
                self.pass_one()
                found = do(*given, **named)
                self.pass_one()
                return found

            return wrapper

        store.Run.append = torn_append
        store.write_atomic = files.write_atomic = torn_write
        Path.replace, os.fsync = watched(replace), watched(fsync)


def _work(folder: str, deadly: int | None, told: str) -> None:
    run = store.Run(Path(folder))
    run.claim(run.state(), "queued")  # which the process that made it hands over
    stages.CHECKPOINT_SECONDS, stages.CHECKPOINT_SHARE = 0.0, 0.0  # after each step: many moments are within one
    progress.MetricsWriter.__init__.__defaults__ = (0.0,)
    os.environ["PRUNEDM_CACHE"] = str(run.folder.parent / "cache")  # so that what fills it can be hurt too
    moments = Moments(run, deadly)
    moments.install()
    pipeline.execute(run, on_step=moments.pass_one)
    Path(told).write_text(json.dumps(moments.stages))


def execute(run: store.Run, deadly: int | None = None) -> list[str]:
    """Run or resume in another process; the stage at each moment, empty when it was killed."""
    told = run.folder.parent / "moments.json"
    process = CONTEXT.Process(target=_work, args=(str(run.folder), deadly, str(told)))
    with without_main():
        process.start()
    process.join()
    assert process.exitcode == (0 if deadly is None else -signal.SIGKILL)
    return json.loads(told.read_text()) if deadly is None else []


@contextmanager
def without_main() -> Iterator[None]:
    """A new process runs its parent's main file first, and after a page's test that is the lab's."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
