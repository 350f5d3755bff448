"""The README.md of an exported model: what it is, where it comes from, its sizes, how to load it, what it cannot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, bundled, report, unet
from .records import VARIANT_LABELS
from .store import write_atomic

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

CPU = (
    "On a CPU the N:M stage buys size, not time: no CPU engine that was tried (ONNX Runtime, OpenVINO) is faster on "
    "2:4 weights than on dense ones, and torch computes with the zeros. Time on a CPU is won by the structured stage "
    "alone; 2:4 layers can be faster on NVIDIA GPUs with sparse tensor cores, through TensorRT or PyTorch's "
    "semi-structured kernels."
)
BUNDLED_LICENCE = (
    "The dense model was trained by PruneDM Lab on Fashion-MNIST (Zalando SE, MIT licence); the weights here derive "
    "from it and are under the licence of the PruneDM Lab project."
)
OTHER_LICENCE = (
    "This model derives from the one named above. The licences of that model and of its training images apply; "
    "PruneDM adds none. Name them here before you publish it."
)


def write(
    folder: Path,
    model: nn.Module,
    record: dict[str, Any],
    patterns: dict[str, str],
    base: str | None,
    data: str | None,
    results: dict[str, dict[str, Any]],
    name: str | None = None,
) -> dict[str, Any]:
    """Write the card of a saved model into its folder; returns its sizes.

    record: ``prunedm.json``. base, data: the dense model and its images as the recipe names them. results: a
    run's evaluation. name: of the folder, where it will have another one.
    """
    name = name or folder.name
    sizes = {
        "parameters": unet.parameters(model),
        "nonzero_parameters": unet.nonzero_parameters(model),
        "bytes": unet.weight_bytes(folder),
        "dtype": DTYPES[next(model.parameters()).dtype],
        "image_shape": unet.image_shape(model),
    }
    variant = record.get("variant")
    label = VARIANT_LABELS.get(variant, variant) if variant else None
    title = f"# {name}\n\nA denoising diffusion UNet in diffusers format"
    title += f", the {label} variant of a PruneDM run" if label else ", exported by PruneDM"
    parts = [
        _front(),
        f"{title}. Written by PruneDM {__version__}.",
        _lineage(record, patterns, base, data),
        _sizes(sizes, patterns),
        _figures(results),
        _loading(name, sizes["dtype"], unet.follows_config(model)),
        _timesteps(model),
        f"## Limits\n\n{CPU}",
        f"## Licence\n\n{BUNDLED_LICENCE if base == bundled.NAME else OTHER_LICENCE}",
    ]
    write_atomic(folder / "README.md", ("\n\n".join(part for part in parts if part) + "\n").encode())
    return sizes


def _timesteps(model: nn.Module) -> str:
    """What a table of timesteps cannot do."""
    if model.config.time_embedding_type != "learned":
        return ""
    return (
        f"## Timesteps\n\nThe time embedding is a table over the {model.config.num_train_timesteps} training "
        "timesteps, exact at each of them. Schedulers whose timesteps are whole numbers (DDPM, DDIM, DPM-Solver) work "
        "as they are; those that ask for times in between (Euler, Heun, Karras sigmas) need the sinusoids of the dense "
        "model: prune with `layout: free` for them."
    )


def _front() -> str:
    return "---\nlibrary_name: diffusers\npipeline_tag: unconditional-image-generation\ntags: [pruned, sparse]\n---"


def _lineage(record: dict[str, Any], patterns: dict[str, str], base: str | None, data: str | None) -> str:
    """Bullets: dense model, data, run, parent variant, stages."""
    rows = [("Dense model", _public(base)), ("Images", _public(data)), ("Run", record.get("run"))]
    is_structured = isinstance(record.get("achieved"), float)
    rows += [("Made from the variant", record.get("parent"))]
    rows += [("Channels ranked by" if is_structured else "Mask method", record.get("method"))]
    rows = [(label, value) for label, value in rows if isinstance(value, str) and value]
    if is_structured:
        rows.append(("Structured stage", f"{record['achieved']:.1%} of the {record.get('of', 'parameters')} removed"))
    if patterns:
        counted = ", ".join(f"{text} in {count} layers" for text, count in Counter(patterns.values()).most_common())
        rows.append(("N:M masks", f"{counted}; groups run along the input channels"))
    return "## Where it comes from\n\n" + "\n".join(f"- {label}: {value}" for label, value in rows) if rows else ""


def _public(source: str | None) -> str | None:
    """A source without the folders of the machine that it was on."""
    return Path(source).name if source and Path(source).is_absolute() else source


def _sizes(sizes: dict[str, Any], patterns: dict[str, str]) -> str:
    channels, height, width = sizes["image_shape"]
    rows = [
        ("Images", f"{height} x {width}, {channels} channel{'s' if channels > 1 else ''}"),
        ("Parameters", f"{sizes['parameters']:,}"),
        ("Non-zero parameters", f"{sizes['nonzero_parameters']:,}"),
        ("Weights on disk", f"{sizes['bytes']:,} bytes ({sizes['dtype']})"),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    note = "\n\nThe zeros are stored: `python -m prunedm export --format packed` leaves them out." if patterns else ""
    return f"## Sizes\n\n| | |\n|---|---|\n{table}{note}"


def _figures(results: dict[str, dict[str, Any]]) -> str:
    """The run's own table; nothing where there is none."""
    if not results:
        return ""
    head = f"| | {' | '.join(VARIANT_LABELS[name] for name in results)} |\n|---|{'---|' * len(results)}"
    lines = [f"| {label} | {' | '.join(cells.values())} |" for label, cells in report.figure_rows(results)]
    note = "Measured in fp32 by the run, with the same seeds for every variant."
    return "## Figures\n\n" + "\n".join([head, *lines]) + f"\n\n{note}"


def _loading(name: str, dtype: str, plain: bool) -> str:
    kind = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    how, extra = "DiffusionPipeline", "" if plain else ", trust_remote_code=True"
    why = "" if plain else (
        "\n\nIts layers have widths of their own, which `config.json` cannot say: `unet/pruned_unet.py` reads them "
        "from the safetensors file, and `trust_remote_code=True` lets diffusers use it. It is short: read it first."
    )  # fmt: skip
    return (
        "## How to load it\n\n```python\nimport torch\n"
        f"from diffusers import {how}\n\n"
        f'pipeline = {how}.from_pretrained("{name}", torch_dtype=torch.{kind}{extra})\n```\n\n'
        f'Or, in float32, with PruneDM: `prunedm.unet.load("{name}")`. '
        f"To check its patterns: `python -m prunedm verify {name}`.{why}"
    )
