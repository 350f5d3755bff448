"""Mask snapshots: packed bits in the run folder, and the small arrays that a heatmap draws.

numpy only, so that a page can show a mask without loading torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .store import Run, write_npz

LARGEST = 64  # heatmap cells a side


def write(path: Path, mask: np.ndarray) -> None:
    """A 0/1 mask ``[G, M]``, eight groups' positions a byte."""
    write_npz(path, bits=np.packbits(mask.astype(bool)), shape=np.array(mask.shape))


def read(path: Path) -> np.ndarray:
    """The inverse of :func:`write`: uint8 ``[G, M]``."""
    with np.load(path, allow_pickle=False) as archive:
        bits, shape = archive["bits"], tuple(int(s) for s in archive["shape"])
    return np.unpackbits(bits, count=math.prod(shape)).reshape(shape)


def masked_layers(run: Run) -> list[dict[str, Any]]:
    """The layers that carry masks, in the order of their rows."""
    return [layer for layer in run.layers() if layer.get("start") is not None]


def layer_mask(mask: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
    """One layer's mask as ``[K, R*S, C]``: output channel, kernel position, input channel."""
    rows = mask[layer["start"] : layer["start"] + layer["groups"]]
    shape = layer["shape"]
    return rows.reshape(shape[0], math.prod(shape[2:]), shape[1])


def kept_share(mask: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
    """Share kept for each (output, input) channel over kernel positions, at most 64x64 cells."""
    return shrink(layer_mask(mask, layer).mean(1))


def changed_share(mask: np.ndarray, first: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
    """Share of positions that differ from the first snapshot, in the cells of :func:`kept_share`."""
    return shrink((layer_mask(mask, layer) != layer_mask(first, layer)).mean(1))


def flips_by_layer(mask: np.ndarray, first: np.ndarray, layers: list[dict[str, Any]]) -> list[float]:
    """Share of each layer's groups that differ from the first snapshot."""
    changed = (mask != first).any(1)
    return [float(changed[la["start"] : la["start"] + la["groups"]].mean()) for la in layers]


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
