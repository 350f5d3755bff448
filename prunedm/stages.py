"""The stages of a run: each reads what the stage before left in the run folder and leaves its own result.

Within a training stage the checkpoint holds everything that the next step depends on, so a run goes on
from any step of any stage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from . import (
    data,
    diffusion,
    evaluate,
    forecast,
    giveway,
    mask_stage,
    model_card,
    parallel,
    pictures,
    report_page,
    sharding,
    store,
    structured,
    unet,
)
from .diagnostics import RISING, LossWatch
from .failure import Diverged
from .failure import remedy as remedy_of
from .inputs import load_inputs, rounding
from .learn import FixedMasks
from .mask_stage import MaskStage
from .progress import MetricsWriter
from .pruned_unet import build, public
from .recipe import Recipe
from .records import STAGES, Step
from .samples import image_seeds
from .stage_recipes import CALIBRATED, FIXED_METHODS
from .store import Run, StoreError
from .training import DenseLoss, Learner, Task, Trainer, Weights, Window

CHECKPOINT_SECONDS = 20.0
CHECKPOINT_SHARE = 20  # and at most a twentieth of the time goes into writing them
PREVIEW_IMAGES, PREVIEW_STEPS = 16, 10
SHARED = ("prune", "finetune")  # stages whose training state ranks may share
VALIDATED = 64  # held-out images of the losses on the way: the evaluation's first ones, with the same noise


class Pipeline:
    """The stages of one run. ``save_checkpoint`` may be called between any two steps."""

    def __init__(self, run: Run, recipe: Recipe, writer: MetricsWriter) -> None:
        self.run, self.recipe, self.writer = run, recipe, writer
        self.device = unet.resolve_device(recipe.device)
        self.trainer: Trainer | None = None
        self.saved, self.checkpoint_after = time.monotonic(), CHECKPOINT_SECONDS
        self.saved_step = 0  # of the stage at hand

    def stages(self) -> Iterator[Step]:
        """Every step of every stage that is not done yet."""
        runs_dir = self.run.folder.parent
        dense = self.run.variant("dense") if "dense" in self.run.variants() else None
        known = self.run.has_checkpoint(mask_stage.M0)
        self.model, self.images = load_inputs(self.recipe, runs_dir, dense, masks_known=known)
        self._redo_what_is_missing()
        if self._shares_state():
            self._require_equal_parts()
        for skipped in self.images.skipped:
            self.run.log(f"image skipped: {skipped}")
        if "dense" not in self.run.variants():
            self._draw("dense", 0, self.model.unet)
            self._save_variant("dense", self.model.unet)  # last: where it is found, this is done
        for stage in STAGES:
            if stage in self.writer.state.stages_done:
                continue
            self.run.event("stage", stage=stage)
            self.run.log(f"stage {stage}")
            self.writer.begin(stage, 0, 0)
            yield from getattr(self, f"_{stage}")()
            self.writer.flush()  # a stage whose last lines cannot be written is not done
            self.writer.state.stages_done.append(stage)
            self.writer.flush()
            self.run.drop_checkpoint(stage)
            self.run.event("stage_done", stage=stage)

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

    def _redo_what_is_missing(self) -> None:
        """A stage whose result was deleted (say, because it was damaged) is not done any more."""
        done = self.writer.state.stages_done
        spec = self.recipe
        results = {
            "prune": spec.prune.target == 0 or "structured" in self.run.variants() or self.run.has_checkpoint("pruned"),
            "finetune": spec.prune.target == 0 or "structured" in self.run.variants(),
            "mask": spec.mask.method == "none"
            or "nm" in self.run.variants()
            or (self.run.has_checkpoint("masked") and self.run.has_checkpoint(mask_stage.M0)),
            "recover": spec.mask.method == "none" or "nm" in self.run.variants(),
        }
        for stage, there in results.items():
            if stage in done and not there:
                self.run.log(f"the result of stage {stage} is gone: it is done again, with all that follows")
                del done[done.index(stage) :]
                return

    # --- stages ------------------------------------------------------------------------------
    def _prune(self) -> Iterator[Step]:
        """Cut in rounds, each to its part of the target, with training between them."""
        spec = self.recipe.prune
        of = max(1, (spec.rounds - 1) * spec.round_steps)
        if spec.target > 0:
            yield Step("prune", 0, of)
            found = self.run.load_checkpoint("pruned")
            if found is not None:
                self._take_pruned(*found)
            done = found[1]["round"] if found is not None else 0
            for number in range(done, spec.rounds):
                if number:
                    yield from self._train_between(number, of)
                self._cut(number + 1)
        yield Step("prune", of, of)

    def _cut(self, number: int) -> None:
        """The cut of this round (from 1), to its share of the target."""
        spec = self.recipe.prune
        wanted = structured.round_of(spec, number)
        whole = unet.load_unet(self.run.variant("dense") / "unet")
        dense = structured.Dense.of(whole, spec, rounding(self.recipe), self.device)
        steps = self.model.scheduler.config.num_train_timesteps
        task = self._task() if spec.method in CALIBRATED else None
        pruned, found = structured.prune(
            self.model.unet.to("cpu"), wanted, rounding(self.recipe), self.recipe.seed, task, dense, steps
        )
        self.model.unet = pruned
        record = found.as_dict() | {"round": number, "rounds": spec.rounds}
        self.run.event_anew("pruned", {"round": number}, report=record)
        if found.reason:
            self.run.log(f"prune.target={wanted.target:.3g} of {spec.of} not met: {found.reason}")
        self._draw("prune", number if spec.rounds == 1 else (number - 1) * spec.round_steps, pruned)
        # Last: a run that goes on and finds this checkpoint does not come here again.
        self.run.save_checkpoint("pruned", pruned.state_dict(), record | {"config": public(pruned.config)})
        self.run.drop_checkpoint("prune")

    def _train_between(self, number: int, of: int) -> Iterator[Step]:
        """Fine-tuning after the cut of this round."""
        spec, model = self.recipe.prune, self.model.unet.to(self.device)
        if not spec.round_steps:
            return
        window = Window((number - 1) * spec.round_steps, number * spec.round_steps)
        weights = self._weights_of(model, window)
        yield from self._train("prune", of, self._task(), DenseLoss(model), weights, window=window)
        weights.use_average()
        self.model.unet = unet.whole_model(model)

    def _weights_of(self, model: torch.nn.Module, window: Window) -> Weights:
        """A model's weights in training without masks, in shards where the recipe says so and there are ranks."""
        if self._shares_state():
            self.run.log(f"{parallel.size()} ranks share the training state")
            sharding.shard(model)
        return Weights(model.parameters(), self.recipe.train, window)

    def _shares_state(self) -> bool:
        """Whether ranks share the state of stage 1's training, and there is some."""
        return self.recipe.train.shard and parallel.size() > 1 and any(forecast.planned(self.recipe)[s] for s in SHARED)

    def _require_equal_parts(self) -> None:
        """ValueError unless each rank passes its slice of a batch in as many parts as the others."""
        size, of = self.recipe.data.batch_size, self.recipe.train.accumulate
        if size // parallel.size() < of:
            raise ValueError(
                f"train.accumulate={of}: {parallel.size()} ranks that share a model need as many parts each of a batch "
                f"of {size}; set it to {max(1, size // parallel.size())} or less"
            )

    def _take_pruned(self, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """The pruned model of a checkpoint in place of the one at hand."""
        self.model.unet = build(record["config"], tensors)

    def _finetune(self) -> Iterator[Step]:
        spec = self.recipe.prune
        if spec.target == 0:
            yield Step("finetune", 0, 0)
            return
        tensors, found = self.run.load_checkpoint("pruned")
        self._take_pruned(tensors, found)
        model = self.model.unet.to(self.device)
        weights = self._weights_of(model, Window.of(spec.finetune_steps))
        yield from self._train("finetune", spec.finetune_steps, self._task(), DenseLoss(model), weights)
        if spec.finetune_steps:
            weights.use_average()
        model = self.model.unet = unet.whole_model(model)
        self._save_variant("structured", model.to("cpu"), found)
        self._draw("finetune", spec.finetune_steps, model)

    def _mask(self) -> Iterator[Step]:
        spec = self.recipe.mask
        if spec.method == "none":
            yield Step("mask", 0, 0)
            return
        task = self._task()
        task.cycle = spec.cached_batches
        stage = MaskStage(self.run, self.recipe)
        yield from stage.begin(self._base(), task, self.images.held_out)
        masked, learner = stage.masked, stage.learner
        window = Window.of(spec.steps, spec.weights_from, spec.weights_until)
        weights = Weights(masked.trainable(), self.recipe.train, window) if spec.train_weights else None
        steps = 0 if spec.method in FIXED_METHODS and weights is None else spec.steps
        if not self.run.has_checkpoint("mask"):
            self.run.forget_after("mask", -1)
            stage.snapshot(0)
            self._draw("mask", 0, masked.unet)
        yield from self._train("mask", steps, task, learner, weights, stage)
        if weights is not None and steps:
            weights.use_average()
        learner.finish()
        stage.snapshot(max(steps, 1))
        tensors = {f"unet.{k}": v for k, v in masked.unet.state_dict().items()}
        tensors |= {f"mask.{i}": bank.mask for i, bank in enumerate(masked.banks)}
        self.run.save_checkpoint("masked", tensors, {})

    def _recover(self) -> Iterator[Step]:
        spec = self.recipe.mask
        if spec.method == "none":
            yield Step("recover", 0, 0)
            return
        base = self._base()
        tensors, _ = self.run.load_checkpoint("masked")
        base.load_state_dict({k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")})
        masked = mask_stage.restore(base, self.recipe, self.run.load_checkpoint(mask_stage.M0))
        masked.wear([tensors[f"mask.{i}"].to(self.device) for i in range(len(masked.banks))])
        weights = None
        if spec.recover_steps:
            weights = Weights(masked.trainable(), self.recipe.train, Window.of(spec.recover_steps))
        learner = FixedMasks(masked, spec, spec.recover_steps, self.recipe.seed)
        yield from self._train("recover", spec.recover_steps, self._task(), learner, weights)
        if weights is not None:
            weights.use_average()
        baked = masked.bake().requires_grad_(False).to("cpu")
        mask_stage.write_layers(self.run, masked)
        label = mask_stage.pattern_label(masked)
        mask_stage.write_masks(self.run, masked, self.recipe)
        self._save_variant("nm", baked, {"pattern": label, "method": spec.method, "parent": self._parent()})
        self._draw("recover", spec.recover_steps, baked)

    def _evaluate(self) -> Iterator[Step]:
        yield from evaluate.evaluate(self.run, self.recipe, self.images, self.device)

    def _report(self) -> Iterator[Step]:
        with parallel.one_writer() as writes:
            if writes:
                self._write_cards()
                report_page.write(self.run)
        yield Step("report", 1, 1)

    def _write_cards(self) -> None:
        """A README.md in each variant's folder, now that its figures are known."""
        patterns = {layer["layer"]: layer["pattern"] for layer in self.run.layers() if layer["eligible"]}
        for name in giveway.between(self.run.variants()):
            folder = self.run.variant(name)
            model, record = unet.load_unet(folder / "unet"), store.read_json(folder / store.VARIANT_RECORD)
            origin = (self.recipe.model.source, self.recipe.data.source)
            found = patterns if name == "nm" else {}
            model_card.write(folder, model, record, found, *origin, self.run.evaluation(), f"{self.run.id}-{name}")

    # --- parts of stages ---------------------------------------------------------------------
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
        """more: ``changes``, fields of the recipe to their values, where the remedy is just these."""
        self.run.event("alert", stage=stage, step=step, what=what, text=text, remedy=remedy, **more)
        self.run.log(f"ALERT ({what}): {text}; {remedy}")

    def _base(self) -> torch.nn.Module:
        """The variant that stage 2 masks, on the run's device."""
        base = unet.load_unet(self.run.variant(self._parent()) / "unet")
        return base.requires_grad_(False).to(self.device)

    def _parent(self) -> str:
        return "structured" if self.recipe.prune.target > 0 else "dense"

    def _save_variant(self, name: str, model: torch.nn.Module, record: dict[str, Any] | None = None) -> None:
        record = {"variant": name, "run": self.run.id} | (record or {})
        with parallel.one_writer() as writes:
            if writes:
                unet.save(model, self.model.scheduler, self.run.variant(name), record)

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
