"""Which models are judged: the variants of runs, model folders, packed files, hub ids; each with its dense model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import bundled, cache, store, subject
from .recipe import Data
from .records import VARIANT_LABELS
from .stage_recipes import Pattern
from .subject import Subject

READ_AS = Pattern(2, 4)  # what the layers of models that claim nothing are looked at as


class JudgeError(ValueError):
    """A judgement that cannot be made as asked, in one line."""


@dataclass
class Entry:
    """One model to judge: its label, where its results go, and its dense model.

    source: what it is found by from any folder. lender: the run whose real images it is judged by, where it has none.
    """

    label: str
    subject: Subject
    home: Path
    variant: str | None = None
    run: store.Run | None = None
    dense: Entry | None = None
    source: str = ""
    lender: store.Run | None = None

    @cached_property
    def fingerprint(self) -> str:
        return subject.fingerprint(self.subject.place)


def entries(sources: list[str], runs_dir: Path, dense: str | None = None) -> list[Entry]:
    """All variants of each run, the one of ``RUN/variant``, or the model of a folder; in the order given.

    dense: the dense model of those that are no runs. ValueError in one line for what cannot be loaded.
    """
    base = None
    if dense is not None:
        found = subject.find(dense, None, runs_dir, READ_AS, strict=False)
        base = Entry(f"{dense} (dense)", found, _home(found), "dense", source=_anywhere(dense, found))
    made: list[Entry] = []
    loaded: dict[str, Entry] = {}
    for source in sources:
        made += _of_source(source, runs_dir, base, loaded)
    if base is not None and any(entry.dense is base for entry in made):
        made.insert(0, base)
    _lend_images(made)
    return _told_apart(made)


def _lend_images(made: list[Entry]) -> None:
    """A model that is of no run is judged by the real images of the runs beside it: by others it would not compare.

    Of the runs that draw images of its shape, where these agree.
    """
    known = [e for e in made if e.run is not None and e.subject.data]
    for entry in made:
        if entry.run is None and entry.subject.data is None:
            fit = [e for e in known if e.subject.model.image_shape == entry.subject.model.image_shape]
            if fit and all(_same_images(e.subject.data, fit[0].subject.data) for e in fit):
                entry.subject.data, entry.lender = fit[0].subject.data, fit[0].run


def _same_images(a: Data, b: Data) -> bool:
    training = {"batch_size", "flip"}  # change no image that is judged by
    return a.model_dump(exclude=training) == b.model_dump(exclude=training)


def _told_apart(made: list[Entry]) -> list[Entry]:
    """Each model once, under a label of its own: folders of one name get a number."""
    found: dict[str, Entry] = {}
    for entry in made:
        if any(entry is other for other in found.values()):
            continue
        label, number = entry.label, 2
        while entry.label in found:
            entry.label, number = f"{label} ({number})", number + 1
        found[entry.label] = entry
    return list(found.values())


def _of_source(source: str, runs_dir: Path, base: Entry | None, loaded: dict[str, Entry]) -> list[Entry]:
    """The models of one source. ``loaded``: what was loaded of runs already, by ``RUN/variant``."""
    run_id, _, tail = source.partition("/")
    if not store.is_run(runs_dir, run_id):
        found = subject.find(source, None, runs_dir, READ_AS, strict=False)
        return [Entry(_name(source, found), found, _home(found), dense=base, source=_anywhere(source, found))]
    run = subject.run_of(runs_dir, run_id)
    finished = run.variants()
    if not finished or (tail and tail not in finished):
        known = ", ".join(finished) or "none yet"
        raise JudgeError(f"{source}: run {run_id} has the variants {known}; name one of them")
    return [_of_variant(run, name, loaded) for name in ([tail] if tail else finished)]


def _of_variant(run: store.Run, name: str, loaded: dict[str, Entry]) -> Entry:
    """A variant of a run with its dense model, each loaded once."""
    key = f"{run.id}/{name}"
    if key not in loaded:
        dense = _of_variant(run, "dense", loaded) if name != "dense" else None
        found = subject.find(run.id, name, run.folder.parent, READ_AS, strict=False)
        if name != "nm":
            found.patterns = {}  # what happens to look like N:M is none
        label, home = f"{run.id} {VARIANT_LABELS[name]}", run.folder / "evaluations"
        loaded[key] = Entry(label, found, home, name, run, dense, key)
    return loaded[key]


def _name(source: str, found: Subject) -> str:
    """A short name of a model that is no run: its folder's, or the hub id."""
    return found.place.name if Path(source).expanduser().exists() else source


def _anywhere(source: str, found: Subject) -> str:
    """What finds the model from any folder: the whole path of one on disk; 'bundled' and hub ids as they are."""
    of_run = found.data is not None  # as a dense model: its runs folder is not said then
    is_path = of_run or (source != bundled.NAME and Path(source).expanduser().exists())
    return str(found.place.absolute()) if is_path else source


def _home(found: Subject) -> Path:
    return cache.folder("evaluations") / subject.fingerprint(found.place)
