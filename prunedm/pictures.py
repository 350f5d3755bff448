"""Sheets of small images as PNG: written, and read back image by image."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 8


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
    """The images of a sheet and its record."""
    with Image.open(path) as sheet:
        if "prunedm" not in getattr(sheet, "text", {}):
            raise ValueError(f"{path} is no sample sheet of this program")
        info = json.loads(sheet.text["prunedm"])
        height, width, columns = info["height"], info["width"], info["columns"]
        places = (divmod(i, columns) for i in range(info["count"]))
        boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y, x in places]
        return [sheet.crop(box) for box in boxes], info


def as_tensor(images: list[Image.Image]) -> Tensor:
    """Images of a sheet as uint8 ``[B, C, H, W]``, what :func:`sheet_png` was given."""
    import torch

    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays[:, None] if arrays.ndim == 3 else arrays.transpose(0, 3, 1, 2).copy())


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """Whole-number enlargement without smoothing: the pixels are the model's own."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
