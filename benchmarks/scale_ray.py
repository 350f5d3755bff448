"""What Ray adds to a run, and how it queues many: ``benchmarks/scale.py ray``.

The same short run by a Ray worker and in this process, in turn, once the cluster is up and both have imported
everything: the difference of the medians is what Ray adds to a run (target: under 1 s). Then so many runs queue
behind one that has all CPUs: how long it takes to submit each, to list all with their places, and to cancel each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_run  # noqa: E402

from prunedm import cluster, jobs, store  # noqa: E402

ENDLESS = {"prune": {"finetune_steps": 10**6}}
POLL = 0.01  # seconds between two looks at a run


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- ray -----------------------------------------------------------------------------------------
def one_run(runs_dir: Path, execute: jobs.Execute) -> None:
    """From a recipe to the end of its run."""
    run = jobs.made(tiny_run.recipe(runs_dir), runs_dir)
    status = execute(run, lambda step: None, lambda: False)
    if status != "done":
        sys.exit(f"run {run.id} is {status}: {run.state().error}")


def overhead(executor: cluster.RayExecutor, count: int) -> None:
    """What Ray adds to a run."""
    ways = {"this process": jobs.here, "Ray": jobs.through(executor, POLL)}
    for execute in ways.values():
        one_run(executor.runs_dir, execute)  # imports, and the worker's start
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count):
        for name, execute in ways.items():
            found[name].append(seconds(lambda execute=execute: one_run(executor.runs_dir, execute)))
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, times in found.items():
        print(f"a short run, {name}: {medians[name]:.2f} s (median of {count}; {min(times):.2f} to {max(times):.2f})")
    print(f"Ray adds {medians['Ray'] - medians['this process']:+.2f} s a run (target: under 1 s)")


def queue(executor: cluster.RayExecutor, count: int) -> None:
    """How quickly many waiting runs are submitted, listed and cancelled."""
    cpus = int(max(one["cpus"] for one in executor.machines()))
    blocker = executor.submit(tiny_run.recipe(executor.runs_dir, **ENDLESS, resources={"cpus": cpus}))
    while blocker.state().status == "queued":
        time.sleep(POLL)
    recipe = tiny_run.recipe(executor.runs_dir, resources={"cpus": cpus})
    submitted = [seconds(lambda: executor.submit(recipe)) for _ in range(count)]

    def listing() -> None:
        places = [executor.position(run.id) for run in store.all_runs(executor.runs_dir) if run.state() is not None]
        if sum(place is not None for place in places) != count:
            sys.exit(f"{count} runs were queued and {places} are their places")

    listed = [seconds(listing) for _ in range(5)]
    waiting = [store.Run(executor.runs_dir / run_id) for run_id in executor.held() if run_id != blocker.id]
    cancelled = [seconds(lambda run=run: executor.stop(run)) for run in waiting]
    if {run.state().status for run in waiting} != {"stopped"}:
        sys.exit("not all runs that were cancelled are stopped")
    executor.stop(blocker)
    while blocker.id in executor.held():
        time.sleep(POLL)
    for what, times in (("submit one", submitted), ("list all", listed), ("cancel one", cancelled)):
        print(f"{count} queued runs, {what}: {statistics.median(times):.3f} s (median; at most {max(times):.3f})")


def add_to(parts: argparse._SubParsersAction) -> None:
    """The subcommand ``ray``."""
    parser = parts.add_parser("ray", help="what Ray adds to a run, and how it queues many")
    parser.add_argument("--runs", type=int, default=5, help="runs each way")
    parser.add_argument("--queued", type=int, default=200, help="runs that wait")
    parser.set_defaults(do=ray)


def ray(arguments: argparse.Namespace) -> None:
    """The subcommand."""
    jobs.load_engine()
    with tempfile.TemporaryDirectory() as folder:
        tiny_run.furnish(Path(folder))
        up = time.perf_counter()
        executor = cluster.RayExecutor(Path(folder))
        print(f"the cluster was up after {time.perf_counter() - up:.1f} s")
        try:
            overhead(executor, arguments.runs)
            queue(executor, arguments.queued)
        finally:
            executor.close()
