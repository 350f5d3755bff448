"""Architectures of models on the hub, built from their configs with random weights: nothing is downloaded."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel

COMMON = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "norm_num_groups": 32, "attention_head_dim": None,
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip
CONFIGS = {  # google/ddpm-cifar10-32 (35.7 M) and google/ddpm-celebahq-256 (113.7 M)
    "cifar10": COMMON | {
        "sample_size": 32, "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "celebahq": COMMON | {
        "sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    },
}  # fmt: skip


def build(name: str) -> UNet2DModel:
    """The UNet of that name, the same weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return UNet2DModel(**CONFIGS[name]).eval()
