"""Run or resume: owns a run's state, its lock and the record of how it ended (stages.py does the work)."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch

from . import artifacts, failure, giveway, parallel, shared_run, system
from .progress import MetricsWriter
from .records import Status, Step
from .stages import Pipeline
from .store import Run

BY_FOLDER = 2  # how ranks tell one another that a stop is asked for there
LOOK_EVERY = 0.2  # seconds between two looks at what a paused run is asked to do
HEARTBEAT = 5.0  # seconds between two signs of life of a run that is paused or in a long step


def execute(
    run: Run,
    on_step: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Run or resume; returns the final status: done, stopped, failed, or interrupted where Ctrl-C or another rank's
    death cut it short. Records every ending.

    ``stop`` is asked after each step and between the parts of long ones; so are the run's request files, through
    which other processes ask it to stop, to pause and to go on. store.Busy, with nothing changed, where another
    process works on the run or has it in its queue. Where several ranks work on the run, all of them call this, and
    rank 0 answers for all, after each step only.
    """
    run = shared_run.of(run)
    with run.lock():
        return work(run, on_step, stop)


def work(
    run: Run,
    on_step: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
    stopped: Status = "stopped",
) -> str:
    """:func:`execute`, for the one who holds the run's lock. stopped: how a run ends that ``stop`` cut short, and not a
    request in its folder."""
    from . import training

    with training.memory_kept(), system.sampled(run), artifacts.mirrored(run):
        status = _work(run, on_step, stop, stopped)
    if status in ("done", "stopped") or (status == stopped and not parallel.is_lost()):
        with suppress(parallel.RankLost):  # the ending is recorded
            parallel.meet()  # or a launcher, seeing one rank gone, would end rank 0 in its last copies
    return status


def _work(run: Run, on_step: Callable[[Step], None], stop: Callable[[], bool], stopped: Status) -> str:
    """From the claim to the ending, which is recorded."""
    state = run.state()
    run.require_free(state)
    run.claim(state, "running")
    session = Session(run, MetricsWriter(run, state), stop)
    status, error, remedy = "done", None, {}
    try:
        # Ranks have different parts to do, so that they can decide together between steps only.
        with giveway.listening(session.give_way if parallel.size() == 1 else None):
            for step in session.steps():
                on_step(step)
    except Stopped:
        status = "stopped" if session.is_requested else stopped
    except KeyboardInterrupt:
        status, error = "interrupted", "interrupted; the last checkpoint is kept"
    except (Exception, SystemExit) as cause:  # noqa: BLE001  (the boundary of a job: all is recorded and shown)
        status, error, remedy = "failed", *_explained(run, cause, state.stage)
    session.work = None  # the memory of models goes back before the ending is told
    status, error, remedy = run.ending(status, error, remedy)
    with suppress(OSError):
        session.writer.flush()
        run.event(status, error=error)
        run.log(status if error is None else f"{status}: {error}")
    run.end(state, status, error, remedy)
    return status


def _explained(run: Run, cause: BaseException, stage: str) -> tuple[str, dict[str, Any]]:
    """Why a run failed, in one line, and the fields to change; the traceback goes into its log."""
    with suppress(OSError):
        run.log("".join(traceback.format_exception(cause)))
    try:
        recipe = run.recipe()
    except (ValueError, OSError):  # what is wrong may be the recipe itself
        return failure.plain_words(cause), {}
    return failure.plain_words(cause, failure.batch_field(recipe, stage)), failure.remedy(cause, recipe, stage)


class Stopped(Exception):  # noqa: N818
    """Someone asked the run to stop; its checkpoint is written."""


class Session:
    """One stretch of work on a run: its steps, each recorded, and its answers to requests to stop and to pause."""

    def __init__(self, run: Run, writer: MetricsWriter, stop: Callable[[], bool]) -> None:
        self.run, self.writer, self.stop = run, writer, stop
        self.work: Pipeline | None = None
        self.is_requested = False  # whether the folder asked for the stop
        self.before, self.started = writer.state.seconds, time.monotonic()

    def steps(self) -> Iterator[Step]:
        """The pipeline's steps."""
        state = self.writer.state
        state.started, state.ended = time.time(), None
        ranks = {"ranks": parallel.size()} if parallel.size() > 1 else {}
        self.run.event("started", stages_done=list(state.stages_done), **ranks)
        for line in (f"{parallel.size()} ranks work on this run" if ranks else "", parallel.lonely()):
            if line:
                self.run.log(line)
        self.run.log(f"started (stages done: {', '.join(state.stages_done) or 'none'})")
        self.give_way()
        self.work = Pipeline(self.run, self.run.recipe(), self.writer)
        for step in self.work.stages():
            self._count_time()
            self.writer.add(step)
            yield step
            self.give_way()
        self._count_time()

    def give_way(self) -> None:
        """Between two steps, or two parts of one: hold or raise Stopped where that is asked, after a checkpoint.

        Else, once in a while, a sign of life.
        """
        if self._is_told_to_stop():
            self._save_checkpoint()
            raise Stopped
        if self._is_told_to_pause():
            self._hold()
        elif time.monotonic() - self.writer.written > HEARTBEAT:
            self.writer.flush()

    def _is_told_to_stop(self) -> bool:
        told = parallel.decide(BY_FOLDER if self.run.stop_requested() else int(bool(self.stop())))
        self.is_requested = told == BY_FOLDER
        return bool(told)

    def _is_told_to_pause(self) -> bool:
        return bool(parallel.decide(self.run.pause_requested()))

    def _save_checkpoint(self) -> None:
        if self.work is not None:
            self.work.save_checkpoint()

    def _count_time(self) -> None:
        self.writer.state.seconds = self.before + time.monotonic() - self.started

    def _hold(self) -> None:
        """Wait for as long as a pause is asked for; Stopped when the run is asked to stop meanwhile.

        The checkpoint is saved first, so that a process that dies here loses nothing.
        """
        self._save_checkpoint()
        began = time.monotonic()
        self.writer.state.status = "paused"
        self.run.event("paused")
        self.run.log("paused")
        self.writer.flush()
        while self._is_told_to_pause():
            if self._is_told_to_stop():
                raise Stopped
            time.sleep(LOOK_EVERY)
            if time.monotonic() - self.writer.written > HEARTBEAT:
                self.writer.flush()
        seconds = time.monotonic() - began
        self.started += seconds
        self.writer.held(seconds)
        self.writer.state.status = "running"
        self.run.event("continued", seconds=round(seconds, 3))
        self.run.log(f"continued after a pause of {seconds:.0f} s")
        self.writer.flush()


def free_device_memory() -> None:
    """Give what a GPU's allocator keeps for later back to the device."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def import_all() -> None:
    """Import what the stages import late, so that a first run does not pay for it."""
    for name in ("diffusers.training_utils", "torch_fidelity.metric_fid", "torch_pruning"):
        importlib.import_module(name)
    diffusers = importlib.import_module("diffusers")
    for name in ("DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "UNet2DModel"):
        getattr(diffusers, name)
