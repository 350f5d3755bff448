"""Quality against size on the bundled model: 60, 70 and 80 % fewer bytes, several seeds; one JSON line a run.

    .venv/bin/python benchmarks/quality_curve.py --runs-dir curve --seeds 0 1 2
    .venv/bin/python benchmarks/quality_curve.py --runs-dir short --set prune.finetune_steps=900 mask.steps=240 \\
        mask.recover_steps=900

Each run is the preset ``quality`` with another ``prune.target``; runs that are there are resumed, or taken as they
are. Bytes: the packed fp16 file of the N:M variant against the dense fp16 one. An hour a run on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from prunedm import comparison, judging, store  # noqa: E402

TARGETS = {60: 0.30, 70: 0.48, 80: 0.66}  # fewer bytes, %: share of the parameters that stage 1 removes before 2:4


def finished(name: str, target: float, seed: int, runs_dir: Path, assignments: list[str]) -> store.Run:
    """The run of this name, made or resumed until it is done; CalledProcessError when it fails."""
    call = [sys.executable, "-m", "prunedm"]
    found = [run for run in store.all_runs(runs_dir) if run.id.endswith(f"-{name}")]
    if not found:
        changes = [f"prune.target={target}", f"seed={seed}", "eval.images=64", *assignments]
        given = [part for text in changes for part in ("--set", text)]
        command = [*call, "run", "--preset", "quality", "--name", name, "--runs-dir", str(runs_dir), *given]
    elif found[0].state().status != "done":
        command = [*call, "resume", found[0].id, "--runs-dir", str(runs_dir)]
    else:
        return found[0]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return next(run for run in store.all_runs(runs_dir) if run.id.endswith(f"-{name}"))


def judged(run: store.Run, images: int) -> dict:
    """The figures that the curve is made of."""
    found = judging.entries([f"{run.id}/nm"], run.folder.parent)
    (one,) = judging.judge(found, judging.Request("quick", {"images": images, "steps": 25}))
    ratio = comparison.efficiency(one)
    return {
        "run": run.id,
        "seconds": round(run.state().seconds),
        "fewer_bytes": round(1 - 1 / ratio["compression"], 4),
        "macs": round(ratio["macs"], 4),
        "loss": round(one.get("validation_loss"), 5),
        "loss_ratio": round(ratio["validation_loss"], 4),
        "fd": round(one.get("fid"), 4),
        "fd_ratio": round(ratio["fid"], 4),
        "kd": round(one.get("kid"), 5),
        "ssim": round(one.get("ssim"), 4),
        "verdict": comparison.verdict(one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("curve"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--set", nargs="*", default=[], dest="assignments", metavar="FIELD=VALUE")
    given = parser.parse_args()
    for seed in given.seeds:
        for size in given.sizes:
            name = f"b{size}-s{seed}"
            run = finished(name, TARGETS[size], seed, given.runs_dir, given.assignments)
            print(json.dumps({"size": size, "seed": seed} | judged(run, given.images)), flush=True)


if __name__ == "__main__":
    main()
