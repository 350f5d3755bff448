"""The Runs page's rows: what each run shows, cached by its files, and the table, filter and family tree of them."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from app import lab, parts
from prunedm import charts, comparison, shelf
from prunedm.comparison import Judged
from prunedm.jsonl import parsed
from prunedm.records import VARIANT_LABELS, VARIANTS
from prunedm.shelf import Lineage, Link, Notes
from prunedm.store import Run

MIB = 2**20
POINTS, CHUNK, WHOLE = 50, 4096, 1 << 17  # of a sparkline; bytes read at each; bytes below which all is read
NUMBERS = ("nonzero_parameters", "validation_loss", "fid", "latency_ms", "sizes.packed_fp16")
SIZES_FOR = 120.0  # seconds that a run's size is believed while its folder looks the same


@dataclass
class Row:
    """One run of the list. ``problem`` is what is wrong with the run or its notes, in a line."""

    card: lab.Card
    notes: Notes = field(default_factory=Notes)
    notes_problem: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    loss: list[float] = field(default_factory=list)
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.card.run.id

    @property
    def bytes(self) -> int:
        return sum(self.disk.values())

    @property
    def problem(self) -> str:
        failed = self.card.state.error if self.card.state else None
        found = self.card.problem or self.notes_problem or failed or ""
        return found.replace(f"{self.card.run.folder}{os.sep}", "")

    @property
    def last(self) -> Judged | None:
        """The last variant that was evaluated, with the dense model its differences are taken from."""
        results = self.card.results
        if not results:
            return None
        name = next(name for name in reversed(VARIANTS) if name in results)
        return Judged(self.id, results[name], name, dense=results.get("dense") if name != "dense" else None)


# --- reading -----------------------------------------------------------------------------------
def rows() -> list[Row]:
    """All runs, newest first."""
    return [row(run) for run in lab.all_runs()]


def row(run: Run) -> Row:
    """One run; what is broken in it is told in the row and breaks no other."""
    kept, found = lab.kept(run), Row(lab.card(run))
    try:
        found.notes = kept.get(shelf.NOTES, lambda: shelf.read_notes(run))
    except (ValueError, OSError) as error:
        found.notes_problem = str(error)
    try:
        if last := found.last:
            found.figures = kept.get("evaluation.json", lambda: _figures(last), "figures")
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        found.card.problem = f"{run.folder}/evaluation.json is damaged; delete it and resume the run to evaluate again"
    try:
        found.loss = kept.get("metrics.jsonl", lambda: loss_curve(run.metrics_path))
        age = int(time.monotonic() / SIZES_FOR)  # what changes deep in the folder is seen after a while
        found.disk = kept.get("state.json", lambda: shelf.disk_use(run), "disk", age)
    except OSError as error:
        found.card.problem = found.card.problem or str(error)
    return found


@st.cache_data(show_spinner=False, max_entries=2048)
def trash_bytes(folder: str, stamp: tuple[int, ...]) -> int:
    """Size of a run in the trash: nothing changes there."""
    return shelf.folder_bytes(Path(folder))


def loss_curve(path: Path) -> list[float]:
    """At most :data:`POINTS` training losses, evenly spread over a file of any length, of which little is read."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            lines = file.read().split(b"\n")[:-1]
            chosen = charts.spread(lines, POINTS)
        else:
            chosen = [_line_at(file, int(i * (size - CHUNK) / (POINTS - 1))) for i in range(POINTS)]
    return [loss for loss in map(_loss_of, chosen) if loss is not None]


def _line_at(file: Any, offset: int) -> bytes:
    """The first whole line at or after a place in the file; empty when the chunk holds none."""
    file.seek(offset)
    found = file.read(CHUNK).split(b"\n")
    whole = found[:-1] if offset == 0 else found[1:-1]
    return whole[0] if whole else b""


def _loss_of(line: bytes) -> float | None:
    try:
        loss = parsed(line)[0]["loss"]
    except (IndexError, KeyError, TypeError):
        return None
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


# --- choosing ------------------------------------------------------------------------------------
def matches(one: Row, text: str, states: list[str], tags: list[str], archived: bool) -> bool:
    """Whether a run passes the filters: each word of the text somewhere, any of the states, all of the tags."""
    said = " ".join((one.id, *one.notes.tags, one.notes.note)).casefold()
    return (
        (archived or not one.notes.archived)
        and (not states or one.card.status in states)
        and set(tags) <= set(one.notes.tags)
        and all(word in said for word in text.casefold().split())
    )


# --- the table -----------------------------------------------------------------------------------
def frame(found: list[Row]) -> pd.DataFrame:
    """The table, a row a run. Absent figures are empty cells; what the figures hold for stands behind them."""
    return pd.DataFrame([_cells(one) for one in found], columns=list(columns()))


def _cells(one: Row) -> dict[str, Any]:
    state = one.card.state
    began = (state.started or state.created) if state else 0
    return {
        "run": one.id,
        "state": state_words(one),
        "loss": one.loss if len(one.loss) > 1 else None,
        "tags": list(one.notes.tags),
        **one.figures,
        "note": one.notes.note.split("\n")[0],
        "problem": one.problem,
        "started": _local(began),
        "minutes": state.seconds / 60 if state and state.seconds else None,
        "disk": one.bytes / MIB,
    }


