"""The command line: ``python -m prunedm run|resume|sweep|plan|pause|continue|stop|ls|show|tag|note|archive|rm|trash``,
``lab|doctor|masks|pretrain|export|verify`` and ``evaluate|compare|report``.

Exit status: 0 done, 1 failed, 2 bad input (one line), 130 interrupted by Ctrl-C or by a rank's
death (resumable).
Heavy imports stay inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import (
    control_commands,
    export_commands,
    judge_commands,
    lab_command,
    mask_commands,
    parallel,
    plan_command,
    pretrain_command,
    shelf_commands,
    sweep_commands,
)
from .interrupts import interruptions
from .terminal import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    Address,
    AsJson,
    ExecutorName,
    Place,
    Progress,
    RunsDir,
)
from .untrusted import one_line

if TYPE_CHECKING:
    from .recipe import Recipe
    from .store import Run

LONGEST_ERROR = 1000  # characters on the terminal
app = typer.Typer(
    help="Prune diffusion models: structured channel pruning, then learned N:M masks.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(mask_commands.app, name="masks")
app.command()(lab_command.lab)
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
app.command()(shelf_commands.copy)
app.command()(shelf_commands.fetch)
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

    place = Place(executor, address, runs_dir)

    def made() -> str:
        recipe = recipes.resolve(recipe_file, preset, assignments, name)
        from . import inputs, jobs

        if dry_run:
            inputs.load_inputs(recipe, runs_dir)
            _print_preview(recipe, inputs.preview(recipe, runs_dir), as_json)
            return ""
        jobs.require_inputs(recipe, runs_dir, place.is_here)
        place.connect(recipe)
        return jobs.made(recipe, runs_dir).id

    _work(made, place, as_json)


@app.command()
def resume(
    run: str,
    runs_dir: RunsDir = Path("runs"),
    executor: ExecutorName = "local",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a stopped, failed or interrupted run."""

    place = Place(executor, address, runs_dir)

    def found() -> str:
        from . import store

        run_ = store.find(runs_dir, run)
        place.connect(run_.recipe())
        run_.take()
        return run

    _work(found, place, as_json)


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
def doctor(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="of the bundle", show_default=False)
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    bundle: Annotated[
        bool, typer.Option("--bundle", help="make a zip for whoever helps, of the runs named or the newest")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="the zip of --bundle", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Look at environment, devices, versions and disk: what is missing and what to do; or put it into a bundle."""
    from . import environment

    if bundle:
        _bundle(runs_dir, runs or [], out, as_json)
        return
    if runs or out:
        raise typer.BadParameter(f"{'RUN' if runs else '--out'} belongs to a bundle; add --bundle")
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


def _bundle(runs_dir: Path, runs: list[str], out: Path | None, as_json: bool) -> None:
    from . import support

    path = out or Path(support.file_name())
    names = support.write(runs_dir, runs, path)
    if as_json:
        print(json.dumps({"bundle": str(path), "contents": names}))
    else:
        print("\n".join(names))
        print(f"{path} holds these; nothing private is meant to be in it: look before you pass it on")


def _work(find: Callable[[], str], place: Place, as_json: bool) -> None:
    """Execute the run whose id ``find`` gives (nothing where it gives none), on all ranks that were started."""
    parallel.join()
    run_id = parallel.shared(find)
    if not run_id:
        return
    from . import store

    run = store.Run(place.runs_dir / run_id)
    if note := parallel.lonely():
        print(note, file=sys.stderr)
    began = time.monotonic()
    status = _execute(run, place)
    if parallel.is_writer():
        _tell_ending(run, status, time.monotonic() - began, as_json)
    raise typer.Exit({"done": 0, "failed": FAILED}.get(status, INTERRUPTED))


def _execute(run: Run, place: Place) -> str:
    """With rank 0's progress bars; Ctrl-C stops after the step at hand, a second one at once."""
    with interruptions("run") as stop:
        if not parallel.is_writer():
            return place.execute(run, lambda step: None, stop)
        with Progress() as bars:
            return place.execute(run, bars, stop)


def _tell_ending(run: Run, status: str, seconds: float, as_json: bool) -> None:
    from . import report

    console = _console()
    if status == "done":
        _print_figures(run)
        console.print(f"{run.id} done in {seconds:.0f} s; report: {run.report_path}")
    else:
        error = run.state().error
        console.print(f"{run.id} {status}" + (f": {error}" if error else ""), highlight=False)
        console.print(f"go on with: python -m prunedm resume {run.id} --runs-dir {run.folder.parent}")
    if as_json:
        print(json.dumps(report.summary(run)))


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
        if parallel.launched() > 1 and given[:1] not in (["run"], ["resume"]):
            raise parallel.LaunchError(
                f"ranks work on run and resume only; start {given[:1] or 'this'} without a launcher"
            )
        return app(given or ["--help"], standalone_mode=False) or 0
    except typer.TyperException as error:
        print(f"error: {one_line(error.format_message().rstrip('.'), LONGEST_ERROR)}; see --help", file=sys.stderr)
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except parallel.RankLost as error:
        if parallel.is_writer():  # where rank 0 has failed, it has said why
            print(f"error: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"error: {one_line(error, LONGEST_ERROR)}", file=sys.stderr)
        return FAILED
    except ValueError as error:  # RecipeError, ModelError, StoreError, InputError: all one line
        print(f"error: {one_line(error, LONGEST_ERROR)}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    parallel.leave(main())
