"""Models out of a run or a folder: diffusers folder, packed file, ONNX, TensorRT, semi-structured.

Every exporter writes beside and moves into place, overwrites nothing, and claims only patterns that the
weights keep. What was written is read back by :func:`prunedm.verify.inspect`.
"""

from __future__ import annotations

import copy
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import maskfile, model_card, onnx_export, packed, semi_structured, subject, unet, verify
from .pruned_unet import public
from .stage_recipes import Pattern
from .store import MASKS, write_atomic
from .subject import Subject

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


class Form(NamedTuple):
    """What is written: one of FORMATS, its number type and its way of int8."""

    kind: str
    dtype: str
    int8: str = "none"


def form(kind: str, dtype: str | None, int8: str) -> Form:
    """A form that can be written here, seen before any model is loaded; ExportError or ValueError where it cannot."""
    found = Form(kind, check_choices(kind, dtype, int8), int8)
    if kind == "semi-structured":
        semi_structured.require_cuda()
    return found


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


def make(
    source: str,
    variant: str | None,
    runs_dir: Path,
    wanted: Form,
    out: Path,
    read_as: Pattern,
    tell: Callable[[str], None] = lambda doing: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find a model (``subject.find``), write it and read it back: the record of it, and what ``verify`` finds.

    ``tell`` hears what is being done. ExportError where what was written does not keep its patterns.
    """
    tell("loading the model")
    found = subject.find(source, variant, runs_dir, read_as)
    tell("writing")
    record = write(found, wanted.kind, out, wanted.dtype, wanted.int8)
    tell("reading it back")
    seen = verify.inspect(out)
    if not seen["ok"]:
        raise ExportError(f"{out} was written, but does not keep its patterns: {seen['problems'][0]}")
    return record, seen


# --- exporters -------------------------------------------------------------------------------
def write(source: Subject, kind: str, out: Path, dtype: str, int8: str = "none") -> dict[str, Any]:
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


def write_diffusers(source: Subject, out: Path, dtype: str) -> dict[str, Any]:
    """A pipeline folder with its record, its masks where it has them, and a model card."""
    with _staged(out) as folder:
        return _fill(source, folder, out.name, dtype)


def _fill(source: Subject, folder: Path, name: str, dtype: str) -> dict[str, Any]:
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


def write_packed(source: Subject, out: Path, dtype: str, int8: str = "none") -> dict[str, Any]:
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


def write_semi_structured(source: Subject, out: Path, dtype: str, measured: dict[str, Any] | None) -> dict[str, Any]:
    """The diffusers folder in half precision and the plan of its conversion, which is done after loading."""
    with _staged(out) as folder:
        record = _fill(source, folder, out.name, dtype)
        half = unet.load_unet(folder / "unet")  # the plan is of the weights as they were written
        plan = semi_structured.write_plan(folder, out, half, dtype, measured)
        return record | {"semi_structured": plan}


def write_trtexec(source: Subject, path: Path) -> str:
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
