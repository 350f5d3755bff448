"""The stages of a run: each reads what the stage before left in the run folder and leaves its own result.

Within a training stage the checkpoint holds everything that the next step depends on, so a run goes on
from any step of any stage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from . import diffusion, evaluate, learn, pattern, pictures, report, snapshots, store, structured, unet
from .data import Batches
from .evaluate import image_seeds
from .inputs import load_inputs, rounding
from .learn import Task, Trainer
from .masks import MaskedUNet
from .progress import MetricsWriter
from .recipe import Recipe
from .records import STAGES, Step
from .store import Run

CHECKPOINT_SECONDS = 20.0
CHECKPOINT_SHARE = 20  # and at most a twentieth of the time goes into writing them
PREVIEW_IMAGES, PREVIEW_STEPS = 16, 10
SNAPSHOTS = 20  # mask snapshots over the mask stage
WATCHED_EVERY = 10  # steps between entropy and flip figures


class Pipeline:
    """The stages of one run. ``save_checkpoint`` may be called between any two steps."""

    def __init__(self, run: Run, recipe: Recipe, writer: MetricsWriter) -> None:
        self.run, self.recipe, self.writer = run, recipe, writer
        self.device = unet.resolve_device(recipe.device)
        self.trainer: Trainer | None = None
        self.saved, self.checkpoint_after = time.monotonic(), CHECKPOINT_SECONDS

    def stages(self) -> Iterator[Step]:
        """Every step of every stage that is not done yet."""
        runs_dir = self.run.folder.parent
        dense = self.run.variant("dense") if "dense" in self.run.variants() else None
        self.model, self.images = load_inputs(self.recipe, runs_dir, dense)
        self._redo_what_is_missing()
        for skipped in self.images.skipped:
            self.run.log(f"image skipped: {skipped}")
        if "dense" not in self.run.variants():
            self._save_variant("dense", self.model.unet)
            self._draw("dense", 0, self.model.unet)
        for stage in STAGES:
            if stage in self.writer.state.stages_done:
                continue
            self.run.event("stage", stage=stage)
            self.run.log(f"stage {stage}")
            self.writer.begin(stage, 0, 0)
            yield from getattr(self, f"_{stage}")()
            self.trainer = None
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
        self.saved = time.monotonic()
        self.checkpoint_after = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (self.saved - started))

    def _redo_what_is_missing(self) -> None:
        """A stage whose result was deleted (say, because it was damaged) is not done any more."""
        done = self.writer.state.stages_done
        spec = self.recipe
        results = {
            "prune": spec.prune.target == 0 or "structured" in self.run.variants() or self.run.has_checkpoint("pruned"),
            "finetune": spec.prune.target == 0 or "structured" in self.run.variants(),
            "mask": spec.mask.method == "none" or "nm" in self.run.variants() or self.run.has_checkpoint("masked"),
            "recover": spec.mask.method == "none" or "nm" in self.run.variants(),
        }
        for stage, there in results.items():
            if stage in done and not there:
                self.run.log(f"the result of stage {stage} is gone: it is done again, with all that follows")
                del done[done.index(stage) :]
                return

    # --- stages ------------------------------------------------------------------------------
    def _prune(self) -> Iterator[Step]:
        spec = self.recipe.prune
        if spec.target > 0:
            yield Step("prune", 0, 1)
            found = structured.prune(self.model.unet, spec.method, spec.target, rounding(self.recipe), self.recipe.seed)
            self.run.event("pruned", report=found.as_dict())
            if found.reason:
                self.run.log(f"prune.target={spec.target} not met: {found.reason}")
            self.run.save_checkpoint("pruned", self.model.unet.state_dict(), found.as_dict())
            self._draw("prune", 1, self.model.unet)
        yield Step("prune", 1, 1)

    def _finetune(self) -> Iterator[Step]:
        spec = self.recipe.prune
        if spec.target == 0:
            yield Step("finetune", 0, 0)
            return
        tensors, found = self.run.load_checkpoint("pruned")
        model = self.model.unet
        unet.fit_shapes(model, tensors)
        model.load_state_dict(tensors)
        model.to(self.device)
        weights = self._weights(model, spec.finetune_steps)
        yield from self._train("finetune", spec.finetune_steps, learn.DenseLoss(model), weights)
        if spec.finetune_steps:
            weights.use_average()
        self._save_variant("structured", model.to("cpu"), found)
        self._draw("finetune", spec.finetune_steps, model)

    def _mask(self) -> Iterator[Step]:
        spec = self.recipe.mask
        if spec.method == "none":
            yield Step("mask", 0, 0)
            return
        masked = self._masked()
        self._write_layers(masked)
        weights = self._weights(masked.unet, spec.steps) if spec.train_weights else None
        steps = spec.steps
        if spec.method == "magnitude":
            masked.logits = masked.initial.clone()
            learner, steps = learn.FixedMasks(masked), spec.steps if spec.train_weights else 0
        else:
            learner = learn.LEARNERS[spec.method](masked, spec, steps, self.recipe.seed)
        if not self.run.has_checkpoint("mask"):
            self._snapshot(0, masked)
            self._draw("mask", 0, masked)
        yield from self._train("mask", steps, learner, weights, masked)
        masked.logits = masked.logits.detach()
        if weights is not None and steps:
            weights.use_average()
        masked.to("cpu")
        self._snapshot(max(steps, 1), masked)
        tensors = {f"unet.{k}": v for k, v in masked.unet.state_dict().items()}
        tensors |= {"logits": masked.logits, "initial": masked.initial}
        self.run.save_checkpoint("masked", tensors, {"n": spec.n, "m": spec.m})

    def _recover(self) -> Iterator[Step]:
        spec = self.recipe.mask
        if spec.method == "none":
            yield Step("recover", 0, 0)
            return
        masked = self._masked()
        tensors, _ = self.run.load_checkpoint("masked")
        masked.unet.load_state_dict({k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")})
        masked.logits, masked.initial = tensors["logits"], tensors["initial"]
        masked.to(self.device)
        weights = self._weights(masked.unet, spec.recover_steps) if spec.recover_steps else None
        yield from self._train("recover", spec.recover_steps, learn.FixedMasks(masked), weights, masked)
        if weights is not None:
            weights.use_average()
        masked.to("cpu").bake()
        self._write_layers(masked)
        record = {"pattern": f"{spec.n}:{spec.m}", "method": spec.method, "parent": self._parent()}
        self._save_variant("nm", masked.unet, record)
        self._draw("recover", spec.recover_steps, masked.unet)

    def _evaluate(self) -> Iterator[Step]:
        yield from evaluate.evaluate(self.run, self.recipe, self.images, self.device)

    def _report(self) -> Iterator[Step]:
        report.write(self.run)
        yield Step("report", 1, 1)

    # --- parts of stages ---------------------------------------------------------------------
    def _train(
        self,
        stage: str,
        steps: int,
        learner: learn.Learner,
        weights: learn.Weights | None,
        masked: MaskedUNet | None = None,
    ) -> Iterator[Step]:
        """Iterate a trainer from its checkpoint, with snapshots, previews and checkpoints."""
        recipe = self.recipe
        batches = Batches(self.images.train, recipe.data.batch_size, recipe.seed)
        bf16 = learn.use_bf16(self.device, recipe.train.precision)
        task = Task(self.model.scheduler, batches, recipe.seed, self.device, bf16)
        trainer = Trainer(stage, steps, task, learner, weights)
        found = self.run.load_checkpoint(stage)
        if found is not None:
            trainer.load(found[0], found[1]["done"])
        self.run.forget_after(stage, trainer.done)
        self.trainer, self.saved = trainer, time.monotonic()
        self.writer.begin(stage, trainer.done, steps)
        previewed = {max(1, steps // 2), max(1, steps // 4), max(1, steps * 3 // 4)} if steps > 1 else set()
        if steps < 200:
            previewed = {steps // 2} & previewed
        every = max(1, steps // SNAPSHOTS)
        for step in trainer:
            if masked is not None and stage == "mask":
                last = step.step == steps
                if step.step % WATCHED_EVERY == 0 or last:
                    step.values |= watch(masked)
                if step.step % every == 0 and not last:
                    self._snapshot(step.step, masked)
            if step.step in previewed:
                self._draw(stage, step.step, masked or learner.unet)
            yield step
            if time.monotonic() - self.saved > self.checkpoint_after:
                self.save_checkpoint()

    def _masked(self) -> MaskedUNet:
        """The structured variant (or the dense one) under fresh masks."""
        base = unet.load_unet(self.run.variant(self._parent()) / "unet")
        base.requires_grad_(False)
        return MaskedUNet(base, self.recipe.mask.n, self.recipe.mask.m).to(self.device)

    def _parent(self) -> str:
        return "structured" if self.recipe.prune.target > 0 else "dense"

    def _weights(self, model: torch.nn.Module, steps: int) -> learn.Weights:
        return learn.Weights(model, self.recipe.train.lr, self.recipe.train.ema, steps)

    def _save_variant(self, name: str, model: torch.nn.Module, record: dict[str, Any] | None = None) -> None:
        record = {"variant": name, "run": self.run.id} | (record or {})
        unet.save(model, self.model.scheduler, self.run.variant(name), record)

    def _write_layers(self, masked: MaskedUNet) -> None:
        rows = {layer.name.removesuffix(".weight"): layer.start for layer in masked.layers}
        reports = masked.layer_reports()
        self.run.write_layers([vars(r) | {"start": rows.get(r.layer)} for r in reports])

    def _snapshot(self, step: int, masked: MaskedUNet) -> None:
        snapshots.write(self.run.snapshot_path("mask", step), masked.mask().detach().cpu().numpy())

    def _draw(self, stage: str, step: int, model: torch.nn.Module) -> None:
        """The same few seeds again, so that progress can be seen."""
        seeds = image_seeds(self.recipe.eval.seed, PREVIEW_IMAGES)
        images = diffusion.sample(model, self.model.scheduler, seeds, "ddim", PREVIEW_STEPS)
        info = {"run": self.run.id, "stage": stage, "step": step, "sampler": "ddim", "steps": PREVIEW_STEPS}
        png = pictures.sheet_png(diffusion.to_uint8(images), info)
        store.write_atomic(self.run.sample_path(stage, step), png)
        self.run.event("sample", stage=stage, step=step)


def watch(masked: MaskedUNet) -> dict[str, float]:
    """Entropy and flips of the logits at hand."""
    with torch.no_grad():
        mask = masked.mask()
        return {
            "entropy": pattern.mean_entropy(masked.logits),
            "flips": pattern.flips(mask, masked.initial),
        }
