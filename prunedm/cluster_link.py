"""The connection to a Ray cluster: what it is asked has an answer in time, or an error in one line.

Ray itself is imported late: it is an optional extra.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from .untrusted import one_line

INSTALL = (
    "the executor ray needs packages that are not here; install them: make cluster, or "
    "pip install -r requirements-cluster.txt -c constraints.txt"
)
LOCAL = "local"  # the address of a cluster of this machine alone, which lives as long as this process
STARTING = 120.0  # seconds for a cluster to start
ANSWER = 10.0  # seconds for it to answer
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",  # else it ends this process a minute after the cluster is gone
}


class ClusterError(ValueError):
    """A cluster that cannot be used, in one line."""


class Unreachable(ClusterError):  # noqa: N818
    """A cluster that does not answer now: what it was asked for can be asked again."""


def require_ray() -> None:
    """:class:`ClusterError` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ClusterError(INSTALL)


class Link:
    """This process's connection to a cluster; one that it has already is used as it is.

    address: as ``ray.init`` takes it (``auto``, ``host:6379``, ``ray://host:10001``), or LOCAL.
    """

    def __init__(self, address: str) -> None:
        for name, value in RAY_SETTINGS.items():
            os.environ.setdefault(name, value)  # read when ray is imported
        self.address, self.is_own = address, False
        self._asked: Future | None = None  # the last question for the cluster's machines
        self._lock = threading.Lock()

    def connect(self) -> str:
        """Why there can be no connection, in one line; empty once there is one."""
        import ray

        if ray.is_initialized():
            return ""
        own: dict[str, Any] = {"include_dashboard": False} if self.address == LOCAL else {}
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="error", **own)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # a refusal is an OSError
            return " ".join(str(error).split())[:200] or type(error).__name__
        self.is_own = True
        return ""

    def close(self) -> None:
        """End the connection, and the cluster where it was LOCAL; one that was there before stays."""
        import ray

        if self.is_own:
            ray.shutdown()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Unreachable for whatever Ray raises of a cluster that does not answer."""
        try:
            yield
        except ClusterError:
            raise
        except Exception as error:  # noqa: BLE001  (Ray's errors have no common base)
            words = f"the Ray cluster {self.address} does not answer ({type(error).__name__}: {one_line(error)})"
            raise Unreachable(words) from error

    def machines(self) -> list[dict[str, float]]:
        """CPUs and GPUs of each machine of the cluster, used or not. Unreachable where it does not answer."""
        with self.asking():
            found = [node["Resources"] for node in self._nodes() if node["Alive"]]
        return [{"cpus": one.get("CPU", 0.0), "gpus": one.get("GPU", 0.0)} for one in found]

    def _nodes(self) -> list[dict[str, Any]]:
        """As ``ray.nodes`` tells them, which waits for ever for a head that is gone: then TimeoutError, and whoever
        asks next waits for the same answer."""
        import ray

        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = _answer_of(ray.nodes)
            asked = self._asked
        if not wait([asked], ANSWER).done:
            raise TimeoutError(f"nothing within {ANSWER:g} s")
        return asked.result()


def _answer_of(question: Callable[[], Any]) -> Future:
    """What a question will have been answered by, asked on a thread that may never end."""
    answer: Future = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:  # noqa: BLE001  (raised where the answer is read)
            answer.set_exception(error)

    threading.Thread(target=ask, name="prunedm-ray-question", daemon=True).start()
    return answer
