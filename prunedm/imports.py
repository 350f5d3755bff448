"""Other people's models in the lab: a copy (import_zip.py, import_hub.py), or a folder by its path. Imports torch
late.

Copies lie in ``runs/models/<name>/``. Folders by path are a list, kept in ``runs/models/paths.json``, and are never
touched: what is exported of an imported model lies in ``runs/models/.exports/<name>/``, for both kinds.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import store
from .model_check import ModelError, check_config, shapes
from .records import ACTIVE
from .untrusted import MIB, one_line, read_json

MODELS, PATHS, EXPORTS = "models", "paths.json", ".exports"  # the last is no NAME, so no model can be called so
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
MOST_LISTED = 200  # folders by path


class ModelImportError(ModelError):
    """A model that cannot be taken in, in one line: the value, the rule, the remedy."""


@dataclass(frozen=True)
class Imported:
    """A model of the list. ``is_copy``: its files lie in the runs folder; else it is known by its path alone."""

    name: str
    path: Path
    is_copy: bool


@dataclass(frozen=True)
class Overview:
    """What a model folder says of itself. shape: (channels, height, width) of its images; bytes: of its weights."""

    shape: tuple[int, int, int]
    parameters: int
    bytes: int


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
        found = read_json(path)
        if not isinstance(found, dict) or not all(NAME.fullmatch(k) and isinstance(v, str) for k, v in found.items()):
            raise ValueError("it is no table of names and paths")
    except (OSError, ValueError) as error:
        raise ModelImportError(f"{path} cannot be read ({one_line(error)}); mend or delete it") from error
    return found


def find(runs_dir: Path, name: str) -> Imported:
    """An imported model by its name; ModelImportError where none is called so."""
    found = next((one for one in listing(runs_dir) if one.name == name), None)
    if found is None:
        raise ModelImportError(f"no imported model {name[:80]!r}; it may have been deleted")
    return found


def exports_dir(runs_dir: Path, name: str) -> Path:
    """Where the lab puts what it exports of an imported model (it may not exist yet)."""
    return models_dir(runs_dir) / EXPORTS / name


def forget_exports(runs_dir: Path, name: str) -> None:
    """Remove what was exported of a model of this name: the next one that is called so is another."""
    folder = exports_dir(runs_dir, name)
    if folder.is_dir():
        shutil.rmtree(folder)


def folder_of(text: str) -> Path:
    """A folder as it was typed, as a whole path."""
    return Path(os.path.abspath(os.path.expanduser(text)))  # Path.expanduser raises for a user who is not there


def from_path(path: str | Path, runs_dir: Path) -> Imported:
    """Put a model folder on the list, after the engine has loaded it; the folder stays where it is.

    ModelImportError or unet.ModelError in one line when it is not there or is no model.
    """
    folder = folder_of(str(path))
    known, paths = listing(runs_dir), _paths(runs_dir)
    same = next((one for one in known if one.path == folder), None)
    if same:
        raise ModelImportError(f"{folder} is on the list already, as {same.name}")
    if len(paths) >= MOST_LISTED:
        raise ModelImportError(f"{len(paths)} folders are on the list and {MOST_LISTED} are allowed; delete some")
    require_model(folder)
    name = suggest(runs_dir, folder.name)
    models_dir(runs_dir).mkdir(parents=True, exist_ok=True)
    forget_exports(runs_dir, name)
    store.write_json(models_dir(runs_dir) / PATHS, paths | {name: str(folder)})
    return Imported(name, folder, False)


def delete(runs_dir: Path, name: str) -> None:
    """Remove an imported model's copy, or take a folder by path off the list and leave the folder alone.

    What was exported of it goes too. ModelImportError when there is none of this name, or an active run needs it.
    """
    one = find(runs_dir, name)
    if not one.is_copy:
        store.write_json(models_dir(runs_dir) / PATHS, {k: v for k, v in _paths(runs_dir).items() if k != name})
        forget_exports(runs_dir, name)
        return
    user = _user(runs_dir, one.path)
    if user:
        raise ModelImportError(f"model {name} is the source of run {user}, which is not over; stop the run first")
    going = Path(tempfile.mkdtemp(prefix=".going-", dir=models_dir(runs_dir)))
    one.path.rename(going / name)  # in one step: a torn removal leaves no half of a model on the list
    shutil.rmtree(going)
    forget_exports(runs_dir, name)


def _user(runs_dir: Path, path: Path) -> str | None:
    """An active run that begins from this model."""
    for run in store.all_runs(runs_dir):
        try:
            if run.state().status in ACTIVE and Path(run.recipe().model.source).expanduser().absolute() == path:
                return run.id
        except (ValueError, OSError):
            continue
    return None


# --- what lies in a folder -----------------------------------------------------------------------------
def look(folder: Path) -> Overview:
    """Image shape and size of a model folder by its config and headers; nothing is loaded.

    ModelImportError or unet.ModelError in one line where it is gone, or is not a supported UNet in safetensors.
    """
    from . import unet

    if not folder.is_dir():
        raise ModelImportError(f"{folder} is not there, or not a folder; give the folder that save_pretrained wrote")
    home = unet.unet_folder(folder)
    if not (home / "config.json").is_file():
        raise ModelImportError(f"{folder} has no config.json of a UNet; give the folder that save_pretrained wrote")
    schedulers = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    for path in (folder / unet.INDEX, home / "config.json", *schedulers):
        if path.is_file():
            check_config(path)
    unet.require_pixels(folder)
    shape = _image_shape(unet.read_config(home))
    files = unet.complete_files(home)
    headers = {path: shapes(path) for path in {*files, *folder.glob("*.safetensors")}}
    parameters = sum(math.prod(shape) for file in files for shape in headers[file].values())
    return Overview(shape, parameters, unet.weight_bytes(folder))


def _image_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) as ``unet.image_shape`` gives it of the model."""
    side, channels = config["sample_size"], config.get("in_channels", 3)
    sides = side if isinstance(side, list) else [side, side]
    if len(sides) != 2 or not all(type(value) is int for value in (*sides, channels)):
        raise ModelImportError(
            f"config.json: sample_size={side!r} and in_channels={channels!r} make no image; mend the config"
        )
    return channels, *sides


def put(into: Path, needed: int, write: Callable[[Path], None], called: str) -> Path:
    """A copy at ``into`` (:func:`target`): written beside it, loaded by the engine, moved; of a failure nothing stays.

    needed: bytes; write: fills a folder that it is given; called: the model's origin, in messages.
    """
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(into.parent).free
        if needed > free:
            raise ModelImportError(f"the model needs {needed / MIB:,.0f} MiB and {free / MIB:,.0f} are free; free some")
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=into.parent))
    except OSError as error:
        raise ModelImportError(f"{into.parent} cannot be written ({one_line(error)}); free its disk") from error
    try:
        model = part / "model"
        model.mkdir()
        write(model)
        require_model(model, called)
        forget_exports(into.parent.parent, into.name)
        model.rename(into)
    except OSError as error:
        raise ModelImportError(f"the model cannot be written ({one_line(error)}); free the disk") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return into


def require_model(folder: Path, called: str | None = None) -> None:
    """ModelImportError unless the engine loads this folder; sizes are bounded before it tries."""
    from . import unet

    try:
        look(folder)
        unet.load(str(folder))
    except unet.ModelError as error:
        raise ModelImportError(str(error).replace(str(folder), called or str(folder))) from error
