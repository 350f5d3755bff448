"""A run's state on disk, ``state.json``: written whole, and read with a look at every part of it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import get_args

from .files import StoreError, read_json, require_known, write_json
from .records import RunState, Status

SCHEMA = 2  # 1 knew an owner by pid and clock alone
NUMBERS = ("created", "seconds", "heartbeat", "step", "of", "pid", "pid_started", "began")


def read(path: Path) -> RunState:
    """The state as it stands there; StoreError where it is damaged or of a later version."""
    raw = read_json(path)
    known = {field.name for field in dataclasses.fields(RunState)}
    require_known(path, raw.get("schema") if isinstance(raw, dict) else None, SCHEMA)
    if not set(raw) <= known:
        raise StoreError(f"{path} is damaged: {min(set(raw) - known)[:40]!r} is no part of it; restore the file")
    state = RunState(**raw)
    if state.status not in get_args(Status) or not all(isinstance(raw.get(n) or 0, int | float) for n in NUMBERS):
        raise StoreError(f"{path} is damaged; restore or delete the run")
    return state


def write(path: Path, state: RunState) -> None:
    """Record it, as of now; OSError where the disk refuses."""
    state.heartbeat, state.schema = time.time(), SCHEMA
    write_json(path, dataclasses.asdict(state))
