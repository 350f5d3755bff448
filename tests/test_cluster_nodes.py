"""A machine of the cluster dies: two Ray nodes of one CPU on loopback, beside a head without any."""

from __future__ import annotations

import os

import psutil
import pytest
import torch
from test_cluster import at_work, ended, kinds, until, weights

from prunedm import cluster, store
from prunedm.cluster import RayExecutor


@pytest.fixture
def two_nodes(monkeypatch):
    """The cluster, and its two nodes that may be killed: the driver is connected to the head."""
    ray = pytest.importorskip("ray", reason=cluster.INSTALL)
    from ray._private import services
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(services, "resolve_ip_for_localhost", lambda host: host)  # or it looks where nobody listens

    for name, value in cluster.RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    place = {"node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 100 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **place}, shutdown_at_exit=False)
    try:
        nodes = [made.add_node(num_cpus=1, **place) for _ in range(2)]
        ray.init(address=made.address, log_to_driver=False, logging_level="error", _node_ip_address="127.0.0.1")
        yield made, nodes
    finally:
        ray.shutdown()
        made.shutdown()


def works_on(pid: int, node) -> bool:
    """Whether a process is a worker of this node."""
    (raylet,) = node.all_processes["raylet"]
    return raylet.process.pid in [parent.pid for parent in psutil.Process(pid).parents()]


@pytest.mark.slow
def test_a_head_that_is_gone_is_said_and_takes_no_runs(two_nodes, micro, tmp_path, monkeypatch):
    made, _ = two_nodes
    monkeypatch.setattr(cluster, "ANSWER", 2.0)
    monkeypatch.setattr(cluster, "ASK_EVERY", 0.0)
    executor = RayExecutor(tmp_path)
    try:
        assert len(executor.machines()) == 3 and not executor.trouble
        busy = executor.submit(micro(name="busy", mask={"steps": 5000}))
        at_work(busy, "mask", 1)
        made.head_node.kill_gcs_server()
        until(lambda: executor.trouble)
        assert "does not answer (TimeoutError: nothing within 2 s)" in executor.trouble
        with pytest.raises(cluster.Unreachable, match="nothing within 2 s"):
            executor.submit(micro())
        (run,) = (one for one in store.all_runs(tmp_path) if one.id != busy.id)
        assert run.state().status == "interrupted" and run.state().error.endswith("resume once it does")
        assert busy.state().status == "running"
        busy.request_stop()
        assert ended(busy) == "stopped"
    finally:
        executor.close()


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
