"""``python -m prunedm sweep``: many runs of one recipe with other values, on any number of machines."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .interrupts import interruptions
from .terminal import FAILED, INTERRUPTED, AsJson, RunsDir

if TYPE_CHECKING:
    from optuna import Study
    from rich.console import Console

    from .sweep_spec import Sweep

SHOWN = 5  # suggestions of a dry run

Trials = Annotated[int | None, typer.Option(min=1, max=100_000, help="trials in all; default: as the file says")]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="PRUNEDM_STORAGE",
        show_default=False,
        help="database of the study, such as postgresql+psycopg://user@host/name; default: a file in the runs folder",
    ),
]


def sweep(
    spec_file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", show_default=False)],
    trials: Trials = None,
    storage: Storage = None,
    worker: Annotated[bool, typer.Option("--worker", help="join a sweep that another process started")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the ranges and the first recipes, and stop")] = False,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Try ranges of a recipe's fields; the same command goes on with what was stopped, or helps along."""
    from . import sweep as sweeps
    from . import sweep_spec

    spec = sweep_spec.read(spec_file)
    if dry_run:
        _print_preview(spec if trials is None else spec.model_copy(update={"trials": trials}), as_json)
        return
    if worker and trials is not None:
        raise sweep_spec.SweepError("--trials is for the one who starts a sweep; leave it out with --worker")
    study = sweeps.join(spec, runs_dir, storage) if worker else sweeps.start(spec, runs_dir, storage, trials)
    status = _work(study, runs_dir, storage)
    if as_json:
        print(json.dumps({"sweep": spec.name, "status": status} | _found(study)))
    else:
        _print_trials(study, spec)
        if status != "done":
            _console().print(f"sweep {spec.name} stopped; go on with: {_same_command(sys.argv[1:])}")
    states = [row["state"] for row in sweeps.trials(study)]
    if status != "done":
        raise typer.Exit(INTERRUPTED)
    if "failed" in states and "complete" not in states:
        raise typer.Exit(FAILED)


def _work(study: Study, runs_dir: Path, storage: str | None) -> str:
    """Be one worker; Ctrl-C stops after the step at hand."""
    from .sweep_worker import Worker

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with interruptions("sweep") as stop:
        return Worker(study, runs_dir, storage, stop=stop, tell=tell).run()


def _same_command(given: list[str]) -> str:
    """The command that was given; a password in its storage is masked, and where it belongs is said instead."""
    from .sweep import shown

    told, is_storage = [], False
    for word in given:
        head, equals, url = ("", "", word) if is_storage else word.partition("=")
        is_storage = is_storage or (head == "--storage" and bool(equals))
        told.append(f"{head}{equals}{shown(url)}" if is_storage else word)
        is_storage = word == "--storage"
    command = shlex.join(["python", "-m", "prunedm", *told])
    return command if told == given else f"{command} (its password is masked here; $PRUNEDM_STORAGE may hold the URL)"


def _found(study: Study) -> dict[str, Any]:
    from . import sweep as sweeps

    return {"trials": sweeps.trials(study), "front": sweeps.front(study), "progress": sweeps.progress(study)}


def _print_trials(study: Study, spec: Sweep) -> None:
    """A row for each trial, those on the front marked, and the command that compares them."""
    from rich.table import Table

    from . import sweep as sweeps
    from .sweep_trials import short

    rows, front = sweeps.trials(study), sweeps.front(study)
    best = "front" if len(spec.objectives.figures) > 1 else "best"
    table = Table("trial", "state", *spec.ranges, *spec.objectives.figures, "seconds", "run", best)
    for row in rows:
        params = [short(row["params"].get(key, "")) for key in spec.ranges]
        objectives = [short("" if value is None else value) for value in row["objectives"].values()]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        mark = "*" if row["number"] in front else ""
        table.add_row(str(row["number"]), row["state"], *params, *objectives, seconds, row["run"] or "", mark)
    console = _console()
    console.print(table)
    for row in rows:
        if row["cause"]:
            console.print(f"trial {row['number']} {row['state']}: {row['cause']}")
    runs = [row["run"] for row in rows if row["number"] in front]
    if len(runs) > 1:
        console.print(f"compare them: python -m prunedm compare {shlex.join(runs)}")


def _print_preview(spec: Sweep, as_json: bool) -> None:
    """The ranges, and the recipes of the first trials as long as no result is known."""
    from .sweep_sampler import first_trials

    found = first_trials(spec, SHOWN)
    if as_json:
        ranges = {key: wanted.short() for key, wanted in spec.ranges.items()}
        print(json.dumps({"sweep": spec.name, "trials": spec.total, "ranges": ranges, "suggestions": found}))
        return
    from rich.table import Table

    from .sweep_trials import short

    console = _console()
    table = Table("field", "range", "recipe")
    base = {key: _of_recipe(spec, key) for key in spec.ranges}
    for key, wanted in spec.ranges.items():
        table.add_row(key, wanted.words(), short(base[key]))
    console.print(table)
    names = " and ".join(spec.objectives.figures)
    console.print(f"{spec.total} trials, sampler {spec.sampler}, pruner {spec.pruner}; to be small: {names}")
    table = Table("trial", *spec.ranges, "recipe")
    for number, one in enumerate(found):
        cells = [short(one["params"].get(key, "")) for key in spec.ranges]
        table.add_row(str(number), *cells, one["cause"] or "valid")
    console.print(table)


def _of_recipe(spec: Sweep, key: str) -> Any:
    found: Any = spec.base
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
