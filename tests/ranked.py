"""What each rank of test_parallel.py does: trains by every method on the same task, scores channels and weights by what
images say of them, and keeps what came of it.

torchrun --standalone --nproc_per_node=2 tests/ranked.py FOLDER [CASE ...]
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from conftest import make_unet  # noqa: E402
from diffusers import DDPMScheduler  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from prunedm import (  # noqa: E402
    channel_scores,
    data,
    diffusion,
    importance,
    learn,
    metrics,
    parallel,
    quality,
    samples,
    sharding,
    training,
    unet,
)
from prunedm.diffusion import Timesteps  # noqa: E402
from prunedm.masked_unet import MaskedUNet  # noqa: E402
from prunedm.recipe import Eval, Train  # noqa: E402
from prunedm.stage_recipes import Mask, Prune  # noqa: E402
from prunedm.training import Trainer, Weights, Window  # noqa: E402

STEPS = 5
SLOW = Train(lr=1e-5)  # Adam moves a weight without a gradient by the sign of its rounding error, as far as this
# An odd batch, so that two ranks have slices of different sizes. "wide": the same method on a model of twice the width.
# "in parts": a rank's slice is passed in three.
CASES: dict[str, dict[str, Any]] = {
    "fine-tune": {"method": None},
    "fine-tune in parts": {"method": None, "accumulate": 3, "timesteps": "importance"},
    "fine-tune, bf16": {"method": None, "bf16": True},
    "gumbel": {"method": "gumbel", "lr": 0.15},
    "gumbel beside weights": {"method": "gumbel", "lr": 0.15, "train_weights": True},
    "gumbel in parts": {"method": "gumbel", "lr": 0.15, "accumulate": 3},
    "gumbel, bf16": {"method": "gumbel", "lr": 0.15, "bf16": True},
    "reinforce": {"method": "reinforce", "samples": 2},
    "reinforce beside weights": {"method": "reinforce", "train_weights": True},
    "reinforce beside weights in parts": {"method": "reinforce", "train_weights": True, "accumulate": 3},
    "reinforce, wide": {"method": "reinforce", "samples": 2, "channels": (32, 64)},
    "gumbel, wide": {"method": "gumbel", "channels": (32, 64)},
    "fine-tune, distilled": {"method": None, "distill": 0.5},
    "fine-tune, sharded": {"method": None, "shard": True},
    "fine-tune, sharded in parts": {"method": None, "shard": True, "accumulate": 3, "timesteps": "importance"},
    "fine-tune, sharded, bf16": {"method": None, "shard": True, "bf16": True},
    "gumbel, adaptive": {"method": "gumbel", "lr": 0.15, "temperature": "adaptive"},
    "offset": {"method": "offset", "train_weights": True},
    "sr-ste": {"method": "sr-ste", "train_weights": True},
    "reinforce, cached": {"method": "reinforce", "cached_batches": 2},
    "reinforce, refreshed": {"method": "reinforce", "flip_budget": 0.1, "tracker_decay": 0.0, "lr": 5.0},
}
COMPILED = {
    "gumbel beside weights, compiled": {"method": "gumbel", "train_weights": True, "compiled": True},
}

CHANNEL_SCORES, WEIGHT_SCORES = ("taylor", "diff-pruning", "activation"), ("fisher", "wanda")


def task_of(bf16: bool = False) -> training.Task:
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return training.Task(DDPMScheduler(), data.Batches(images, 9, 0), 0, torch.device("cpu"), bf16)


def statistics(kind: str) -> dict[str, torch.Tensor]:
    """Scores of channels, by weight, or of weights, by bank."""
    if kind in WEIGHT_SCORES:
        masked = MaskedUNet(make_unet().requires_grad_(False), 2, 4, ())
        return {str(i): scores for i, scores in enumerate(importance.weight_scores(masked, kind, task_of()))}
    spec = Prune(method=kind, calibration_images=9, calibration_steps=4)
    return channel_scores.saliencies(make_unet(), spec, task_of())


def trainer(
    method: str | None,
    accumulate: int = 1,
    timesteps: str | None = None,
    channels: tuple[int, int] = (16, 32),
    train_weights: bool = False,
    bf16: bool = False,
    compiled: bool = False,
    distill: float = 0.0,
    shard: bool = False,
    **spec: Any,
) -> tuple[Trainer, MaskedUNet | None]:
    """A short stage, and its masks where it has any."""
    task = task_of(bf16)
    task.accumulate, task.timesteps = accumulate, Timesteps(timesteps, 1000) if timesteps else None
    task.compiled, task.cycle, task.distill = compiled, spec.get("cached_batches", 0), distill
    task.teacher = make_unet(block_out_channels=(32, 64)).requires_grad_(False) if distill else None
    model, window = make_unet(block_out_channels=channels), Window.of(STEPS)
    if shard and parallel.size() > 1:
        sharding.shard(model)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert held < 0.6 * model.num_parameters(), "each rank holds about a half"
    if method is None:
        weights = Weights(model.parameters(), SLOW, window)
        return Trainer("finetune", STEPS, task, training.DenseLoss(model), weights), None
    masked = MaskedUNet(model.requires_grad_(False), 2, 4, ())
    budget = {"flip_budget": 0.2} if method in ("gumbel", "reinforce") else {}
    learner = learn.METHODS[method](masked, Mask(method=method, train_weights=train_weights, **budget | spec), STEPS, 0)
    weights = Weights(masked.trainable(), SLOW, window) if train_weights else None
    return Trainer("mask", STEPS, task, learner, weights), masked


def work(case: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The state after all steps; of each step its figures and a digest of the masks that were worn."""
    made, masked = trainer(**(CASES | COMPILED)[case])
    records = []
    for step in made:
        worn = b"" if masked is None else b"".join(mask.numpy().tobytes() for mask in masked.masks())
        records.append(step.values | {"masks": hashlib.sha256(worn).hexdigest()})
    kept = {name: tensor for name, tensor in made.tensors().items() if not tensor.is_meta}
    return {name: tensor.detach().clone().contiguous() for name, tensor in kept.items()}, records


