"""What the commands share: options, exit statuses, and Ctrl-C that stops after the step at hand."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from .jobs import Execute

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses

RunsDir = Annotated[Path, typer.Option("--runs-dir", envvar="PRUNEDM_RUNS", help="folder of the runs")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on the last line")]
ExecutorName = Annotated[
    Literal["local", "ray"],
    typer.Option("--executor", envvar="PRUNEDM_EXECUTOR", help="who works: this process or Ray"),
]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS", show_default=False, help="the Ray cluster: auto, host:6379; default: one of this machine"
    ),
]
FOLLOW_EVERY = 0.2  # seconds between two looks at a run that a cluster works on


def execute_by(executor: str, address: str | None, runs_dir: Path) -> Execute:
    """What executes the runs of a command. ClusterError in one line where there is no such cluster."""
    from . import jobs

    if executor == "local":
        if address is not None and "RAY_ADDRESS" not in os.environ:
            raise ValueError(f"--address {address} is read by --executor ray alone; add that, or leave it out")
        return jobs.here
    from . import cluster

    return jobs.through(cluster.RayExecutor(runs_dir, address or cluster.LOCAL), FOLLOW_EVERY)


@contextmanager
def interruptions(work: str) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed while ``work`` goes on; a second one ends the program at once."""
    asked: list[int] = []

    def on_interrupt(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        print(f"stopping after this step; the {work} can be resumed", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, previous)
