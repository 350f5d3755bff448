"""Bytes of a model in each way of storing it: written to a temporary file and counted, not computed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from . import packed

FORMATS = ("dense_fp32", "dense_fp16", "packed_fp16", "packed_int8")


def stored(unet: nn.Module, patterns: dict[str, str]) -> dict[str, int]:
    """Bytes by FORMATS of a UNet: plain safetensors with all zeros stored, and packed files (packed.py) of layers
    ``patterns`` (layer name to ``N:M``), with fp16 values or int8 ones. PackedError where a pattern is not kept."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in unet.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        found = {}
        for name, dtype in (("dense_fp32", torch.float32), ("dense_fp16", torch.float16)):
            save_file({key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}, path)
            found[name] = path.stat().st_size
        for name, dtype, int8 in (("packed_fp16", torch.float16, False), ("packed_int8", None, True)):
            packed.write(path, tensors, patterns, {}, dtype, int8)
            found[name] = path.stat().st_size
    return found
