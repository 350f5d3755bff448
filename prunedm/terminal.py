"""What the commands share: options, exit statuses, progress."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import parallel

if TYPE_CHECKING:
    from .jobs import OnStep, Stop
    from .recipe import Recipe
    from .store import Run

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


class Place:
    """Where a command's run is worked on: in this process, or as a task of a Ray cluster. ValueError in one line."""

    def __init__(self, executor: str, address: str | None, runs_dir: Path) -> None:
        self.is_here, self.runs_dir = executor == "local", runs_dir
        self.address = address
        if self.is_here and address is not None and "RAY_ADDRESS" not in os.environ:
            raise ValueError(f"--address {address} is read by --executor ray alone; add that, or leave it out")
        if not self.is_here and parallel.launched() > 1:
            raise ValueError("--executor ray starts processes itself; give the command once, without a launcher")

    def connect(self, recipe: Recipe) -> None:
        """Find the cluster, before a run is made that it is to work on."""
        if self.is_here:
            return
        from . import cluster, cluster_link

        cluster.require_reserved(recipe)
        self.cluster = cluster.RayExecutor(self.runs_dir, self.address or cluster_link.LOCAL)

    def execute(self, run: Run, on_step: OnStep, stop: Stop) -> str:
        """An Execute, as jobs.py defines it."""
        from . import jobs

        if self.is_here:
            return jobs.here(run, on_step, stop)
        try:
            return jobs.through(self.cluster, FOLLOW_EVERY)(run, on_step, stop)
        finally:
            self.cluster.close()


class Progress:
    """One rich bar a stage, with rate and ETA, on standard error."""

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.bars = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>12}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, Any] = {}
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, step: Any) -> None:
        from .records import STAGE_LABELS

        if step.of == 0:
            return
        if step.stage not in self.tasks:
            label = STAGE_LABELS[step.stage]
            self.tasks[step.stage] = self.bars.add_task(label, total=step.of, completed=step.step, rate="")
            return
        task = self.tasks[step.stage]
        speed = self.bars.tasks[task].speed
        self.bars.update(task, total=step.of, completed=step.step, rate=f"{speed:.1f} step/s" if speed else "")
