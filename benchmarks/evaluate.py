"""What judging costs beside what it must do: one JSON line a measurement.

.venv/bin/python benchmarks/evaluate.py throughput     images a second against a bare loop, target 0.95; fixed costs
.venv/bin/python benchmarks/evaluate.py memory         peak growth for few images and for many
.venv/bin/python benchmarks/evaluate.py compare        20 finished runs side by side, target 5 s
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from prunedm import bundled, cache, data, diffusion, extractors, memory, samples, store, unet  # noqa: E402
from prunedm.quality import Judge, Target  # noqa: E402
from prunedm.recipe import Eval  # noqa: E402


def bare(model: unet.Diffusion, settings: Eval, network: extractors.Extractor) -> None:
    """Sampling and feature extraction, and nothing else."""
    for start in range(0, settings.images, samples.MOST):
        seeds = samples.image_seeds(settings.seed, range(start, start + samples.MOST))
        images = diffusion.sample(model.unet, model.scheduler, seeds, settings.sampler, settings.steps)
        network.features(diffusion.to_uint8(images))


def judged(judge: Judge, target: Target) -> dict[str, float]:
    """Seconds of the parts of an evaluation; all but ``stream`` is paid once a model, whatever the steps.

    validation: before the first image. stream: images sampled and kept on disk, moments and features gathered. figures:
    all that is computed of them at the end, and the sheet.
    """
    marks = [time.perf_counter()]
    for _ in judge.quality(target):  # yields after the validation, after each chunk, and with the figures
        marks.append(time.perf_counter())
    return {"validation": marks[1] - marks[0], "stream": marks[-2] - marks[1], "figures": marks[-1] - marks[-2]}


def throughput(rounds: int, images: int, steps: int) -> None:
    """Each round times both, in turn, at a seed of its own, of which nothing is kept yet; medians of the rounds."""
    model, network, real = unet.load(bundled.NAME), extractors.get("bundled"), data.load_bundled()
    target = Target(model, bundled.MODEL, Path(os.environ[cache.ENV]) / "sheet.png")
    warm = Eval(images=samples.MOST, steps=1, seed=rounds, noise_floor=False)
    bare(model, warm, network)
    judged(Judge(warm, real, network), target)  # also keeps the features of the real images
    found = []
    for i in range(rounds):
        settings = Eval(images=images, steps=steps, seed=i, noise_floor=False)
        times: dict[str, float] = {}
        for name in ("bare", "judged") if i % 2 else ("judged", "bare"):
            began = time.perf_counter()
            if name == "bare":
                bare(model, settings, network)
            else:
                times |= judged(Judge(settings, real, network), target)
            times[name] = time.perf_counter() - began
        found.append(times)
    print(json.dumps({"images": images, "steps": steps, "rounds": rounds} | summary(found, images)), flush=True)


def summary(found: list[dict[str, float]], images: int) -> dict[str, float]:
    """The stream against the bare loop, to which the target applies; then with what is paid once a model."""

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return round(statistics.median(map(of, found)), 4)

    return {
        "images_a_second": median(lambda times: images / times["stream"]),
        "ratio": median(lambda times: times["bare"] / times["stream"]),
        "target": 0.95,
        "ratio_with_fixed_costs": median(lambda times: times["bare"] / times["judged"]),
        "validation_s": median(lambda times: times["validation"]),
        "figures_s": median(lambda times: times["figures"]),
    }


def peak(counts: list[int]) -> None:
    """Growth of the resident set while so many images are judged, each in a process of its own."""
    for count in counts:
        script = f"import benchmarks.evaluate as b; b.judge_once({count})"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        print(done.stdout.strip(), flush=True)


def judge_once(count: int) -> None:
    """One judgement with a UNet that costs nothing, so that only the stream's own memory shows."""
    model, images = unet.load(bundled.NAME), data.load_bundled()
    model.unet.forward = lambda x, t: type("Out", (), {"sample": x * 0.5})
    target = Target(model, bundled.MODEL, Path(tempfile.mkdtemp()) / "sheet.png")
    judge = Judge.of(Eval(images=count, steps=1), images, torch.device("cpu"))
    with memory.PeakMemory(torch.device("cpu")) as watched:
        for _ in judge.quality(target):
            pass
    print(json.dumps({"images": count, "growth_mb": round(watched.growth / 1e6, 1)}))


def compare(runs: int) -> None:
    """The command on copies of one finished run, from the start of the process to its end."""
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "prunedm"]
        environment = os.environ | {"PRUNEDM_RUNS": folder}
        made = [*call, "run", "--preset", "smoke", "--set", "prune.finetune_steps=1", "--set", "mask.steps=1"]
        subprocess.run(
            [*made, "--set", "mask.recover_steps=1"], cwd=ROOT, env=environment, capture_output=True, check=True
        )
        first = store.all_runs(Path(folder))[0]
        for i in range(runs - 1):
            copy = shutil.copytree(first.folder, first.folder.with_name(f"{first.id}-{i}"))
            results = store.Run(copy).evaluation()
            for figures in results.values():
                figures["fid"] += 0.01 * i
            store.Run(copy).write_evaluation(results)
        ids = [run.id for run in store.all_runs(Path(folder))]
        times = []
        for extra in ([], ["--out", f"{folder}/out"]):
            began = time.perf_counter()
            subprocess.run([*call, "compare", *ids, *extra], cwd=ROOT, env=environment, capture_output=True, check=True)
            times.append(round(time.perf_counter() - began, 2))
        print(json.dumps({"runs": len(ids), "seconds": times[0], "seconds_with_out": times[1], "target": 5}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "memory", "compare"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[cache.ENV] = folder
        if given.what == "throughput":
            throughput(given.rounds, given.images, given.steps)
        elif given.what == "memory":
            peak([64, 1024, 8192, 16384])
        else:
            compare(20)


if __name__ == "__main__":
    main()
