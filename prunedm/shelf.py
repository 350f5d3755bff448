"""Runs as things that are kept: tags and notes, archive, trash, where they come from, what they take on disk.

Tags, note and the archive mark stand in ``notes.json`` in the run's folder. A deleted run's folder is renamed to
``.trash/<id>-<UTC time>`` in the same runs folder: in one step, with nothing copied, and its name is the record of
when. Ids and names are checked before they join a path, links are never followed, and nothing outside the runs
folder is touched. Knows no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from . import store
from .files import require_known
from .recipe import Recipe
from .records import ACTIVE, VARIANTS
from .store import RUN_ID, Run, StoreError

NOTES, TRASH = "notes.json", ".trash"
SCHEMA = 1
TAG = re.compile(r"\w[\w.+:=/@-]{0,39}")
MOST_TAGS, LONGEST_NOTE = 20, 10_000
STAMP = "%Y%m%dT%H%M%S.%fZ"
TRASHED = re.compile(rf"({RUN_ID.pattern})-(\d{{8}}T\d{{6}}\.\d{{6}}Z)")
GOING = ".going-"  # begins the name of what is being removed for good
PARTS = ("variants", "checkpoints", "masks", "samples", "exports", "evaluations")
REST = "rest"


# --- tags, note, archive -------------------------------------------------------------------------
@dataclass(frozen=True)
class Notes:
    """What a person says of a run; StoreError for what cannot be kept."""

    tags: tuple[str, ...] = ()
    note: str = ""
    archived: bool = False

    def __post_init__(self) -> None:
        for tag in self.tags:
            if not isinstance(tag, str) or not TAG.fullmatch(tag):
                raise StoreError(
                    f"tag {_shown(tag)} is not a tag: at most 40 letters, digits and any of _.+:=/@-, "
                    "beginning with a letter, digit or _; use another"
                )
        if len(self.tags) > MOST_TAGS or len(set(self.tags)) < len(self.tags):
            raise StoreError(f"{len(self.tags)} tags: at most {MOST_TAGS}, each once; remove some")
        if not isinstance(self.note, str) or len(self.note) > LONGEST_NOTE or any(map(_is_control, self.note)):
            raise StoreError(f"a note is text of at most {LONGEST_NOTE:,} characters, none of them a control character")
        if not isinstance(self.archived, bool):
            raise StoreError(f"archived={_shown(self.archived)} is neither true nor false")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_control(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")


def read_notes(run: Run) -> Notes:
    """A run's notes, none where no file is; StoreError in one line where the file is damaged."""
    path = run.folder / NOTES
    if not os.path.lexists(path):
        return Notes()
    try:
        raw = store.read_json(path)
    except StoreError as error:
        raise StoreError(f"{path} cannot be read ({error.__cause__}); restore or delete the file") from None
    require_known(path, raw.get("schema") if isinstance(raw, dict) else None, SCHEMA)
    try:
        if set(raw) != {"schema", "tags", "note", "archived"} or not isinstance(raw["tags"], list):
            raise StoreError("its fields are not those of notes")
        return Notes(tuple(raw["tags"]), raw["note"], raw["archived"])
    except (TypeError, StoreError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore or delete the file") from None


def write_notes(run: Run, notes: Notes) -> Notes:
    """Keep a run's notes; gives them back."""
    store.write_json(run.folder / NOTES, {"schema": SCHEMA, **asdict(notes)})
    return notes


def retag(run: Run, add: list[str] | tuple[str, ...] = (), remove: list[str] | tuple[str, ...] = ()) -> Notes:
    """Add and remove tags; StoreError when a tag to remove is not there, and nothing is changed then."""
    notes = read_notes(run)
    absent = [tag for tag in remove if tag not in notes.tags]
    if absent:
        raise StoreError(f"run {run.id} has no tag {_shown(absent[0])}; its tags: {', '.join(notes.tags) or 'none'}")
    tags = tuple(dict.fromkeys(tag for tag in (*notes.tags, *add) if tag not in remove))
    return write_notes(run, Notes(tags, notes.note, notes.archived))


def annotate(run: Run, note: str) -> Notes:
    """Replace a run's note; an empty one removes it."""
    notes = read_notes(run)
    return write_notes(run, Notes(notes.tags, tidy(note), notes.archived))


def archive(run: Run, archived: bool = True) -> Notes:
    """Take a run out of the lists' usual view, or back into it."""
    notes = read_notes(run)
    return write_notes(run, Notes(notes.tags, notes.note, archived))


def tidy(note: str) -> str:
    """Text as a browser or a shell gives it, with one kind of line end and no blank ends."""
    return note.replace("\r\n", "\n").replace("\r", "\n").strip()


# --- trash ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Trashed:
    """A deleted run: its name in the trash, its id, and when it was deleted."""

    folder: Path
    run_id: str
    deleted: datetime

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        return folder_bytes(self.folder)


def delete(run: Run) -> Trashed:
    """Move a run to the trash, in one step; StoreError for one that is active, locked or not a run's folder."""
    runs_dir = run.folder.parent
    found = store.locate(runs_dir, run.id)
    trash = _trash(runs_dir)
    had_lock = os.path.lexists(found.folder / ".lock")
    try:
        trash.mkdir(exist_ok=True)
        with found.lock():
            _refuse_active(found)
            now = datetime.now(timezone.utc)
            target = trash / f"{run.id}-{now.strftime(STAMP)}"
            found.folder.rename(target)
        if not had_lock:
            (target / ".lock").unlink(missing_ok=True)  # the trash keeps the folder as it was
    except OSError as error:
        raise StoreError(
            f"run {run.id} cannot be moved to {trash} ({error.strerror or error}); see its permissions"
        ) from error
    return Trashed(target, run.id, now)


def _refuse_active(run: Run) -> None:
    try:
        status = run.state().status
    except StoreError:
        return  # unreadable, and nobody holds its lock
    if status in ACTIVE:
        raise StoreError(f"run {run.id} is {status}; stop it, then delete it")


def trashed(runs_dir: Path) -> list[Trashed]:
    """What lies in the trash, what was deleted last first."""
    trash = _trash(runs_dir)
    if not trash.is_dir():
        return []
    found = [_trashed(path) for path in trash.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted((one for one in found if one), key=lambda one: (one.deleted, one.name), reverse=True)


def _trashed(path: Path) -> Trashed | None:
    match = TRASHED.fullmatch(path.name)
    try:
        when = datetime.strptime(match[2], STAMP) if match else None
    except ValueError:
        return None  # the shape of a time, and none
    return Trashed(path, match[1], when.replace(tzinfo=timezone.utc)) if match and when else None


def restore(runs_dir: Path, name: str) -> Run:
    """Take a run out of the trash; StoreError when it is not there, or its id is in use again."""
    found = _in_trash(runs_dir, name)
    target = runs_dir / found.run_id
    if os.path.lexists(target):
        raise StoreError(f"there is a run {found.run_id} again; delete or rename that one, then restore")
    try:
        found.folder.rename(target)
    except OSError as error:
        raise StoreError(f"{name} cannot be restored ({error.strerror or error}); see {found.folder}") from error
    return Run(target)


def empty_trash(runs_dir: Path, older_than: timedelta | None = None) -> list[Trashed]:
    """Remove what lies in the trash for good, or what was deleted so long ago; gives what is gone.

    Each folder gets a hidden name first: one that a crash left half removed is never restored.
    """
    trash, now = _trash(runs_dir), datetime.now(timezone.utc)
    gone = [one for one in trashed(runs_dir) if older_than is None or now - one.deleted >= older_than]
    try:
        for one in gone:
            one.folder.rename(trash / f"{GOING}{one.name}")
        for path in trash.glob(f"{GOING}*"):
            if not path.is_symlink():
                shutil.rmtree(path)
    except OSError as error:
        raise StoreError(
            f"{error.filename} cannot be removed ({error.strerror or error}); see its permissions"
        ) from error
    return gone


def _in_trash(runs_dir: Path, name: str) -> Trashed:
    folder = _trash(runs_dir) / name if TRASHED.fullmatch(name) else None
    found = _trashed(folder) if folder and folder.is_dir() and not folder.is_symlink() else None
    if found is None:
        raise StoreError(f"{_shown(name)} is not in the trash; `python -m prunedm trash` lists what is")
    return found


def _trash(runs_dir: Path) -> Path:
    trash = runs_dir / TRASH
    if trash.is_symlink():
        raise StoreError(f"{trash} is a link; the trash has to be a folder of its own: remove the link")
    return trash


# --- where runs come from --------------------------------------------------------------------------
@dataclass(frozen=True)
class Link:
    """One run made from another. variant: which of its models, '' for its last. what: weights or masks."""

    parent: str
    child: str
    variant: str
    what: str


@dataclass(frozen=True)
class Lineage:
    """All links between runs, by either end. known: the runs that are there; a parent may not be."""

    parents: dict[str, list[Link]]
    children: dict[str, list[Link]]
    known: frozenset[str]

    def missing(self, run_id: str) -> bool:
        return run_id not in self.known

    def around(self, run_id: str) -> list[tuple[int, str]]:
        """All that a run was made from, itself, and all that was made from it: (depth, id), parents before
        children, a child under its parent where it can be. Links in a circle, which no recipe can make, end it."""
        members = self._reach(run_id, self.parents, "parent") | self._reach(run_id, self.children, "child")
        open_parents = {one: {link.parent for link in self.parents.get(one, ())} & members for one in members}
        depth = dict.fromkeys(members, 0)
        ready = sorted((one for one in members if not open_parents[one]), reverse=True)
        found: list[tuple[int, str]] = []
        while ready:
            one = ready.pop()
            found.append((depth[one], one))
            for child in sorted({link.child for link in self.children.get(one, ())} & members, reverse=True):
                depth[child] = max(depth[child], depth[one] + 1)
                open_parents[child].discard(one)
                if not open_parents[child]:
                    ready.append(child)
        placed = {one for _, one in found}
        return found + [(0, one) for one in sorted(members - placed)]

    def _reach(self, start: str, links: dict[str, list[Link]], end: str) -> set[str]:
        seen, waiting = {start}, [start]
        while waiting:
            for link in links.get(waiting.pop(), ()):
                other = getattr(link, end)
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen


def lineage(recipes: Mapping[str, Recipe], runs_dir: Path, known: Mapping[str, Any] | None = None) -> Lineage:
    """Who was made from whom, by the recipes of runs. known: all ids that are there, where more than have a recipe."""
    ids = frozenset(recipes if known is None else known) | frozenset(recipes)
    parents: dict[str, list[Link]] = {}
    children: dict[str, list[Link]] = {}
    for run_id, recipe in recipes.items():
        for given, what in ((recipe.model.source, "weights"), (recipe.mask.initial, "masks")):
            origin = _origin(given, runs_dir, ids) if given else None
            if origin and origin[0] != run_id:
                link = Link(origin[0], run_id, origin[1], what)
                parents.setdefault(run_id, []).append(link)
                children.setdefault(link.parent, []).append(link)
    return Lineage(parents, children, ids)


STAMPED = re.compile(r"\d{8}-\d{6}-.+")  # how store.create names runs


def _origin(source: str, runs_dir: Path, known: frozenset[str]) -> tuple[str, str] | None:
    """The run and variant that a recipe names, as RUN, RUN/variant or a path in the runs folder; None for others.

    A run that is gone is known by its path, by the time in its name or by a variant's name after it.
    """
    run_id, _, variant = source.partition("/")
    if run_id in known or (RUN_ID.fullmatch(run_id) and (STAMPED.fullmatch(run_id) or variant in VARIANTS)):
        return run_id, variant if variant in VARIANTS else ""
    path, home = Path(source), runs_dir.absolute()
    if not path.is_absolute() or ".." in path.parts or not path.is_relative_to(home):
        return None
    parts = path.relative_to(home).parts
    if not parts or not RUN_ID.fullmatch(parts[0]):
        return None
    return parts[0], parts[2] if len(parts) > 2 and parts[1] == "variants" and parts[2] in VARIANTS else ""


# --- disk ------------------------------------------------------------------------------------------
def disk_use(run: Run) -> dict[str, int]:
    """Bytes of a run by :data:`PARTS` and the rest. Links count for themselves; what vanishes meanwhile for nothing."""
    found = dict.fromkeys((*PARTS, REST), 0)
    for entry in _entries(run.folder):
        part = entry.name if entry.name in PARTS and entry.is_dir(follow_symlinks=False) else REST
        found[part] += _entry_bytes(entry)
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(_entry_bytes(entry) for entry in _entries(folder))


def free_bytes(runs_dir: Path) -> int:
    """Free space where the runs are kept, or will be."""
    while not runs_dir.exists():
        runs_dir = runs_dir.parent
    return shutil.disk_usage(runs_dir).free


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def _entry_bytes(entry: os.DirEntry[str]) -> int:
    try:
        info = entry.stat(follow_symlinks=False)
    except OSError:
        return 0
    return sum(map(_entry_bytes, _entries(entry.path))) if stat.S_ISDIR(info.st_mode) else info.st_size
