"""Images in: the bundled set, a folder, a Hugging Face dataset or CIFAR-10, as tensors in [-1, 1].

All of a data set's images are held as uint8 in memory and batches are drawn by step number, so that
the batch of step k does not depend on what the process did before. Which images are taken, how they are
cropped and which are held out depends on the data set and the ``data`` section only, never on the recipe's
seed: runs of several seeds are judged on the same images.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import bundled, giveway, sources
from .pictures import MOST_PIXELS
from .recipe import Data
from .seeds import generator
from .sources import Entry, line

Shape = tuple[int, int, int]  # channels, height, width

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What Pillow raises on files that are torn, altered, not images, or bombs; its decoders for AVIF, DDS, IM, TIFF
# and SPIDER raise those of the second line on altered files.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
    RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError,
)  # fmt: skip


@dataclass
class Images:
    """A data set in memory: ``train`` and ``held_out`` are uint8 ``[N, C, H, W]``."""

    name: str
    train: Tensor
    held_out: Tensor
    skipped: list[str] = field(default_factory=list)
    is_bundled: bool = False

    @property
    def shape(self) -> Shape:
        return tuple(self.train.shape[1:])

    @cached_property
    def digest(self) -> str:
        """sha256 of all images, train and held out."""
        found = hashlib.sha256(str((self.train.shape, self.held_out.shape)).encode())
        for part in (self.train, self.held_out):
            found.update(part.contiguous().numpy())
        return found.hexdigest()


def to_float(images: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """0..255 bytes to floats in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def load(spec: Data, shape: Shape) -> Images:
    """The data set of a recipe at the model's ``(channels, height, width)``.

    Raises ValueError with value, rule and remedy when nothing usable is there.
    """
    if spec.kind == "bundled":
        return _bundled(shape)
    if shape[0] not in MODES:
        raise ValueError(f"the model has {shape[0]} image channels; image folders serve 1, 3 or 4")
    if spec.kind == "cifar10":
        return load_cifar10(spec, shape)
    if spec.kind == "hub" or sources.is_saved_dataset(Path(spec.source).expanduser()):
        return load_dataset(spec, shape)
    return load_folder(spec, shape)


def absolute(spec: Data) -> str:
    """The source with its folder's whole path, so that a run resumes from any working directory."""
    if spec.kind == "cifar10" and ":" in spec.source:
        return f"cifar10:{sources.cifar10_root(spec).absolute()}"
    folder = Path(spec.source).expanduser()
    return str(folder.absolute()) if spec.kind == "folder" and folder.is_dir() else spec.source


# --- the bundled set -------------------------------------------------------------------------
def _bundled(shape: Shape) -> Images:
    images = load_bundled()
    if images.shape != shape:
        raise ValueError(
            f"data.source=bundled holds images of shape {images.shape} and the model expects {shape}; "
            "set data.source to a folder of images"
        )
    return images


def load_bundled(path: Path = bundled.IMAGES) -> Images:
    """The bundled subset: 12,000 training and 3,000 held-out grey images of 28x28."""
    with np.load(path, allow_pickle=False) as archive:
        train, held_out = archive["train_images"], archive["heldout_images"]
    tensors = (torch.from_numpy(a)[:, None] for a in (train, held_out))
    return Images(bundled.IMAGES_NAME, *tensors, is_bundled=True)


def load_bundled_labels(path: Path = bundled.IMAGES) -> tuple[Tensor, Tensor]:
    """Class labels 0..9 of the bundled training and held-out images."""
    with np.load(path, allow_pickle=False) as archive:
        return tuple(torch.from_numpy(archive[k]).long() for k in ("train_labels", "heldout_labels"))


# --- the other sources -----------------------------------------------------------------------
def load_folder(spec: Data, shape: Shape) -> Images:
    """Every readable image under a folder, in any format that Pillow decodes; of a film its first frame.

    What is broken, no regular file, or of another size where ``resize=none``, is skipped and named in
    ``Images.skipped``.
    """
    folder, skipped = Path(spec.source).expanduser(), []
    if not folder.is_dir():
        raise ValueError(f"data.source={spec.source} is not a folder; give an image folder or 'bundled'")
    entries = sources.folder_entries(folder, skipped)
    return _split(_read(entries, spec.limit, spec, shape, skipped), spec, folder.name, skipped)


def load_dataset(spec: Data, shape: Shape) -> Images:
    """The images of a Hugging Face dataset (sources.py), skipped as those of folders are."""
    skipped: list[str] = []
    rows = _read(sources.dataset_entries(spec), spec.limit, spec, shape, skipped)
    return _split(rows, spec, Path(spec.source).name, skipped)


def load_cifar10(spec: Data, shape: Shape) -> Images:
    """CIFAR-10 with its own test images held out; ``limit`` counts both and keeps their proportion."""
    if spec.resize == "none" and shape[1:] != sources.CIFAR10_SHAPE[1:]:
        raise ValueError(
            f"data.resize=none: CIFAR-10 images are 32x32 and the model expects {shape[2]}x{shape[1]}; set it to fit"
        )
    train, held = sources.cifar10(spec)
    limits: tuple[int | None, int | None] = (None, None)
    if spec.limit is not None:
        share = round(spec.limit * len(held) / (len(train) + len(held)))
        share = min(max(1, share), spec.limit - 1)
        limits = (spec.limit - share, share)
    parts = [_from_planes(planes, limit, spec, shape) for planes, limit in zip((train, held), limits)]
    return Images("cifar10", *(torch.from_numpy(part) for part in parts))


