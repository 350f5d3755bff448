"""What was computed once and may be needed again: arrays and records on disk, by a digest of what they depend on.

``$PRUNEDM_CACHE`` (else ``~/.cache/prunedm``) holds it. A file's name ends in the digest of its bytes, so one that
was torn or altered is never parsed. A folder that cannot be written costs time, and is said once; nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .store import write_atomic

ENV, LIMIT_ENV = "PRUNEDM_CACHE", "PRUNEDM_CACHE_GB"
LIMIT_GB = 10.0


def folder(kind: str) -> Path:
    """Where one kind of result is kept (it may not exist yet)."""
    return Path(os.environ.get(ENV) or Path.home() / ".cache" / "prunedm").expanduser() / kind


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of anything that JSON can say; arrays by their digests."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


def read_arrays(place: Path, key: str) -> dict[str, np.ndarray] | None:
    """What :func:`write_arrays` wrote under this key, or None."""
    content = _read(place, key, ".npz")
    if content is None:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def write_arrays(place: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    _write(place, key, ".npz", buffer.getvalue())


def read_record(place: Path, key: str) -> dict[str, Any] | None:
    """What :func:`write_record` wrote under this key, or None."""
    content = _read(place, key, ".json")
    return None if content is None else json.loads(content)


def write_record(place: Path, key: str, record: dict[str, Any]) -> None:
    _write(place, key, ".json", json.dumps(record, allow_nan=False).encode())


def forget(place: Path, key: str) -> None:
    """Delete what is kept under this key."""
    for path in place.glob(f"{key}-*"):
        path.unlink(missing_ok=True)


def trim(kind: str, keep: Path) -> None:
    """Delete the folders of this kind that were longest unused until all fit into ``$PRUNEDM_CACHE_GB``.

    ``keep`` is in use now, and stays.
    """
    if keep.is_dir():
        os.utime(keep)
    limit = float(os.environ.get(LIMIT_ENV) or LIMIT_GB) * 2**30
    sizes = {place: sum(f.stat().st_size for f in _files(place)) for place in folder(kind).glob("*") if place.is_dir()}
    for place in sorted(sizes, key=lambda p: p.stat().st_mtime):
        if sum(sizes.values()) <= limit:
            return
        if place != keep:
            shutil.rmtree(place, ignore_errors=True)
            del sizes[place]


def _files(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_file()]


def _name(key: str, content: bytes, suffix: str) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}{suffix}"


def _read(place: Path, key: str, suffix: str) -> bytes | None:
    for path in place.glob(f"{key}-*{suffix}"):
        try:
            content = path.read_bytes()
            if path.name == _name(key, content, suffix):
                return content
            path.unlink()
        except OSError:  # unreadable, or deleted by another process meanwhile: as good as absent
            continue
    return None


def _write(place: Path, key: str, suffix: str, content: bytes) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_atomic(place / _name(key, content, suffix), content)
    except OSError as error:  # a full or read-only disk costs the next run some time, and this one nothing
        warnings.warn(f"{place} cannot be written ({error}); set {ENV} to a folder that can", stacklevel=3)
