"""A program whose Ray cluster loses its head while a run is worked on: Ray may end the process that this happens to.

python headless.py RUNS_DIR BUSY.yaml OTHER.yaml prints, as JSON, what the executor says and what became of both runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from test_cluster import at_work, ended, until
from test_cluster_nodes import cluster_of_two_nodes

from prunedm import cluster, cluster_link, recipe, store


def main(runs_dir: Path, *recipes: Path) -> None:
    cluster_link.ANSWER, cluster.ASK_EVERY = 2.0, 0.0
    first, second = (recipe.build(recipe.read(path)) for path in recipes)
    with cluster_of_two_nodes() as (made, _):
        executor = cluster.RayExecutor(runs_dir)
        machines, before = len(executor.machines()), executor.trouble
        busy = executor.submit(first)
        at_work(busy, "mask", 1)
        made.head_node.kill_gcs_server()
        until(lambda: executor.trouble)
        try:
            executor.submit(second)
        except cluster_link.Unreachable as error:
            refused = str(error)
        (other,) = (run for run in store.all_runs(runs_dir) if run.id != busy.id)
        found = {"machines": machines, "before": before, "trouble": executor.trouble, "refused": refused}
        found |= {"other": [other.state().status, other.state().error], "busy": busy.state().status}
        busy.request_stop()
        print(json.dumps(found | {"ended": ended(busy)}), flush=True)
        made.shutdown()
        os._exit(0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
