"""The run folder: the only code, with run_results.py, that knows its file names.

::

    runs/<id>/  recipe.yaml  state.json  metrics.jsonl  events.jsonl  mask-layers.jsonl  log.txt[.1 .2 .3]
                system.jsonl  layers[-variant].json  allocation.json  evaluation.json
                masks/*.npz  samples/*.png  checkpoints/*.safetensors  variants/<name>/...  report.html

JSON files are replaced atomically; JSONL files only grow (``system.jsonl`` is thinned), and a line that a
crash tore is ignored by readers, closed off by the next writer and dropped on resume. Nothing here is a pickle.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, logs, owner, state_file
from . import recipe as recipes
from .files import StoreError, read_json, write_atomic, write_json  # noqa: F401  (others have them from here)
from .jsonl import read_jsonl
from .records import ACTIVE, RESUMABLE, STAGES, VARIANTS, RunState, Status
from .run_results import Results

if TYPE_CHECKING:
    from torch import Tensor

MASKS = "masks.safetensors"  # in the N:M variant's folder, with its manifest (maskfile.py)
VARIANT_RECORD = "prunedm.json"  # in a variant's folder, written last: what was done to it
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
EVENTS = "events.jsonl"
MASK_LAYERS = "mask-layers.jsonl"
SYSTEM = "system.jsonl"
HEARTBEAT = ".heartbeat"  # its time is that of the owner's last sign of life, where state.json's is older
HANDOVER = 8.0  # seconds that an owner which has recorded its ending may still hold the lock
STALE_AFTER = 120.0  # seconds without heartbeat before a run on another host counts as interrupted


class Busy(StoreError):
    """Another process works on the run, or is about to; nothing was changed."""


_UNWRITTEN: dict[Path, RunState] = {}  # endings of this process's runs that could not be written yet


def write_endings() -> bool:
    """Try again to write the endings that a full disk refused; whether none is left."""
    for folder, state in list(_UNWRITTEN.items()):
        with suppress(OSError):
            if folder.is_dir():
                Run(folder).write_state(state)
            else:
                _UNWRITTEN.pop(folder, None)
    return not _UNWRITTEN


class Run(Results):
    """One run folder. Cheap to make: reads nothing until asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name

    def __repr__(self) -> str:
        return f"Run({self.id})"

    # --- paths -------------------------------------------------------------------------------
    @property
    def report_path(self) -> Path:
        return self.folder / "report.html"

    @property
    def state_path(self) -> Path:
        return self.folder / "state.json"

    @property
    def log_path(self) -> Path:
        return self.folder / "log.txt"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def variant(self, name: str) -> Path:
        """The diffusers folder of one variant (it may not exist yet)."""
        return self.folder / "variants" / name

    @property
    def exports(self) -> Path:
        """Where the lab puts what it exports (it may not exist yet)."""
        return self.folder / "exports"

    def sheet(self, name: str) -> Path:
        """The sample sheet of one variant's evaluation."""
        return self.variant(name) / "samples.png"

    def variants(self) -> list[str]:
        """Names of the variants whose folders are complete."""
        return [name for name in VARIANTS if (self.variant(name) / VARIANT_RECORD).exists()]

    # --- recipe and state --------------------------------------------------------------------
    def recipe(self) -> recipes.Recipe:
        return recipes.build(recipes.read(self.folder / "recipe.yaml"))

    def state(self) -> RunState:
        """The recorded state, with a dead owner's run shown as *interrupted*."""
        kept = _UNWRITTEN.get(self.folder)  # before the file: it is kept until that can be read
        state = state_file.read(self.state_path)
        state.heartbeat = max(state.heartbeat, owner.last_beat(self.folder / HEARTBEAT))
        if kept is not None and state.status in ACTIVE and owner.is_this_process(state):
            state = kept
        if state.status in ACTIVE and not owner.lives(state, STALE_AFTER):
            state.status = "interrupted"
        elif state.status in ACTIVE and self.stop_requested():
            state.status = "stopping"
        return state

    def write_state(self, state: RunState) -> None:
        state_file.write(self.state_path, state)
        _UNWRITTEN.pop(self.folder, None)

    def beat(self) -> None:
        """A sign of life for other machines, from an owner that has no news to write."""
        owner.beat(self.folder / HEARTBEAT)

    def claim(self, state: RunState, status: Status) -> None:
        """Record this process as the run's owner."""
        owner.sign(state)
        state.status, state.error, state.remedy = status, None, {}
        self.write_state(state)

    def take(self) -> None:
        """Claim a stopped, failed or interrupted run as *queued* by this process: of all that try, one gets it.

        Old requests to stop or to pause are forgotten. Busy, saying who has the run, while someone works on it;
        StoreError when it is done.
        """
        with self.lock(0 if self.state().status in ACTIVE else HANDOVER):
            state = self.state()
            if state.status not in RESUMABLE:
                by, error = (f" by {owner.words(state)}", Busy) if state.status in ACTIVE else ("", StoreError)
                raise error(f"run {self.id} is {state.status}{by}; it cannot be resumed; only an ended one can")
            self.clear_stop()
            self.clear_pause()
            self.claim(state, "queued")

    def require_free(self, state: RunState) -> None:
        """Busy unless this process may work on the run: another's claim stands for as long as that one lives."""
        if state.status in ACTIVE and not owner.is_this_process(state):
            raise Busy(f"run {self.id} is {state.status} by {owner.words(state)}; wait for it or stop it")

    def ending(self, status: Status, error: str | None, remedy: dict[str, Any]) -> tuple[Status, str | None, Any]:
        """How the run ends, where another than this process may know better."""
        return status, error, remedy

    def end(self, state: RunState, status: Status, error: str | None, remedy: dict[str, Any] | None = None) -> None:
        """Record how the work on the run ended; ``remedy`` as in RunState.

        Requests to stop or to pause are met then, but where the work was interrupted: whoever goes on with it without
        :meth:`take` obeys them. What a full disk refuses is kept in memory, where :meth:`state` finds it, until it can
        be written.
        """
        state.status, state.error, state.ended, state.eta = status, error, time.time(), None
        state.remedy = remedy or {}
        try:
            if status != "interrupted":
                self.clear_stop()
                self.clear_pause()
            self.write_state(state)
        except OSError:
            _UNWRITTEN[self.folder] = state

    @contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """Only one process works on a run; the second is told who does (Busy), at once or after so many seconds."""
        lock = owner.Lock(self.folder / ".lock")
        holder = lock.acquire(patience)
        if holder:
            raise Busy(f"run {self.id} is being worked on by {holder}; wait for it or stop it")
        try:
            yield
        finally:
            lock.release()

    # --- requests, seen by whichever process works on the run ----------------------------------
    def request_stop(self) -> None:
        (self.folder / "stop").touch()

    def clear_stop(self) -> None:
        (self.folder / "stop").unlink(missing_ok=True)

    def stop_requested(self) -> bool:
        return (self.folder / "stop").exists()

    def request_pause(self) -> None:
        (self.folder / "pause").touch()

    def clear_pause(self) -> None:
        (self.folder / "pause").unlink(missing_ok=True)

    def pause_requested(self) -> bool:
        return (self.folder / "pause").exists()

    # --- growing files -----------------------------------------------------------------------
    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Append lines to ``metrics.jsonl`` or another growing file, all of them or none."""
        files.append(self.folder / name, records)

    def event(self, kind: str, **values: Any) -> None:
        self.append(EVENTS, [{"time": round(time.time(), 3), "kind": kind, **values}])

    def event_anew(self, kind: str, about: dict[str, Any], **values: Any) -> None:
        """An event in place of one about the same, which a process may have left that died before its work was kept."""
        same = {"kind": kind} | about
        events = self.events()
        kept = [event for event in events if {**event, **same} != event]
        if len(kept) < len(events):
            write_atomic(self.folder / EVENTS, files.as_lines(kept))
        self.event(**same, **values)

    def log(self, line: str) -> None:
        logs.append(self.log_path, line)

    def metrics(self) -> list[dict[str, Any]]:
        """One record a step: ``{"stage", "step", "time", ...}``."""
        return read_jsonl(self.metrics_path)

    def mask_layers(self) -> list[dict[str, Any]]:
        """One record a mask snapshot: lists of figures, one entry a masked layer."""
        return read_jsonl(self.folder / MASK_LAYERS)

    def events(self) -> list[dict[str, Any]]:
        """What happened, in order; a line that tells no event, as a damaged file may hold, is left out."""
        return [one for one in read_jsonl(self.folder / EVENTS) if isinstance(one, dict) and "kind" in one]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop what a killed process recorded of ``stage`` beyond its checkpoint at ``step`` (-1: of every step)."""
        for name in ("metrics.jsonl", EVENTS, MASK_LAYERS):
            path = self.folder / name
            records = [r for r in read_jsonl(path) if isinstance(r, dict)]
            if path.exists():
                kept = (r for r in records if r.get("stage") != stage or "step" not in r or r["step"] <= step)
                write_atomic(path, files.as_lines(kept))
        for path in [*self.mask_snapshots(), *self.samples()]:
            if stage_step(path)[0] == stage and stage_step(path)[1] > step:
                path.unlink()

    # --- tensors -----------------------------------------------------------------------------
    def checkpoint(self, name: str) -> Path:
        """The file of one checkpoint (it may not exist yet)."""
        return self.folder / "checkpoints" / f"{name}.safetensors"

    def save_checkpoint(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Tensors and a JSON record, replaced atomically."""
        self._made("checkpoints")
        files.write_tensors(self.checkpoint(name), tensors, meta)

    def load_checkpoint(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What :meth:`save_checkpoint` wrote, or None when there is none."""
        return files.read_tensors(self.checkpoint(name))

    def has_checkpoint(self, name: str) -> bool:
        return self.checkpoint(name).exists()

    def drop_checkpoint(self, name: str) -> None:
        self.checkpoint(name).unlink(missing_ok=True)

    # --- pictures ----------------------------------------------------------------------------
    def snapshot_path(self, stage: str, step: int) -> Path:
        return self._made("masks") / f"{stage}-{step:07d}.npz"

    def sample_path(self, stage: str, step: int) -> Path:
        return self._made("samples") / f"{stage}-{step:07d}.png"

    def mask_snapshots(self) -> list[Path]:
        return sorted((self.folder / "masks").glob("*.npz"), key=stage_step)

    def samples(self) -> list[Path]:
        """Sample grids in the order of the stages and their steps."""
        order = {stage: i for i, stage in enumerate(("dense", *STAGES))}
        pictures = [p for p in (self.folder / "samples").glob("*.png") if stage_step(p)[0] in order]
        return sorted(pictures, key=lambda p: (order[stage_step(p)[0]], stage_step(p)[1]))

    def _made(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder


def stage_step(path: Path) -> tuple[str, int]:
    """``mask-0000300.npz`` to ``("mask", 300)``."""
    stage, _, step = path.stem.rpartition("-")
    return stage, int(step) if step.isdigit() else 0


def create(runs_dir: Path, recipe: recipes.Recipe) -> Run:
    """A new run folder with its recipe, state *queued*, owned by this process."""
    check_writable(runs_dir)
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe.name}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        run = Run(runs_dir / f"{stem}{suffix}")
        try:
            run.folder.mkdir()
        except FileExistsError:
            continue
        try:
            run.claim(RunState(created=time.time()), "queued")
            # The recipe is written last: it is what makes the folder a run in the eyes of lists.
            write_atomic(run.folder / "recipe.yaml", recipe.to_yaml().encode())
        except OSError:
            shutil.rmtree(run.folder, ignore_errors=True)
            raise
        return run
    raise StoreError(f"{runs_dir} already holds 999 runs named {stem}; use another --name")


def check_writable(runs_dir: Path) -> None:
    """Make the runs folder, or say why it cannot be."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"runs folder {runs_dir} cannot be made ({error.strerror}); use --runs-dir") from error
    if not os.access(runs_dir, os.W_OK):
        raise StoreError(f"runs folder {runs_dir} is not writable; use --runs-dir")


def is_run(runs_dir: Path, run_id: str) -> bool:
    """Whether a run of this id is there; the id is checked before it joins a path."""
    return bool(RUN_ID.fullmatch(run_id)) and (runs_dir / run_id / "recipe.yaml").is_file()


def find(runs_dir: Path, run_id: str) -> Run:
    """A run by id, to read or to work on. The id is checked before it joins a path."""
    run = locate(runs_dir, run_id)
    files.require_own(run.folder)
    return run


def locate(runs_dir: Path, run_id: str) -> Run:
    """A run by id whatever its folder holds: to move it, and not to read it."""
    if not RUN_ID.fullmatch(run_id):
        raise StoreError(f"run id {run_id!r} is not an id; `python -m prunedm ls` lists them")
    folder = runs_dir / run_id
    if folder.is_symlink() or not os.path.isfile(folder / "recipe.yaml"):
        raise StoreError(f"no run {run_id!r} in {runs_dir}; `python -m prunedm ls` lists them")
    return Run(folder)


def all_runs(runs_dir: Path) -> list[Run]:
    """Newest first. Folders without a recipe are not runs."""
    if not runs_dir.is_dir():
        return []
    folders = [p for p in runs_dir.iterdir() if RUN_ID.fullmatch(p.name) and not p.is_symlink()]
    return [Run(p) for p in sorted(folders, reverse=True) if os.path.isfile(p / "recipe.yaml")]
