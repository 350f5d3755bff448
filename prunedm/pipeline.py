"""Run or resume: owns a run's state, its lock and the record of how it ended (stages.py does the work)."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress

from .inputs import InputError
from .progress import MetricsWriter
from .records import RESUMABLE, Step
from .stages import Pipeline
from .store import Run


def execute(
    run: Run,
    on_step: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Run or resume; returns the final status: done, stopped or failed. Records every ending.

    ``stop`` is asked after each step; so is the run's stop file, through which other processes ask.
    """
    from . import training

    with run.lock(), training.memory_kept():
        state = run.state()
        run.claim(state, "running")
        writer = MetricsWriter(run, state)
        status, error = "done", None
        try:
            for step in _recorded_steps(run, writer, stop):
                on_step(step)
        except Stopped:
            status = "stopped"
        except KeyboardInterrupt:
            status, error = "interrupted", "interrupted; the last checkpoint is kept"
        except Exception as failure:  # noqa: BLE001  (the boundary of a job: all is recorded and shown)
            status, error = "failed", plain_words(failure)
            with suppress(OSError):
                run.log(traceback.format_exc())
        with suppress(OSError):
            writer.flush()
            run.event(status, error=error)
            run.log(status if error is None else f"{status}: {error}")
        run.end(state, status, error)
        return status


class Stopped(Exception):  # noqa: N818
    """Someone asked the run to stop; its checkpoint is written."""


def _recorded_steps(run: Run, writer: MetricsWriter, stop: Callable[[], bool]) -> Iterator[Step]:
    """The pipeline's steps, each recorded and then followed by a look at stop requests."""
    state, started = writer.state, time.time()
    before, state.started, state.ended = state.seconds, started, None
    run.event("started", stages_done=list(state.stages_done))
    run.log(f"started (stages done: {', '.join(state.stages_done) or 'none'})")
    if stop() or run.stop_requested():
        raise Stopped
    work = Pipeline(run, run.recipe(), writer)
    for step in work.stages():
        state.seconds = before + time.time() - started
        writer.add(step)
        yield step
        if stop() or run.stop_requested():
            work.save_checkpoint()
            raise Stopped
    state.seconds = before + time.time() - started


def import_all() -> None:
    """Import what the stages import late, so that a first run does not pay for it."""
    for name in ("diffusers.training_utils", "torch_fidelity.metric_fid", "torch_pruning"):
        importlib.import_module(name)
    diffusers = importlib.import_module("diffusers")
    for name in ("DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "UNet2DModel"):
        getattr(diffusers, name)


def resumable(run: Run) -> None:
    """InputError unless the run can go on; an old request to stop is forgotten."""
    status = run.state().status
    if status not in RESUMABLE:
        raise InputError(f"run {run.id} is {status}; only {', '.join(RESUMABLE)} runs can be resumed")
    run.clear_stop()


def plain_words(error: BaseException) -> str:
    """A failure in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return f"out of memory; halve data.batch_size (calibrating: prune.calibration_images) ({text[:120]})"
    if isinstance(error, OSError) and error.errno == 28:
        return "the disk is full; free some space and resume"
    known = isinstance(error, ValueError | ArithmeticError)
    return text if known and text else f"{error.__class__.__name__}: {text or 'no message'}"
