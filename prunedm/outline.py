"""UNets without their weights: built from a config on meta tensors, narrowed as stage 1 would, counted.

What a training step costs is counted by running it on fake tensors: torch's meta tensors that remember that they
lie on a CPU, so that autocast and fused attention choose the same operations as on a real one. No memory is taken.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import devices, ledger, training, unet
from .unet import ModelError

TEXT_TOKENS = 77  # of the text encoder (CLIP) that conditions Stable Diffusion's UNets
TIME_IDS = 6  # sizes and crops beside the pooled text of SDXL
PLAIN = ("UNet2DModel", "PrunedUNet")
KINDS = (*PLAIN, "UNet2DConditionModel")
REFINEMENTS = 3
FEW, MANY = 11, 13  # images: unlike any other dimension, which could make views of copies


@dataclass
class Outline:
    """A UNet of a config whose weights take no memory. ``mode``: the fake tensors' own; None for a real UNet."""

    unet: nn.Module
    config: dict[str, Any]
    mode: Any = None

    @property
    def parameters(self) -> int:
        return unet.parameters(self.unet)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return unet.image_shape(self.unet)


# --- found and built -------------------------------------------------------------------------------
def find(source: str) -> Outline:
    """The outline of ``bundled``, a config file, a UNet or pipeline folder with or without weights, a packed file
    or a hub id (of which the config alone is fetched). ModelError in one line."""
    path = unet.bundled.MODEL if source == unet.bundled.NAME else Path(source).expanduser()
    if not path.exists():
        path = unet.download(source, ["*.json"])
    if path.is_file() and path.suffix != ".json":
        found = unet.load_packed(path).unet
        config = dict(found.config) | {"_class_name": PLAIN[0]}
        return build(config, {name: tuple(t.shape) for name, t in found.state_dict().items()}, str(path))
    folder = unet.unet_folder(path)
    config = _config(path if path.is_file() else folder / "config.json")
    files = [] if path.is_file() else unet.weight_files(folder)
    shapes = _shapes(unet.complete_files(folder)) if files and config["_class_name"] in PLAIN else None
    return build(config, shapes, source)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        kind = error.__class__.__name__
        raise ModelError(f"model config {path} cannot be read ({kind}); give a UNet's config.json") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ModelError(f"model config {path} is of {kind or 'no known class'}; plans know {', '.join(KINDS)}")
    if config.get("sample_size") is None:
        raise ModelError(f"model config {path} has no sample_size; write the side of images or latents there")
    return config


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read ({error.__class__.__name__}); restore it") from error
    return found


def build(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None, origin: str = "config") -> Outline:
    """An outline of a config; ``shapes``: of weights with widths of their own. ModelError names ``origin``."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the meta tensors that give way
    found = _on_meta(config, shapes, origin).eval()
    with mode:
        found.to_empty(device="cpu")
    return Outline(found, config, mode)


def _on_meta(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None, origin: str) -> nn.Module:
    import diffusers

    from .pruned_unet import fit_shapes, public

    plain = config["_class_name"] in PLAIN
    kind = diffusers.UNet2DModel if plain else diffusers.UNet2DConditionModel
    try:
        with torch.device("meta"):
            found = kind.from_config(public(config))
            if shapes is not None:
                fit_shapes(found, {name: torch.empty(shape) for name, shape in shapes.items()})
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
        text = " ".join(str(error).split())[:160]
        raise ModelError(f"model {origin} cannot be built ({text}); give the config of a trained UNet") from error
    return found


def example(found: nn.Module, batch: int) -> dict[str, Any]:
    """Inputs of one call: ``[B, C, H, W]``, timesteps ``[B]`` and, where the UNet takes text, its embedding."""
    config, place = found.config, next(found.parameters()).device
    given = {
        "sample": torch.zeros(batch, *unet.image_shape(found), device=place),
        "timestep": torch.zeros(batch, dtype=torch.long, device=place),
    }
    if not hasattr(found, "encoder_hid_proj"):
        return given
    unknown = [name for name in ("class_embed_type", "encoder_hid_dim_type") if config.get(name)]
    extra = config.get("addition_embed_type")
    if unknown or extra not in (None, "text_time"):
        name = (unknown or ["addition_embed_type"])[0]
        raise ModelError(f"model config has {name}={config[name]}; plans know text alone and text_time")
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else max(width)
    given["encoder_hidden_states"] = torch.zeros(batch, TEXT_TOKENS, width, device=place)
    if config.get("num_class_embeds"):
        given["class_labels"] = torch.zeros(batch, dtype=torch.long, device=place)
    if extra:
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        text, ids = torch.zeros(batch, pooled, device=place), torch.zeros(batch, TIME_IDS, device=place)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    return given


# --- narrowed ----------------------------------------------------------------------------------------
def narrowed(outline: Outline, target: float) -> Outline:
    """The outline of an evenly narrower model, with about ``1 - target`` of the parameters.

    Widths move in steps of GroupNorm's groups and the heads, so the share is met nearly, as in stage 1.
    """
    config = dict(outline.unet.config) | {"_class_name": outline.config["_class_name"]}  # with its defaults
    goal = (1 - target) * outline.parameters
    tried: dict[tuple[int, ...], int] = {}
    ratio = math.sqrt(1 - target)
    for _ in range(REFINEMENTS):
        widths = _widths(config, ratio)
        if widths in tried:
            break
        tried[widths] = unet.parameters(_on_meta(config | {"block_out_channels": widths}, None, "narrowed"))
        ratio *= math.sqrt(goal / tried[widths])
    best = min(tried, key=lambda widths: abs(tried[widths] - goal))
    return build(config | {"block_out_channels": best}, None, "narrowed")


def _widths(config: dict[str, Any], ratio: float) -> tuple[int, ...]:
    heads, widths = config["attention_head_dim"] or 1, config["block_out_channels"]
    per_level = heads if isinstance(heads, list | tuple) else [heads] * len(widths)
    found = []
    for width, head in zip(widths, per_level):
        step = math.lcm(config["norm_num_groups"] or 1, head)
        found.append(max(step, round(width * ratio / step) * step))
    return tuple(found)


# --- counted -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Trace:
    """The operations of a pass at one batch size, in their order, ``[ops]`` each.

    flops; moved: bytes; kind: places in devices.PRODUCTS; live: bytes held after each beside the weights; gradients:
    those of them that are the weights' gradients. forward: how many of the operations belong to the forward pass.
    saved: bytes kept for backward.
    """

    flops: np.ndarray
    moved: np.ndarray
    kind: np.ndarray
    live: np.ndarray
    gradients: np.ndarray
    forward: int
    saved: float

    def forward_only(self) -> Trace:
        """The operations of the forward pass."""
        cut = {name: getattr(self, name)[: self.forward] for name in (*GROWING, "kind")}
        return replace(self, **cut)

    @property
    def macs(self) -> float:
        return float(self.flops.sum()) / 2

    @property
    def peak(self) -> float:
        """Most bytes held at once beside the weights, gradients counted as they come."""
        return float(self.live.max())

    @property
    def activations(self) -> float:
        """The same without the weights' gradients."""
        return float((self.live - self.gradients).max())


