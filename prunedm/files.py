"""Files that are whole or absent: written beside, flushed and put in place; read with the file's name in the error.

Nothing here is a pickle.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from . import untrusted

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON = 64 * untrusted.MIB


class StoreError(ValueError):
    """A file or run folder that is missing, unreadable, locked, or of a later version, in one line."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, replace: a reader sees the old file or the new, never a part."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _keep_name(path.parent)
    except OSError:
        part.unlink(missing_ok=True)  # on a full disk its space is the first to be needed
        raise


def _keep_name(folder: Path) -> None:
    """Flush a folder's list of names, without which a power cut may undo a replacement. Not where there is no way."""
    if os.name != "posix":
        return  # Windows opens no folders, and its replace is written through
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Atomic JSON."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False).encode())


def write_npz(path: Path, **arrays: Any) -> None:
    """Arrays in one compressed file, atomically; read with ``allow_pickle=False``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{key: np.asarray(value) for key, value in arrays.items()})
    write_atomic(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """JSON, or StoreError with the file's name."""
    try:
        return untrusted.read_json(path, LARGEST_JSON)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error}); restore or delete the run") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Tensors and a JSON record in one safetensors file, atomically."""
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomic(path, save(plain, metadata={"record": json.dumps(record)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`write_tensors` wrote; None when there is no such file, StoreError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        untrusted.require_header(path)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["record"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        said = f"{path} cannot be read ({error}); delete the file and resume: its stage is done again"
        raise StoreError(said) from error


def as_lines(records: Iterable[Any]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines in one write; where the disk is full the file stays as it was."""
    content = as_lines(records)
    if not content:
        return
    with path.open("ab+", buffering=0) as file:
        before = file.tell()
        if before and not _ends_a_line(file):
            content = b"\n" + content  # a crash tore the last line: let it be the only victim
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(before)  # a part of a line would be lost, and a whole one doubled when it is written again
            raise


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def require_own(folder: Path) -> None:
    """StoreError when a link or a pipe stands in a run's folder: what it leads to is not the run's to show."""
    found = foreign(folder)
    if found:
        raise StoreError(f"{found[0]} is {found[1]}; a run holds its own files only: remove it or copy")


def foreign(folder: Path) -> tuple[str, str] | None:
    """The first entry below a folder that is neither a file nor a folder of its own, and what it is; links first."""
    waiting, pipe = [str(folder)], None
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    return entry.path, "a link"
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    pipe = (entry.path, "no regular file")  # a reader would wait for it without end
    return pipe


def require_known(what: object, version: object, known: int) -> None:
    """StoreError unless ``version`` is one that this program wrote or writes, a whole number from 0 to ``known``."""
    if type(version) is not int or version < 0:
        raise StoreError(f"{what} is damaged: its version is {str(version)[:40]!r}; restore or delete it")
    if version > known:
        raise StoreError(
            f"{what} is of version {version} and this prunedm reads up to {known}; update prunedm to open it"
        )
