"""Stage 2 of a run, around the learning itself: patterns, initial masks, their baseline, and what is recorded.

All that later steps depend on (patterns and m0) is kept in the checkpoint ``m0``, so that a resumed run
neither measures nor chooses again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import allocate, data, diffusion, importance, maskfile, parallel, snapshots
from .diagnostics import Watcher
from .learn import METHODS
from .mask_methods import FixedMasks
from .masked_unet import MaskedUNet
from .recipe import Recipe
from .records import Step
from .stage_recipes import INITIALS
from .store import MASK_LAYERS, MASKS, Run
from .training import Task

BASELINE_IMAGES, BASELINE_BATCH, SENSITIVITY_IMAGES = 256, 128, 64
SNAPSHOTS = 20  # mask snapshots over the stage, unless the recipe says otherwise
WATCHED_EVERY = 10  # steps between figures of the masks
M0 = "m0"


def initial_kind(recipe: Recipe) -> str:
    """How m0 is found: one of INITIALS, or where another run's masks are."""
    method = recipe.mask.method
    return method if method in INITIALS else recipe.mask.initial or "magnitude"


def set_initial(masked: MaskedUNet, recipe: Recipe, task: Task) -> None:
    """Give the masked UNet the recipe's m0. MaskFileError or ValueError when another run's masks do not fit."""
    kind = initial_kind(recipe)
    if kind in INITIALS:
        masked.set_initial(importance.weight_scores(masked, kind, task))
    else:
        masked.set_layer_masks(maskfile.read(maskfile.locate(Path(kind))))


def baseline(masked: MaskedUNet, scheduler, held_out: torch.Tensor, seed: int) -> dict[str, Any]:
    """Loss of the dense weights and under m0, for each timestep bin (the cleanest first) and over all.

    On the first held-out images with fixed noise; a bin without a timestep is None.
    """
    device = next(masked.unet.parameters()).device
    count = min(BASELINE_IMAGES, len(held_out))
    images = data.to_float(held_out[:count], device)
    batches = diffusion.validation_batches(scheduler, images, count, BASELINE_BATCH, seed)
    steps = scheduler.config.num_train_timesteps
    found: dict[str, Any] = {"images": count, "timesteps": steps}
    for name, dress in (("dense", masked.undress), ("m0", masked.wear)):
        dress()
        found[f"{name}_mean"], found[name] = diffusion.losses_by_bin(lambda x, t: masked(x, t).sample, batches, steps)
    return found


