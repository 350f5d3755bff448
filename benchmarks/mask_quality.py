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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from prunedm import data, diffusion, learn, mask_stage, masks, pattern, recipe, training, unet  # noqa: E402

IMAGES = 1024


def validation(images: data.Images, scheduler) -> list[diffusion.NoisedBatch]:
    held_out = data.to_float(images.held_out[:IMAGES])
    return diffusion.validation_batches(scheduler, held_out, IMAGES, 128, 0)


def one(spec: recipe.Recipe, seed: int, images: data.Images, looks: int) -> None:
    model, device = unet.load("bundled"), torch.device("cpu")
    batches = validation(images, model.scheduler)

    def judge(net: torch.nn.Module) -> float:
        return diffusion.validation_loss(lambda x, t: net(x, t).sample, batches)

    dense = judge(model.unet)
    train, spec = spec.train, spec.model_copy(update={"seed": seed})
    teacher = unet.load("bundled").unet.requires_grad_(False) if train.distill else None
    task = training.Task.of(spec, model.scheduler, images.train, device, teacher)
    task.cycle = spec.mask.cached_batches
    overrides = [(layer.match, layer.pattern) for layer in spec.mask.layers]
    masked = masks.MaskedUNet(model.unet, spec.mask.n, spec.mask.m, overrides)
    mask_stage.set_initial(masked, spec, task)
    first = judge(masked.unet)
    steps = spec.mask.steps
    learner = learn.METHODS[spec.mask.method](masked, spec.mask, steps, seed)
    window = training.Window.of(steps, spec.mask.weights_from, spec.mask.weights_until)
    weights = training.Weights(masked.trainable(), train, window) if spec.mask.train_weights else None
    m0 = masked.masks()
    worked, curve = 0.0, []
    line = {"method": spec.mask.method, "pattern": f"{spec.mask.n}:{spec.mask.m}", "seed": seed, "steps": steps}

    def look(step: int) -> None:
        kept = masked.masks()
        masked.wear(learner.choice())
        curve.append((step, round(judge(masked.unet), 5)))
        masked.wear(kept)
        print(f"# {line['method']} {line['pattern']} step {step}: {curve[-1][1]} ({worked:.0f} s)", flush=True)

    trainer = training.Trainer("mask", steps, task, learner, weights)
    running = iter(trainer if spec.mask.method not in recipe.FIXED_METHODS or weights else ())
    while True:
        started = time.perf_counter()
        step = next(running, None)
        worked += time.perf_counter() - started
        if step is None:
            break
        if step.step % max(1, steps // looks) == 0 and step.step < steps:
            look(step.step)
    if weights is not None:
        weights.use_average()
    learner.finish()
    final = judge(masked.unet)
    flipped = sum(pattern.flips(a, b.mask) * len(a) for a, b in zip(m0, masked.banks)) / sum(map(len, m0))
    removed = (first - final) / (first - dense)
    line |= {"dense": dense, "first": first, "final": final, "removed": removed, "flipped": flipped, "curve": curve}
    print(json.dumps(line | {"seconds": round(worked), "threads": torch.get_num_threads()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", dest="assignments", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--looks", type=int, default=1, help="looks at the validation loss")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    arguments = parser.parse_args()
    spec = recipe.resolve(assignments=[*arguments.assignments, f"mask.steps={arguments.steps}"])
    images = data.load_bundled()
    for seed in arguments.seeds:
        one(spec, seed, images, arguments.looks)


if __name__ == "__main__":
    with training.memory_kept():
        main()
