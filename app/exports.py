"""Exports of a run's variants in the background: they outlive pages and tabs, and files say what is there."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from app import lab
from prunedm.jobs import load_engine
from prunedm.store import Run

READ_AS = "2:4"  # layers that claim no pattern are looked at under this one


@dataclass
class Task:
    """One export at work or ended: its file, and what came of it."""

    path: Path
    future: Future
    began: float = field(default_factory=time.monotonic)

    @property
    def error(self) -> str:
        """Why it failed, in words; empty while it runs and when it went well."""
        return str(self.future.exception() or "") if self.future.done() else ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class Exports:
    """The exports of this server, one at a time: each takes the whole machine."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "prunedm-export")
        self._lock = threading.Lock()
        self._tasks: dict[Path, Task] = {}

    def start(self, run: Run, variant: str, kind: str, dtype: str | None, int8: str) -> Task:
        """Queue an export. ValueError in one line for a combination that is not there or a file that is."""
        load_engine()
        from prunedm import export, semi_structured

        dtype = export.check_choices(kind, dtype, int8)
        if kind == "semi-structured":
            semi_structured.require_cuda()
        path = run.exports / file_name(run.id, variant, kind, dtype, int8)
        with self._lock:
            busy = path in self._tasks and not self._tasks[path].future.done()
            if busy or path in finished(run):
                raise ValueError(f"{path.name} is already there; delete it first")
            delete(path)  # what a server that was killed left half done
            task = Task(path, self._pool.submit(_work, run, variant, kind, dtype, int8, path))
            self._tasks[path] = task
        return task

    def of(self, run: Run) -> list[Task]:
        """This run's exports at work, and those that failed since the server began."""
        with self._lock:
            return [t for p, t in self._tasks.items() if p.parent == run.exports and (not t.future.done() or t.error)]


def _work(run: Run, variant: str, kind: str, dtype: str, int8: str, path: Path) -> dict[str, Any]:
    from prunedm import export, subject, verify

    source = subject.find(run.id, variant, run.folder.parent, verify.parse(READ_AS))
    record = export.write(source, kind, path, dtype, int8)
    if path.is_dir():
        part = shutil.make_archive(str(path.with_name(f".{path.name}.part")), "zip", path.parent, path.name)
        Path(part).replace(archive(path))
    return record


def file_name(run_id: str, variant: str, kind: str, dtype: str, int8: str) -> str:
    """``demo-1-nm-packed-fp16.safetensors``: one name for each choice."""
    ending = {"packed": ".safetensors", "onnx": ".onnx", "tensorrt": ".onnx"}.get(kind, "")
    form = dtype if int8 == "none" else f"int8-{int8}"
    return f"{run_id}-{variant}-{kind}-{form}{ending}"


def finished(run: Run) -> list[Path]:
    """What lies ready. What is written last tells: a folder's archive, the record or script of an ONNX file."""
    found = sorted(run.exports.iterdir()) if run.exports.is_dir() else []
    return [path for path in found if not path.name.startswith(".") and _complete(path)]


def _complete(path: Path) -> bool:
    if path.is_dir():
        return archive(path).is_file()
    if path.suffix == ".onnx":
        return path.with_suffix(".sh" if "-tensorrt-" in path.name else ".json").is_file()
    return path.suffix == ".safetensors"


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


def inspect(path: Path) -> dict[str, Any]:
    """What ``prunedm verify`` finds on disk."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return _inspect(str(path), tuple(lab.stamp(p) for p in files if p.is_file()))


@st.cache_data(show_spinner="Reading the layers…", max_entries=32)
def _inspect(path: str, stamps: tuple) -> dict[str, Any]:
    load_engine()
    from prunedm import verify

    return verify.inspect(Path(path), verify.parse(READ_AS))
