"""Train a dense UNet on images of one's own, for those who have no model to prune.

The loop, the checkpoints and the losses are those of a run's training stages. The result is a diffusers
folder: ``DDPMPipeline`` loads it, and so does ``model.source``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import data, diffusion, training, unet
from . import recipe as recipes
from .quality import VALIDATION_BATCH, VALIDATION_IMAGES
from .recipe import Recipe
from .records import Step
from .seeds import derive
from .stage_training import CHECKPOINT_SECONDS, CHECKPOINT_SHARE
from .store import VARIANT_RECORD, Run, check_writable, read_json, write_json
from .training import DenseLoss, Task, Trainer, Weights, Window

if TYPE_CHECKING:
    from diffusers import UNet2DModel

STAGE = "pretrain"  # names the checkpoint and the random numbers
PLAN = "pretrain.json"  # in the folder, written first: what --resume goes on with
GROUPS = 8  # of every GroupNorm, and channels of an attention head: widths are multiples of it


class PretrainError(ValueError):
    """Options or a folder that a training cannot work with, in one line."""


@dataclass(frozen=True)
class Architecture:
    """A UNet2DModel: image side and channels, a width for each resolution, and the levels with attention.

    Level 0 is the full resolution, and each further one has half its side. ``attention_at=None``: the last
    level only; the middle of the network always attends.
    """

    size: int = 32
    channels: int = 3
    widths: tuple[int, ...] = (64, 128, 128)
    layers_per_block: int = 2
    attention_at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        levels = len(self.widths)
        attention = (levels - 1,) if self.attention_at is None else tuple(sorted(set(self.attention_at)))
        object.__setattr__(self, "attention_at", attention)
        for broken, line in (
            (self.channels not in (1, 3), f"channels={self.channels} must be 1 (grey) or 3 (colour)"),
            (not 1 <= levels <= 8, f"widths={self.widths} must be 1 to 8 widths; try 64,128,128"),
            (
                any(width % GROUPS or not GROUPS <= width <= 4096 for width in self.widths),
                f"widths={_listed(self.widths)} must be multiples of {GROUPS} up to 4096; try 64,128,128",
            ),
            (
                self.size % 2 ** (levels - 1) or not 4 <= self.size <= 1024,
                f"size={self.size} must be 4 to 1024 and divisible by {2 ** (levels - 1)} for {levels} widths; try 32",
            ),
            (not 1 <= self.layers_per_block <= 8, f"layers-per-block={self.layers_per_block} must be 1 to 8; try 2"),
            (
                any(not 0 <= level < levels for level in attention),
                f"attention-at={_listed(attention)} must be levels from 0 to {levels - 1}, or none",
            ),
        ):
            if broken:
                raise PretrainError(f"--{line}")

    @property
    def shape(self) -> data.Shape:
        return self.channels, self.size, self.size

    def build(self, seed: int) -> UNet2DModel:
        """The network with random weights, the same ones for the same seed."""
        from diffusers import UNet2DModel

        attends = [level in self.attention_at for level in range(len(self.widths))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, STAGE, "weights"))
            return UNet2DModel(
                sample_size=self.size,
                in_channels=self.channels,
                out_channels=self.channels,
                layers_per_block=self.layers_per_block,
                block_out_channels=self.widths,
                norm_num_groups=GROUPS,
                attention_head_dim=GROUPS,
                down_block_types=["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
                up_block_types=["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
            ).eval()


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers)) or "none"


@dataclass(frozen=True)
class Plan:
    """All that decides the result. Of the recipe only data, train, seed and device are read."""

    recipe: Recipe
    architecture: Architecture
    steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 10_000_000:
            raise PretrainError(f"--steps={self.steps} must be 1 to 10000000; try 20000")
        if self.recipe.train.distill:
            raise PretrainError(f"train.distill={self.recipe.train.distill} needs a teacher; leave it at 0")

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        recipe = self.recipe.model_dump(include={"data", "train", "seed", "device"})
        return recipe | {"architecture": dataclasses.asdict(self.architecture), "steps": self.steps}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Plan:
        """The inverse of :meth:`record`."""
        rest = {key: record[key] for key in ("data", "train", "seed", "device")}
        shape = {k: tuple(v) if isinstance(v, list) else v for k, v in record["architecture"].items()}
        return cls(recipes.build(rest), Architecture(**shape), record["steps"])


def begin(out: Path, plan: Plan) -> Run:
    """A folder for a new training; PretrainError where something is in it already."""
    if (out / PLAN).is_file() and not (out / VARIANT_RECORD).exists():
        raise PretrainError(f"--out {out} holds an unfinished training; go on with it by --resume, or name another")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PretrainError(f"--out {out} is not an empty folder; name another")
    check_writable(out)
    write_json(out / PLAN, plan.record())
    return Run(out)


def reopen(out: Path, device: str | None = None) -> tuple[Run, Plan]:
    """The unfinished training in a folder, on another device where one is named."""
    if (out / VARIANT_RECORD).is_file():
        raise PretrainError(f"--out {out} holds a finished model; there is nothing to resume")
    if not (out / PLAN).is_file():
        raise PretrainError(f"--out {out} holds no training ({PLAN}); leave out --resume to begin one")
    try:
        record = read_json(out / PLAN)
        plan = Plan.of(record | ({} if device is None else {"device": device}))
    except recipes.RecipeError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PretrainError(f"{out / PLAN} is damaged ({error}); restore it, or begin in another folder") from error
    return Run(out), plan


class Pretraining:
    """One training in its folder: iterate it, and ``finish``. ``save_checkpoint`` may be called between steps."""

    def __init__(self, run: Run, plan: Plan, images: data.Images) -> None:
        from diffusers import DDPMScheduler

        self.run, self.plan, self.images = run, plan, images
        self.device = unet.resolve_device(plan.recipe.device)
        self.unet = plan.architecture.build(plan.recipe.seed).to(self.device)
        self.scheduler = DDPMScheduler()
        task = Task.of(plan.recipe, self.scheduler, images.train, self.device)
        self.weights = Weights(self.unet.parameters(), plan.recipe.train, Window.of(plan.steps))
        self.trainer = Trainer(STAGE, plan.steps, task, DenseLoss(self.unet), self.weights)
        self.lines: list[dict[str, Any]] = []
        self.seconds, self.began = 0.0, time.monotonic()
        self.before = self._resume() or self.validation_loss()

    def validation_loss(self) -> float:
        """Mean noise-prediction error on held-out images, at the timesteps and noise of a run's evaluation."""
        held_out = data.to_float(self.images.held_out[:VALIDATION_IMAGES], self.device)
        seed = self.plan.recipe.eval.seed
        batches = diffusion.validation_batches(self.scheduler, held_out, VALIDATION_IMAGES, VALIDATION_BATCH, seed)
        return diffusion.validation_loss(lambda x, t: self.unet(x, t).sample, batches)

    def __iter__(self) -> Iterator[Step]:
        """Every step that is left, with checkpoints as often as a run's stages write them."""
        saved, after = time.monotonic(), CHECKPOINT_SECONDS
        try:
            for step in self.trainer:
                self.lines.append({"stage": step.stage, "step": step.step, "time": round(time.time(), 3)} | step.values)
                yield step
                if time.monotonic() - saved > after:
                    started = time.monotonic()
                    self.save_checkpoint()
                    saved = time.monotonic()
                    after = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (saved - started))
        finally:
            self._flush()

    def save_checkpoint(self) -> None:
        """All that the next step depends on; metrics go first, as lines beyond a checkpoint are dropped."""
        self._flush()
        self.run.save_checkpoint(STAGE, self.trainer.tensors(), self._identity() | {
            "done": self.trainer.done, "before": self.before, "seconds": self._elapsed(),
        })  # fmt: skip

    def finish(self) -> dict[str, Any]:
        """Write the averaged weights as a diffusers folder; its record."""
        self.weights.use_average()
        record = {
            "variant": "dense",
            "pretrain": self.plan.record(),
            "parameters": unet.parameters(self.unet),
            "images": {"train": len(self.images.train), "held_out": len(self.images.held_out),
                       "skipped": len(self.images.skipped)},
            "validation_loss": {"before": self.before, "after": self.validation_loss()},
            "seconds": round(self._elapsed(), 1),
        }  # fmt: skip
        unet.save(self.unet.requires_grad_(False).to("cpu"), self.scheduler, self.run.folder, record)
        self.run.drop_checkpoint(STAGE)
        return record

    def _resume(self) -> float | None:
        """Load the checkpoint, if there is one; the validation loss that the training began with."""
        found = self.run.load_checkpoint(STAGE)
        done = 0
        if found is not None:
            tensors, meta = found
            self._require_same(meta)
            done, self.seconds = meta["done"], meta["seconds"]
            self.trainer.load(tensors, done)
        self.run.forget_after(STAGE, done)
        return meta["before"] if found is not None else None

    def _identity(self) -> dict[str, Any]:
        """What must be as it was for a training to go on; the device may change."""
        plan = self.plan.record()
        del plan["device"]
        return {"plan": plan, "images": [len(self.images.train), len(self.images.held_out)]}

    def _require_same(self, meta: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(self._identity()))  # with lists for tuples, as in the checkpoint
        if meta["plan"] != ours["plan"]:
            raise PretrainError(f"{PLAN} has been changed since the checkpoint; restore it, or begin in another folder")
        if meta["images"] != ours["images"]:
            was, now = (" + ".join(map(str, images)) for images in (meta["images"], ours["images"]))
            raise PretrainError(
                f"data.source={self.plan.recipe.data.source} held {was} images when the training began and now {now}; "
                "restore them, or begin in another folder"
            )

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def _flush(self) -> None:
        lines, self.lines = self.lines, []
        self.run.append("metrics.jsonl", lines)


def execute(
    run: Run,
    plan: Plan,
    images: data.Images,
    on_step: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train from the last checkpoint to the end; the finished folder's record, or None when stopped before it."""
    with run.lock(), training.memory_kept():
        for skipped in images.skipped:
            run.log(f"image skipped: {skipped}")
        work = Pretraining(run, plan, images)
        for step in work:
            on_step(step)
            if stop():
                work.save_checkpoint()
                return None
        return work.finish()
