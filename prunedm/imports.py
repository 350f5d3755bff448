"""Other people's models into the lab: a zip with safetensors and JSON, or a folder by its path.

A zip is unpacked beside and moved to ``runs/models/<name>/`` only after its names, kinds and sizes were checked and
the engine has loaded it. Nothing is ever unpickled or executed. Folders by path are a list, kept in
``runs/models/paths.json``, and are never touched. Imports torch late.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from . import store
from .records import ACTIVE

MODELS, PATHS = "models", "paths.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
MIB = 2**20
LARGEST_ZIP, LARGEST_UNPACKED, LARGEST_TEXT = 200 * MIB, 1024 * MIB, 4 * MIB
LARGEST_HEADER = 16 * MIB  # of a safetensors file
LARGEST_DIRECTORY = 256 * 1024  # of a zip: what lists its files
MOST_FILES, MOST_RATIO = 64, 50
MOST_LISTED = 200  # folders by path
JSON_NAMES = {"": ("config", "model_index", "scheduler_config", "prunedm", "masks"), "unet": ("config",)}
LEFT_OUT = re.compile(r"(__MACOSX/.*|(.*/)?(\.DS_Store|\.gitattributes|pruned_unet\.py|samples\.png|LICENSE))")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
END, END64 = b"PK\x05\x06", b"PK\x06\x07"
# What diffusers raises on configs that make no sense, beside what unet.load puts into words.
UNBUILDABLE = (ArithmeticError, LookupError, AttributeError, AssertionError, RuntimeError, MemoryError)
CONFIG_LIMITS = {"layers_per_block": 32, "sample_size": 2048, "in_channels": 1024, "num_train_timesteps": 1_000_000}
WIDEST, MOST_BLOCKS = 16_384, 16


class ModelImportError(ValueError):
    """A model that cannot be taken in, in one line: the value, the rule, the remedy."""


@dataclass(frozen=True)
class Imported:
    """A model of the list. ``is_copy``: its files lie in the runs folder; else it is known by its path alone."""

    name: str
    path: Path
    is_copy: bool


# --- the list --------------------------------------------------------------------------------------
def models_dir(runs_dir: Path) -> Path:
    """Where imported models lie: a folder without a recipe, which the listing of runs passes over."""
    return runs_dir / MODELS


def target(runs_dir: Path, name: str) -> Path:
    """The folder of a model to be; ModelImportError for a name that is none or is taken."""
    if not NAME.fullmatch(name) or name == PATHS:
        raise ModelImportError(
            f"name {name[:80]!r}: 1 to 60 letters, digits, '.', '_' or '-', starting with one of the first two"
        )
    if any(one.name.casefold() == name.casefold() for one in listing(runs_dir)):
        raise ModelImportError(f"name {name!r} is taken by an imported model; use another or delete that one")
    return models_dir(runs_dir) / name


def suggest(runs_dir: Path, given: str) -> str:
    """A free name made of a file's or folder's own."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", given).lstrip("._-")[:50] or "model"
    taken = {one.name.casefold() for one in listing(runs_dir)} | {PATHS}
    return next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))) if n.casefold() not in taken)


