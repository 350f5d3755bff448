"""Runs in processes of their own, one or as many as a launcher starts: test_parallel.py and test_ranks_end.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prunedm import store
from prunedm.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
THREE = [*TORCHRUN[:-1], "--nproc_per_node=3"]
PRUNEDM = ["-m", "prunedm"]
PATIENCE = 300  # seconds, on a busy machine


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def start_run(launcher: list[str], recipe: Recipe, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return launch([*launcher, *PRUNEDM, "run", str(folder / "recipe.yaml"), "--runs-dir", str(folder)])


def only_run(folder: Path) -> store.Run:
    (run,) = store.all_runs(folder)
    return run
