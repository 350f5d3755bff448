"""Models out of a run or a folder: diffusers folder, packed file, ONNX, TensorRT, semi-structured.

Every exporter writes beside and moves into place, overwrites nothing, and claims only patterns that the
weights keep. What was written is read back by :func:`prunedm.verify.inspect`.
"""

from __future__ import annotations

import copy
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import bundled, maskfile, model_card, onnx_export, packed, pattern, semi_structured, store, unet, verify
from .pruned_unet import public
from .recipe import Data
from .stage_recipes import Pattern
from .store import MASKS, VARIANT_RECORD, write_atomic

FORMATS = ("diffusers", "packed", "onnx", "semi-structured", "tensorrt")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What each format can be: its dtypes, the default first, and its ways of int8.
CHOICES = {
    "diffusers": (("fp32", "fp16", "bf16"), ("none",)),
    "packed": (("fp32", "fp16", "bf16"), ("none", "weights")),
    "onnx": (("fp32",), onnx_export.INT8),
    "semi-structured": (("fp16", "bf16"), ("none",)),
    "tensorrt": (("fp32",), ("none",)),
}
TENSORRT_BATCHES = {"min": 1, "opt": 8, "max": 32}


class ExportError(ValueError):
    """A model that cannot be exported as asked, in one line."""


@dataclass
class Source:
    """A model to export: float32 on the CPU, and all that is known of it."""

    model: unet.Diffusion
    name: str
    record: dict[str, Any] = field(default_factory=dict)  # prunedm.json
    patterns: dict[str, str] = field(default_factory=dict)  # layer to "N:M"
    masks: Path | None = None
    base: str | None = None  # the dense model, as the recipe names it
    data: Data | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def origin(self) -> dict[str, Any]:
        """Where the model comes from, for the records of files."""
        known = {key: self.record[key] for key in ("run", "variant", "parent", "method") if key in self.record}
        return {"source": self.name} | known


def check_choices(kind: str, dtype: str | None, int8: str) -> str:
    """The dtype to use; ExportError for a combination that the format does not have."""
    if kind not in FORMATS:
        raise ExportError(f"--format {kind} is not known; use one of {', '.join(FORMATS)}")
    dtypes, ways = CHOICES[kind]
    dtype = dtype or dtypes[0]
    if dtype not in dtypes:
        hint = "; half precision is the engine's choice (trtexec --fp16)" if kind == "tensorrt" else ""
        raise ExportError(f"--dtype {dtype} is not for --format {kind}; use {' or '.join(dtypes)}{hint}")
    if int8 not in ways:
        raise ExportError(f"--int8 {int8} is not for --format {kind}; use {' or '.join(ways)}")
    if kind == "packed" and int8 == "weights" and dtype != "fp32":
        raise ExportError(f"--dtype {dtype} and --int8 weights exclude one another in a packed file; leave one out")
    return dtype


# --- sources ---------------------------------------------------------------------------------
def find(source: str, variant: str | None, runs_dir: Path, read_as: Pattern) -> Source:
    """The model of a run (its last finished variant unless told), a model folder, 'bundled' or a hub id.

    Patterns come from its masks manifest, else every layer that keeps ``read_as`` is one of that pattern.
    ExportError where a claimed pattern is not kept, or a variant is missing.
    """
    run_id, _, tail = source.partition("/")
    if store.RUN_ID.fullmatch(run_id) and (runs_dir / run_id / "recipe.yaml").is_file():
        found = _of_run(store.find(runs_dir, run_id), variant or tail or None)
    elif variant is not None:
        raise ExportError(f"--variant {variant} is for runs and no run {source!r} is in {runs_dir}; leave it out")
    else:
        found = _of_folder(source)
    _take_patterns(found, read_as)
    return found


def _of_run(run: store.Run, variant: str | None) -> Source:
    finished = run.variants()
    if not finished or (variant and variant not in finished):
        known = ", ".join(finished) or "none yet"
        raise ExportError(f"--variant {variant or 'nm'}: run {run.id} has the variants {known}; name one of them")
    name = variant or finished[-1]
    found = _of_folder(str(run.variant(name)))
    recipe = run.recipe()
    found.name, found.base, found.data = f"{run.id}/{name}", recipe.model.source, recipe.data
    found.record = {"run": run.id} | found.record
    found.results = run.evaluation()
    return found


def _of_folder(source: str) -> Source:
    model = unet.load(source)
    folder = bundled.MODEL if source == bundled.NAME else Path(source).expanduser()
    if folder.is_file():
        found = packed.manifest(folder)
        patterns = {n.removesuffix(".weight"): e["pattern"] for n, e in found["tensors"].items() if "pattern" in e}
        known = found["config"].get("record")
        return Source(model, source, known if isinstance(known, dict) else {}, patterns)
    record = folder / VARIANT_RECORD
    known = store.read_json(record) if record.is_file() else {}
    if not isinstance(known, dict):
        raise ExportError(f"{record} holds no JSON object; delete it or restore the model")
    earlier = known.pop("export", None)  # the entry of the export that made this folder
    claimed = earlier.get("patterns") if isinstance(earlier, dict) else None
    masks = folder / MASKS
    base = source if source == bundled.NAME or not folder.is_dir() else None
    patterns = verify.checked_claims(claimed, record)
    return Source(model, source, known, patterns, masks if masks.is_file() else None, base)


