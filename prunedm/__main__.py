"""The command line: ``python -m prunedm run|resume|sweep|plan|pause|continue|stop|ls|show|tag|note|archive|rm|trash``,
``doctor|masks|pretrain|export|verify`` and ``evaluate|compare|report``.

Exit status: 0 done, 1 failed, 2 bad input (one line), 130 interrupted by Ctrl-C (resumable).
Heavy imports stay inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import (
    control_commands,
    export_commands,
    judge_commands,
    mask_commands,
    plan_command,
    pretrain_command,
    shelf_commands,
    sweep_commands,
)
from .terminal import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    Address,
    AsJson,
    ExecutorName,
    RunsDir,
    execute_by,
    interruptions,
)

if TYPE_CHECKING:
    from .jobs import Execute
    from .recipe import Recipe
    from .store import Run

app = typer.Typer(
    help="Prune diffusion models: structured channel pruning, then learned N:M masks.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(mask_commands.app, name="masks")
app.command()(pretrain_command.pretrain)
app.command()(judge_commands.evaluate)
app.command()(judge_commands.compare)
app.command()(judge_commands.report)
app.command()(export_commands.export)
app.command()(export_commands.verify)
app.command()(sweep_commands.sweep)
app.command()(plan_command.plan)
app.command()(control_commands.pause)
app.command("continue")(control_commands.go_on)
app.command()(control_commands.stop)
app.command()(shelf_commands.tag)
app.command()(shelf_commands.note)
app.command()(shelf_commands.archive)
app.command()(shelf_commands.rm)
app.add_typer(shelf_commands.trash_app, name="trash")


@app.command("run")
def run_command(
    recipe_file: Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", show_default=False)] = None,
    preset: Annotated[str | None, typer.Option(help="smoke, balanced or quality")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="change one field")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    name: Annotated[str | None, typer.Option(help="name of the run")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done, and stop")] = False,
    executor: ExecutorName = "local",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline: prune, fine-tune, learn masks, recover, evaluate, report."""
    from . import recipe as recipes

    recipe = recipes.resolve(recipe_file, preset, assignments, name)
    from . import inputs, jobs

    if dry_run:
        inputs.load_inputs(recipe, runs_dir)
        _print_preview(recipe, inputs.preview(recipe, runs_dir), as_json)
        return
    execute = execute_by(executor, address, runs_dir)
    _work(jobs.prepared(recipe, runs_dir, executor == "local"), execute, as_json)


