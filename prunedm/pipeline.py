"""Run or resume: owns a run's state, its lock and the record of how it ended (stages.py does the work)."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress

from . import failure, system
from .inputs import InputError
from .progress import MetricsWriter
from .records import RESUMABLE, Step
from .stages import Pipeline
from .store import Run

LOOK_EVERY = 0.2  # seconds between two looks at what a paused run is asked to do
HEARTBEAT = 5.0  # seconds between two signs of life of a paused run


def execute(
    run: Run,
    on_step: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Run or resume; returns the final status: done, stopped or failed. Records every ending.

    ``stop`` is asked after each step; so are the run's request files, through which other processes ask
    it to stop, to pause and to go on.
    """
    with run.lock():
        return work(run, on_step, stop)


def work(
    run: Run,
    on_step: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """:func:`execute`, for the one who holds the run's lock."""
    from . import training

    with training.memory_kept(), system.sampled(run):
        state = run.state()
        run.claim(state, "running")
        writer = MetricsWriter(run, state)
        status, error, remedy = "done", None, {}
        try:
            for step in _recorded_steps(run, writer, stop):
                on_step(step)
        except Stopped:
            status = "stopped"
        except KeyboardInterrupt:
            status, error = "interrupted", "interrupted; the last checkpoint is kept"
        except Exception as cause:  # noqa: BLE001  (the boundary of a job: all is recorded and shown)
            status, error = "failed", failure.plain_words(cause)
            remedy = failure.remedy(cause, run.recipe(), state.stage)
            with suppress(OSError):
                run.log(traceback.format_exc())
        with suppress(OSError):
            writer.flush()
            run.event(status, error=error)
            run.log(status if error is None else f"{status}: {error}")
        run.end(state, status, error, remedy)
        return status


class Stopped(Exception):  # noqa: N818
    """Someone asked the run to stop; its checkpoint is written."""


def _recorded_steps(run: Run, writer: MetricsWriter, stop: Callable[[], bool]) -> Iterator[Step]:
    """The pipeline's steps, each recorded and then followed by a look at requests to stop and to pause."""

    def told_to_stop() -> bool:
        return stop() or run.stop_requested()

    state, started = writer.state, time.time()
    before, state.started, state.ended = state.seconds, started, None
    run.event("started", stages_done=list(state.stages_done))
    run.log(f"started (stages done: {', '.join(state.stages_done) or 'none'})")
    if told_to_stop():
        raise Stopped
    work = Pipeline(run, run.recipe(), writer)
    started += _hold(work, told_to_stop)
    for step in work.stages():
        state.seconds = before + time.time() - started
        writer.add(step)
        yield step
        if told_to_stop():
            work.save_checkpoint()
            raise Stopped
        started += _hold(work, told_to_stop)
    state.seconds = before + time.time() - started


def _hold(work: Pipeline, told_to_stop: Callable[[], bool]) -> float:
    """Wait for as long as a pause is asked for; returns the seconds waited.

    The checkpoint is saved first, so that a process that dies here loses nothing. Raises Stopped when the
    run is asked to stop meanwhile.
    """
    run, writer = work.run, work.writer
    if not run.pause_requested():
        return 0.0
    work.save_checkpoint()
    began = time.monotonic()
    writer.state.status = "paused"
    run.event("paused")
    run.log("paused")
    writer.flush()
    while run.pause_requested():
        if told_to_stop():
            raise Stopped
        time.sleep(LOOK_EVERY)
        if time.monotonic() - writer.written > HEARTBEAT:
            writer.flush()
    seconds = time.monotonic() - began
    writer.held(seconds)
    writer.state.status = "running"
    run.event("continued", seconds=round(seconds, 3))
    run.log(f"continued after a pause of {seconds:.0f} s")
    writer.flush()
    return seconds


def import_all() -> None:
    """Import what the stages import late, so that a first run does not pay for it."""
    for name in ("diffusers.training_utils", "torch_fidelity.metric_fid", "torch_pruning"):
        importlib.import_module(name)
    diffusers = importlib.import_module("diffusers")
    for name in ("DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "UNet2DModel"):
        getattr(diffusers, name)


def resumable(run: Run) -> None:
    """InputError unless the run can go on; old requests to stop or to pause are forgotten."""
    status = run.state().status
    if status not in RESUMABLE:
        raise InputError(f"run {run.id} is {status}; only {', '.join(RESUMABLE)} runs can be resumed")
    run.clear_stop()
    run.clear_pause()
