"""``python -m prunedm evaluate``, ``compare`` and ``report``: what compression cost, in figures."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .terminal import AsJson, RunsDir

if TYPE_CHECKING:
    from rich.console import Console

    from .comparison import Axis, Judged
    from .judging import Request


class Extractor(str, Enum):
    bundled = "bundled"
    inception = "inception"
    efficientnet = "efficientnet-lite0"


class Kind(str, Enum):
    html = "html"
    csv = "csv"
    md = "md"


SUFFIXES = {".html": Kind.html, ".csv": Kind.csv, ".md": Kind.md}

Quick = Annotated[bool, typer.Option("--quick", help="128 images in 10 steps, one batch size")]
Full = Annotated[bool, typer.Option("--full", help="2,048 images, and channels_last timed too")]
By = Annotated[Extractor | None, typer.Option("--extractor", help="feature network of the distances")]
Images = Annotated[int | None, typer.Option(help="generated images")]
Sampler = Annotated[str | None, typer.Option(help="ddim, ddpm, dpm-solver++ or euler")]
Steps = Annotated[int | None, typer.Option(help="sampling steps")]
Eta = Annotated[float | None, typer.Option(help="ddim: share of DDPM's noise")]
Seed = Annotated[int | None, typer.Option(help="seed of the evaluation's noise")]
RealImages = Annotated[str | None, typer.Option("--data", help="real images to judge by, as in a recipe's data.source")]
Dense = Annotated[str | None, typer.Option(help="dense model of the folders: what differences are taken from")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")]
Ways = Annotated[
    str, typer.Option(help="ways to time beside eager, by commas: channels_last, compile, onnxruntime, semi-structured")
]
Measure = Annotated[bool, typer.Option("--measure", help="time all models anew, in turn")]


def request(
    quick: Quick = False,
    full: Full = False,
    extractor: By = None,
    images: Images = None,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    seed: Seed = None,
    real: RealImages = None,
    dense: Dense = None,
    device: Device = "auto",
    ways: Ways = "",
    measure: Measure = False,
) -> Request:
    """What to judge by, from the options that all three commands have."""
    from .judging import JudgeError, Request

    if quick and full:
        raise JudgeError("--quick and --full exclude one another; leave one out")
    mode = "quick" if quick else "full" if full else "standard"
    given = {"images": images, "sampler": sampler, "steps": steps, "eta": eta, "seed": seed}
    given["extractor"] = extractor.value if extractor else None
    changes = {name: value for name, value in given.items() if value is not None}
    chosen = tuple(way.strip() for way in ways.split(",") if way.strip())
    return Request(mode, changes, real, dense, device, chosen, measure)


def judging(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the options of :func:`request` beside its own, and gets the request as ``by``."""
    theirs = _options(request)
    shown = [option for option in _options(command) if option.name != "by"] + theirs

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        by = request(**{option.name: given.pop(option.name) for option in theirs})
        command(**given, by=by)

    wrapped.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]  (what typer reads)
    wrapped.__annotations__ = {option.name: option.annotation for option in shown}
    del wrapped.__wrapped__  # or typer would read the command's own
    return wrapped


