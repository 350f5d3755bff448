"""The stages of a run: each reads what the stage before left in the run folder and leaves its own result.

Within a training stage the checkpoint holds everything that the next step depends on, so a run goes on
from any step of any stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import (
    evaluate,
    forecast,
    giveway,
    mask_stage,
    model_card,
    parallel,
    report_page,
    store,
    structured,
    unet,
)
from .inputs import load_inputs, rounding
from .learn import FixedMasks
from .mask_stage import MaskStage
from .pruned_unet import build, public
from .records import STAGES, Step
from .stage_recipes import CALIBRATED, FIXED_METHODS
from .stage_training import StageTraining
from .training import DenseLoss, Weights, Window


class Pipeline(StageTraining):
    """The stages of one run."""

    def stages(self) -> Iterator[Step]:
        """Every step of every stage that is not done yet."""
        runs_dir = self.run.folder.parent
        dense = self.run.variant("dense") if "dense" in self.run.variants() else None
        known = self.run.has_checkpoint(mask_stage.M0)
        self.model, self.images = load_inputs(self.recipe, runs_dir, dense, masks_known=known)
        self._redo_what_is_missing()
        self._require_fair_shares()
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

    def _require_fair_shares(self) -> None:
        """ValueError unless the ranks that are to share a model in what is left of stage 1 can; one process alone logs
        that it shares nothing."""
        planned, done = forecast.planned(self.recipe), self.writer.state.stages_done
        left = sum(planned[stage] for stage in ("prune", "finetune") if stage not in done)
        if self._is_shared(left):
            self._require_equal_parts()
        elif self.recipe.train.shard and left and parallel.size() == 1:
            self.run.log("train.shard: one process works on this run, so that nothing is shared")

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
        weights = self._weights_of(model, window, spec.round_steps)
        yield from self._train("prune", of, self._task(), DenseLoss(model), weights, window=window)
        weights.use_average()
        self.model.unet = unet.whole_model(model)

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
        weights = self._weights_of(model, Window.of(spec.finetune_steps), spec.finetune_steps)
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
