"""Does a model on disk keep the N:M pattern that it claims? Read from the file itself, whatever its format.

A *claim* is a layer with a pattern, found in the masks manifest, the record of an export, the manifest of a
packed file, an ONNX file's metadata or ``semi-structured.json``. Other people's models claim nothing: their
layers are looked at under one pattern (2:4 unless told otherwise).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import maskfile, onnx_graph, packed, pattern, semi_structured
from .files import StoreError, require_known
from .masked_unet import EXCLUDED
from .stage_recipes import Pattern, parse_pattern
from .store import MASKS, VARIANT_RECORD
from .unet import read_weights
from .untrusted import UntrustedError, one_line, read_table, require_header

CLAIMED = Pattern(2, 4)
TABLES = ("time_proj.weight", "class_embedding.weight")  # embeddings: no input channels


class VerifyError(ValueError):
    """A model that cannot be read at all, in one line."""


@dataclass
class Model:
    """What was read: the weights of the layers by name, the claimed patterns, and what is wrong already."""

    kind: str
    weights: dict[str, Tensor]
    claims: dict[str, str]
    problems: list[str]


def parse(text: str) -> Pattern:
    """``N:M`` as a Pattern; ValueError with the rule for anything else, ``dense`` included."""
    found = parse_pattern(text)
    if found is None:
        raise VerifyError("--pattern dense is no N:M pattern; use 2:4 or another")
    return found


def inspect(path: Path, default: Pattern = CLAIMED) -> dict[str, Any]:
    """All figures of a model on disk; ``ok`` is False when a claim does not hold.

    A row for each conv and linear weight ([K, C, ...], whatever lies second being the input channels). Raises
    VerifyError, MaskFileError, OnnxError or PackedError when the model cannot be read.
    """
    model = read(path)
    rows = [layer_row(name, weight, model.claims.get(name), default) for name, weight in model.weights.items()]
    problems = model.problems + broken_claims(model.weights, model.claims)
    total = sum(weight.numel() for weight in model.weights.values())
    return {
        "path": str(path),
        "kind": model.kind,
        "ok": not problems,
        "claimed_layers": len(model.claims),
        "tensor_core_ready_layers": sum(row["tensor_core_ready"] for row in rows),
        "weights": total,
        "density": sum(int(w.count_nonzero()) for w in model.weights.values()) / max(total, 1),
        "problems": problems,
        "layers": rows,
    }


def layer_row(name: str, weight: Tensor, claimed: str | None, default: Pattern) -> dict[str, Any]:
    """One layer: its claim, the pattern it was looked at under, and what was found."""
    wanted = parse_pattern(claimed) if claimed else default
    reason = pattern.ineligible(weight.shape, wanted.m) or ""
    kept_dense = next((why for prefix, why in EXCLUDED.items() if name.startswith(prefix)), "")
    fits_24 = weight.shape[1] % 4 == 0 and pattern.compliance(weight, 2, 4) == 1
    return {
        "layer": name,
        "shape": list(weight.shape),
        "claimed": claimed,
        "pattern": str(wanted),
        "compliance": None if reason else pattern.compliance(weight, *wanted),
        "density": pattern.density(weight),
        "eligible": not reason and bool(claimed or not kept_dense),
        "reason": reason or ("" if claimed else kept_dense),
        "tensor_core_ready": fits_24 and pattern.tensor_core_ready(weight.shape),
    }


def broken_claims(weights: dict[str, Tensor], claims: dict[str, str]) -> list[str]:
    """Each claim that the weights do not keep, in words."""
    problems = []
    for name, text in claims.items():
        weight, (n, m) = weights.get(name), parse_pattern(text)
        if weight is None:
            problems.append(f"{name}: claimed {text}, but its weight is not in the file")
            continue
        reason = pattern.ineligible(weight.shape, m)
        if reason:
            problems.append(f"{name}: claimed {text}, but {reason}")
            continue
        wrong = int((pattern.group(weight, m).ne(0).sum(-1) > n).sum())
        if wrong:
            groups = weight.numel() // m
            problems.append(f"{name}: claimed {text}, but {wrong:,} of {groups:,} groups have more than {n} non-zero")
    return problems


def read(path: Path) -> Model:
    """Weights and claims of a folder, an ONNX file or a packed file."""
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise VerifyError(f"{path} is not there; give a model folder, an ONNX file or a packed file")
    if path.suffix.lower() == ".onnx":
        model = onnx_graph.load(path)
        try:
            claimed = onnx_graph.claims(model)
        except ValueError as error:
            raise VerifyError(f"{path}: {onnx_graph.CLAIMS} in its metadata is no JSON; export it again") from error
        return Model("onnx", onnx_graph.weights(model), checked_claims(claimed, path), [])
    return _read_packed(path)


def checked_claims(found: Any, path: Path) -> dict[str, str]:
    """Layer to ``N:M`` as a file gives it, or VerifyError; None is no claim."""
    try:
        if found is None or (isinstance(found, dict) and all(parse_pattern(text) for text in found.values())):
            return found or {}
    except (ValueError, TypeError):
        pass
    raise VerifyError(f"{path}: its claimed patterns are not a table of layer to N:M; export it again")


def _read_packed(path: Path) -> Model:
    """A packed file, or a plain safetensors file, which claims nothing."""
    if _is_plain(path):
        return Model("safetensors file", _layers(_load(path)), {}, [])
    entries = packed.manifest(path)["tensors"]
    claimed = {name.removesuffix(".weight"): entry["pattern"] for name, entry in entries.items() if "pattern" in entry}
    return Model("packed file", _layers(packed.read(path)), claimed, [])


def _is_plain(path: Path) -> bool:
    """Whether this is a sound safetensors file that nobody packed."""
    from safetensors import SafetensorError, safe_open

    try:
        require_header(path)
        with safe_open(path, "pt") as file:
            is_packed = any(name.endswith(".codes") for name in file.keys())  # noqa: SIM118
            return not is_packed and "manifest" not in (file.metadata() or {})
    except (SafetensorError, OSError, UntrustedError):
        return False  # packed.manifest says what is wrong


def _read_folder(path: Path) -> Model:
    folder = path / "unet" if (path / "unet").is_dir() else path
    weights = _layers(read_weights(folder))
    claims, problems = {}, []
    kind = "diffusers folder" if folder != path else "UNet folder"
    exported = _json(path / VARIANT_RECORD).get("export")
    if isinstance(exported, dict):
        claims |= checked_claims(exported.get("patterns"), path / VARIANT_RECORD)
    masks = path / MASKS
    if masks.is_file() or maskfile.manifest_path(masks).is_file():
        layers = maskfile.manifest(masks)["layers"]
        maskfile.read(masks)
        claims |= {name: layer["pattern"] for name, layer in layers.items()}
        problems = maskfile.verify(masks, folder)
    if (path / semi_structured.PLAN).is_file():
        kind = "semi-structured folder"
        claims |= _planned(path / semi_structured.PLAN)
    return Model(kind, weights, claims, problems)


def _planned(path: Path) -> dict[str, str]:
    """The layers that a semi-structured plan converts: each must be 2:4."""
    found = _json(path)
    try:
        require_known(path, found.get("schema"), semi_structured.SCHEMA)
        return {row["layer"]: "2:4" for row in found["layers"] if row["convert"]}
    except StoreError as error:
        raise VerifyError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise VerifyError(f"{path} is no plan of an export; export it again") from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path} cannot be read ({one_line(error)}); export the model again") from error


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_header(file)
        return load_file(file)
    except (SafetensorError, OSError, UntrustedError) as error:
        raise VerifyError(f"{file} cannot be read ({one_line(error)}); restore it or export the model again") from error


def _layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with input channels: two dimensions and more, but for a table of timesteps or classes."""
    found = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim >= 2 and name not in TABLES
    }
    if not found:
        raise VerifyError("the file holds no conv or linear weight; give a model's weights")
    return found
