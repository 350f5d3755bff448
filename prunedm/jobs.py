"""Who executes runs: this thread, this process's queue, or whatever else takes a run folder (cluster.py).

The queue works on one run at a time by default, on threads that outlive pages and tabs.

It lives in memory and the runs in their folders: when a server dies, its runs show as
*interrupted* (their recorded owner is gone) and can be resumed by any server or by the command line.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from . import owner, store
from .logs import LOGGER
from .recipe import Recipe
from .records import ACTIVE, STAGES, RunState, Step
from .store import Run

Stop = Callable[[], bool]
OnStep = Callable[[Step], None]

SWITCH_INTERVAL = 0.0005  # seconds
RETRY = 10.0  # seconds between tries to write an ending that a full disk refused
_ENGINE = threading.Lock()
WARM_UP_DELAY = 2.0  # seconds: the first page comes first


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
            atexit.register(gc.unfreeze)  # else triton's bindings complain of leaks as the process ends


def require_inputs(recipe: Recipe, runs_dir: Path, is_here: bool = True) -> None:
    """ValueError in one line when a recipe asks for what is not there.

    is_here: whether this machine is to work on it, so that its devices count.
    """
    from . import inputs

    inputs.load_inputs(recipe if is_here else recipe.model_copy(update={"device": "auto"}), runs_dir)


def made(recipe: Recipe, runs_dir: Path) -> Run:
    """A new run of a recipe whose inputs are there, claimed as *queued* by this process."""
    from . import inputs

    return store.create(runs_dir, inputs.absolute(recipe, runs_dir))


class Executor(Protocol):
    """Takes runs and works on them elsewhere; all that happens to one is read in its folder."""

    def submit(self, recipe: Recipe) -> Run:
        """Queue a new run. ValueError in one line when the recipe cannot run."""
        ...

    def resume(self, run: Run) -> None:
        """Queue a stopped, failed or interrupted run again."""
        ...

    def put(self, run: Run) -> None:
        """Queue a run that is claimed as *queued* by this process."""
        ...

    def stop(self, run: Run) -> None:
        """Ask a run to stop after its step (a paused one stops at once), or take it out of the queue."""
        ...

    def position(self, run_id: str) -> int | None:
        """Place in the queue, 1 for the next; None when not waiting here."""
        ...

    def held(self) -> list[str]:
        """Ids of the runs that wait here or are worked on."""
        ...


class Line:
    """Runs that wait, in the order in which they came; a part of each Executor."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._lock = threading.RLock()

    def position(self, run_id: str) -> int | None:
        """As Executor says."""
        with self._lock:
            return self._waiting.index(run_id) + 1 if run_id in self._waiting else None


class Jobs(Line):
    """The jobs of one process and one runs folder: an Executor on threads of its own."""

    def __init__(self, runs_dir: Path, workers: int = 1) -> None:
        store.check_writable(runs_dir)
        owner.call_this_process("the lab")
        # Training gives the interpreter's lock up at each operation; a page's script that then runs keeps
        # it for this long. The default of 5 ms costs training a third of its rate beside a busy page.
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.runs_dir = runs_dir
        self._queue: queue.Queue[Run] = queue.Queue()
        super().__init__()
        self._working: set[str] = set()
        for number in range(workers):
            threading.Thread(target=self._work, name=f"prunedm-job-{number}", daemon=True).start()

    def warm_up(self, *first: Callable[[], object]) -> None:
        """Call these in the background, then import the heavy modules, so that the first job starts at once."""

        def work() -> None:
            for call in (*first, load_engine):
                call()

        timer = threading.Timer(WARM_UP_DELAY, work)
        timer.daemon = True
        timer.start()

    def submit(self, recipe: Recipe) -> Run:
        """Queue a new run. ValueError in one line when the recipe cannot run here."""
        load_engine()
        require_inputs(recipe, self.runs_dir)
        run = made(recipe, self.runs_dir)
        self.put(run)
        return run

    def resume(self, run: Run) -> None:
        """Queue a stopped, failed or interrupted run again."""
        run.take()
        self.put(run)

    def stop(self, run: Run) -> None:
        """Ask a run to stop after its step (a paused one stops at once), or take it out of the queue."""
        with self._lock:
            if run.id in self._waiting:
                self._waiting.remove(run.id)
                run.end(run.state(), "stopped", None)
                return
        run.request_stop()

    def held(self) -> list[str]:
        """Ids of the runs that wait here or are worked on."""
        with self._lock:
            return [*self._waiting, *self._working]

    def put(self, run: Run) -> None:
        """Queue a run that is claimed as *queued* by this process."""
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
                    with self._lock:
                        self._working.discard(run.id)
            wait = None if store.write_endings() else RETRY

    def _begins(self, run: Run) -> bool:
        """Whether a run whose turn has come still waits, and was not stopped meanwhile; it waits no longer."""
        with self._lock:
            waits = run.id in self._waiting
            if waits:
                self._waiting.remove(run.id)
                self._working.add(run.id)
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


class Execute(Protocol):
    """Runs or resumes a run and returns its final status, as ``pipeline.execute`` does."""

    def __call__(self, run: Run, on_step: OnStep, stop: Stop) -> str: ...


def here(run: Run, on_step: OnStep, stop: Stop) -> str:
    """Execute in this thread."""
    from . import pipeline

    return pipeline.execute(run, on_step, stop)


def through(executor: Executor, poll: float = 1.0) -> Execute:
    """Execute by an executor, behind the runs that wait there. poll: seconds between two looks at the run."""

    def execute(run: Run, on_step: OnStep, stop: Stop) -> str:
        state = run.state()
        if state.status == "queued" and owner.is_this_process(state):  # a new one
            executor.put(run)
        else:
            executor.resume(run)
        return follow(run, on_step, stop, executor, poll)

    return execute


def _steps(lines: Iterable[bytes], state: RunState) -> list[Step]:
    """Steps as their lines tell them. Of a stage that the run has left its last step is the number of them; of one that
    it has entered since, that is not known."""
    found = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            record = json.loads(line)
            found.append(Step(record.pop("stage"), record.pop("step"), state.of, record))
    last = {step.stage: step.step for step in found}
    left = STAGES[: STAGES.index(state.stage)] if state.stage in STAGES else ()
    of = {state.stage: state.of} | {stage: last.get(stage, 0) for stage in left}
    return [replace(step, of=of.get(step.stage, 0)) for step in found]


def follow(run: Run, on_step: OnStep, stop: Stop, executor: Executor, poll: float) -> str:
    """Wait for a run that an executor holds, and return its final status.

    ``on_step`` gets its steps from the metrics file, those of before left out; the executor is told once when
    ``stop`` says so.
    """
    path, asked = run.metrics_path, False
    position = path.stat().st_size if path.exists() else 0
    while True:
        is_held = run.id in executor.held()
        state = run.state()  # before the metrics, so that those of the last steps are not missed
        size = path.stat().st_size if path.exists() else 0
        position = min(position, size)  # a resumed run drops what lies beyond its checkpoint
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            whole = file.read().rpartition(b"\n")
            position += len(whole[0]) + len(whole[1])
        for step in _steps(whole[0].splitlines() if size else (), state):
            on_step(step)
        if state.status not in ACTIVE and not is_held:
            return state.status
        if stop() and not asked:
            executor.stop(run)
            asked = True
        time.sleep(poll)
