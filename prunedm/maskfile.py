"""Masks as a file: packed bits in safetensors, with a JSON manifest beside it.

``masks.safetensors`` holds one uint8 tensor a layer: the mask in the order of its groups ([K, R, S, C]
flattened), eight positions a byte, the first in the highest bit (numpy's ``packbits``). ``masks.json``
says for each layer its shape and pattern, and the SHA-256 of the first file. Nothing is a pickle.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import pattern
from .files import StoreError, require_known, write_atomic, write_json
from .stage_recipes import parse_pattern
from .store import MASKS
from .unet import WEIGHTS
from .untrusted import LARGEST_HEADER, one_line, read_json, require_header

SCHEMA = 1


class MaskFileError(ValueError):
    """A masks file that is missing, torn or altered, in one line."""


def write(path: Path, masks: dict[str, Tensor], patterns: dict[str, str], origin: dict[str, Any]) -> None:
    """Boolean masks in their weights' shapes, by layer name, each with its pattern ``N:M``.

    The manifest is written last: it marks the file complete.
    """
    from safetensors.numpy import save

    manifest_path(path).unlink(missing_ok=True)
    packed, layers = {}, {}
    for name, mask in masks.items():
        found = parse_pattern(patterns[name])
        packed[name] = np.packbits(pattern.group(mask.cpu().bool(), found.m).numpy())
        layers[name] = {"shape": list(mask.shape), "pattern": str(found), "kept": int(mask.sum())}
    content = save(packed)
    write_atomic(path, content)
    digest = hashlib.sha256(content).hexdigest()
    write_json(manifest_path(path), {"schema": SCHEMA, "sha256": digest, **origin, "layers": layers})


def manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def manifest(path: Path) -> dict[str, Any]:
    """The JSON beside a masks file; MaskFileError when it is missing or not what :func:`write` makes."""
    try:
        found = read_json(manifest_path(path), LARGEST_HEADER)
        require_known(manifest_path(path), found["schema"], SCHEMA)
        good = isinstance(found["sha256"], str)
        good = good and all(
            isinstance(layer["kept"], int)
            and isinstance(layer["shape"], list)
            and 2 <= len(layer["shape"]) <= 5
            and all(isinstance(side, int) and side > 0 for side in layer["shape"])
            and parse_pattern(layer["pattern"])
            for layer in found["layers"].values()
        )
    except OSError as error:
        raise MaskFileError(
            f"{manifest_path(path)} cannot be read ({error.strerror}); extract the masks again"
        ) from None
    except StoreError as error:
        raise MaskFileError(str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise MaskFileError(f"{manifest_path(path)} is not a masks manifest; extract the masks again")
    return found


def read(path: Path) -> dict[str, Tensor]:
    """Layer name to its boolean mask in the weight's shape; MaskFileError for anything torn or altered."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    wanted = manifest(path)
    try:
        require_header(path)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != wanted["sha256"]:
            raise MaskFileError(f"{path} is not the file that {manifest_path(path).name} describes; extract it again")
        packed = load(content)
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, MaskFileError):
            raise
        raise MaskFileError(f"{path} cannot be read ({one_line(error)}); extract the masks again") from error
    return {name: _unpack(path, name, packed.get(name), layer) for name, layer in wanted["layers"].items()}


def _unpack(path: Path, name: str, bits: np.ndarray | None, layer: dict[str, Any]) -> Tensor:
    shape, found = layer["shape"], parse_pattern(layer["pattern"])
    count = math.prod(shape)
    if bits is None or bits.dtype != np.uint8 or bits.size != -(-count // 8) or shape[1] % found.m:
        raise MaskFileError(f"{path}: {name} does not hold {count} bits in groups of {found.m}; extract it again")
    groups = torch.from_numpy(np.unpackbits(bits.ravel(), count=count)).bool().view(-1, found.m)
    return pattern.ungroup(groups, shape)


def verify(path: Path, model: Path | None = None) -> list[str]:
    """What is wrong with a masks file, in words; empty when all is well.

    Every group must keep exactly N. With ``model`` (a UNet folder) every weight that a mask prunes must
    be exactly zero there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        masks, layers = read(path), manifest(path)["layers"]
        tensors = load_file(model / WEIGHTS) if model else {}
    except (MaskFileError, OSError, SafetensorError) as error:
        return [str(error)]
    problems = []
    for name, mask in masks.items():
        n, m = parse_pattern(layers[name]["pattern"])
        wrong = int((pattern.group(mask, m).sum(-1) != n).sum())
        if wrong:
            problems.append(f"{name}: {wrong} of {mask.numel() // m} groups do not keep exactly {n} of {m}")
        if model is None:
            continue
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.shape != mask.shape:
            found = "is not there" if weight is None else f"has the shape {tuple(weight.shape)}"
            problems.append(f"{name}: its weight {found}; the mask has {tuple(mask.shape)}")
        elif (weight[~mask] != 0).any():
            problems.append(f"{name}: {int((weight[~mask] != 0).sum())} pruned weights are not zero in {model}")
    return problems


def locate(folder_or_file: Path) -> Path:
    """The masks file itself, or that of a variant's folder or of a run."""
    for candidate in (
        folder_or_file,
        folder_or_file / MASKS,
        folder_or_file / "variants" / "nm" / MASKS,
    ):
        if candidate.is_file() and candidate.suffix == ".safetensors":
            return candidate
    raise MaskFileError(f"no {MASKS} in {folder_or_file}; give a masks file, a run or an nm variant's folder")
