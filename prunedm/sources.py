"""Where images come from: a folder, a Hugging Face dataset or CIFAR-10, each image by its name and how to open it.

Nothing is decoded here but by Pillow's own decoders, no file is unpickled and no data set's code is run.
"""

from __future__ import annotations

import io
import os
import re
import socket
import stat
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .recipe import HUB_PATTERN, Data
from .untrusted import one_line

Entry = tuple[str, Callable[[], Image.Image]]  # an image's name, and how to open it; opening may fail

# Pillow knows these by name but has no decoder of its own for them; it would hand EPS to Ghostscript, and a
# picture must not run a program.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_ROOT = "~/.cache/prunedm"
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_TRAIN, CIFAR10_TEST = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"
CIFAR10_SHAPE = (3, 32, 32)
DOWNLOAD_SECONDS = 60.0  # without a byte


def line(error: BaseException) -> str:
    """An error in one line."""
    return one_line(error) or error.__class__.__name__


# --- a folder of images ----------------------------------------------------------------------
def folder_entries(folder: Path, skipped: list[str]) -> list[Entry]:
    """What looks like an image by its suffix, under its path within the folder, sorted.

    Links are followed to files, never to folders. Sub-folders that cannot be listed are named in ``skipped``.
    """
    suffixes, found = readable()[0], []

    def unlisted(error: OSError) -> None:
        skipped.append(f"{Path(error.filename).relative_to(folder).as_posix()}: {line(error)}")

    for parent, folders, files in os.walk(folder, onerror=unlisted):
        names = [name for name in (*folders, *files) if Path(name).suffix.lower() in suffixes]
        found += [Path(parent, name) for name in names]
    return [(path.relative_to(folder).as_posix(), partial(open_file, path)) for path in sorted(found)]


@cache
def readable() -> tuple[set[str], list[str]]:
    """(file suffixes, formats) that Pillow decodes by itself here."""
    known = Image.registered_extensions()
    formats = [name for name in Image.OPEN if name not in NOT_READ]
    return {suffix for suffix, name in known.items() if name in formats}, formats


def open_file(path: Path) -> Image.Image:
    """The image in a file, whatever its suffix says."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for without end
        raise ValueError("is no regular file")
    return Image.open(path, formats=readable()[1])


# --- Hugging Face datasets -------------------------------------------------------------------
def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote this folder."""
    has = {name for name in ("state.json", "dataset_info.json", "dataset_dict.json") if (folder / name).is_file()}
    return "dataset_dict.json" in has or {"state.json", "dataset_info.json"} <= has


def dataset_entries(spec: Data) -> list[Entry]:
    """The rows of the first image column of a dataset saved by ``datasets.save_to_disk``, or of one on the hub.

    Of several splits ``train`` is taken. Hub datasets are kept in Hugging Face's own cache, and code of theirs
    is never run. ValueError with value, rule and remedy where there is no such dataset.
    """
    table, column = _images_of(_dataset(spec), spec.source)
    return [(f"row {i}", partial(_open_row, table, column, i)) for i in range(len(table))]


def _dataset(spec: Data) -> Any:
    """The ``datasets.Dataset`` that the source names."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.source={spec.source} needs a package that is not here: pip install datasets") from None
    from huggingface_hub.errors import HfHubHTTPError

    hub = re.fullmatch(HUB_PATTERN, spec.source) if spec.kind == "hub" else None
    if hub and Path(hub[1]).exists():
        raise ValueError(f"data.source={spec.source}: {hub[1]} is a folder here too; give it as ./{hub[1]}")
    try:
        if hub:
            found = datasets.load_dataset(hub[1], split=hub[2], trust_remote_code=False)
        else:
            found = datasets.load_from_disk(str(Path(spec.source).expanduser()))
    except (OSError, ValueError, LookupError, TypeError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        remedy = "check the name and the network" if hub else "save it again with save_to_disk"
        raise ValueError(f"data.source={spec.source} cannot be loaded ({line(error)}); {remedy}") from error
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) != 1:
        another = f"hf:{hub[1]}:{next(iter(found))}" if hub else f"{spec.source}/{next(iter(found))}"
        raise ValueError(f"data.source={spec.source} has the splits {', '.join(found)}; name one, as in {another}")
    return found["train"] if "train" in found else next(iter(found.values()))


def _images_of(table: Any, source: str) -> tuple[Any, str]:
    """The table and its column of images: an Image feature, as it is stored, or values that are PIL images."""
    from datasets import Image as ImageFeature

    for name, feature in table.features.items():
        if isinstance(feature, ImageFeature):
            # Decoded here, with the formats and the care that files get.
            return table.select_columns([name]).cast_column(name, ImageFeature(decode=False)), name
    for name, value in (table[0] if len(table) else {}).items():
        if isinstance(value, Image.Image):
            return table, name
    raise ValueError(
        f"data.source={source} has no column of images (columns: {', '.join(table.features)}); "
        "cast one to datasets.Image"
    )


def _open_row(table: Any, column: str, row: int) -> Image.Image:
    value = table[row][column]
    if isinstance(value, Image.Image):
        return value
    if value and value.get("bytes"):
        return Image.open(io.BytesIO(value["bytes"]), formats=readable()[1])
    if value and value.get("path"):
        return open_file(Path(value["path"]))
    raise ValueError("is empty")


# --- CIFAR-10 --------------------------------------------------------------------------------
def cifar10(spec: Data) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's training and test images, uint8 ``[N, 3, 32, 32]``, 50,000 and 10,000 of them.

    The *binary* version is read, from ``cifar10:FOLDER`` or ~/.cache/prunedm, and downloaded where it is not
    there: torchvision's own CIFAR10 class reads the Python version, which is a pickle, and a pickle from the
    network can run anything.
    """
    folder = _cifar10_folder(spec)
    train = np.concatenate([_cifar10_images(folder / name) for name in CIFAR10_TRAIN])
    return train, _cifar10_images(folder / CIFAR10_TEST)


def cifar10_root(spec: Data) -> Path:
    """The folder that holds, or will hold, ``cifar-10-batches-bin``."""
    return Path(spec.source.partition(":")[2] or CIFAR10_ROOT).expanduser()


def _cifar10_images(path: Path) -> np.ndarray:
    """The images of one file: each record is a label and three planes of colour."""
    raw = np.fromfile(path, np.uint8)
    size = 1 + 3 * 32 * 32
    if not len(raw) or len(raw) % size or raw[::size].max() > 9:
        raise ValueError(f"{path} is no CIFAR-10 file of {size}-byte records; delete it to download it again")
    return raw.reshape(-1, size)[:, 1:].reshape(-1, *CIFAR10_SHAPE)


def _cifar10_folder(spec: Data) -> Path:
    """The folder that holds all six files, downloaded where they are not there."""
    root = cifar10_root(spec)
    for folder in (root, root / CIFAR10_FOLDER):
        if all((folder / name).is_file() for name in (*CIFAR10_TRAIN, CIFAR10_TEST)):
            return folder
    before = socket.getdefaulttimeout()
    try:
        from torchvision.datasets.utils import download_and_extract_archive

        socket.setdefaulttimeout(DOWNLOAD_SECONDS)
        download_and_extract_archive(CIFAR10_URL, str(root), md5=CIFAR10_MD5)
    except (ImportError, OSError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"data.source={spec.source}: {root} holds no {CIFAR10_FOLDER} and it cannot be downloaded "
            f"({line(error)}); unpack {CIFAR10_URL} there"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return root / CIFAR10_FOLDER
