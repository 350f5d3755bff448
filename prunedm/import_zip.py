"""A model out of a zip with safetensors and JSON, unpacked beside and moved to ``runs/models/<name>/``.

That happens only after names, kinds and sizes were checked and the engine has loaded it. Nothing is ever unpickled
or executed.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from .imports import NAME, ModelImportError, put
from .untrusted import LARGEST_TEXT, MIB, one_line

LARGEST_ZIP, LARGEST_UNPACKED = 200 * MIB, 1024 * MIB
LARGEST_DIRECTORY = 256 * 1024  # of a zip: what lists its files
MOST_FILES, MOST_RATIO = 64, 50
JSON_NAMES = {"": ("config", "model_index", "scheduler_config", "prunedm", "masks"), "unet": ("config",)}
LEFT_OUT = re.compile(r"(__MACOSX/.*|(.*/)?(\.DS_Store|\.gitattributes|pruned_unet\.py|samples\.png|LICENSE))")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
END, END64 = b"PK\x05\x06", b"PK\x06\x07"


def from_zip(file: Path | IO[bytes], into: Path) -> Path:
    """Unpack a model beside ``into`` (:func:`target`), let the engine load it, and move it into place.

    ModelImportError in one line for a file that is torn, hostile or too large, or holds anything but a model;
    nothing is left behind then.
    """
    if isinstance(file, Path):
        with _opened(file) as stream:
            return from_zip(stream, into)
    if into.exists():
        raise ModelImportError(f"{into} is already there; use another name")
    try:
        _check_end(file)
        with zipfile.ZipFile(file) as archive:
            wanted = _checked(archive, _size(file))
            return _moved(archive, wanted, into)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ModelImportError(f"the zip is torn or altered ({one_line(error)}); make it again") from error


def _opened(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise ModelImportError(f"{path} is not there or no file; give a .zip of a model folder")
    return path.open("rb")


def _size(file: IO[bytes]) -> int:
    return file.seek(0, os.SEEK_END)


def _check_end(file: IO[bytes]) -> None:
    """Size and the number of files, before Python's reader lists them all in memory."""
    size = _size(file)
    if size > LARGEST_ZIP:
        raise ModelImportError(
            f"the zip has {size / MIB:,.0f} MiB and {LARGEST_ZIP // MIB} are allowed; unpack it and give the folder"
        )
    file.seek(max(0, size - 42))
    tail = file.read()
    end = tail[-22:]
    if len(end) < 22 or not end.startswith(END) or end[-2:] != b"\0\0":
        raise ModelImportError("the file does not end as a zip does (torn, or with a comment); make a plain zip of it")
    if tail[:-22][-20:].startswith(END64) or b"\xff\xff" in (end[8:10], end[10:12]):
        raise ModelImportError("the zip is a zip64 archive, which a model of this size needs not; make a plain zip")
    count, directory = struct.unpack("<HI", end[10:16])
    if count > MOST_FILES or directory > LARGEST_DIRECTORY:
        raise ModelImportError(f"the zip lists {count} files and {MOST_FILES} are allowed; zip the model folder alone")


def _checked(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Path to entry of what will be unpacked, below the one top folder; ModelImportError says what is wrong."""
    infos = archive.infolist()
    for info in infos:
        _check_entry(info)
    unpacked = sum(info.file_size for info in infos)
    if unpacked > LARGEST_UNPACKED:
        raise ModelImportError(
            f"the zip unpacks to {unpacked / MIB:,.0f} MiB and {LARGEST_UNPACKED // MIB} are allowed"
        )
    if unpacked > MIB and unpacked > MOST_RATIO * size:
        raise ModelImportError(f"the zip unpacks to {unpacked / size:,.0f} times its size and {MOST_RATIO} is allowed")
    files = [info for info in infos if not info.is_dir() and not LEFT_OUT.fullmatch(info.filename)]
    top = _top(files)
    wanted: dict[str, zipfile.ZipInfo] = {}
    for info in files:
        name = info.filename.removeprefix(top)
        _check_name(name, info)
        if name.casefold() in (other.casefold() for other in wanted):
            raise ModelImportError(f"the zip holds {_shown(name)} twice; make it again")
        wanted[name] = info
    return wanted


def _top(files: list[zipfile.ZipInfo]) -> str:
    """The one folder that all files lie in, with its slash; empty where there is none."""
    firsts = {info.filename.partition("/")[0] for info in files}
    inside = all("/" in info.filename for info in files)
    return f"{firsts.pop()}/" if len(firsts) == 1 and inside and not firsts & {"unet", "scheduler"} else ""


def _check_entry(info: zipfile.ZipInfo) -> None:
    """Refuse what could leave the folder, or is no plain file."""
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
    parts = name.rstrip("/").split("/")
    if "\\" in name or ":" in name or name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise ModelImportError(f"the zip holds {_shown(name)}, which points outside its folder; make it again")
    if not name.isprintable() or len(name) > 200:
        raise ModelImportError(f"the zip holds a file of the name {_shown(name)}; use plain names")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ModelImportError(f"the zip holds {_shown(name)}, a link or no plain file; zip the files themselves")
    if info.flag_bits & 0x41:
        raise ModelImportError(f"the zip holds {_shown(name)} encrypted; make it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ModelImportError(f"the zip holds {_shown(name)} packed in a rare way; use stored or deflated")


def _check_name(name: str, info: zipfile.ZipInfo) -> None:
    """Only what a model folder is made of."""
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.rpartition(".")
    if f".{ending.lower()}" in PICKLES:
        raise ModelImportError(
            f"the zip holds {_shown(name)}: pickled weights can run code and are never loaded; save the model with "
            "safe_serialization=True"
        )
    known = folder in ("", "unet") and ending == "safetensors"
    known |= folder == "scheduler" and ending == "json"
    known |= folder in JSON_NAMES and ending == "json" and stem in JSON_NAMES[folder]
    known |= folder == "unet" and ending == "json" and file.endswith(".safetensors.index.json")
    known |= folder == "" and file in ("README.md",)
    if not known or not NAME.fullmatch(file):
        raise ModelImportError(
            f"the zip holds {_shown(name)}; only config.json, *.safetensors, model_index.json, scheduler/*.json and "
            "README.md are taken, in at most one top folder and unet/ or scheduler/"
        )
    if ending != "safetensors" and info.file_size > LARGEST_TEXT:
        raise ModelImportError(
            f"the zip holds {_shown(name)} of {info.file_size / MIB:.0f} MiB; {LARGEST_TEXT // MIB} are allowed"
        )


def _moved(archive: zipfile.ZipFile, wanted: dict[str, zipfile.ZipInfo], into: Path) -> Path:
    """Unpack beside, check, move."""

    def unpack(folder: Path) -> None:
        for name, info in wanted.items():
            _unpack(archive, info, folder / name)

    return put(into, sum(info.file_size for info in wanted.values()), unpack, "of the zip")


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    """One file, of exactly the size that the zip states."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    with archive.open(info) as source, path.open("xb") as out:
        while block := source.read(MIB):
            done += len(block)
            if done > info.file_size:
                raise ModelImportError(f"{_shown(info.filename)} unpacks to more than the zip states; make it again")
            out.write(block)
    if done != info.file_size:
        raise ModelImportError(f"{_shown(info.filename)} unpacks to less than the zip states; make it again")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}…")
