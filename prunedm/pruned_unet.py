"""A pruned UNet2DModel whose layers have widths of their own: read back from its folder, strictly.

This file needs nothing but diffusers. It is part of the engine, and a copy of it lies beside the weights of
each such model, so that the folder loads where PruneDM is not installed:

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

``config.json`` says how the layers are connected; how wide each one is, the shapes in the safetensors file say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model.safetensors"


class PrunedUNet(UNet2DModel):
    """UNet2DModel with the widths that its weights have."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **_: Any) -> PrunedUNet:
        """The model of a local folder, in evaluation mode. Weights are read from safetensors and loaded strictly."""
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        unet = build(config, load_file(Path(folder) / WEIGHTS), cls)
        return unet if torch_dtype is None else unet.to(torch_dtype)


def public(config: Any) -> dict[str, Any]:
    """A diffusers config without what is private to diffusers (names that begin with ``_``)."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def build(config: dict[str, Any], tensors: dict[str, Tensor], kind: type[UNet2DModel] = UNet2DModel) -> UNet2DModel:
    """A UNet of this config and these weights, pruned or not, float32 and in evaluation mode.

    Layers take the shapes of ``tensors``; RuntimeError when the names do not fit.
    """
    unet = kind.from_config(public(config))
    fit_shapes(unet, tensors)
    unet.load_state_dict({key: value.float() for key, value in tensors.items()})
    return unet.eval()


def fit_shapes(unet: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give each Conv2d, Linear and GroupNorm empty parameters of the shapes in ``tensors``."""
    for name, module in unet.named_modules():
        weight = tensors.get(f"{name}.weight")
        if weight is None or getattr(module, "weight", None) is None:
            continue
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            continue
        if module.weight.shape != weight.shape:
            module.weight = nn.Parameter(torch.empty(weight.shape))
            if module.bias is not None:
                module.bias = nn.Parameter(torch.empty(weight.shape[0]))
    sync_attributes(unet)


def sync_attributes(unet: nn.Module) -> None:
    """Make the widths that modules remember agree with their parameters.

    Up- and downsamplers assert on ``channels``; attention derives its head size from ``heads``.
    """
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = module.weight.shape[0]
    for module in unet.modules():
        kind = module.__class__.__name__
        if kind in ("Upsample2D", "Downsample2D") and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif kind == "ResnetBlock2D":
            # Samplers inside a resnet have no convolution of their own: they see its input channels.
            for sampler in (module.upsample, module.downsample):
                if hasattr(sampler, "channels") and not isinstance(sampler.conv, nn.Conv2d):
                    sampler.channels = sampler.out_channels = module.norm1.num_channels
        elif kind == "Attention":
            # Whole heads are pruned where the config says how large one is, else the one head is narrowed.
            module.heads = module.to_q.out_features // head_size(unet, module)
            module.sliceable_head_dim = module.heads
            module.scale = head_size(unet, module) ** -0.5  # some attention processors read it, others compute it


def attentions(unet: nn.Module) -> list[nn.Module]:
    """The attention layers."""
    return [module for module in unet.modules() if module.__class__.__name__ == "Attention"]


def head_size(unet: nn.Module, attention: nn.Module) -> int:
    """Channels of one attention head as the model's config says; the whole width where it says nothing."""
    return unet.config.attention_head_dim or attention.to_q.out_features
