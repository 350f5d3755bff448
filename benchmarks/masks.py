"""Cost of a mask step as a ratio to plain fine-tuning of the same model, interleaved in one run.

    .venv/bin/python benchmarks/masks.py [--model bundled|cifar10] [--batch 64] [--rounds 8]

Both models dense: the bundled one (2.7 M) and the architecture of google/ddpm-cifar10-32 (35.7 M, random
weights). Prints what each method holds between steps too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import architectures  # noqa: E402
import torch  # noqa: E402

from prunedm import data, learn, masked_unet, training, unet  # noqa: E402
from prunedm.recipe import Train  # noqa: E402
from prunedm.stage_recipes import Mask  # noqa: E402

FOREVER = 10**6
KINDS = {
    "gumbel": Mask(method="gumbel"),
    "reinforce": Mask(method="reinforce"),
    "reinforce, f(m0) cached": Mask(method="reinforce", cached_batches=1),
    "magnitude, weights train": Mask(method="magnitude", train_weights=True),
    "sr-ste, weights train": Mask(method="sr-ste", train_weights=True),
    "offset, weights train": Mask(method="offset", train_weights=True),
    "gumbel, weights train": Mask(method="gumbel", train_weights=True),
}


def model(name: str) -> torch.nn.Module:
    return unet.load("bundled").unet if name == "bundled" else architectures.build(name)


def trainers(name: str, task: training.Task, kinds: list[str]) -> dict[str, training.Trainer]:
    window = training.Window.of(FOREVER)
    spec = Train(lr=1e-6)
    dense = model(name)
    weights = training.Weights(dense.parameters(), spec, window)
    made = {"fine-tune": training.Trainer("f", FOREVER, task, training.DenseLoss(dense), weights)}
    for kind in kinds:
        mask = KINDS[kind]
        masked = masked_unet.MaskedUNet(model(name), 2, 4)
        learner = learn.METHODS[mask.method](masked, mask, FOREVER, 0)
        weights = training.Weights(masked.trainable(), spec, window) if mask.train_weights else None
        made[kind] = training.Trainer("m", FOREVER, task, learner, weights)
    return made


def prunable(name: str) -> int:
    return sum(bank.weights.numel() for bank in masked_unet.MaskedUNet(model(name), 2, 4).banks)


def bytes_held(trainer: training.Trainer) -> int:
    """What the mask method itself keeps between steps: logits, Adam's moments, masks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in trainer.learner.tensors().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("bundled", "cifar10"), default="bundled")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--precision", nargs="*", default=["bf16", "fp32"])
    arguments = parser.parse_args()
    device = torch.device("cpu")
    shape = (1, 28, 28) if arguments.model == "bundled" else (3, 32, 32)
    images = torch.randint(0, 256, (arguments.batch * 2, *shape), dtype=torch.uint8)
    scheduler = unet.load("bundled").scheduler
    for precision in arguments.precision:
        task = training.Task(scheduler, data.Batches(images, arguments.batch, 0), 0, device, precision == "bf16")
        made = trainers(arguments.model, task, arguments.kinds)
        running = {kind: iter(trainer) for kind, trainer in made.items()}
        times: dict[str, list[float]] = {kind: [] for kind in running}
        for round_ in range(arguments.rounds + 1):
            for kind, steps in running.items():
                start = time.perf_counter()
                next(steps)
                if round_:
                    times[kind].append(time.perf_counter() - start)
        plain = statistics.median(times["fine-tune"])
        weights = prunable(arguments.model)
        print(f"{arguments.model}, {precision}, batch {arguments.batch}: fine-tuning step {plain:.3f} s", flush=True)
        for kind, values in times.items():
            ratios = [v / p for v, p in zip(values, times["fine-tune"])]
            held = f"{bytes_held(made[kind]) / weights:5.2f} bytes a prunable weight" if kind in KINDS else ""
            print(f"  {kind:<28} {statistics.median(ratios):.2f}x  {held}", flush=True)


if __name__ == "__main__":
    with training.memory_kept():
        main()
