"""Images in: the bundled Fashion-MNIST subset or a folder of images, as tensors in [-1, 1].

All of a data set's images are held as uint8 in memory and batches are drawn by step number, so that
the batch of step k does not depend on what the process did before.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import bundled
from .seeds import generator

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
HELD_OUT_SHARE = 0.1
# What Pillow raises on files that are torn, altered, not images, or bombs.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass
class Images:
    """A data set in memory: ``train`` and ``held_out`` are uint8 ``[N, C, H, W]``."""

    name: str
    train: Tensor
    held_out: Tensor
    skipped: list[str] = field(default_factory=list)
    is_bundled: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train.shape[1:])


def to_float(images: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """0..255 bytes to floats in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def load(source: str, shape: tuple[int, int, int]) -> Images:
    """The data set of a recipe at the model's ``(channels, height, width)``.

    Raises ValueError with value, rule and remedy when nothing usable is there.
    """
    if source != bundled.NAME:
        return load_folder(Path(source), shape)
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


def load_folder(folder: Path, shape: tuple[int, int, int]) -> Images:
    """Every readable image under ``folder``, resized and centre-cropped; each tenth is held out.

    Unreadable files are skipped and named in ``Images.skipped``.
    """
    if not folder.is_dir():
        raise ValueError(f"data.source={folder} is not a folder; give an image folder or 'bundled'")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    channels, height, width = shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise ValueError(f"the model has {channels} image channels; image folders serve 1, 3 or 4")
    arrays, skipped = [], []
    for file in files:
        try:
            with Image.open(file) as image:
                fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert(mode), (width, height))
        except UNREADABLE as error:
            skipped.append(f"{file.name}: {error}")
            continue
        arrays.append(np.asarray(fitted, dtype=np.uint8).reshape(height, width, channels))
    if len(arrays) < 2:
        raise ValueError(
            f"data.source={folder} holds {len(arrays)} readable images ({len(skipped)} unreadable); "
            "at least 2 are needed: add PNG, JPEG or WebP files"
        )
    stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    held = max(1, round(len(stacked) * HELD_OUT_SHARE))
    order = torch.randperm(len(stacked), generator=generator(0, "split"))
    return Images(folder.name, stacked[order[held:]], stacked[order[:held]], skipped)


class Batches:
    """Training batches by step number: shuffled epochs, a pure function of (seed, step)."""

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self.batch_size = min(batch_size, len(images))
        self._epoch: tuple[int, Tensor] | None = None

    def at(self, step: int, device: str | torch.device = "cpu") -> Tensor:
        """The batch of this step, ``[B, C, H, W]`` in [-1, 1]."""
        epoch, position = divmod(step, len(self.images) // self.batch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            gen = generator(self.seed, "epoch", epoch)
            self._epoch = (epoch, torch.randperm(len(self.images), generator=gen))
        chosen = self._epoch[1][position * self.batch_size :][: self.batch_size]
        return to_float(self.images[chosen], device)
