"""Exports of models in the background: they outlive pages and tabs, and files say what is there."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from app import lab, model_files
from prunedm import failure, imports
from prunedm.imports import Imported
from prunedm.jobs import load_engine
from prunedm.store import Run

if TYPE_CHECKING:
    from prunedm.export import Form


ENDINGS = {"packed": ".safetensors", "onnx": ".onnx", "tensorrt": ".onnx"}  # other formats are folders
FILES = set(ENDINGS.values())


@dataclass(frozen=True)
class Source:
    """What is exported: a run's variant or an imported model.

    name: as ``prunedm export`` takes it. stem: what the names of its files begin with. model: its folder.
    folder: where its exports go, which is the lab's own, wherever the model lies.
    """

    name: str
    stem: str
    model: Path
    folder: Path


def of_variant(run: Run, variant: str) -> Source:
    return Source(f"{run.id}/{variant}", f"{run.id}-{variant}", run.variant(variant), run.exports)


def of_imported(one: Imported) -> Source:
    return Source(str(one.path), one.name, one.path, imports.exports_dir(lab.runs_dir(), one.name))


@dataclass
class Task:
    """One export at work or ended: its file, and what came of it."""

    path: Path
    future: Future = field(default_factory=Future)
    doing: str = "waiting for the one before it"
    began: float = field(default_factory=time.monotonic)
    phase: int = 0  # the one at hand, from 1; 0 while it waits

    @property
    def phases(self) -> int:
        """Loading, writing and reading back; and a zip of what is a folder."""
        return 3 if self.path.suffix in FILES else 4

    @property
    def error(self) -> str:
        """Why it failed, in one line; empty while it runs and when it went well."""
        failed = self.future.exception() if self.future.done() else None
        return failure.plain_words(failed) if failed else ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def tell(self, doing: str) -> None:
        self.doing = doing
        self.phase += 1


class Exports:
    """The exports of this server, one at a time: each takes the whole machine."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "prunedm-export")
        self._lock = threading.Lock()
        self._tasks: dict[Path, Task] = {}

    def start(self, source: Source, kind: str, dtype: str | None, int8: str) -> Task:
        """Queue an export. ValueError in one line for a combination that is not there or a file that is."""
        load_engine()
        from prunedm import export

        form = export.form(kind, dtype, int8)
        model_files.look(source.model)
        path = source.folder / file_name(source.stem, *form)
        with self._lock:
            if path in self._tasks and not self._tasks[path].future.done():
                raise ValueError(f"{path.name} is being exported; wait for its end")
            if path in finished(source.folder):
                raise ValueError(f"{path.name} is already there; delete it first")
            delete(path)  # what a server that was killed left half done
            task = self._tasks[path] = Task(path)
            task.future = self._pool.submit(_work, task, source, form, lab.runs_dir())
        return task

    def of(self, folder: Path) -> list[Task]:
        """The exports into this folder that are at work, and those that failed since the server began."""
        with self._lock:
            return [t for p, t in self._tasks.items() if p.parent == folder and (not t.future.done() or t.error)]

    def busy(self, folder: Path) -> bool:
        return any(not task.future.done() for task in self.of(folder))


def _work(task: Task, source: Source, form: Form, runs_dir: Path) -> dict[str, Any]:
    from prunedm import export, verify

    read_as, path = verify.parse(model_files.READ_AS), task.path
    record, _ = export.make(source.name, None, runs_dir, form, path, read_as, task.tell)
    if path.is_dir():
        task.tell("making a zip of it")
        part = shutil.make_archive(str(path.with_name(f".{path.name}.part")), "zip", path.parent, path.name)
        Path(part).replace(archive(path))
    return record


def file_name(stem: str, kind: str, dtype: str, int8: str) -> str:
    """``demo-1-nm-packed-fp16.safetensors``: one name for each choice."""
    ending = ENDINGS.get(kind, "")
    form = dtype if int8 == "none" else f"int8-{int8}"
    return f"{stem}-{kind}-{form}{ending}"


def finished(folder: Path) -> list[Path]:
    """What lies ready. What is written last tells: a folder's archive, the record or script of an ONNX file."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if not path.name.startswith(".") and _complete(path)]


def _complete(path: Path) -> bool:
    if path.is_dir():
        return archive(path).is_file()
    if path.suffix == ".onnx":
        return path.with_suffix(".sh" if path.stem.endswith("-tensorrt-fp32") else ".json").is_file()
    return path.suffix == ".safetensors"


def outdated(path: Path, source: Source) -> bool:
    """Whether the model's weights were written after this export of it."""
    weights = [*source.model.glob("*.safetensors"), *(source.model / "unet").glob("*.safetensors")]
    return any(file.stat().st_mtime > archive(path).stat().st_mtime for file in weights)


def archive(path: Path) -> Path:
    """What the browser gets: the file itself, or the folder's zip."""
    return path.with_name(f"{path.name}.zip") if path.is_dir() else path


def belonging(path: Path) -> list[Path]:
    """The files beside an export: its record and script, or its archive."""
    beside = [archive(path)] if path.is_dir() else [path.with_suffix(s) for s in (".json", ".sh")]
    return [p for p in beside if p.is_file()]


def delete(path: Path) -> None:
    """Remove an export and what belongs to it."""
    for other in belonging(path):
        other.unlink(missing_ok=True)
    if path.is_dir():
        archive(path).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@st.cache_resource(show_spinner=False)
def exports() -> Exports:
    """The exports of this server, shared by all tabs."""
    return Exports()


def choices() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Format to its dtypes and its ways of int8, the defaults first."""
    load_engine()
    from prunedm import export

    return export.CHOICES
