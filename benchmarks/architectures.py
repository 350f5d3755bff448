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

CONDITIONED = {  # the UNets of Stable Diffusion 1.5 (860 M) and Stable Diffusion XL base 1.0 (2,567 M)
    "sd15": {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    },
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


def conditioned(name: str) -> dict:
    """The config of a text-conditioned UNet, as its config.json has it; what is not given are diffusers' defaults."""
    return {"_class_name": "UNet2DConditionModel"} | CONDITIONED[name]


def build(name: str) -> UNet2DModel:
    """The UNet of that name, the same weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return UNet2DModel(**CONFIGS[name]).eval()
