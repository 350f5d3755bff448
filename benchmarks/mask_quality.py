"""Validation loss of masks on the bundled dense model, method by method: one JSON line a result.

    .venv/bin/python benchmarks/mask_quality.py --set mask.method=gumbel --steps 1000 --seeds 0 1 2

``--set`` takes any field of the recipe. Weights stay frozen unless ``mask.train_weights=true``; then the
averaged weights are judged. Seconds are those of the steps, without the looks at the validation loss.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from prunedm import data, diffusion, learn, mask_stage, masked_unet, pattern, recipe, stage_recipes, training, unet  # noqa: E402


class Trial:
    """One seed of one recipe, on the bundled dense model."""

    def __init__(self, spec: recipe.Recipe, seed: int, images: data.Images, judged: int) -> None:
        self.spec = spec.model_copy(update={"seed": seed})
        mask = self.spec.mask
        model = unet.load("bundled")
        held_out = data.to_float(images.held_out[:judged])
        self.batches = diffusion.validation_batches(model.scheduler, held_out, judged, 128, 0)
        self.dense = self.judge(model.unet)
        teacher = unet.load("bundled").unet.requires_grad_(False) if spec.train.distill else None
        self.task = training.Task.of(self.spec, model.scheduler, images.train, torch.device("cpu"), teacher)
        self.task.cycle = mask.cached_batches
        overrides = [(layer.match, layer.pattern) for layer in mask.layers]
        self.masked = masked_unet.MaskedUNet(model.unet, mask.n, mask.m, overrides)
        mask_stage.set_initial(self.masked, self.spec, self.task)
        self.learner = learn.METHODS[mask.method](self.masked, mask, mask.steps, seed)
        window = training.Window.of(mask.steps, mask.weights_from, mask.weights_until)
        trains = mask.train_weights
        self.weights = training.Weights(self.masked.trainable(), spec.train, window) if trains else None
        self.worked, self.curve = 0.0, []

    def judge(self, net: torch.nn.Module) -> float:
        return diffusion.validation_loss(lambda x, t: net(x, t).sample, self.batches)

    def look(self, step: int) -> None:
        kept = self.masked.masks()
        self.masked.wear(self.learner.choice())
        self.curve.append((step, round(self.judge(self.masked.unet), 5)))
        self.masked.wear(kept)
        print(f"# {self.spec.mask.method} step {step}: {self.curve[-1][1]} ({self.worked:.0f} s)", flush=True)

    def train(self, looks: int) -> None:
        """All steps; only they are timed. Masks that do not move on weights that do not need none."""
        mask = self.spec.mask
        trainer = training.Trainer("mask", mask.steps, self.task, self.learner, self.weights)
        running = iter(trainer if mask.method not in stage_recipes.FIXED_METHODS or self.weights else ())
        while True:
            started = time.perf_counter()
            step = next(running, None)
            self.worked += time.perf_counter() - started
            if step is None:
                break
            if step.step % max(1, mask.steps // looks) == 0 and step.step < mask.steps:
                self.look(step.step)
        if self.weights is not None:
            self.weights.use_average()
        self.learner.finish()

    def run(self, looks: int) -> dict[str, Any]:
        mask, first, m0 = self.spec.mask, self.judge(self.masked.unet), self.masked.masks()
        self.train(looks)
        final = self.judge(self.masked.unet)
        flipped = sum(pattern.flips(a, bank.mask) * len(a) for a, bank in zip(m0, self.masked.banks))
        return {
            **{"method": mask.method, "pattern": f"{mask.n}:{mask.m}", "seed": self.spec.seed, "steps": mask.steps},
            **{"dense": self.dense, "first": first, "final": final, "curve": self.curve},
            **{"removed": (first - final) / (first - self.dense), "flipped": flipped / sum(map(len, m0))},
            **{"seconds": round(self.worked), "threads": torch.get_num_threads()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", dest="assignments", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=1024, help="held-out images of the validation loss")
    parser.add_argument(
        "--looks", type=int, default=1, choices=range(1, 101), metavar="1..100", help="looks at the validation loss"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    arguments = parser.parse_args()
    spec = recipe.resolve(assignments=[*arguments.assignments, f"mask.steps={arguments.steps}"])
    images = data.load_bundled()
    for seed in arguments.seeds:
        print(json.dumps(Trial(spec, seed, images, arguments.images).run(arguments.looks)), flush=True)


if __name__ == "__main__":
    with training.memory_kept():
        main()
