"""Background jobs: a queue, one run at a time by default, on threads that outlive pages and tabs.

The queue lives in memory and the runs in their folders: when a server dies, its runs show as
*interrupted* (their recorded owner is gone) and can be resumed by any server or by the command line.
"""

from __future__ import annotations

import gc
import importlib
import queue
import sys
import threading
from contextlib import suppress
from pathlib import Path

from . import owner, store
from .logs import LOGGER
from .recipe import Recipe
from .store import Run

SWITCH_INTERVAL = 0.0005  # seconds
RETRY = 10.0  # seconds between tries to write an ending that a full disk refused
_ENGINE = threading.Lock()
WARM_UP_DELAY = 2.0  # seconds: the first page comes first, then torch is imported


def load_engine() -> None:
    """Import torch and all that the stages need, one thread at a time.

    diffusers imports lazily and is half-made meanwhile: a second thread that imports it then gets
    "cannot import name". Whoever is about to use the engine on a thread calls this first.
    """
    with _ENGINE:
        first = "prunedm.pipeline" not in sys.modules
        importlib.import_module("prunedm.pipeline").import_all()
        if first:
            # A full collection over torch's objects takes 0.3 s with the interpreter locked (measured): modules
            # never die, so take them out of its sight. Not later, or the models of a run would be out of it too.
            gc.collect()
            gc.freeze()


class Jobs:
    """The jobs of one process and one runs folder."""

    def __init__(self, runs_dir: Path, workers: int = 1) -> None:
        store.check_writable(runs_dir)
        owner.call_this_process("the lab")
        # Training gives the interpreter's lock up at each operation; a page's script that then runs keeps
        # it for this long. The default of 5 ms costs training a third of its rate beside a busy page.
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.runs_dir = runs_dir
        self._queue: queue.Queue[Run] = queue.Queue()
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        for number in range(workers):
            threading.Thread(target=self._work, name=f"prunedm-job-{number}", daemon=True).start()

    def warm_up(self) -> None:
        """Import the heavy modules in the background, so that the first job starts at once."""
        timer = threading.Timer(WARM_UP_DELAY, load_engine)
        timer.daemon = True
        timer.start()

    def submit(self, recipe: Recipe) -> Run:
        """Queue a new run. ValueError in one line when the recipe cannot run here."""
        load_engine()
        from . import inputs

        inputs.load_inputs(recipe, self.runs_dir)
        run = store.create(self.runs_dir, inputs.absolute(recipe, self.runs_dir))
        self._put(run)
        return run

    def resume(self, run: Run) -> None:
        """Queue a stopped, failed or interrupted run again."""
        run.take()
        self._put(run)

    def stop(self, run: Run) -> None:
        """Ask a run to stop after its step (a paused one stops at once), or take it out of the queue."""
        with self._lock:
            if run.id in self._waiting:
                self._waiting.remove(run.id)
                run.end(run.state(), "stopped", None)
                return
        run.request_stop()

    def position(self, run_id: str) -> int | None:
        """Place in the queue, 1 for the next; None when not waiting here."""
        with self._lock:
            return self._waiting.index(run_id) + 1 if run_id in self._waiting else None

    def _put(self, run: Run) -> None:
        with self._lock:
            self._waiting.append(run.id)
        self._queue.put(run)

    def _work(self) -> None:
        wait = None
        while True:
            with suppress(queue.Empty):
                run = self._queue.get(timeout=wait)
                if self._begins(run):
                    self._execute(run)
            wait = None if store.write_endings() else RETRY

    def _begins(self, run: Run) -> bool:
        """Whether a run whose turn has come still waits, and was not stopped meanwhile; it waits no longer."""
        with self._lock:
            waits = run.id in self._waiting
            if waits:
                self._waiting.remove(run.id)
        return waits

    def _execute(self, run: Run) -> None:
        load_engine()
        from . import failure, pipeline

        try:
            status = pipeline.execute(run)
            LOGGER.info("run %s: %s", run.id, status)
        except store.Busy as busy:
            LOGGER.info("run %s: left alone: %s", run.id, busy)  # it is another process's to end
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the queue goes on whatever one run does)
            # Not the pipeline's failures, which it records: the folder is gone, damaged or full.
            LOGGER.exception("run %s could not be worked on", run.id)
            with suppress(OSError, store.StoreError):
                run.end(run.state(), "failed", failure.plain_words(error))
        gc.collect()  # what a failed run held goes back before the next one begins
        pipeline.free_device_memory()
