"""A run of a few seconds, where a benchmark is of what lies around runs and not of the runs themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402
from PIL import Image  # noqa: E402

from prunedm import recipe as recipes  # noqa: E402
from prunedm import unet  # noqa: E402
from prunedm.recipe import Recipe  # noqa: E402

TINY = {  # a UNet of about 60 k parameters
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": (16, 32), "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SHORT = {  # a run of a few seconds
    "device": "cpu",
    "prune": {"target": 0.3, "finetune_steps": 1},
    "mask": {"steps": 1, "recover_steps": 1},
    "eval": {"images": 8, "steps": 2, "noise_floor": False},
}


def recipe(runs_dir: Path, **changes: Any) -> Recipe:
    """A recipe for the model and the images of :func:`furnish`."""
    own = {"model": {"source": str(runs_dir / "tiny")}, "data": {"source": str(runs_dir / "images"), "batch_size": 8}}
    return recipes.build(recipes.merge(recipes.merge(SHORT, own), changes))


def furnish(runs_dir: Path) -> None:
    """A tiny model and some images of noise, beside the runs."""
    torch.manual_seed(0)
    unet.save(UNet2DModel(**TINY).eval(), DDPMScheduler(), runs_dir / "tiny", {"variant": "dense"})
    (runs_dir / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(runs_dir / "images" / f"{i:02}.png")