def _options(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """A function's parameters with what typer is told of each. Request is known to type checkers only."""
    hints = get_type_hints(function, localns={"Request": Any}, include_extras=True)
    return [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]


@judging
def evaluate(
    source: Annotated[str, typer.Argument(help="a run, RUN/variant, a model folder, a packed file or a hub id")],
    by: Request,
    out: Annotated[Path | None, typer.Option(help="also write a .html, .csv or .md file")] = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Judge a model: quality, faithfulness to its dense model, speed, sparsity and size."""
    kind = None if out is None else _kind_of(out)  # before anything is judged
    judged = _judge([source], by, runs_dir)
    if out is not None:
        _write(judged, kind, out)
    if as_json:
        print(json.dumps([_plain(one) for one in judged]))
    else:
        _print_figures(judged)


@judging
def compare(
    sources: Annotated[list[str], typer.Argument(help="runs, RUN/variant, model folders, packed files or hub ids")],
    by: Request,
    out: Annotated[Path | None, typer.Option(help="folder for comparison.html, .csv, .md and .json")] = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Any models side by side; those that are not finished runs of one setting are judged alike first."""
    judged = _gathered(sources, by, runs_dir)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for kind in Kind:
            _write(judged, kind, out / f"comparison.{kind.value}")
        (out / "comparison.json").write_text(json.dumps([_plain(one) for one in judged], indent=1), encoding="utf-8")
    if as_json:
        print(json.dumps([_plain(one) for one in judged]))
    else:
        _print_comparison(judged)


@judging
def report(
    runs: Annotated[list[str], typer.Argument(help="runs, or models as for compare")],
    by: Request,
    kind: Annotated[Kind | None, typer.Option("--format", help="default: by --out, else html")] = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write; default: a run's own report.html, else the screen")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write a report of one run or several: one HTML file that needs no network, a CSV table or Markdown."""
    from . import store

    chosen = kind or (_kind_of(out) if out is not None else Kind.html)
    if out is None and chosen is Kind.html:
        if len(runs) > 1:
            raise store.StoreError("--out is needed for a page of several runs; give a file such as report.html")
        out = store.find(runs_dir, runs[0].partition("/")[0]).report_path
    judged = _gathered(runs, by, runs_dir)
    if out is None:
        sys.stdout.write(_text(judged, chosen))
        return
    _write(judged, chosen, out)
    print(out)


# --- what the commands share ---------------------------------------------------------------------
def _gathered(sources: list[str], by: Request, runs_dir: Path) -> list[Judged]:
    """What the runs recorded themselves where nothing else is asked for, else everything judged alike."""
    from . import comparison
    from .judging import Request

    found = comparison.recorded(sources, runs_dir) if by == Request() else None
    return _judge(sources, by, runs_dir) if found is None else found


def _judge(sources: list[str], by: Request, runs_dir: Path) -> list[Judged]:
    """Judge with a bar for each model on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from . import comparison
    from . import judging as engine

    found = engine.entries(sources, runs_dir, by.dense)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars, tasks = Progress(*columns, console=Console(stderr=True)), {}

    def tell(text: str, done: int, of: int) -> None:
        if text not in tasks:
            bars.start()
            tasks[text] = bars.add_task(text.replace("[", "\\["), total=of)
        bars.update(tasks[text], completed=done, total=of)

    try:
        return comparison.without_repeats(engine.judge(found, by, tell))
    finally:
        if tasks:
            bars.stop()


def _kind_of(path: Path) -> Kind:
    from . import store

    if path.suffix.lower() not in SUFFIXES:
        raise store.StoreError(f"--out {path} must end in {', '.join(SUFFIXES)}")
    return SUFFIXES[path.suffix.lower()]


def _text(judged: list[Judged], kind: Kind) -> str:
    from . import report as reports
    from . import report_page

    if kind is Kind.html:
        return report_page.render(judged, command=_command())
    return reports.csv_text(judged) if kind is Kind.csv else reports.markdown(judged)


def _command() -> str:
    """This command as it can be given again."""
    import shlex

    return "python -m prunedm " + shlex.join(sys.argv[1:])


def _write(judged: list[Judged], kind: Kind, path: Path) -> None:
    from .store import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _text(judged, kind).encode())


def _plain(one: Judged) -> dict[str, Any]:
    """One model as JSON."""
    from . import comparison

    known = {"label": one.label, "run": one.run.id if one.run else None, "variant": one.variant}
    return known | {"figures": one.figures, "layers": one.layers, "efficiency": comparison.efficiency(one)}


def _print_figures(judged: list[Judged]) -> None:
    """A column for each model, as after a run."""
    from rich.table import Table

    from . import comparison, report
    from .records import VARIANTS

    console = _console()
    names = [one.variant if one.variant in VARIANTS else one.label for one in judged]
    results = {name: one.figures for name, one in zip(names, judged)}
    if judged[-1].dense is not None and "dense" not in results:  # RUN/variant: its dense model as the yardstick
        results = {"dense": judged[-1].dense} | results
    table = Table("", *results)
    for label, cells in report.figure_rows(results):
        table.add_row(label, *cells.values())
    console.print(table)
    _print_speed(console, judged)
    _print_warnings(console, judged)
    for one in judged:
        line = comparison.verdict(one)
        if line:
            console.print(f"{one.label}: {line}")


def _print_speed(console: Console, judged: list[Judged]) -> None:
    """What was timed, way by way and batch by batch; what could not be timed, with the reason."""
    from rich.table import Table

    table = Table("model", "way", "batch", "ms a call", "10th to 90th", "ms an image")
    for one in judged:
        for row in one.get("speed") or []:
            call = row["call"]
            cells = [f"absent: {row['absent'] or 'no reason was recorded'}"]
            if call:
                cells = [f"{call['median']:.2f}", f"{call['p10']:.2f} to {call['p90']:.2f}", f"{row['per_image']:.3f}"]
            table.add_row(one.label, row["way"], str(row["batch"] or ""), *cells)
    if table.row_count:
        console.print(table)


def _print_warnings(console: Console, judged: list[Judged]) -> None:
    """Each once: too few images for the distances, or none to judge by."""
    for line in dict.fromkeys(one.get("few_images") for one in judged):
        console.print(f"Warning: {line}") if line else None
    for one in judged:
        line = one.get("quality_absent")
        console.print(f"{one.label}: {line}") if line else None


def _print_comparison(judged: list[Judged]) -> None:
    """A row for each model: the figures that decide, and whether one is on a Pareto front; what they hold for."""
    from rich.table import Table

    from . import comparison, figures

    fronts = comparison.fronts(judged)
    names = [figures.names_of(one) for one in judged if one.get("fid") is not None]
    called = names[0] if names and names.count(names[0]) == len(names) else {"fid": "distance", "kid": "kernel"}
    head = ["model", "weights not zero", "packed fp16, bytes", "smaller by", "validation loss"]
    table = Table(*head, called["fid"], called["kid"], "ms a call", "on the front of")
    for one in judged:
        ratio = comparison.efficiency(one)["compression"]
        cells = [
            _shown(one.get("nonzero_parameters"), "{:,}"),
            _shown(one.get("sizes.packed_fp16"), "{:,}"),
            _shown(None if ratio is None else 1 - 1 / ratio, "{:.1%}"),
            _shown(one.get("validation_loss"), "{:.5f}"),
            _shown(one.get("fid"), "{:.3f}"),
            _shown(one.get("kid"), "{:.5f}"),
            _shown(one.get("latency_ms"), "{:.1f}"),
        ]
        table.add_row(one.label, *cells, _fronts(fronts.get(id(one), []), called["fid"]))
    console = _console()
    console.print(table)
    console.print("On a front: no other model here is as good at both quality and cost, and better at one.")
    _print_conditions(console, judged)
    _print_warnings(console, judged)
    if len({one.get("speed_session") for one in judged}) > 1:
        console.print("Latencies were taken at different times; --measure times all models in turn.")


def _fronts(found: list[tuple[Axis, Axis, bool]], distance: str) -> str:
    """The fronts that a model is on, in a line a quality: 'loss against MACs, bytes'."""
    costs: dict[str, list[str]] = {}
    for quality, cost, is_on in found:
        if is_on:
            costs.setdefault(distance if quality.key == "fid" else quality.short, []).append(cost.short)
    return "\n".join(f"{quality} against {', '.join(names)}" for quality, names in costs.items())


def _print_conditions(console: Console, judged: list[Judged]) -> None:
    """What the figures hold for, a line for all that share it; figures of two lines do not compare."""
    from . import figures

    found: dict[str, list[str]] = {}
    for one in judged:
        found.setdefault(figures.held(one), []).append(one.label)
    for text, labels in found.items():
        console.print(f"{', '.join(labels)}: {text}." if len(found) > 1 else f"{text[0].upper()}{text[1:]}.")
    if len(found) > 1:
        console.print("Figures of models that stand on different lines here hold for different conditions.")


def _shown(value: Any, form: str) -> str:
    return "n/a" if value is None else form.format(value)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
