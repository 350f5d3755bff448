"""``python -m prunedm tag|note|archive|rm|copy|fetch|trash``: how runs are kept, and given up."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from . import artifacts, shelf, store
from .terminal import AsJson, RunsDir

OwnRunsDir = Annotated[Path | None, typer.Option("--runs-dir", help="folder of the runs", show_default=False)]

trash_app = typer.Typer(help="List, restore or remove deleted runs.", rich_markup_mode=None)


def tag(
    run: str,
    tags: Annotated[list[str] | None, typer.Argument(help="tags to add", show_default=False)] = None,
    remove: Annotated[list[str] | None, typer.Option(metavar="TAG", help="tag to remove; may be repeated")] = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Add tags to a run and remove some; prints those that it has then."""
    found = store.find(runs_dir, run)
    changed = shelf.retag(found, tags or [], remove or []) if tags or remove else shelf.read_notes(found)
    _say(found, changed, as_json, ", ".join(changed.tags) or "no tags")


def note(
    run: str,
    text: Annotated[str | None, typer.Argument(help="the whole note; '' removes it", show_default=False)] = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Write a run's note, or show it."""
    found = store.find(runs_dir, run)
    changed = shelf.read_notes(found) if text is None else shelf.annotate(found, text)
    _say(found, changed, as_json, changed.note or "no note")


def archive(
    run: str,
    undo: Annotated[bool, typer.Option("--undo", help="take it out of the archive")] = False,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Mark a run as archived: the lab's list leaves it out until asked. Its folder stays where it is."""
    found = store.find(runs_dir, run)
    changed = shelf.archive(found, not undo)
    _say(found, changed, as_json, "archived" if changed.archived else "not archived")


def rm(runs: list[str], runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Move runs to the trash; `trash restore` brings them back."""
    chosen = [store.find(runs_dir, run) for run in dict.fromkeys(runs)]  # all known, before the first one moves
    moved = []
    for run in chosen:
        moved.append(shelf.delete(run))
        if not as_json:
            back = f"python -m prunedm trash restore {moved[-1].name} --runs-dir {runs_dir}"
            print(f"{run.id} is in the trash; bring it back with: {back}")
    if as_json:
        print(json.dumps([_row(one) for one in moved]))


def copy(run: str, url: str, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Copy a run to a URL: s3://bucket/runs, file:///x; `fetch` brings it back."""
    found = store.find(runs_dir, run)
    count = artifacts.Mirror(found, url).push()
    print(json.dumps({"run": run, "url": url, "files": count}) if as_json else f"{run}: {count} files are at {url}")


def fetch(url: str, run: str, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Bring a run back from its copy at a URL."""
    found = artifacts.fetch(url, run, runs_dir)
    print(json.dumps({"run": run, "folder": str(found.folder)}) if as_json else f"{run} is in {runs_dir}")


@trash_app.callback(invoke_without_command=True)
def listing(context: typer.Context, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """List, restore or remove deleted runs."""
    if context.invoked_subcommand is not None:
        context.obj = runs_dir
        return
    found = shelf.trashed(runs_dir)
    if as_json:
        print(json.dumps([_row(one) for one in found]))
        return
    for one in found:
        print(f"{one.name}  {one.bytes / 2**20:,.1f} MiB  deleted {one.deleted.astimezone():%Y-%m-%d %H:%M}")
    if not found:
        print("the trash is empty")


@trash_app.command()
def restore(context: typer.Context, name: str, runs_dir: OwnRunsDir = None) -> None:
    """Bring a run back, by its name in the trash."""
    print(f"{shelf.restore(runs_dir or context.obj, name).id} is back")


@trash_app.command()
def empty(
    context: typer.Context,
    days: Annotated[float | None, typer.Option("--older-than", min=0, max=1e5, metavar="DAYS")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    runs_dir: OwnRunsDir = None,
) -> None:
    """Remove deleted runs for good; asks first."""
    folder = runs_dir or context.obj
    age = None if days is None else timedelta(days=days)
    if not yes:
        which = "all runs" if days is None else f"runs deleted {days:g} days ago or earlier"
        question = f"Remove {which} in the trash of {folder} for good?"
        if not sys.stdin.isatty():
            raise store.StoreError(f"nobody is there to answer '{question}'; use --yes")
        typer.confirm(question, abort=True)
    gone = shelf.empty_trash(folder, age)
    print(f"removed {len(gone)} of the deleted runs")


def _say(run: store.Run, notes: shelf.Notes, as_json: bool, text: str) -> None:
    if as_json:
        print(json.dumps({"run": run.id, "tags": notes.tags, "note": notes.note, "archived": notes.archived}))
    else:
        print(f"{run.id}: {text}")


def _row(one: shelf.Trashed) -> dict[str, Any]:
    return {"name": one.name, "run": one.run_id, "deleted": one.deleted.isoformat(), "bytes": one.bytes}