def judged(folder: Path) -> tuple[dict[str, Any], int]:
    """All figures of a model's quality, in chunks and batches of few images; and how many chunks were sampled here."""
    with parallel.one_writer() as writes:
        if writes:
            unet.save(make_unet(), DDPMScheduler(), folder / "model", {"variant": "dense"})
    gen, sampled = torch.Generator().manual_seed(2), []
    train, held_out = (torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=gen) for n in (40, 24))

    def sample(*given: Any, **named: Any) -> torch.Tensor:
        sampled.append(1)
        return real(*given, **named)

    real, few = diffusion.sample, {samples: ("MOST", 4), quality: ("VALIDATION_BATCH", 8), metrics: ("AT_ONCE", 16)}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(diffusion, "sample", sample))
        for module, (name, value) in few.items():
            stack.enter_context(mock.patch.object(module, name, value))
        settings, images = Eval(images=18, steps=2), data.Images("random", train, held_out)
        judge = quality.Judge.of(settings, images, torch.device("cpu"))
        target = quality.Target(unet.load(str(folder / "model")), folder / "model", folder / "sheet.png", is_dense=True)
        *_, figures = judge.quality(target)
    return figures, len(sampled)


def main() -> int:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    parallel.join()
    if not sys.argv[2:]:
        (folder / f"judged.{parallel.rank()}.json").write_text(json.dumps(judged(folder)))
    for case in sys.argv[2:] or CASES:
        tensors, records = work(case)
        save_file(tensors, folder / f"{case}.{parallel.rank()}.safetensors")
        (folder / f"{case}.{parallel.rank()}.json").write_text(json.dumps(records))
    for kind in (*CHANNEL_SCORES, *WEIGHT_SCORES) if not sys.argv[2:] else ():
        save_file({name: t.contiguous() for name, t in statistics(kind).items()}, folder / f"{kind}.{parallel.rank()}")
    (folder / f"ranks.{parallel.rank()}").write_text(str(parallel.size()))
    return 0


if __name__ == "__main__":
    parallel.leave(main())