def _take_patterns(found: Source, read_as: Pattern) -> None:
    weights = layer_weights(found.model.unet)
    if found.masks is not None:
        maskfile.read(found.masks)  # torn or altered: refused here
        layers = maskfile.manifest(found.masks)["layers"]
        found.patterns = {name: layer["pattern"] for name, layer in layers.items()}
    elif not found.patterns:
        found.patterns = {name: str(read_as) for name, weight in weights.items() if keeps(weight, read_as)}
    broken = verify.broken_claims(weights, found.patterns)
    if broken:
        raise ExportError(f"{found.name}: {broken[0]}; restore the model or delete its {MASKS}")


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """Layer name to weight of each convolution and linear layer."""
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def keeps(weight: Tensor, wanted: Pattern) -> bool:
    """Whether every group of a weight has at most N non-zero values."""
    return not pattern.ineligible(weight.shape, wanted.m) and pattern.compliance(weight, *wanted) == 1


# --- exporters -------------------------------------------------------------------------------
def write(source: Source, kind: str, out: Path, dtype: str, int8: str = "none") -> dict[str, Any]:
    """Write the model in one of FORMATS and return what is recorded of it. Nothing is overwritten."""
    beside = {"onnx": (".json",), "tensorrt": (".json", ".sh")}.get(kind, ())
    if kind in ("onnx", "tensorrt") and out.suffix != ".onnx":
        raise ExportError(f"--out {out} must end in .onnx for --format {kind}")
    for path in (out, *(out.with_suffix(suffix) for suffix in beside)):
        if path.exists():
            raise ExportError(f"--out: {path} is already there; give another name or delete it")
    if kind == "semi-structured":
        semi_structured.require_cuda()
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "diffusers":
        return write_diffusers(source, out, dtype)
    if kind == "packed":
        return write_packed(source, out, dtype, int8)
    if kind == "semi-structured":
        measured = semi_structured.measure(source.model.unet, DTYPES[dtype])
        return write_semi_structured(source, out, dtype, measured)
    record = onnx_export.write(source.model, source.patterns, out, int8, source.data, source.origin)
    return record | ({"trtexec": write_trtexec(source, out)} if kind == "tensorrt" else {})


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when all went well, and is removed when not."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed and had this number
    part.mkdir()
    try:
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_diffusers(source: Source, out: Path, dtype: str) -> dict[str, Any]:
    """A pipeline folder with its record, its masks where it has them, and a model card."""
    with _staged(out) as folder:
        return _fill(source, folder, out.name, dtype)


def _fill(source: Source, folder: Path, name: str, dtype: str) -> dict[str, Any]:
    """The diffusers folder itself; returns its record."""
    # torch's own `to`: that of diffusers warns of modules to be kept in float32, of which UNet2DModel has none.
    model = nn.Module.to(copy.deepcopy(source.model.unet), DTYPES[dtype])
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ExportError(f"--dtype {dtype} cannot hold all weights of {source.name}; use bf16 or fp32")
    if source.masks is not None:
        shutil.copyfile(source.masks, folder / MASKS)
        shutil.copyfile(maskfile.manifest_path(source.masks), maskfile.manifest_path(folder / MASKS))
    record = source.record | {"export": {"source": source.name, "dtype": dtype, "patterns": source.patterns}}
    unet.save(model, source.model.scheduler, folder, record)
    data = source.data.source if source.data else None
    return record | model_card.write(folder, model, record, source.patterns, source.base, data, source.results, name)


def write_packed(source: Source, out: Path, dtype: str, int8: str = "none") -> dict[str, Any]:
    """One packed file with all that :func:`prunedm.unet.load_packed` needs; returns a summary of it."""
    scheduler = source.model.scheduler
    config = {
        "unet": public(source.model.unet.config),
        "scheduler": {"_class_name": type(scheduler).__name__} | public(scheduler.config),
        "record": source.record,
    }
    held = None if int8 == "weights" else DTYPES[dtype]
    manifest = packed.write(out, source.model.unet.state_dict(), source.patterns, config, held, int8 == "weights")
    summary = {"format": "packed", "file": out.name, "bytes": out.stat().st_size, "sha256": manifest["sha256"]}
    return summary | {"dtype": dtype, "int8": int8, "patterns": source.patterns} | source.origin


def write_semi_structured(source: Source, out: Path, dtype: str, measured: dict[str, Any] | None) -> dict[str, Any]:
    """The diffusers folder in half precision and the plan of its conversion, which is done after loading."""
    with _staged(out) as folder:
        record = _fill(source, folder, out.name, dtype)
        half = unet.load_unet(folder / "unet")  # the plan is of the weights as they were written
        plan = semi_structured.write_plan(folder, out, half, dtype, measured)
        return record | {"semi_structured": plan}


def write_trtexec(source: Source, path: Path) -> str:
    """``NAME.sh`` beside an ONNX file, after its own weights were seen to keep every claim; returns the command."""
    broken = verify.inspect(path)["problems"]
    if broken:
        raise ExportError(f"{path}: {broken[0]}; delete it and export it again")
    command = trtexec(path.name, source.model.image_shape)
    remark = (
        "# Builds a TensorRT engine on the machine and GPU that run it. The log says which layers took sparse\n"
        "# kernels, after '(Sparsity)': TensorRT uses them only where it measures them to be faster."
    )
    script = f'#!/bin/sh\n{remark}\nset -e\ncd "$(dirname "$0")"\n{command}\n'
    write_atomic(path.with_suffix(".sh"), script.encode())
    path.with_suffix(".sh").chmod(0o755)
    return command


def trtexec(name: str, shape: tuple[int, int, int]) -> str:
    """The trtexec command for an ONNX file in the present folder."""
    shapes = []
    for which, batch in TENSORRT_BATCHES.items():
        sides = "x".join(map(str, (batch, *shape)))
        shapes.append(f"--{which}Shapes=sample:{sides},timestep:{batch}")
    engine = str(Path(name).with_suffix(".engine"))
    parts = ["trtexec", f"--onnx={name}", "--sparsity=enable", "--fp16", *shapes, f"--saveEngine={engine}"]
    return shlex.join([*parts, "--verbose"])
