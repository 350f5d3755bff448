"""Steps per second of one rank on one core and of two ranks on two: the subcommand ``ranks`` of scale.py.

Each launch is a torchrun of its own, every rank held to one core. The rounds of both sizes are interleaved, so that
drift of the machine falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from prunedm import data, learn, masked_unet, parallel, training, unet  # noqa: E402
from prunedm.stage_recipes import Mask  # noqa: E402

TARGETS = {"reinforce": 1.6, "gumbel": 1.5}
FOREVER = 10**6
WARM = 2  # steps that are not timed


def add_to(parts: argparse._SubParsersAction) -> None:
    """The subcommand and its options."""
    parser = parts.add_parser("ranks", help="two ranks on two cores against one rank on one core")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a launch")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each size")
    parser.add_argument("--batch", type=int, default=64, help="images of the whole batch")
    parser.set_defaults(do=ranks)


def ranks(arguments: argparse.Namespace) -> None:
    """Time and print each method; exit where the machine has too few cores."""
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two ranks need two cores; this process may use one")
    for method, target in TARGETS.items():
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(arguments.rounds):
            for count, found in rates.items():
                found.append(_rate(method, count, arguments.steps, arguments.batch))
        one, two = (statistics.median(found) for found in rates.values())
        print(
            f"{method}: one rank {one:.2f} steps/s, two ranks {two:.2f} steps/s: {two / one:.2f}x "
            f"(target {target}x; batch {arguments.batch}, medians of {arguments.rounds})",
            flush=True,
        )


def _rate(method: str, count: int, steps: int, batch: int) -> float:
    """Steps per second of so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [*launcher, __file__, method, str(steps), str(batch)]
    ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{count} ranks by {method} ended with {ended.returncode}:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def work(method: str, steps: int, batch: int) -> float:
    """One rank's part: mask steps of the bundled model in fp32; the median rate of its steps."""
    parallel.join()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[parallel.rank() % len(cores)]})
    torch.set_num_threads(1)
    loaded = unet.load("bundled")
    images = torch.randint(
        0, 256, (2 * batch, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    task = training.Task(loaded.scheduler, data.Batches(images, batch, 0), 0, torch.device("cpu"), bf16=False)
    masked = masked_unet.MaskedUNet(loaded.unet, 2, 4)
    learner = learn.METHODS[method](masked, Mask(method=method), FOREVER, 0)
    running = iter(training.Trainer("mask", FOREVER, task, learner, None))
    times = []
    for _ in range(WARM + steps):
        began = time.perf_counter()
        next(running)
        times.append(time.perf_counter() - began)
    return 1 / statistics.median(times[WARM:])


if __name__ == "__main__":
    with training.memory_kept():
        rate = work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    if parallel.is_writer():
        print(json.dumps(rate), flush=True)
    parallel.leave(0)
