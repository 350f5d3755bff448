"""A copy of a run folder at a URL (s3://bucket/runs, gs://, file://, and whatever else fsspec knows), kept up to date
while the run is worked on: machines come and go, and what a run has made outlives them.

The folder stays the original: what cannot be copied is said in the run's log and costs the run nothing. Keys and
passwords come from where the driver of the URL looks for them (environment, configuration), never from a recipe.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from . import parallel
from .store import RUN_ID, Run, StoreError, check_writable
from .untrusted import one_line

EVERY = 30.0  # seconds between two looks at what has changed
WHOLE = 2**20  # bytes: smaller files are read before they are sent, as they may grow meanwhile
PASSING = (".lock", ".heartbeat", "stop", "pause")  # of the machine at hand


class ArtifactError(ValueError):
    """A URL that cannot be written or read, in one line."""


def place(url: str, run_id: str) -> tuple[Any, PurePosixPath]:
    """The file system of a URL, and a run's folder there. :class:`ArtifactError` where there is no such system."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise ArtifactError(
            f"{url} is no place for artifacts ({one_line(error)}); give a URL that fsspec knows, such as "
            "s3://bucket/runs or file:///shared/runs, and install its driver (s3: pip install s3fs)"
        ) from None
    return system, PurePosixPath(root) / run_id


class Mirror:
    """The copy of one run. Files are told apart by size and time: one that looks as it did is not sent again."""

    def __init__(self, run: Run, url: str) -> None:
        self.run, self.url = run, url
        self.system, self.root = place(url, run.id)
        self._sent: dict[str, tuple[int, int]] | None = None  # name of a file to its size and time

    def push(self) -> int:
        """Copy what is new or has changed and drop what is gone; how many files were copied.

        :class:`ArtifactError` when the place cannot be written.
        """
        try:
            if self._sent is None:
                self._sent = dict.fromkeys(self._left_checkpoints(), (0, 0))
            names = self._names()
            for name in set(self._sent) - set(names):  # a resumed run would take a checkpoint for its newest
                self.system.rm_file(str(self.root / name))
                del self._sent[name]
            return sum(self._send(name) for name in names)
        except Exception as error:  # noqa: BLE001  (drivers raise what their clients raise)
            raise ArtifactError(f"{self.url} cannot be written ({type(error).__name__}: {one_line(error)})") from error

    def _left_checkpoints(self) -> list[str]:
        """Those in the copy, which a worker that was killed may have left there."""
        folder = self.root / "checkpoints"
        found = self.system.find(str(folder)) if self.system.exists(str(folder)) else []
        return [f"checkpoints/{PurePosixPath(name).name}" for name in found]

    def _names(self) -> list[str]:
        """All files of the run, its recipe last: what is there without one is no run yet."""
        found = [p for p in self.run.folder.rglob("*") if p.is_file() and not p.is_symlink()]
        kept = [p for p in found if p.name not in PASSING and not p.name.endswith(".part")]
        names = [p.relative_to(self.run.folder).as_posix() for p in kept]
        return sorted(names, key=lambda name: (name == "recipe.yaml", name))

    def _send(self, name: str) -> bool:
        """Whether the file was copied: not when it looks as before, or is gone meanwhile."""
        path, there = self.run.folder / name, str(self.root / name)
        try:
            found = path.stat()
            content = path.read_bytes() if found.st_size < WHOLE else None
        except FileNotFoundError:
            return False
        stamp = found.st_size, found.st_mtime_ns
        if self._sent.get(name) == stamp:
            return False
        self.system.makedirs(str(PurePosixPath(there).parent), exist_ok=True)
        if content is None:
            self.system.put_file(str(path), there)
        else:
            self.system.pipe_file(there, content)
        self._sent[name] = stamp
        return True


class _Mirroring(threading.Thread):
    """Pushes every so many seconds and once more at the end. Never raises: trouble is logged, once."""

    def __init__(self, mirror: Mirror, every: float) -> None:
        super().__init__(name="prunedm-artifacts", daemon=True)
        self.mirror, self.every = mirror, every
        self.ending, self.said = threading.Event(), ""

    def run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self.ending.wait(self.every)
            try:
                self.mirror.push()
            except ArtifactError as error:
                self._say(f"artifacts: {error}; the run goes on, and copies them when it can")

    def _say(self, line: str) -> None:
        if line != self.said:
            self.said = line
            with suppress(OSError):
                self.mirror.run.log(line)


@contextmanager
def mirrored(run: Run, every: float = EVERY) -> Iterator[None]:
    """Keep a copy of the run where its recipe says (``resources.artifacts``) while the block runs, and at its end."""
    url = None
    with suppress(ValueError, OSError):  # what is wrong with a recipe is said where it is used
        url = run.recipe().resources.artifacts
    if url is None or not parallel.is_writer():
        yield
        return
    try:
        thread = _Mirroring(Mirror(run, url), every)
    except ArtifactError as error:
        with suppress(OSError):  # the disk is full: the run itself will say so
            run.log(f"artifacts: {error}")
        yield
        return
    thread.start()
    try:
        yield
    finally:
        thread.ending.set()
        thread.join()


def fetch(url: str, run_id: str, runs_dir: Path) -> Run:
    """Bring a run back from its copy. :class:`ArtifactError` or StoreError when there is none, or one is here."""
    if not RUN_ID.fullmatch(run_id):
        raise StoreError(f"run id {run_id!r} is not an id; give the name of its folder at {url}")
    check_writable(runs_dir)
    target, part = runs_dir / run_id, runs_dir / f".{run_id}.part"
    if target.exists():
        raise StoreError(f"run {run_id} is in {runs_dir} already; delete it, or use another --runs-dir")
    system, root = place(url, run_id)
    try:
        names = system.find(str(root)) if system.exists(str(root / "recipe.yaml")) else []
        if not names:
            raise ArtifactError(f"no run {run_id} at {url}; look there for its name")
        shutil.rmtree(part, ignore_errors=True)
        for name in names:
            here = part / _below(root, name)
            here.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(name, str(here))
        part.rename(target)
    except ArtifactError:
        raise
    except Exception as error:  # noqa: BLE001  (drivers raise what their clients raise)
        raise ArtifactError(f"{url} cannot be read ({type(error).__name__}: {one_line(error)})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Run(target)


def _below(root: PurePosixPath, name: str) -> Path:
    """A listed file's place in the run folder, which it must not leave."""
    parts = PurePosixPath("/" + name.lstrip("/")).parts
    above = PurePosixPath("/" + str(root).lstrip("/")).parts
    inside = parts[len(above) :]
    if parts[: len(above)] != above or not inside or any(p in ("..", ".") or "\\" in p or "\0" in p for p in inside):
        raise ArtifactError(f"{one_line(name)} lies outside {root}; nothing was taken over")
    return Path(*inside)