GROWING = ("flops", "moved", "live", "gradients")  # with the batch, each on a line of its own


@dataclass(frozen=True)
class Costs:
    """Traces at two batch sizes: costs have a part of the weights and a part of each image."""

    few: Trace
    many: Trace

    def at(self, batch: float) -> Trace:
        """The trace of any batch size, each operation on the line through the two."""
        share = (batch - FEW) / (MANY - FEW)

        def between(name: str) -> Any:
            low, high = getattr(self.few, name), getattr(self.many, name)
            return low + (high - low) * share

        return replace(self.few, **{name: between(name) for name in (*GROWING, "saved")})


def costs(outline: Outline, bf16: bool, kind: str, backward: bool = True) -> Costs:
    """Costs of a training step's passes (``backward``), or of a call without gradients.

    ModelError for a network whose operations are not the same for every batch.
    """
    few, many = (trace(outline, size, bf16, kind, backward) for size in (FEW, MANY))
    if not np.array_equal(few.kind, many.kind):
        raise ModelError("model passes other operations for other batch sizes; plans know networks that do not")
    return Costs(few, many)


def trace(outline: Outline, batch: int, bf16: bool, kind: str, backward: bool = True) -> Trace:
    """Run one pass and count it. kind: cpu, cuda or mps, which differ under autocast and in their convolutions."""
    found = outline.unet
    found.requires_grad_(backward)
    for parameter in found.parameters():
        parameter.grad = None
    with ExitStack() as stack:
        stack.enter_context(outline.mode or nullcontext())
        given = example(found, batch)
        book = stack.enter_context(ledger.Ledger())
        stack.enter_context(torch.set_grad_enabled(backward))
        with ledger.saved_tensors(found.parameters()) as saved, _numerics(found, bf16, kind):
            prediction = found(**given).sample
        forward = len(book.lines)
        if backward:
            prediction.float().square().mean().backward()
        lines = book.table()
        gradients = book.made(p.grad for p in found.parameters() if p.grad is not None)
    for parameter in found.parameters():
        parameter.grad = None
    flops, moved, of, live = lines.T
    if kind == "cpu":  # its convolutions copy what they read and write into a layout of their own
        live = live + np.where(of >= devices.CONVOLUTIONS, moved, 0)
    return Trace(
        *(column.astype(float) for column in (flops, moved)), of, live, gradients, forward, sum(saved.values())
    )


def _numerics(found: nn.Module, bf16: bool, kind: str) -> ExitStack:
    """Autocast as training does it on that kind of device, with the fake CPU's means.

    On a GPU, autocast runs norms in fp32 and attention is fused; on a CPU, norms follow their input and bf16 attention
    goes by plain products (training.numerics).
    """
    stack = ExitStack()
    if not bf16:
        return stack
    if kind == "cpu":
        stack.enter_context(training.numerics(found, torch.device("cpu"), True))
        return stack
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    for module in found.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            stack.callback(module.register_forward_pre_hook(_in_fp32).remove)
    return stack


def _in_fp32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)
