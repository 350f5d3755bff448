"""Mask snapshots: packed bits in the run folder, and the small arrays that a heatmap draws.

numpy only, so that a page can show a mask without loading torch. A snapshot is all masks of a run one
after the other, each in the order of its groups ([K, R, S, C] flattened); ``offset`` in the run's layers
says where each begins.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from .files import write_npz
from .store import Run

LARGEST = 64  # heatmap cells a side


def write(path: Path, masks: list[np.ndarray]) -> None:
    """0/1 masks ``[G, M]``, one a pattern, eight positions a byte."""
    flat = np.concatenate([mask.ravel() for mask in masks])
    write_npz(path, bits=np.packbits(flat.astype(bool)), count=np.array(flat.size))


def read(path: Path) -> np.ndarray:
    """The inverse of :func:`write`: uint8 ``[weights]``. ValueError in one line for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return np.unpackbits(archive["bits"], count=int(archive["count"]))
    except (EOFError, BadZipFile, zlib.error, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"mask snapshot {path.name} is damaged ({error}); delete it: the others are shown") from error


def masked_layers(run: Run) -> list[dict[str, Any]]:
    """The layers that carry masks, in the order of their weights in a snapshot."""
    return sorted((la for la in run.layers() if la.get("offset") is not None), key=lambda la: la["offset"])


def layer_mask(mask: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
    """One layer's mask as ``[K, R*S, C]``: output channel, kernel position, input channel."""
    shape = layer["shape"]
    return _cut(mask, layer).reshape(shape[0], math.prod(shape[2:]), shape[1])


def kept_share(mask: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
    """Share kept for each (output, input) channel over kernel positions, at most 64x64 cells."""
    return shrink(layer_mask(mask, layer).mean(1))


def changed_share(mask: np.ndarray, first: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
    """Share of positions that differ from the first snapshot, in the cells of :func:`kept_share`."""
    return shrink((layer_mask(mask, layer) != layer_mask(first, layer)).mean(1))


def _cut(flat: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
    return flat[layer["offset"] : layer["offset"] + math.prod(layer["shape"])]


def shrink(values: np.ndarray, largest: int = LARGEST) -> np.ndarray:
    """Mean over equal blocks, so that neither side exceeds ``largest``."""
    for axis in (0, 1):
        size = values.shape[axis]
        if size > largest:
            edges = np.linspace(0, size, largest + 1).astype(int)[:-1]
            counts = np.diff(np.append(edges, size))
            sums = np.add.reduceat(values, edges, axis=axis)
            values = sums / (counts[:, None] if axis == 0 else counts[None, :])
    return values
