"""Run folders as the pipeline leaves them, models aside, written without an engine: for tests and benchmarks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunedm import recipe as recipes
from prunedm import shelf, store
from prunedm.recipe import Recipe
from prunedm.shelf import Notes
from prunedm.store import Run

SAMPLING = {"sampler": "ddim", "steps": 25, "eta": 0.0, "seed": 0, "extractor": "bundled", "data": "fashion"}
DENSE = {
    "parameters": 2_734_945, "nonzero_parameters": 2_734_945, "macs": 290_000_000, "bytes": 10_950_000,
    "sizes": {"dense_fp32": 10_950_000, "dense_fp16": 5_480_000, "packed_fp16": 5_480_000, "packed_int8": 2_750_000},
    "validation_loss": 0.0391, "validation_images": 512, "validation_errors": [0.0391] * 512,
    "fid": 0.52, "fid_std": 0.02, "fid_extractor": "FD-fashion", "fid_images": 512, "sampling": SAMPLING,
    "latency_ms": 12.4, "latency_ms_p10": 12.0, "latency_ms_p90": 13.1, "device": "cpu", "dtype": "float32", "batch": 8,
}  # fmt: skip
STEPS = {"finetune": 150, "mask": 200, "recover": 200}


def figures(keep: float, loss: float, fid: float) -> dict[str, Any]:
    """Figures of a variant with so much of dense."""
    sizes = DENSE["sizes"] | {"packed_fp16": int(5_480_000 * keep * 1.12)}
    count = {"parameters": 1_100_000, "nonzero_parameters": int(2_734_945 * keep), "latency_ms": 7.31}
    return DENSE | count | {"sizes": sizes, "validation_loss": loss, "fid": fid}


def fake(
    runs_dir: Path, name: str, status: str = "done", evaluated: bool = True, steps: dict[str, int] | None = None,
    keep: float = 0.22, loss: float = 0.0437, notes: Notes | None = None, **changes: Any,
) -> Run:  # fmt: skip
    """A run's folder in the state named; ``changes``: of its recipe."""
    base = recipes.merge(Recipe().model_dump(), {"name": name})
    run = store.create(runs_dir, recipes.build(recipes.merge(base, changes)))
    state = run.state()
    state.seconds, state.started, state.stage, state.of = 83.0, time.time() - 4000, "mask", STEPS["mask"]
    run.append("metrics.jsonl", list(curve(steps or STEPS)))
    if evaluated:
        results = {"dense": DENSE, "structured": figures(0.4, 0.0419, 0.71), "nm": figures(keep, loss, 0.93)}
        run.write_evaluation(results)
        for variant in results:
            run.variant(variant).mkdir(parents=True)
            (run.variant(variant) / "weights.safetensors").write_bytes(b"x" * 20_000)
            store.write_json(run.variant(variant) / store.VARIANT_RECORD, {})
    if notes:
        shelf.write_notes(run, notes)
    if status in ("queued", "running", "paused"):
        state.step = 120
        run.claim(state, status)
    elif status == "interrupted":
        run.claim(state, "running")
        raw = store.read_json(run.folder / "state.json")
        store.write_json(run.folder / "state.json", raw | {"began": 1.0})
    elif status == "unreadable":
        (run.folder / "state.json").write_text("{")
    else:
        run.end(state, status, "the disk is full; free some space and resume" if status == "failed" else None)
    return run


def other_states(runs_dir: Path) -> None:
    """A run in each state that needs a hand, with a tag and a note, and one in the trash."""
    for status in ("failed", "interrupted", "unreadable"):
        fake(runs_dir, status, status, evaluated=False, notes=Notes(("a-tag",), "a note"))
    shelf.delete(fake(runs_dir, "deleted"))


def active_states(runs_dir: Path) -> None:
    """A run that was stopped, and one in each state that this process could be at work in."""
    for status in ("stopped", "queued", "paused"):
        fake(runs_dir, status, status, evaluated=False)
    fake(runs_dir, "stopping", "running", evaluated=False).request_stop()


def curve(steps: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Step records of each stage: a falling, wavy loss."""
    for stage, count in steps.items():
        for step in range(1, count + 1):
            loss = 0.04 + 0.05 * math.exp(-step / 40) + 0.004 * math.sin(step * 1.7)
            yield {"stage": stage, "step": step, "time": step * 0.2, "loss": loss, "entropy": 0.5, "flips": 0.1}
