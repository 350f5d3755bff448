"""Cost of a step of each kind as a ratio to plain fine-tuning, interleaved in one run.

    .venv/bin/python benchmarks/steps.py [--batch 64] [--rounds 8]

The structured bundled model (40 % of the parameters gone), 2:4, as the pipeline trains it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from prunedm import data, learn, masks, structured, unet  # noqa: E402
from prunedm.recipe import Mask  # noqa: E402


def model(requires_grad: bool):
    loaded = unet.load("bundled")
    structured.prune(loaded.unet, "magnitude", 0.4, 4, 0)
    loaded.unet.requires_grad_(requires_grad)
    return loaded


def trainers(task: learn.Task) -> dict[str, learn.Trainer]:
    made = {}
    dense = model(True).unet
    weights = learn.Weights(dense, 1e-5, 0.999, 10**6)
    made["fine-tune"] = learn.Trainer("f", 10**6, task, learn.DenseLoss(dense), weights)
    masked = masks.MaskedUNet(model(True).unet, 2, 4)
    masked.logits = masked.initial
    weights = learn.Weights(masked.unet, 1e-5, 0.999, 10**6)
    made["fixed masks, weights train"] = learn.Trainer("r", 10**6, task, learn.FixedMasks(masked), weights)
    for method in learn.LEARNERS:
        frozen = masks.MaskedUNet(model(False).unet, 2, 4)
        learner = learn.LEARNERS[method](frozen, Mask(method=method), 600, 0)
        made[f"{method}, weights frozen"] = learn.Trainer("m", 10**6, task, learner, None)
    return made


def sampling(rounds: int) -> float:
    """Share of a 64-image forward pass that the structured model needs of the dense one's time."""
    pair = {"dense": unet.load("bundled").unet, "structured": model(False).unet}
    x, t = torch.zeros(64, 1, 28, 28), torch.zeros(64, dtype=torch.long)
    times: dict[str, list[float]] = {name: [] for name in pair}
    with torch.no_grad():
        for _ in range(rounds):
            for name, net in pair.items():
                start = time.perf_counter()
                net(x, t)
                times[name].append(time.perf_counter() - start)
    return statistics.median(times["structured"]) / statistics.median(times["dense"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    scheduler = model(False).scheduler
    batches = data.Batches(data.load_bundled().train, arguments.batch, 0)
    for bf16 in (False, True) if learn.use_bf16(device, "auto") else (False,):
        task = learn.Task(scheduler, batches, 0, device, bf16)
        running = {name: iter(trainer) for name, trainer in trainers(task).items()}
        times: dict[str, list[float]] = {name: [] for name in running}
        for round_ in range(arguments.rounds + 1):
            for name, steps in running.items():
                start = time.perf_counter()
                next(steps)
                if round_:
                    times[name].append(time.perf_counter() - start)
        plain = statistics.median(times["fine-tune"])
        print(f"{'bf16' if bf16 else 'fp32'}: fine-tuning step {plain:.3f} s at batch {arguments.batch}")
        for name, values in times.items():
            print(f"  {name:<28} {statistics.median(values) / plain:.2f}x")
    print(f"structured forward pass / dense, fp32, 64 images: {sampling(arguments.rounds):.2f}x")


if __name__ == "__main__":
    main()
