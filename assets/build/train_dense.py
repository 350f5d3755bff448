"""Trains the bundled dense DDPM further and writes ``assets/fashion-ddpm``.

    .venv/bin/python assets/build/train_dense.py --start DIR --steps 8000

``--start`` is a diffusers folder, or ``scratch`` for the same architecture with random weights.
Checkpoints go to ``.build/dense`` and an interrupted training goes on from the last one. The weights are
stored as float16: half the bytes, same samples.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from prunedm import data, diffusion  # noqa: E402
from prunedm.seeds import generator  # noqa: E402

WORK = ROOT / ".build" / "dense"
ASSET = ROOT / "assets" / "fashion-ddpm"
SEED, BATCH, PEAK_RATE, WARMUP, EMA, EVERY = 0, 64, 6e-4, 200, 0.9995, 250


def architecture() -> UNet2DModel:
    """28x28x1, (32, 64, 128), one layer a block, attention at 7x7: 2.73 M parameters."""
    return UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(32, 64, 128), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def save_checkpoint(step: int, unet, ema: EMAModel, optimizer, plan: dict[str, str]) -> None:
    tensors = {f"weight.{i}": p.detach() for i, p in enumerate(unet.parameters())}
    tensors |= {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
    for i, p in enumerate(unet.parameters()):
        for key, value in optimizer.state[p].items():
            tensors[f"adam.{i}.{key}"] = value
    temporary = WORK / "checkpoint.part"
    save_file(tensors, temporary, metadata={"step": str(step), "ema_step": str(ema.optimization_step), **plan})
    temporary.replace(WORK / "checkpoint.safetensors")


def load_checkpoint(unet, ema: EMAModel, optimizer, plan: dict[str, str]) -> int:
    from safetensors import safe_open

    path = WORK / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    if {key: meta.get(key) for key in plan} != plan:
        raise SystemExit(f"{path} belongs to another training; delete it to start {plan}")
    tensors = load_file(path)
    with torch.no_grad():
        for i, p in enumerate(unet.parameters()):
            p.copy_(tensors[f"weight.{i}"])
            ema.shadow_params[i].copy_(tensors[f"ema.{i}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[p] = {k: tensors[f"adam.{i}.{k}"] for k in keys}
    ema.optimization_step = int(meta["ema_step"])
    return int(meta["step"])


def ema_copy(unet, ema: EMAModel) -> UNet2DModel:
    copy = UNet2DModel.from_config(unet.config).eval()
    copy.load_state_dict(unet.state_dict())
    ema.copy_to(copy.parameters())
    return copy


def validate(unet: UNet2DModel, held_out: list[diffusion.NoisedBatch]) -> float:
    return diffusion.validation_loss(lambda x, t: unet(x, t).sample, held_out)


def train(start: str, steps: int) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)  # the random weights of --start scratch
    unet = architecture() if start == "scratch" else UNet2DModel.from_pretrained(
        start, subfolder="unet", use_safetensors=True, torch_dtype=torch.float32
    )  # fmt: skip
    unet.train()
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=PEAK_RATE, weight_decay=0.0, fused=True)
    ema = EMAModel(unet.parameters(), decay=EMA, foreach=True)
    images = data.load_bundled()
    batches = data.Batches(images.train, BATCH, SEED)
    held_out = diffusion.validation_batches(scheduler, data.to_float(images.held_out), 1000, 250, SEED)
    log = WORK / "log.jsonl"
    plan = {"start": start, "steps": str(steps)}
    started, first = time.time(), load_checkpoint(unet, ema, optimizer, plan)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        batch = diffusion.noised(scheduler, batches.at(step), generator(SEED, "dense", step))
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            value = diffusion.loss(lambda x, t: unet(x, t).sample, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        done = step + 1
        if done % EVERY == 0 or done == steps:
            save_checkpoint(done, unet, ema, optimizer, plan)
            record = {
                "step": done,
                "train_loss": round(value.item(), 5),
                "validation_loss": validate(ema_copy(unet, ema), held_out),
                "seconds": round(time.time() - started),
            }
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(record, flush=True)
    export(ema_copy(unet, ema), scheduler)


def export(unet: UNet2DModel, scheduler: DDPMScheduler, folder: Path = ASSET) -> None:
    DDPMPipeline(unet.half(), scheduler).save_pretrained(folder, safe_serialization=True)
    config = folder / "unet" / "config.json"
    record = json.loads(config.read_text())
    record.pop("_name_or_path", None)  # a path of this machine
    config.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    print(f"written: {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", required=True, help="diffusers folder, or 'scratch'")
    parser.add_argument("--steps", type=int, default=8000)
    arguments = parser.parse_args()
    train(arguments.start, arguments.steps)