class MaskStage:
    """The masks of one run, from the patterns to the last snapshot."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        self.run, self.recipe = run, recipe
        self.masked: MaskedUNet | None = None
        self.learner: FixedMasks | None = None

    def begin(self, base: nn.Module, task: Task, held_out: torch.Tensor) -> Iterator[Step]:
        """Choose patterns and m0, or find them again; sets ``masked`` and ``learner``."""
        spec = self.recipe.mask
        found = self.run.load_checkpoint(M0)
        if found is None:
            overrides = yield from self._patterns(base, task, held_out)
            self.masked = MaskedUNet(base, spec.n, spec.m, overrides)
            set_initial(self.masked, self.recipe, task)
            found = baseline(self.masked, task.scheduler, held_out, self.recipe.eval.seed)
            self.run.event_anew("baseline", {}, initial=initial_kind(self.recipe), **found)
            tensors = {f"initial.{i}": bank.initial for i, bank in enumerate(self.masked.banks)}
            self.run.save_checkpoint(M0, tensors, {"overrides": overrides})
        else:
            self.masked = restore(base, self.recipe, found)
        self.learner = METHODS[spec.method](self.masked, spec, spec.steps, self.recipe.seed)
        self.watcher: Watcher | None = None
        write_layers(self.run, self.masked)

    def _patterns(self, base: nn.Module, task: Task, held_out: torch.Tensor) -> Iterator[Step]:
        """The layers' patterns; with a density, the recipe's own overrides stay as they are."""
        spec = self.recipe.mask
        if initial_kind(self.recipe) not in INITIALS:
            return self._patterns_of_the_file()
        given = [(layer.match, layer.pattern) for layer in spec.layers]
        if spec.density is None:
            return given
        batches = allocate.held_out_batches(task, held_out, SENSITIVITY_IMAGES, self.recipe.seed)
        kind = initial_kind(self.recipe)
        for measured, of, choices in allocate.sensitivity(base, kind, given, task, batches):
            yield Step("mask", measured, of)
        record = parallel.shared(lambda: allocate.choose(choices, spec.density))
        self.run.write_allocation(record | {"images": min(SENSITIVITY_IMAGES, len(held_out)), "importance": kind})
        self.run.log(
            f"patterns chosen for a density of {spec.density}: {record['kept']:.4f} kept, "
            f"predicted loss increase {record['predicted_increase']:.5f}"
        )
        return given + allocate.overrides(record)

    def _patterns_of_the_file(self) -> list[tuple[str, str]]:
        """Another run's masks bring their patterns with them; what they do not cover stays dense."""
        layers = maskfile.manifest(maskfile.locate(Path(initial_kind(self.recipe))))["layers"]
        found = sorted({layer["pattern"] for layer in layers.values()})
        self.run.log(f"patterns are those of the given masks: {', '.join(found)} in {len(layers)} layers")
        return [("*", "dense"), *((name, layer["pattern"]) for name, layer in layers.items())]

    def _watch(self) -> Watcher:
        """The watcher, which in a resumed run knows the alerts and the snapshot that came before."""
        if self.watcher is None:
            raised = {e["what"] for e in self.run.events() if e["kind"] == "alert"}
            self.watcher = Watcher(self.masked, self.learner, raised)
            earlier = self.run.mask_snapshots()
            if earlier:
                flat = torch.from_numpy(snapshots.read(earlier[-1])).bool()
                sizes = [bank.mask.numel() for bank in self.masked.banks]
                parts = zip(flat.split(sizes), self.masked.banks)
                self.watcher.previous = [part.view_as(bank.mask).to(bank.mask.device) for part, bank in parts]
        return self.watcher

    def follow(self, step: Step, rates: dict[str, float]) -> list[dict[str, Any]]:
        """Figures into the step's record, a snapshot when one is due; returns new alerts, which name other ``rates``.
        Rank 0's part."""
        if not parallel.is_writer():
            return []
        last = step.step == step.of
        alerts: list[dict[str, Any]] = []
        if step.step % WATCHED_EVERY == 0 or last:
            figures = self._watch().figures()
            step.values |= figures
            alerts = list(self._watch().alerts(step.step, figures, rates))
        every = self.recipe.mask.snapshot_every or max(1, step.of // SNAPSHOTS)
        if step.step % every == 0 and not last:
            self.snapshot(step.step)
        return alerts

    def snapshot(self, step: int) -> None:
        """The masks of the moment, packed, and the figures of each layer. Rank 0's part."""
        if not parallel.is_writer():
            return
        figures = self._watch().layers()
        chosen = [mask.cpu().numpy() for mask in self.learner.choice()]
        snapshots.write(self.run.snapshot_path("mask", step), chosen)
        if step not in {record["step"] for record in self.run.mask_layers()}:
            self.run.append(MASK_LAYERS, [{"stage": "mask", "step": step, **figures}])


def restore(base: nn.Module, recipe: Recipe, found: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> MaskedUNet:
    """The masked UNet with the patterns and m0 of an ``m0`` checkpoint."""
    tensors, record = found
    overrides = [(match, text) for match, text in record["overrides"]]
    masked = MaskedUNet(base, recipe.mask.n, recipe.mask.m, overrides)
    masked.set_initial([tensors[f"initial.{i}"].to(bank.weights) for i, bank in enumerate(masked.banks)])
    return masked


def write_layers(run: Run, masked: MaskedUNet) -> None:
    offsets, start = {}, 0
    for bank in masked.banks:
        for layer in bank.layers:
            offsets[layer.name.removesuffix(".weight")] = start + layer.start * bank.m
        start += bank.mask.numel()
    run.write_layers([dataclasses.asdict(r) | {"offset": offsets.get(r.layer)} for r in masked.layer_reports()])


def write_masks(run: Run, masked: MaskedUNet, recipe: Recipe) -> None:
    """The masks file of the finished N:M variant."""
    patterns = {report.layer: report.pattern for report in masked.reports if report.eligible}
    origin = {"run": run.id, "method": recipe.mask.method}
    if parallel.is_writer():
        run.variant("nm").mkdir(parents=True, exist_ok=True)
        maskfile.write(run.variant("nm") / MASKS, masked.layer_masks(), patterns, origin)


def pattern_label(masked: MaskedUNet) -> str:
    """``2:4``, or ``mixed (2:4, 1:4)`` where layers differ."""
    found = [str(bank.pattern) for bank in masked.banks]
    return found[0] if len(found) == 1 else f"mixed ({', '.join(sorted(found))})"