def _local(seconds: float) -> datetime | None:
    """Local time; None for what is no time."""
    try:
        return datetime.fromtimestamp(seconds) if seconds else None
    except (ValueError, OverflowError, OSError):
        return None


def _figures(last: Judged) -> dict[str, Any]:
    """The cells of one variant; ValueError or TypeError for figures that are none."""
    for key in NUMBERS:
        if not isinstance(last.get(key), int | float | None):
            raise ValueError(f"{key} is no number")
    ratio = comparison.efficiency(last)
    dense = (last.dense or {}).get("nonzero_parameters")
    judged, timed = last.get("fid_extractor"), [last.get(key) for key in comparison.TIMED]
    loss_ratio, packed = ratio["validation_loss"], last.get("sizes.packed_fp16")
    return {
        "variant": VARIANT_LABELS.get(last.variant or "", last.variant),
        "nonzero": last.get("nonzero_parameters"),
        "removed": last.get("nonzero_parameters") / dense - 1 if dense else None,
        "validation": last.get("validation_loss"),
        "worse": loss_ratio - 1 if loss_ratio else None,
        "fd": last.get("fid"),
        "fd_by": f"{judged}, {last.get('fid_images')} images" if judged else "",
        "latency": last.get("latency_ms"),
        "timed_on": f"{timed[0]}, {timed[1]}, batch {timed[2]}" if last.get("latency_ms") is not None else "",
        "packed": packed / MIB if packed else None,
    }


def state_words(one: Row) -> str:
    """State as icon and word, with how far the stage at hand is, or the place in the queue."""
    state = one.card.state
    text = f"{parts.STATES.get(one.card.status, ('•',))[0]} {one.card.status}"
    if one.card.status in ("running", "paused", "stopping") and state and state.of:
        text += f" {min(1, state.step / state.of):.0%}"
    if one.card.status == "queued" and (place := lab.position(one.id)) is not None:
        text += f", number {place}"
    return text + (", archived" if one.notes.archived else "") + (", bad notes" if one.notes_problem else "")


def columns() -> dict[str, Any]:
    """Headings, help and number formats of :func:`frame`'s columns, in their order: up to the packed size they fit the
    page at 1280 pixels."""
    text, number = st.column_config.TextColumn, st.column_config.NumberColumn
    line = st.column_config.LineChartColumn
    return {
        "run": text("Run", pinned=True, width=185),
        "state": text("State", width=105),
        "loss": line("Loss", width=75, help="training loss of all stages, one after the other"),
        "tags": st.column_config.ListColumn("Tags", width=125),
        "nonzero": number("Non-zero", format="compact", width=75, help="parameters of the last variant but zeros"),
        "removed": number("vs dense", format="percent", width=75, help="change of the non-zero parameters"),
        "validation": number("Val. loss", format="%.5f", width=80, help="noise-prediction error on held-out images"),
        "worse": number("vs dense", format="percent", width=75, help="change of the validation loss, if judged alike"),
        "fd": number("FD", format="%.3f", width=60, help="Frechet distance, by the extractor under FD by"),
        "latency": number("ms", format="%.2f", width=55, help="median of one UNet call, measured"),
        "packed": number("Packed", format="%.2f MiB", width=80, help="the packed N:M file in fp16"),
        "fd_by": text("FD by", width=170),
        "timed_on": text("ms on", width=150),
        "variant": text("Variant", width=80, help="the last one that was evaluated: the figures are its own"),
        "note": text("Note", width=200, help="its first line"),
        "problem": text("Problem", width=220, help="why it failed or cannot be read"),
        "started": st.column_config.DatetimeColumn("Started", format="YYYY-MM-DD HH:mm", width=130),
        "minutes": number("Ran for", format="%.1f min", width=85),
        "disk": number("Disk", format="%.1f MiB", width=85),
    }


def size_words(size: int) -> str:
    """Bytes in words: 512 B, 3.4 KiB, 12.0 MiB, 1.2 GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", MIB), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


# --- the family tree -------------------------------------------------------------------------------
def lineage(found: list[Row]) -> Lineage:
    """Who was made from whom, of all runs that can be read."""
    recipes = {one.id: one.card.recipe for one in found if one.card.recipe}
    return shelf.lineage(recipes, lab.runs_dir(), [one.id for one in found])


def made_by(tree: Lineage, run_id: str, recipe: Any, above: str = "") -> str:
    """What a run was made from, in words; ``above``: the run that the list names just before it."""
    links = tree.parents.get(run_id, [])
    said = [f"the {link.what} of {_model(link, above)}" for link in links]
    if recipe is not None and not any(link.what == "weights" for link in links):
        bundled = recipe.model.source == "bundled"
        said.insert(0, "the bundled dense model" if bundled else f"the model {recipe.model.source}")
    return " and ".join(said)


def _model(link: Link, above: str) -> str:
    name = f"{VARIANT_LABELS[link.variant]} model" if link.variant else "last model"
    return f"the {name} above" if link.parent == above else f"{link.parent}'s {name}"
