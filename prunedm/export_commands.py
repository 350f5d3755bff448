"""``python -m prunedm export`` and ``verify``: models out of a run, and whether a file keeps what it claims."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import AsJson, RunsDir

ReadAs = Annotated[str, typer.Option("--pattern", metavar="N:M", help="pattern of layers that claim none")]


class Format(str, Enum):
    diffusers = "diffusers"
    packed = "packed"
    onnx = "onnx"
    semi_structured = "semi-structured"
    tensorrt = "tensorrt"


class Variant(str, Enum):
    dense = "dense"
    structured = "structured"
    nm = "nm"


class Dtype(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Int8(str, Enum):
    none = "none"
    weights = "weights"
    static = "static"
    dynamic = "dynamic"


def export(
    source: Annotated[str, typer.Argument(help="a run, or a model folder")],
    kind: Annotated[Format, typer.Option("--format", help="what to write")],
    out: Annotated[Path, typer.Option(help="folder or file to write; must not exist")],
    variant: Annotated[Variant | None, typer.Option(help="of a run; default: the last that is finished")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="default: fp32, or fp16 for semi-structured")] = None,
    int8: Annotated[Int8, typer.Option(help="8-bit weights (packed, onnx) or activations too (onnx)")] = Int8.none,
    read_as: ReadAs = "2:4",
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Write a model as a diffusers folder, a packed file, ONNX, a TensorRT script or for semi-structured kernels."""
    from . import export as exports
    from . import verify

    wanted = exports.form(kind.value, dtype.value if dtype else None, int8.value)
    named = variant.value if variant else None
    record, seen = exports.make(source, named, runs_dir, wanted, out, verify.parse(read_as))
    if as_json:
        print(json.dumps({"path": str(out)} | record))
        return
    for line in _told(out, record, seen):
        print(line)


def verify(
    path: Annotated[Path, typer.Argument(help="a diffusers or UNet folder, a packed, ONNX or safetensors file")],
    read_as: ReadAs = "2:4",
    as_json: AsJson = False,
) -> None:
    """Check a model on disk, layer by layer: the pattern it claims, compliance, density, who can use it."""
    from . import verify as verifier

    found = verifier.inspect(path.expanduser(), verifier.parse(read_as))
    if as_json:
        print(json.dumps(found))
    else:
        _print_layers(found)
    if not found["ok"]:
        raise typer.Exit(1)


def _told(out: Path, record: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """What was written, in lines for a person."""
    count = seen["claimed_layers"]
    checked = f"{count} N:M layers, each checked in what was written" if count else "no N:M layers"
    lines = [f"{out}: {seen['kind']}, {checked}"]
    if "bytes" in record:
        lines[0] += f"; {record['bytes']:,} bytes"
    if "difference_from_torch" in record:
        worst = max(record["difference_from_torch"].values())
        lines.append(f"largest difference of fp32 from torch: {worst:.1e} (allowed: {record['tolerance']})")
    if "int8_error" in record:
        error = record["int8_error"]
        lines.append(
            f"int8 against fp32: root mean square {error['relative_rms']:.2%} of the output's, largest "
            f"{error['largest']:.4f}, over {error['inputs']}"
        )
    if "calibration" in record:
        lines.append(f"calibrated with {record['calibration']}")
    for name, figure in record.get("latency", {}).get("milliseconds", {}).items():
        spread = f"{figure['p10']:.1f} to {figure['p90']:.1f}"
        lines.append(f"{name}: {figure['median']:.1f} ms a call (p10 to p90: {spread}; batch 1, {figure['device']})")
    if "semi_structured" in record:
        plan = record["semi_structured"]
        lines += [f"{plan['converted']} of {len(plan['layers'])} layers convert; {plan['note']}:", *plan["load"]]
    if "trtexec" in record:
        lines.append(f"{seen['tensor_core_ready_layers']} layers are 2:4 and of a size for sparse tensor cores")
        lines.append(f"on a machine with TensorRT: {record['trtexec']}")
    return lines


def _print_layers(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "shape", "claimed", "looked at as", "compliance", "density", "tensor cores", "why not")
    for row in found["layers"]:
        compliance = "n/a" if row["compliance"] is None else f"{row['compliance']:.1%}"
        cells = ("x".join(map(str, row["shape"])), row["claimed"] or "none", row["pattern"], compliance)
        ready = "ready" if row["tensor_core_ready"] else "no"
        table.add_row(row["layer"], *cells, f"{row['density']:.1%}", ready, row["reason"])
    console = Console(width=160, highlight=False, markup=False, emoji=False)
    console.print(table)
    for problem in found["problems"]:
        console.print(f"PROBLEM: {problem}")
    state = "every claimed pattern is kept" if found["claimed_layers"] else "claims no pattern"
    console.print(
        f"{found['path']} ({found['kind']}): {state if found['ok'] else 'claims that do not hold'}; "
        f"{found['claimed_layers']} claimed layers, {found['tensor_core_ready_layers']} ready for sparse tensor "
        f"cores, density {found['density']:.1%}"
    )
