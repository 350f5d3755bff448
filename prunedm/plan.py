"""Planning past this machine: memory, time, communication and cost of a recipe on a device that need not be here.

What a step does is counted on a UNet without weights (outline.py); what optimiser and masks do, on one small layer
(upkeep.py); plan_model.py turns that into seconds and bytes.

Data-parallel, as ``torchrun`` does it: the batch is shared out, each rank holds everything (but for what
``train.shard`` has them share), gradients travel by a ring and reinforce's loss residual as one number a timestep bin.
Nothing overlaps, so communication is not flattered.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch

from . import allocate, bundled, diffusion, forecast, masked_unet, outline, samples, training, upkeep
from .importance import CALIBRATION_BATCHES
from .inputs import overrides
from .mask_stage import BASELINE_BATCH, BASELINE_IMAGES, SENSITIVITY_IMAGES, initial_kind
from .outline import Costs, Outline, Trace
from .plan_model import (
    FP32,
    Line,
    Memory,
    PlanError,
    Setting,
    Stage,
    largest,
    link_seconds,
    ring,
    seconds,
    summed_bytes,
    upkeep_seconds,
)
from .quality import VALIDATION_BATCH, VALIDATION_IMAGES
from .recipe import Recipe
from .stage_recipes import CALIBRATED, FIXED_METHODS, INITIALS, Mask

RANKS = (1, 2, 4, 8, 16, 32, 64)
SHOWN_METHODS = ("gumbel", "reinforce")  # whose communication grows, and whose does not
SHARED_SENDS = 1.5  # of what gradients alone take: a gather of the weights in each direction, and a share-out
M0_BYTES = 10.0  # a prunable weight: dense weight, mask and m0, and the scores that choose it
NOT_COUNTED = [
    "reading data, previews, checkpoints and the cut of stage 1",
    "the feature network, the distances and the timing of the evaluation",
    "what an allocator wastes, and on a GPU workspaces of convolutions and what the driver takes for itself",
    "latency of messages, and traffic between machines, whose links are slower",
]


class Planner:
    """Plans of one recipe and model in one setting. ``dense``: the model as it is; ``structured``: after stage 1."""

    def __init__(self, recipe: Recipe, dense: Outline, setting: Setting) -> None:
        self.recipe, self.setting, self.dense = recipe, setting, dense
        batch = recipe.data.batch_size
        if setting.gpus > batch:
            raise PlanError(f"gpus={setting.gpus} are more than the images of a batch ({batch}); set data.batch_size")
        self.batch = share(batch, setting.gpus)
        target, kind = recipe.prune.target, setting.device.kind
        self.structured = outline.narrowed(dense, target) if target else dense
        self.bf16 = self._bf16(recipe.train.precision)
        self.prunable = self._prunable()
        self.training = outline.costs(self.structured, self.bf16, kind)
        self.parts = min(recipe.train.accumulate, self.batch)
        self.call = outline.costs(self.structured, False, kind, backward=False)
        self.dense_call = self.call
        if target:
            self.dense_call = outline.costs(dense, False, kind, backward=False)

    def _bf16(self, precision: str) -> bool:
        """Whether training computes in bf16 there; ``auto`` does on every published device."""
        if precision != "auto" or self.setting.device.basis == "published":
            return precision != "fp32"
        return training.use_bf16(torch.device(self.setting.device.kind), precision)

    def _prunable(self) -> int:
        spec, given = self.recipe.mask, overrides(self.recipe)
        if spec.method == "none":
            return 0
        masked_unet.require_eligible(self.structured.unet, spec.n, spec.m, given)
        rows = masked_unet.layer_reports(self.structured.unet, spec.n, spec.m, given)
        return sum(math.prod(row.shape) for row in rows if row.eligible)

    @functools.cached_property
    def forward(self) -> Costs:
        """A call of the model after stage 1 without gradients, in training's precision."""
        if not self.bf16:
            return self.call
        return outline.costs(self.structured, True, self.setting.device.kind, backward=False)

    def _part(self, batch: float) -> Trace:
        """Forward and backward of one of the parts into which a batch is split to save memory."""
        return self.training.at(batch / self.parts)

    def _passes(self) -> float:
        """Seconds of forward and backward."""
        return self.parts * seconds(self._part(self.batch), self.setting)

    # --- stages ---
    def stages(self) -> list[Stage]:
        """Those that the recipe asks for, in their order."""
        recipe, found = self.recipe, []
        if recipe.prune.target:
            if recipe.prune.method in CALIBRATED:
                found.append(self._calibrate())
            found.append(self._finetune())
        if recipe.mask.method != "none":
            found += [self._scores(), self._looks(), self._mask(), self._recover()]
        found += [self._sampling(), self._validation()]
        return [stage for stage in found if stage.steps]

    def _stage(
        self,
        name: tuple[str, str],
        steps: int,
        batch: int,
        compute: float,
        fixed: tuple[float, float],
        at: Line,
        summed: float = 0.0,
    ) -> Stage:
        """``fixed``: bytes of weights and state; ``at``: batch -> bytes of activations; ``summed``: over the ranks."""
        device, sent = self.setting.device, ring(summed, self.setting.gpus)
        memory, most = Memory(*fixed, at(batch)), largest(device.memory - sum(fixed), at)
        fits = memory.total <= device.memory
        wait = link_seconds(sent, self.setting)
        return Stage(*name, steps, batch, compute, sent, wait, memory, fits, most, device.basis)

    def _calibrate(self) -> Stage:
        """Scores of the channels, on the dense model in fp32 (channel_scores.py); diff-pruning's at most so long."""
        spec, backward = self.recipe.prune, self.recipe.prune.method != "activation"
        batch = share(spec.calibration_images, self.setting.gpus)
        costs = outline.costs(self.dense, False, self.setting.device.kind, backward)
        whole = costs.at(batch)
        passes = [whole.forward_only(), whole] if spec.method == "diff-pruning" else [whole]
        compute = sum(seconds(one, self.setting) for one in passes)
        weights = FP32 * self.dense.parameters
        state = weights if backward else 0.0  # gradients, which add up over the batches
        steps, name = spec.calibration_steps * spec.rounds, ("prune", f"{spec.method} scores")
        return self._stage(name, steps, batch, compute, (weights, state), lambda b: costs.at(b).activations)

    def _finetune(self) -> Stage:
        """Training of all weights without masks, between the cuts and after them."""
        steps, whole, update = forecast.planned(self.recipe), self.structured.parameters, upkeep.of_update()
        is_shared = self.recipe.train.shard and self.setting.gpus > 1
        count = whole / self.setting.gpus if is_shared else whole  # of the weights whose state a rank holds
        compute = self._passes() + upkeep_seconds(update, count, self.setting) + self._teacher_seconds()
        fixed = FP32 * count + self._teacher_bytes(), update.held * count
        after = (FP32 + update.transient) * count  # the gradients, and what the update adds
        summed = summed_bytes(None, whole, self.prunable) * (SHARED_SENDS * self.parts if is_shared else 1)

        def at(batch: float) -> float:
            part = self._part(batch)
            passes = part.activations + FP32 * (count + 2 * self._gathered()) if is_shared else part.peak
            return max(passes, after)

        name = ("finetune", "fine-tuning in shards" if is_shared else "fine-tuning")
        return self._stage(name, steps["prune"] + steps["finetune"], self.batch, compute, fixed, at, summed)

    def _gathered(self) -> int:
        """Parameters that ranks which share a model hold whole at a time, with their gradients: those of no block, a
        block, and the next one, which is fetched ahead."""
        unet = self.structured.unet
        blocks = [block for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if block is not None]
        counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
        return self.structured.parameters - sum(counts) + max(map(sum, itertools.pairwise([0, *counts])))

    def _teacher_seconds(self) -> float:
        """Time of the dense model's prediction, where the recipe distils: its forward pass goes with its MACs."""
        if not self.recipe.train.distill:
            return 0.0
        forward = seconds(self.forward.at(self.batch), self.setting)
        return forward * self.dense_call.at(1).macs / self.call.at(1).macs

    def _teacher_bytes(self) -> float:
        return FP32 * self.dense.parameters if self.recipe.train.distill else 0.0

    def _scores(self) -> Stage:
        """Scores of the weights for m0, where they look at images (importance.py)."""
        kind, gradients = initial_kind(self.recipe), initial_kind(self.recipe) == "fisher"
        steps = CALIBRATION_BATCHES if kind in ("wanda", "fisher") else 0
        compute = self._passes() if gradients else seconds(self.forward.at(self.batch), self.setting)
        fixed = FP32 * self.structured.parameters, (M0_BYTES + (2 * FP32 if gradients else 0)) * self.prunable

        def at(batch: float) -> float:
            return (self._part(batch) if gradients else self.forward.at(batch)).activations

        name, summed = ("mask", f"{kind} scores of weights"), FP32 * self.prunable if gradients else 0.0
        return self._stage(name, steps, self.batch, compute, fixed, at, summed)

    def _looks(self) -> Stage:
        """The loss before and under m0 and, with a density, under each layer's choices; ranks deal the batches out."""
        spec, images = self.recipe.mask, 2 * BASELINE_IMAGES
        if spec.density is not None and initial_kind(self.recipe) in INITIALS:
            rows = masked_unet.layer_reports(self.structured.unet, 1, 2, overrides(self.recipe))
            images += SENSITIVITY_IMAGES * (1 + sum(len(allocate.fitting(row.shape)) for row in rows if row.eligible))
        steps = share(share(images, BASELINE_BATCH), self.setting.gpus)
        fixed = FP32 * self.structured.parameters, M0_BYTES * self.prunable
        compute = seconds(self.call.at(BASELINE_BATCH), self.setting)
        name = ("mask", "loss under initial masks")
        return self._stage(name, steps, BASELINE_BATCH, compute, fixed, lambda b: self.call.at(b).peak)

    def _mask(self) -> Stage:
        spec = self.recipe.mask
        steps = 0 if spec.method in FIXED_METHODS and not spec.train_weights else spec.steps
        return self._masked(("mask", f"masks by {spec.method}"), steps, spec)

    def _recover(self) -> Stage:
        spec = self.recipe.mask
        fixed = Mask(method="fixed", n=spec.n, m=spec.m, train_weights=True)
        return self._masked(("recover", "recovery"), spec.recover_steps, fixed)

    def _masked(self, name: tuple[str, str], steps: int, spec: Mask) -> Stage:
        """A step of a masked model: passes, the masks' own work, and the weights' update where they train."""
        count, prunable, train = self.structured.parameters, self.prunable, spec.train_weights
        masks, update = upkeep.of_masks(spec, train), upkeep.of_update()
        calls_only = spec.method == "reinforce" and not train
        compute = self._mask_passes(spec) + upkeep_seconds(masks, prunable, self.setting) + self._teacher_seconds()
        state, outside = masks.held * prunable, masks.transient * prunable
        if train:
            compute += upkeep_seconds(update, count, self.setting)
            state += update.held * count + FP32 * (count - prunable)  # the other weights' gradients
            outside = max(outside, update.transient * count)

        def at(batch: float) -> float:
            held = self.forward.at(batch).peak if calls_only else self._part(batch).activations
            return max(held + masks.during * prunable, outside)

        fixed, summed = (FP32 * count + self._teacher_bytes(), state), summed_bytes(spec, count, prunable)
        return self._stage(name, steps, self.batch, compute, fixed, at, summed)

    def _mask_passes(self, spec: Mask) -> float:
        """Seconds of the UNet's passes: reinforce judges m0 and each drawn mask, forward only unless weights train."""
        if spec.method != "reinforce":
            return self._passes()
        forward = seconds(self.forward.at(self.batch), self.setting)
        drawn = self._passes() if spec.train_weights else forward
        return (0.0 if spec.cached_batches else forward) + spec.samples * drawn

    def _sampling(self) -> Stage:
        """Images of every variant, a chunk at a time, in fp32; ranks deal the chunks out; a step is one call."""
        spec, shape, device = self.recipe.eval, self.dense.image_shape, torch.device(self.setting.device.kind)
        chunk, call = samples.chunk_size(shape, device), diffusion.call_size(shape, device)
        calls = share(share(spec.images, chunk), self.setting.gpus) * share(chunk, call) * spec.steps
        dense = 0 if bundled.quality(self.recipe) is not None else 2 if spec.noise_floor else 1
        return self._judging("sampling of all variants", calls, call, dense)

    def _validation(self) -> Stage:
        calls = share(share(VALIDATION_IMAGES, VALIDATION_BATCH), self.setting.gpus)
        return self._judging("validation losses", calls, VALIDATION_BATCH, int(bundled.quality(self.recipe) is None))

    def _judging(self, what: str, calls: int, batch: int, dense: int) -> Stage:
        """Calls in fp32 for ``dense`` sets of the dense model, and one of each other variant."""
        others = (self.recipe.prune.target > 0) + (self.recipe.mask.method != "none")
        each = [seconds(costs.at(batch), self.setting) for costs in (self.dense_call, self.call)]
        compute = (dense * each[0] + others * each[1]) / max(1, dense + others)
        model, costs = (self.dense, self.dense_call) if dense else (self.structured, self.call)
        fixed, steps = (FP32 * model.parameters, 0.0), calls * (dense + others)
        return self._stage(("evaluate", what), steps, batch, compute, fixed, lambda b: costs.at(b).peak)

    # --- how costs grow ---
    def growth(self) -> dict[str, list[dict[str, Any]]]:
        """How the costs of a fine-tuning step grow with ranks, images and parameters, the rest as planned."""
        return {"ranks": self._by_ranks(), "images": self._by_images(), "parameters": self._by_parameters()}

    def _step_seconds(self, batch: int) -> float:
        parts = min(self.recipe.train.accumulate, batch)
        update = upkeep_seconds(upkeep.of_update(), self.structured.parameters, self.setting)
        return parts * seconds(self.training.at(batch / parts), self.setting) + update

    def _by_ranks(self) -> list[dict[str, Any]]:
        rows, count, batch = [], self.structured.parameters, self.recipe.data.batch_size
        for ranks in (n for n in sorted({*RANKS, self.setting.gpus}) if n <= batch):
            own, sent = share(batch, ranks), ring(summed_bytes(None, count, self.prunable), ranks)
            row = {"ranks": ranks, "batch": own, "compute": self._step_seconds(own), "sent_finetune": sent}
            row["communication"] = link_seconds(sent, self.setting)
            for method in SHOWN_METHODS:
                summed = summed_bytes(Mask(method=method), count, self.prunable)
                row[f"sent_{method}"] = ring(summed, ranks) if self.prunable else None
            rows.append(row)
        return rows

    def _by_images(self) -> list[dict[str, Any]]:
        rows = []
        for batch in sorted({max(1, self.batch // 2), self.batch, 2 * self.batch, 4 * self.batch}):
            trace, compute = self._part(batch), self._step_seconds(batch)
            rows.append({"batch": batch, "compute": compute, "saved_activations": trace.saved, "peak": trace.peak})
        return rows

    def _by_parameters(self) -> list[dict[str, Any]]:
        both = [("dense", self.dense, self.dense_call), ("structured", self.structured, self.call)]
        rows = []
        for name, found, call in both[: 1 if self.structured is self.dense else 2]:
            count = found.parameters
            held = (2 * FP32 + upkeep.of_update().held) * count  # weights, gradients, optimiser and average
            row = {"model": name, "parameters": count, "macs": call.at(1).macs, "training_state": held}
            row["call"] = seconds(call.at(self.batch), self.setting) / self.batch
            rows.append(row | {"sent_finetune": ring(FP32 * count, self.setting.gpus)})
        return rows


def share(count: int, among: int) -> int:
    """What the busiest of so many gets of a count."""
    return -(-count // among)


def make(recipe: Recipe, dense: Outline, setting: Setting) -> dict[str, Any]:
    """The plan, as JSON has it. ModelError, PlanError or ValueError in one line."""
    planner = Planner(recipe, dense, setting)
    stages, step = planner.stages(), planner.training.at(planner.batch)
    whole = sum(stage.seconds for stage in stages)
    hours = whole / 3600 * setting.gpus
    price = None if setting.price is None else {"of_an_hour": setting.price, "total": hours * setting.price}
    return {
        "device": setting.device.as_dict(),
        "gpus": setting.gpus,
        "efficiency": setting.efficiency,
        "times_are": setting.words,
        "precision": "bf16" if planner.bf16 else "fp32",
        "batch": recipe.data.batch_size,
        "model": {
            "parameters": dense.parameters,
            "macs": round(planner.dense_call.at(1).macs),
            "structured_parameters": planner.structured.parameters,
            "structured_macs": round(planner.call.at(1).macs),
            "prunable_weights": planner.prunable,
            "saved_activations": step.saved,
            "operations": len(step.flops),
        },
        "stages": [stage.as_dict() for stage in stages],
        "seconds": whole,
        "communication_unknown": [stage.what for stage in stages if stage.communication is None],
        "device_hours": hours,
        "price": price,
        "fits": all(stage.fits for stage in stages),
        "growth": planner.growth(),
        "not_counted": not_counted(recipe, setting, len(step.flops)),
    }


def not_counted(recipe: Recipe, setting: Setting, operations: int) -> list[str]:
    """What the figures leave out, in words."""
    found = []
    if setting.device.basis == "published":
        found.append(f"launching a training step's {operations:,} operations, which small models on a GPU wait for")
    if recipe.train.compile:
        found.append("what torch.compile gains, and takes to begin with")
    return found + NOT_COUNTED