def listing(runs_dir: Path) -> list[Imported]:
    """All imported models by name; ModelImportError where the list of paths is damaged."""
    folder = models_dir(runs_dir)
    found = [Imported(name, Path(path), False) for name, path in _paths(runs_dir).items()]
    if folder.is_dir():
        inside = [p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
        found += [Imported(p.name, p.absolute(), True) for p in inside]
    return sorted(found, key=lambda one: one.name.casefold())


def _paths(runs_dir: Path) -> dict[str, str]:
    path = models_dir(runs_dir) / PATHS
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(NAME.fullmatch(k) and isinstance(v, str) for k, v in found.items()):
            raise ValueError("it is no table of names and paths")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelImportError(f"{path} cannot be read ({_line(error)}); mend or delete it") from error
    return found


def from_path(path: str | Path, runs_dir: Path) -> Imported:
    """Put a model folder on the list, after the engine has loaded it; the folder stays where it is.

    ModelImportError or unet.ModelError in one line when it is not there or is no model.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise ModelImportError(f"{folder} is not a folder; give the folder that save_pretrained wrote")
    known, paths = listing(runs_dir), _paths(runs_dir)
    same = next((one for one in known if one.path == folder), None)
    if same:
        raise ModelImportError(f"{folder} is on the list already, as {same.name}")
    if len(paths) >= MOST_LISTED:
        raise ModelImportError(f"{len(paths)} folders are on the list and {MOST_LISTED} are allowed; delete some")
    require_model(folder)
    name = suggest(runs_dir, folder.name)
    models_dir(runs_dir).mkdir(parents=True, exist_ok=True)
    store.write_json(models_dir(runs_dir) / PATHS, paths | {name: str(folder)})
    return Imported(name, folder, False)


def delete(runs_dir: Path, name: str) -> None:
    """Remove an imported model's copy, or take a folder by path off the list and leave the folder alone.

    ModelImportError when there is none of this name, or an active run needs it.
    """
    one = next((one for one in listing(runs_dir) if one.name == name), None)
    if one is None:
        raise ModelImportError(f"no imported model {name[:80]!r}; it may have been deleted already")
    if not one.is_copy:
        store.write_json(models_dir(runs_dir) / PATHS, {k: v for k, v in _paths(runs_dir).items() if k != name})
        return
    user = _user(runs_dir, one.path)
    if user:
        raise ModelImportError(f"model {name} is the source of run {user}, which is not over; stop the run first")
    going = Path(tempfile.mkdtemp(prefix=".going-", dir=models_dir(runs_dir)))
    one.path.rename(going / name)  # in one step: a torn removal leaves no half of a model on the list
    shutil.rmtree(going)


def _user(runs_dir: Path, path: Path) -> str | None:
    """An active run that begins from this model."""
    for run in store.all_runs(runs_dir):
        try:
            if run.state().status in ACTIVE and Path(run.recipe().model.source).expanduser().absolute() == path:
                return run.id
        except (ValueError, OSError):
            continue
    return None


# --- a zip -------------------------------------------------------------------------------------------
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
        raise ModelImportError(f"the zip is torn or altered ({_line(error)}); make it again") from error


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
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(info.file_size for info in wanted.values()), shutil.disk_usage(into.parent).free
        if needed > free:
            raise ModelImportError(f"the model needs {needed / MIB:,.0f} MiB and {free / MIB:,.0f} are free; free some")
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=into.parent))
    except OSError as error:
        raise ModelImportError(f"{into.parent} cannot be written ({_line(error)}); free its disk") from error
    try:
        for name, info in wanted.items():
            _unpack(archive, info, part / "model" / name)
        (part / "model").mkdir(exist_ok=True)
        require_model(part / "model")
        (part / "model").rename(into)
    except OSError as error:
        raise ModelImportError(f"the model cannot be unpacked ({_line(error)}); free the disk") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return into


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


# --- what lies in a folder -----------------------------------------------------------------------------
def require_model(folder: Path) -> None:
    """ModelImportError or unet.ModelError unless the engine loads this folder; sizes are bounded before it tries."""
    from . import unet

    home = unet.unet_folder(folder)
    for path in {*unet.weight_files(home), *folder.glob("*.safetensors")}:
        check_header(path)
    for path in (home / "config.json", folder / "scheduler" / "scheduler_config.json"):
        if path.is_file():
            check_config(path)
    try:
        unet.load(str(folder))
    except unet.ModelError as error:
        text = str(error).replace(str(folder), "of the zip" if folder.parent.name.startswith(".part-") else str(folder))
        raise ModelImportError(text) from error
    except UNBUILDABLE as error:
        raise ModelImportError(f"config.json builds no UNet2DModel ({type(error).__name__}: {_line(error)})") from error


def check_header(path: Path) -> None:
    """A safetensors header of a bounded size that the file can hold, before anything parses it."""
    with path.open("rb") as file:
        size, start = path.stat().st_size, file.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or length + 8 > size:
        raise ModelImportError(f"{path.name} is no safetensors file, or torn; save the model again")
    if length > LARGEST_HEADER:
        raise ModelImportError(
            f"{path.name} has a header of {length / MIB:,.0f} MiB; {LARGEST_HEADER // MIB} are allowed"
        )


def check_config(path: Path) -> None:
    """Numbers of a config within reason, so that building the model cannot eat the machine."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= LARGEST_TEXT else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelImportError(f"{path.name} is no JSON ({_line(error)}); save the model again") from error
    if not isinstance(found, dict):
        raise ModelImportError(f"{path.name} holds no table of a sane size; save the model again")
    for key, most in CONFIG_LIMITS.items():
        for value in _numbers(found.get(key)):
            if not 1 <= value <= most:
                raise ModelImportError(f"{path.name}: {key}={value!r} must be 1 to {most:,}; mend the config")
    widths = _numbers(found.get("block_out_channels"))
    if len(widths) > MOST_BLOCKS or any(not 1 <= width <= WIDEST for width in widths):
        raise ModelImportError(f"{path.name}: block_out_channels must be at most {MOST_BLOCKS} widths up to {WIDEST:,}")


def _numbers(value: Any) -> list[float]:
    found = value if isinstance(value, list) else [value]
    return [number for number in found if isinstance(number, int | float)]


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}…")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