@app.command()
def resume(
    run: str,
    runs_dir: RunsDir = Path("runs"),
    executor: ExecutorName = "local",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a stopped, failed or interrupted run."""
    from . import store

    found = store.find(runs_dir, run)
    execute = execute_by(executor, address, runs_dir)
    found.take()
    _work(found, execute, as_json)


@app.command("ls")
def list_runs(runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs, newest first."""
    from . import store

    rows = [_row(run) for run in store.all_runs(runs_dir)]
    if as_json:
        print(json.dumps(rows))
        return
    from rich.table import Table

    table = Table("run", "state", "stage", "seconds", "non-zero", "validation loss", "FD")
    for row in rows:
        nm = row["variants"].get("nm") or row["variants"].get("structured") or {}
        table.add_row(
            row["run"],
            row["status"],
            row["stage"],
            f"{row['seconds']:.0f}",
            _shown(nm.get("nonzero_parameters"), "{:,}"),
            _shown(nm.get("validation_loss"), "{:.5f}"),
            _shown(nm.get("fid"), "{:.2f}"),
        )
    none = f"no runs in {runs_dir}; start one: python -m prunedm run --preset smoke"
    _console().print(table if rows else none)


@app.command()
def show(run: str, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Show one run: state, recipe and figures."""
    from . import report, store

    found = store.find(runs_dir, run)
    if as_json:
        print(json.dumps(report.summary(found)))
        return
    state = found.state()
    console = _console()
    console.print(f"{found.id}: {state.status}" + (f" ({state.error})" if state.error else ""))
    console.print(f"stages done: {', '.join(state.stages_done) or 'none'}; {state.seconds:.0f} s")
    console.print(found.recipe().to_yaml().rstrip())
    _print_figures(found)


@app.command()
def doctor(runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Look at environment, devices, versions and disk: what is missing and what to do."""
    from . import environment

    checks = environment.checks(runs_dir)
    if as_json:
        print(json.dumps([vars(check) for check in checks]))
    else:
        from rich.table import Table

        table = Table("", "what", "found", "what to do")
        for check in checks:
            mark = "ok" if check.ok else "PROBLEM"
            table.add_row(mark, check.name, check.found, "" if check.ok else check.remedy)
        _console().print(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(FAILED)


def _work(run: Run, execute: Execute, as_json: bool) -> None:
    """Execute with progress bars; Ctrl-C stops after the step at hand, a second one at once."""
    from . import report

    began = time.monotonic()
    with interruptions("run") as stop, _Progress() as bars:
        status = execute(run, bars, stop)
    console = _console()
    if status == "done":
        _print_figures(run)
        console.print(f"{run.id} done in {time.monotonic() - began:.0f} s; report: {run.report_path}")
    else:
        error = run.state().error
        console.print(f"{run.id} {status}" + (f": {error}" if error else ""), highlight=False)
        console.print(f"go on with: python -m prunedm resume {run.id} --runs-dir {run.folder.parent}")
    if as_json:
        print(json.dumps(report.summary(run)))
    raise typer.Exit({"done": 0, "failed": FAILED}.get(status, INTERRUPTED))


class _Progress:
    """One rich bar a stage, with rate and ETA, on standard error."""

    def __enter__(self) -> _Progress:
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


def _print_preview(recipe: Recipe, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"recipe": recipe.model_dump()} | found))
        return
    from rich.table import Table

    console = _console()
    console.print(recipe.to_yaml().rstrip())
    sizes = ", ".join(f"{key} {value:,}" for key, value in found["parameters"].items())
    console.print(f"\nparameters: {sizes}")
    if found["prune"]:
        report = found["prune"]
        from .report import stage_one

        console.print(stage_one(report).replace("removed", "removes"), report["reason"])
        table = Table("channel group", "width", "after", "multiple of")
        for group in report["groups"]:
            table.add_row(group["layer"], *(str(group[k]) for k in ("before", "after", "multiple_of")))
        console.print(table)
    table = Table("layer", "shape after stage 1", "groups", "masked", "why not")
    for layer in found["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        chosen = layer["pattern"] if recipe.mask.density is None else "by sensitivity"
        masked = chosen if layer["eligible"] else "no"
        table.add_row(layer["layer"], shape, f"{layer['groups']:,}", masked, layer["reason"])
    console.print(table)


def _print_figures(run: Run) -> None:
    from rich.table import Table

    from . import report

    results = run.evaluation()
    if not results:
        return
    table = Table("", *results)
    for label, cells in report.figure_rows(results):
        table.add_row(label, *cells.values())
    console = _console()
    console.print(table)
    console.print(report.headline(results))


def _row(run: Run) -> dict[str, Any]:
    """One run for ``ls``; a broken folder is a row that says so."""
    from . import report, store

    try:
        return report.summary(run)
    except (store.StoreError, ValueError) as error:
        return {
            "run": run.id,
            "folder": str(run.folder),
            "status": "unreadable",
            "error": str(error),
            "stage": "",
            "seconds": 0.0,
            "variants": {},
        }


def _shown(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; bad input is one line on standard error."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return app(given or ["--help"], standalone_mode=False) or 0
    except typer.TyperException as error:
        print(f"error: {error.format_message().rstrip('.')}; see --help", file=sys.stderr)
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except ValueError as error:  # RecipeError, ModelError, StoreError, InputError: all one line
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
