"""``python -m prunedm pause``, ``continue`` and ``stop``: tell a run what to do, whichever process works on it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import AsJson, RunsDir

if TYPE_CHECKING:
    from .store import Run

Wait = Annotated[float, typer.Option(min=0, help="seconds to wait for the run's answer")]
LOOK_EVERY = 0.1  # seconds


def pause(run: str, wait: Wait = 10.0, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Hold a run after the step at hand. Its checkpoint is saved; it keeps its memory and its worker."""
    found = _active(runs_dir, run, "paused")
    if found.stop_requested():
        raise ValueError(f"run {run} is stopping; a run that stops cannot be paused, but resumed later")
    found.request_pause()
    status = _wait(found, ("paused",), wait)
    hints = {
        "paused": f"go on with: python -m prunedm continue {run} --runs-dir {found.folder.parent}",
        "running": "it pauses after the step at hand",
        "queued": "it pauses as soon as it starts",
    }
    _say(found, status, hints, as_json)


def go_on(run: str, wait: Wait = 10.0, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Let a paused run go on. One that stopped, failed or was interrupted is resumed instead."""
    found = _active(runs_dir, run, "continued")
    found.clear_pause()
    status = _wait(found, ("running", "queued"), wait)
    _say(found, status, {"paused": "it has not answered yet"}, as_json)


def stop(run: str, wait: Wait = 10.0, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Stop a run after the step at hand. Its checkpoint is saved; resume goes on from there."""
    found = _active(runs_dir, run, "stopped")
    found.request_stop()
    status = _wait(found, (), wait)
    hints = {
        "stopped": f"go on with: python -m prunedm resume {run} --runs-dir {found.folder.parent}",
        "stopping": "it stops after the step at hand, or when its turn in the queue comes",
    }
    _say(found, status, hints, as_json)


def _active(runs_dir: Path, run: str, what: str) -> Run:
    """The run, or ValueError in one line when nobody works on it."""
    from . import store
    from .records import ACTIVE, RESUMABLE

    found = store.find(runs_dir, run)
    status = found.state().status
    if status not in ACTIVE:
        remedy = f"; go on with: python -m prunedm resume {run}" if status in RESUMABLE else ""
        raise ValueError(f"run {run} is {status}; only a run that is being worked on can be {what}{remedy}")
    return found


def _wait(run: Run, wanted: tuple[str, ...], seconds: float) -> str:
    """The run's status as soon as it is one of these, or the run has ended, or the time is over."""
    from .records import ACTIVE

    deadline = time.monotonic() + seconds
    status = run.state().status
    while status in ACTIVE and status not in wanted and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)
        status = run.state().status
    return status


def _say(run: Run, status: str, hints: dict[str, str], as_json: bool) -> None:
    """The state and what comes next."""
    if as_json:
        print(json.dumps({"run": run.id, "status": status}))
        return
    hint = hints.get(status)
    print(f"{run.id} is {status}" + (f"; {hint}" if hint else ""))
