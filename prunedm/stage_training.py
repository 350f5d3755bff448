"""What the training stages of a run share: from the checkpoint on, with alerts, previews, validation and checkpoints;
whether ranks share the training state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from . import data, diffusion, giveway, parallel, pictures, sharding, store, unet
from .diagnostics import RISING, LossWatch
from .failure import Diverged
from .failure import remedy as remedy_of
from .learn import FixedMasks
from .mask_stage import MaskStage
from .progress import MetricsWriter
from .recipe import Recipe
from .records import Step
from .samples import image_seeds
from .store import Run, StoreError
from .training import Learner, Task, Trainer, Weights, Window

CHECKPOINT_SECONDS = 20.0
CHECKPOINT_SHARE = 20  # and at most a twentieth of the time goes into writing them
PREVIEW_IMAGES, PREVIEW_STEPS = 16, 10
VALIDATED = 64  # held-out images of the losses on the way: the evaluation's first ones, with the same noise


class StageTraining:
    """The base of the run's stages. ``save_checkpoint`` may be called between any two steps."""

    model: unet.Diffusion  # as the stage before left it
    images: data.Images

    def __init__(self, run: Run, recipe: Recipe, writer: MetricsWriter) -> None:
        self.run, self.recipe, self.writer = run, recipe, writer
        self.device = unet.resolve_device(recipe.device)
        self.trainer: Trainer | None = None
        self.saved, self.checkpoint_after = time.monotonic(), CHECKPOINT_SECONDS
        self.saved_step = 0  # of the stage at hand

    def save_checkpoint(self) -> None:
        """The state of the training stage at hand, if one is running.

        Metrics go first: lines beyond a checkpoint are dropped on resume, missing ones are lost.
        """
        started = time.monotonic()
        if self.trainer is not None:
            self.writer.flush()
            self.run.save_checkpoint(self.trainer.stage, self.trainer.tensors(), {"done": self.trainer.done})
            self.saved_step = self.trainer.done
        self.saved = time.monotonic()
        self.checkpoint_after = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (self.saved - started))

    def _weights_of(self, model: torch.nn.Module, window: Window, steps: int) -> Weights:
        """A model's weights in training without masks, in shards where ranks share the state of so many steps."""
        if self._is_shared(steps):
            self.run.log(f"{parallel.size()} ranks share the training state")
            sharding.shard(model)
        return Weights(model.parameters(), self.recipe.train, window)

    def _is_shared(self, steps: int) -> bool:
        """Whether ranks share the state of a training of so many steps."""
        return self.recipe.train.shard and parallel.size() > 1 and steps > 0

    def _require_equal_parts(self) -> None:
        """ValueError unless each rank passes its slice of a batch in as many parts as the others."""
        size, of = min(self.recipe.data.batch_size, len(self.images.train)), self.recipe.train.accumulate
        if size // parallel.size() < of:
            raise ValueError(
                f"train.accumulate={of}: {parallel.size()} ranks that share a model need as many parts each of a batch "
                f"of {size}; set it to {max(1, size // parallel.size())} or less"
            )

    def _train(
        self,
        stage: str,
        steps: int,
        task: Task,
        learner: Learner,
        weights: Weights | None,
        masks: MaskStage | None = None,
        window: Window | None = None,
    ) -> Iterator[Step]:
        """Iterate a trainer from its checkpoint, with snapshots, previews and checkpoints.

        window: the part of the stage's steps to train, where it is not the whole.
        """
        trainer = Trainer(stage, steps, task, learner, weights, window)
        found = self.run.load_checkpoint(stage)
        if found is not None and found[1]["done"] > trainer.done:  # else it is that of an earlier round
            self._go_on(trainer, *found)
        lost = sum(record["stage"] == stage and record["step"] > trainer.done for record in self.run.metrics())
        if lost:
            self.run.log(
                f"stage {stage} goes on from step {trainer.done}: {lost} steps after its checkpoint are redone"
            )
        self.run.forget_after(stage, trainer.done)
        self.trainer, self.saved, self.saved_step = trainer, time.monotonic(), trainer.done
        self.writer.begin(stage, trainer.done, steps)
        previewed = {max(1, steps // 2), max(1, steps // 4), max(1, steps * 3 // 4)} if steps > 1 else set()
        if steps < 200:
            previewed = {steps // 2} & previewed
        if window is not None:
            previewed = set()  # the cuts are drawn
        if parallel.decide(trainer.done in previewed and not self.run.sample_path(stage, trainer.done).exists()):
            self._preview(stage, trainer.done, learner)  # it was stopped before it drew
        watch = self._loss_watch(trainer)
        for step in self._watched(trainer):
            self._follow_loss(watch, trainer, step)
            if masks is not None:
                for alert in masks.follow(step, trainer.rates()):
                    self._alert(stage, step.step, **alert)
            if is_due(step.step, steps, self.recipe.train.validations):
                step.values["validation_loss"] = self._validation_loss(learner)
            yield step
            # After the step is recorded: drawing gives way, with a checkpoint, which must hold whole steps.
            if step.step in previewed:
                self._preview(stage, step.step, learner)
            if parallel.decide(time.monotonic() - self.saved > self.checkpoint_after):
                self.save_checkpoint()
        if trainer.done > self.saved_step:
            self.save_checkpoint()
        self.trainer = None  # what follows changes the weights, and is no state to go on from

    def _go_on(self, trainer: Trainer, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Load a checkpoint; StoreError where it lacks what this version keeps, as one of an earlier version may."""
        try:
            trainer.load(tensors, record["done"])
        except KeyError as error:
            raise StoreError(
                f"{self.run.checkpoint(trainer.stage)} has no {error}, as one of another version of prunedm; "
                "delete the file and resume: its stage is done again"
            ) from error

    def _watched(self, trainer: Trainer) -> Iterator[Step]:
        """The trainer's steps; one that ends in no number leaves an alert."""
        try:
            yield from trainer
        except Diverged as error:
            text, _, remedy = str(error).partition("; ")
            self._alert(trainer.stage, trainer.done, "not a number", text, remedy)
            raise

    def _loss_watch(self, trainer: Trainer) -> LossWatch:
        """With the losses and the alarm of this stage so far."""
        rising = trainer.weights is not None and trainer.weights.window
        since = rising.first + round((rising.last - rising.first) * self.recipe.train.warmup) if rising else 0
        losses = [(r["step"], r["loss"]) for r in self.run.metrics() if r["stage"] == trainer.stage]
        told = [e.get("stage") for e in self.run.events() if e.get("what") == RISING]
        return LossWatch(since, losses, trainer.stage in told)

    def _follow_loss(self, watch: LossWatch, trainer: Trainer, step: Step) -> None:
        text = watch.alarm(step.step, step.values["loss"])
        changes = remedy_of(Diverged(text, trainer.rates()), self.recipe, trainer.stage) if text else {}
        if changes:
            lower = " and ".join(f"{field} to {value:g}" for field, value in changes.items())
            self._alert(trainer.stage, step.step, RISING, text, f"stop the run and lower {lower}", changes=changes)

    def _task(self) -> Task:
        """The recipe's task; the teacher, where one is asked for, is the dense variant."""
        teacher = None
        if self.recipe.train.distill:
            teacher = unet.load_unet(self.run.variant("dense") / "unet").requires_grad_(False).to(self.device)
        return Task.of(self.recipe, self.model.scheduler, self.images.train, self.device, teacher)

    def _alert(self, stage: str, step: int, what: str, text: str, remedy: str, **more: Any) -> None:
        """more: ``changes``, fields of the recipe to the values to try next, of the remedy or of a part of it."""
        self.run.event("alert", stage=stage, step=step, what=what, text=text, remedy=remedy, **more)
        self.run.log(f"ALERT ({what}): {text}; {remedy}")

    def _preview(self, stage: str, step: int, learner: Learner) -> None:
        """Draw the model of the moment."""
        self._draw(stage, step, _of_the_moment(learner, for_all=False))

    def _validation_loss(self, learner: Learner) -> float:
        """Of the model of the moment. It does not give way: the step that it belongs to is not recorded yet."""
        model, seed = _of_the_moment(learner), self.recipe.eval.seed
        images = data.to_float(self.images.held_out[:VALIDATED], self.device)
        batches = diffusion.validation_batches(self.model.scheduler, images, VALIDATED, VALIDATED, seed)
        with giveway.listening(None):
            return diffusion.validation_loss(lambda x, t: model(x, t).sample, batches)

    def _draw(self, stage: str, step: int, model: torch.nn.Module) -> None:
        """The same few seeds again, so that progress can be seen. Rank 0's part."""
        if not parallel.is_writer():
            return
        seeds = image_seeds(self.recipe.eval.seed, range(PREVIEW_IMAGES))
        images = diffusion.sample(model, self.model.scheduler, seeds, "ddim", PREVIEW_STEPS)
        info = {"run": self.run.id, "stage": stage, "step": step, "sampler": "ddim", "steps": PREVIEW_STEPS}
        info["recipe"] = self.recipe.to_yaml()
        png = pictures.sheet_png(diffusion.to_uint8(images), info)
        store.write_atomic(self.run.sample_path(stage, step), png)
        self.run.event_anew("sample", {"stage": stage, "step": step})


def is_due(step: int, steps: int, times: int) -> bool:
    """Whether what is done ``times`` times in a stage, evenly spaced and at its end, is done after this step."""
    return step > 0 and step * times // steps > (step - 1) * times // steps


def _of_the_moment(learner: Learner, for_all: bool = True) -> torch.nn.Module:
    """The model as it is now, under the masks that would be chosen; where ranks share it, a whole one on all of them
    or on rank 0."""
    if not isinstance(learner, FixedMasks):
        return unet.whole_model(learner.unet, for_all)
    learner.masked.wear(learner.choice())
    return learner.masked.unet