def _from_planes(images: np.ndarray, limit: int | None, spec: Data, shape: Shape) -> np.ndarray:
    """So many of the images ``[N, 3, H, W]`` at the model's shape."""
    if shape == images.shape[1:]:
        return images[_chosen(len(images), limit)]
    entries = [(str(i), partial(Image.fromarray, image.transpose(1, 2, 0))) for i, image in enumerate(images)]
    return _read(entries, limit, spec, shape, [])


# --- what all sources share ------------------------------------------------------------------
def _chosen(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` positions, in order; a larger limit takes the same ones and more."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=generator(0, "limit"))[:limit].tolist())


def _read(entries: list[Entry], limit: int | None, spec: Data, shape: Shape, skipped: list[str]) -> np.ndarray:
    """The images that can be read, uint8 ``[n, C, H, W]``; the others are added to ``skipped``."""
    entries = [entries[i] for i in _chosen(len(entries), limit)]
    _require_memory(len(entries), spec, shape)
    rows, done = np.empty((len(entries), *shape), np.uint8), 0
    for name, opener in giveway.between(entries):
        try:
            with opener() as image:
                rows[done] = _fitted(image, name, spec, shape)
        except UNREADABLE as error:
            skipped.append(f"{name}: {line(error)}")
        else:
            done += 1
    return rows[:done]


def _require_memory(count: int, spec: Data, shape: Shape) -> None:
    needed, free = count * math.prod(shape), psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"data.source={spec.source}: {count} images need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
            f"free; set data.limit={max(2, count * free // needed // 2)}"
        )


def _fitted(image: Image.Image, name: str, spec: Data, shape: Shape) -> np.ndarray:
    """One image as the model expects it, uint8 ``[C, H, W]``."""
    if image.width * image.height > MOST_PIXELS:  # before it is decoded
        raise ValueError(
            f"has {image.width:,} x {image.height:,} pixels and {MOST_PIXELS:,} are allowed; make it smaller"
        )
    size, mode = (shape[2], shape[1]), MODES[shape[0]]
    image = _eight_bits(ImageOps.exif_transpose(image), image.format).convert(mode)
    if spec.resize == "none" and image.size != size:
        raise ValueError(f"is {image.width}x{image.height} and resize=none takes {size[0]}x{size[1]} only")
    if spec.resize == "stretch":
        image = image.resize(size, Image.Resampling.BICUBIC)
    elif spec.resize == "fit":
        centre = (0.5, 0.5)
        if spec.crop == "random":
            centre = tuple(torch.rand(2, generator=generator(0, "crop", name)).tolist())
        image = ImageOps.fit(image, size, centering=centre)
    return np.asarray(image, np.uint8).reshape(*shape[1:], shape[0]).transpose(2, 0, 1)


def _eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """16-bit greys by their high byte: Pillow's own conversion would clip nearly all of them to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"has pixels of mode {image.mode}, whose range is not known; save it with 8 or 16 bits")
    return image


def _split(rows: np.ndarray, spec: Data, name: str, skipped: list[str]) -> Images:
    """Training and held-out images; the rows are put into their new order in place."""
    if len(rows) < 2:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise ValueError(
            f"data.source={spec.source} holds {len(rows)} readable images ({len(skipped)} unreadable{first}); "
            "at least 2 are needed: add PNG, JPEG or WebP files"
        )
    held = max(1, round(len(rows) * spec.held_out))
    _reorder(rows, torch.randperm(len(rows), generator=generator(0, "split")).tolist())
    whole = torch.from_numpy(rows)
    return Images(name, whole[held:], whole[:held], skipped)


def _reorder(rows: np.ndarray, order: list[int]) -> None:
    """``rows[:] = rows[order]`` without a second copy of the data: cycle by cycle."""
    for start in range(len(order)):
        if order[start] < 0:
            continue
        kept, here = rows[start].copy(), start
        while (source := order[here]) != start:
            rows[here], order[here] = rows[source], -1
            here = source
        rows[here], order[here] = kept, -1


class Batches:
    """Training batches by step number: shuffled epochs, a pure function of (seed, step).

    flip: mirror each image of a batch left to right with probability one half, drawn for each step anew.
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int, flip: bool = False) -> None:
        self.images, self.seed, self.flip = images, seed, flip
        self.batch_size = min(batch_size, len(images))
        self._epoch: tuple[int, Tensor] | None = None

    def at(self, step: int, device: str | torch.device = "cpu") -> Tensor:
        """The batch of this step, ``[B, C, H, W]`` in [-1, 1]."""
        epoch, position = divmod(step, len(self.images) // self.batch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            gen = generator(self.seed, "epoch", epoch)
            self._epoch = (epoch, torch.randperm(len(self.images), generator=gen))
        batch = self.images[self._epoch[1][position * self.batch_size :][: self.batch_size]]
        if self.flip:
            mirrored = torch.rand(len(batch), generator=generator(self.seed, "flip", step)) < 0.5
            batch[mirrored] = batch[mirrored].flip(-1)
        return to_float(batch, device)
