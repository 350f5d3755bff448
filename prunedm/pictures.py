"""Sheets of small images as PNG: written, and read back image by image."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin

from .untrusted import one_line, parse_json

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 8
MOST_PIXELS = 64_000_000  # of a picture that is decoded: what it takes is a few times 4 bytes each


def sheet_png(images: Tensor, info: dict[str, Any], columns: int = COLUMNS) -> bytes:
    """uint8 ``[B, C, H, W]`` as one PNG without gaps, ``info`` and the geometry in its text."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.zeros((rows * height, columns * width, channels), dtype=np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        y, x = divmod(i, columns)
        canvas[y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    text = PngImagePlugin.PngInfo()
    geometry = {"count": count, "height": height, "width": width, "columns": columns}
    text.add_text("prunedm", json.dumps(geometry | info))
    buffer = io.BytesIO()
    Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas).save(buffer, "PNG", pnginfo=text, optimize=True)
    return buffer.getvalue()


def read_sheet(path: Path) -> tuple[list[Image.Image], dict[str, Any]]:
    """The images of a sheet and its record. OSError where it is not there; ValueError where it is torn or no sheet."""
    try:
        with Image.open(path, formats=["PNG"]) as sheet:
            info = _record(sheet)
            if info is not None:
                return [sheet.crop(box) for box in _boxes(info)], info
    except (SyntaxError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is a damaged picture ({one_line(error)}); delete it") from error
    raise ValueError(f"{path} is no sample sheet of this program")


def _record(sheet: Image.Image) -> dict[str, Any] | None:
    """A sheet's record, where its geometry is that of the picture itself: nothing larger is cut out of it."""
    if sheet.width * sheet.height > MOST_PIXELS:  # looked at first: asking for its text decodes the picture
        return None
    try:
        info = parse_json(sheet.text["prunedm"])  # type: ignore[attr-defined]
        sides = [info[key] for key in ("count", "height", "width", "columns")]
        count, height, width, columns = sides
    except (KeyError, TypeError, ValueError):
        return None
    whole = all(type(value) is int and value > 0 for value in sides)
    return info if whole and sheet.size == (columns * width, -(-count // columns) * height) else None


def _boxes(info: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    height, width = info["height"], info["width"]
    places = (divmod(i, info["columns"]) for i in range(info["count"]))
    return [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y, x in places]


def as_tensor(images: list[Image.Image]) -> Tensor:
    """Images of a sheet as uint8 ``[B, C, H, W]``, what :func:`sheet_png` was given."""
    import torch

    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays[:, None] if arrays.ndim == 3 else arrays.transpose(0, 3, 1, 2).copy())


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """Whole-number enlargement without smoothing: the pixels are the model's own."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
