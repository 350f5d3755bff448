"""A machine of the cluster dies: two Ray nodes of one CPU on loopback, beside a head without any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_cluster import at_work, ended, kinds, weights

from prunedm import cluster, cluster_link
from prunedm.cluster import RayExecutor


@contextmanager
def cluster_of_two_nodes() -> Iterator[tuple[Any, list[Any]]]:
    """The cluster, and its two nodes that may be killed: the driver is connected to the head."""
    import ray
    from ray._private import services
    from ray.cluster_utils import Cluster

    for name, value in cluster_link.RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    place = {"node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 100 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "resolve_ip_for_localhost", lambda host: host)  # or it looks where nobody listens
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **place}, shutdown_at_exit=False)
        try:
            nodes = [made.add_node(num_cpus=1, **place) for _ in range(2)]
            ray.init(address=made.address, log_to_driver=False, logging_level="error", _node_ip_address="127.0.0.1")
            yield made, nodes
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def two_nodes():
    pytest.importorskip("ray", reason=cluster_link.INSTALL)
    with cluster_of_two_nodes() as found:
        yield found


def works_on(pid: int, node) -> bool:
    """Whether a process is a worker of this node."""
    (raylet,) = node.all_processes["raylet"]
    return raylet.process.pid in [parent.pid for parent in psutil.Process(pid).parents()]


@pytest.mark.slow
def test_a_head_that_is_gone_is_said_and_takes_no_runs_while_others_go_on(micro, tmp_path):
    """In a process of its own, which Ray may end."""
    pytest.importorskip("ray", reason=cluster_link.INSTALL)
    runs_dir, recipes = tmp_path / "runs", []
    for recipe in (micro(name="busy", mask={"steps": 5000}), micro(name="other")):
        recipes.append(tmp_path / f"{recipe.name}.yaml")
        recipes[-1].write_text(recipe.to_yaml())
    command = [sys.executable, Path(__file__).with_name("headless.py"), runs_dir, *recipes]
    environment = os.environ | {"PYTHONPATH": str(cluster.ROOT)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert process.stdout, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    words = "does not answer (TimeoutError: nothing within 2 s)"
    assert found["machines"] == 3 and found["before"] == "" and words in found["trouble"] and words in found["refused"]
    assert found["other"] == ["interrupted", f"{found['refused']}; resume once it does"]
    assert (found["busy"], found["ended"]) == ("running", "stopped")


@pytest.mark.slow
def test_a_run_whose_machine_dies_goes_on_on_another_with_the_uninterrupted_result(two_nodes, micro, tmp_path):
    made, nodes = two_nodes
    executor = RayExecutor(tmp_path)
    try:
        recipe = micro(mask={"steps": 400})
        whole, hurt = executor.submit(recipe), executor.submit(recipe)
        pid = at_work(hurt, "mask", 1).pid
        busy, other = sorted(nodes, key=lambda node: not works_on(pid, node))
        assert works_on(pid, busy) and works_on(whole.state().pid, other)
        made.remove_node(busy, allow_graceful=False)
        assert [ended(whole), ended(hurt)] == ["done", "done"]
    finally:
        executor.close()
    assert kinds(hurt).count("worker_lost") == 1 and kinds(hurt).count("started") == 2
    assert kinds(whole).count("worker_lost") == 0
    expected, found = weights(whole), weights(hurt)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
