"""A UNet as an ONNX file that was checked against torch and timed, with a JSON record beside it.

Inputs: ``sample`` [B, C, H, W] float32 and ``timestep`` [B] int64; output: ``output`` [B, C', H, W]. B is
dynamic, H and W are the model's own. The file's metadata carries the layers' claimed N:M patterns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import data, environment, latency, onnx_graph, onnx_int8
from .latency import OnnxModel
from .onnx_graph import OnnxError
from .recipe import Data
from .store import write_atomic, write_json
from .unet import Diffusion, image_shape

if TYPE_CHECKING:
    from onnx import ModelProto

SCHEMA = 1
OPSET = 17
TOLERANCE = 1e-3  # largest allowed difference from torch in fp32
CHECKED_BATCHES = (1, 3)
CHECKED_INPUTS = 16  # noisy inputs over which the error of int8 is taken
LARGEST = 2**31 - 2**20  # bytes; an ONNX file is one protobuf message of less than 2 GiB
INT8 = ("none", *onnx_int8.METHODS)


def write(
    model: Diffusion,
    patterns: dict[str, str],
    path: Path,
    int8: str = "none",
    data_spec: Data | None = None,
    origin: dict[str, Any] | None = None,
    rounds: int = latency.ROUNDS,
) -> dict[str, Any]:
    """The ONNX file at ``path`` and its record at ``path.json``; returns the record.

    OnnxError when the file's fp32 output is off by TOLERANCE or more, when int8 gives no finite output, or
    when the model is too large. Nothing is written then.
    """
    floats = build(model.unet, patterns)
    record: dict[str, Any] = {"schema": SCHEMA, "format": "onnx", "file": path.name, **(origin or {})}
    record |= {"opset": OPSET, "int8": int8, "patterns": patterns, "tolerance": TOLERANCE}
    sessions: dict[str, nn.Module] = {"torch eager": model.unet}
    sessions["onnxruntime fp32"] = OnnxModel(floats.SerializeToString(), model.image_shape)
    record["difference_from_torch"] = check(model, sessions["onnxruntime fp32"])
    made = floats
    if int8 != "none":
        images = onnx_int8.images_of(model, data_spec)
        x, t, where = onnx_int8.noisy_inputs(model, onnx_int8.IMAGES, "calibration", images)
        made = _with_claims(onnx_int8.METHODS[int8](floats, (x, t)), patterns)
        sessions[f"onnxruntime int8 {int8}"] = OnnxModel(made.SerializeToString(), model.image_shape)
        record["int8_error"] = int8_error(model, *list(sessions.values())[1:], images)
        if int8 == "static":
            record["calibration"] = where
    content = made.SerializeToString()
    record["latency"] = measured(sessions, rounds)
    record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "versions": versions()}
    write_atomic(path, content)
    write_json(path.with_suffix(".json"), record)
    return record


def build(unet: nn.Module, patterns: dict[str, str]) -> ModelProto:
    """The ONNX graph of a float32 UNet on the CPU, weights named by layer, claims in its metadata."""
    onnx_graph.require()
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    if size > LARGEST:
        raise OnnxError(
            f"the model has {size / 2**30:.1f} GiB of weights and an ONNX file holds 2; export it as packed"
        )
    channels, height, width = image_shape(unet)
    example = (torch.zeros(2, channels, height, width), torch.zeros(2, dtype=torch.long), None, False)
    axes = {name: {0: "batch"} for name in ("sample", "timestep", "output")}
    names = {"input_names": ["sample", "timestep"], "output_names": ["output"], "dynamic_axes": axes}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's remarks on constants: dynamic batch is checked below
        path = Path(folder) / "unet.onnx"
        try:
            # The older exporter: needs no further package, and keeps layers apart, by their names.
            torch.onnx.export(unet.eval(), example, str(path), dynamo=False, opset_version=OPSET, **names)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise OnnxError(f"torch cannot export this UNet to ONNX ({' '.join(str(error).split())[:160]})") from error
        made = onnx_graph.load(path)
    onnx_graph.name_weights(made, unet)
    missing = set(patterns) - set(onnx_graph.weights(made))
    if missing:
        raise OnnxError(f"the weight of {min(missing)} did not reach the ONNX graph; report this model")
    return _with_claims(made, patterns)


def _with_claims(made: ModelProto, patterns: dict[str, str]) -> ModelProto:
    found = versions()
    values = {onnx_graph.CLAIMS: json.dumps(patterns), "prunedm.version": found["prunedm"]}
    onnx_graph.set_metadata(made, values)
    return made


@torch.no_grad()
def check(model: Diffusion, session: OnnxModel) -> dict[str, float]:
    """Largest absolute difference from torch at each checked batch size; OnnxError where it is too large."""
    found = {}
    for batch in CHECKED_BATCHES:
        x, t, _ = onnx_int8.noisy_inputs(model, batch, f"check {batch}", None)
        difference = (session(x, t) - model.unet(x, t).sample).abs().max().item()
        if not difference < TOLERANCE:
            raise OnnxError(
                f"ONNX Runtime differs from torch by {difference:.2e} at batch {batch}, {TOLERANCE} is allowed; "
                "report this model, or export it as diffusers or packed"
            )
        found[f"batch {batch}"] = difference
    return found


def int8_error(model: Diffusion, floats: OnnxModel, small: OnnxModel, images: data.Images | None) -> dict[str, Any]:
    """How far int8 is from fp32, on inputs that calibration did not see.

    largest and mean: absolute differences. relative_rms: root mean square of the difference over that of the
    fp32 output. OnnxError when the output is not finite.
    """
    x, t, where = onnx_int8.noisy_inputs(model, CHECKED_INPUTS, "int8 error", images)
    expected = floats(x, t)
    difference = small(x, t) - expected
    if not difference.isfinite().all():
        raise OnnxError("the int8 model's output is not finite; use --int8 weights or none")
    share = (difference.square().mean() / expected.square().mean().clamp(min=1e-12)).sqrt().item()
    sizes = {"largest": difference.abs().max().item(), "mean": difference.abs().mean().item()}
    return sizes | {"relative_rms": share, "inputs": where}


def measured(sessions: dict[str, nn.Module], rounds: int) -> dict[str, Any]:
    """Milliseconds of one call at batch 1, interleaved: median, p10, p90, and the threads both engines had."""
    for timed in latency.measure(sessions, batch=1, rounds=rounds):
        pass
    figures = {name: dataclasses.asdict(figure) for name, figure in timed.items()}
    return {"threads": torch.get_num_threads(), "rounds": rounds, "milliseconds": figures}


def versions() -> dict[str, str]:
    """Versions of what made and checked the file."""
    import onnx
    import onnxruntime

    found = environment.versions()
    kept = {name: found[name] for name in ("prunedm", "python", "torch", "diffusers", "numpy")}
    return kept | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
