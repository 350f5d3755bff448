"""Which executor a lab uses: the queue of its own process, or a Ray cluster. The choice is kept in the runs folder.

It holds for what is queued from then on: runs that the other executor has stay there until they end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from . import cluster_link
from .cluster import RayExecutor
from .cluster_link import ClusterError, Unreachable
from .files import StoreError, read_json, write_json
from .jobs import Executor, Jobs
from .recipe import Recipe
from .store import Run
from .untrusted import one_line

FILE = "executor.json"
Name = Literal["local", "ray"]


@dataclass(frozen=True)
class Choice:
    """An executor, and for ray the address of its cluster as :class:`cluster.RayExecutor` takes it."""

    executor: Name = "local"
    address: str = cluster_link.LOCAL

    @classmethod
    def read(cls, runs_dir: Path, environment: Mapping[str, str]) -> Choice:
        """What was chosen last, else what the environment says; StoreError where that is no choice."""
        path = runs_dir / FILE
        if path.exists():
            found, source = read_json(path), str(path)
        else:
            found, source = {"executor": environment.get("PRUNEDM_EXECUTOR", "local")}, "PRUNEDM_EXECUTOR"
            found |= {"address": environment["RAY_ADDRESS"]} if environment.get("RAY_ADDRESS") else {}
        known = isinstance(found, dict) and found.get("executor") in get_args(Name) and set(found) <= set(asdict(cls()))
        if not known or not isinstance(found.get("address", ""), str):
            raise StoreError(f"{source} names no executor; it is local or ray: delete it and choose again")
        return cls(**found)


class Chosen:
    """The Executor of a lab. It connects to a cluster in the background: no page waits for that."""

    def __init__(self, runs_dir: Path, choice: Choice) -> None:
        self.runs_dir, self.local = runs_dir, Jobs(runs_dir)
        self.choice, self.fault = Choice(), ""
        self._ray: RayExecutor | None = None
        self._connecting: threading.Thread | None = None
        self._lock = threading.Lock()
        if choice.executor == "ray":
            self._begin(choice)

    # --- the choice ------------------------------------------------------------------------------
    def choose(self, choice: Choice) -> None:
        """Use this executor from now on. ClusterError in one line where it cannot be."""
        if choice.executor == "ray":
            cluster_link.require_ray()
        with self._lock:
            if self._connecting is not None and self._connecting.is_alive():
                raise ClusterError(f"the cluster {self.choice.address} is being connected to; wait for that to end")
            held = self._ray.held() if self._ray is not None else []
            same = self._ray is not None and self._ray.address == choice.address
            if choice.executor == "ray" and held and not same:
                raise ClusterError(
                    f"{len(held)} of the runs are on the cluster {self._ray.address}; stop them, or wait for their end"
                )
            if self._ray is not None and not held and not (same and choice.executor == "ray"):
                self._ray.close()
                self._ray = None
            write_json(self.runs_dir / FILE, asdict(choice))
            self._begin(choice)

    def _begin(self, choice: Choice) -> None:
        self.choice, self.fault = choice, ""
        if choice.executor == "ray" and self._ray is None:
            self._connecting = threading.Thread(target=self._connect, name="prunedm-connect", daemon=True)
            self._connecting.start()

    def _connect(self) -> None:
        try:
            self._ray = RayExecutor(self.runs_dir, self.choice.address)
        except (ClusterError, StoreError, OSError) as error:
            self.fault = one_line(error)

    def is_connecting(self) -> bool:
        return self._connecting is not None and self._connecting.is_alive()

    def machines(self) -> list[dict[str, float]]:
        """CPUs and GPUs of each machine of the cluster; empty without one."""
        return [] if self._ray is None else self._ray.machines()

    def trouble(self) -> str:
        """What keeps the cluster from answering now, in one line; empty while it does, and without one."""
        return "" if self._ray is None else self._ray.trouble

    def warm_up(self, *first: Callable[[], object]) -> None:
        self.local.warm_up(*first)

    # --- as an Executor --------------------------------------------------------------------------
    def submit(self, recipe: Recipe) -> Run:
        """Queue a new run. ValueError in one line when the recipe cannot run."""
        return self._current().submit(recipe)

    def resume(self, run: Run) -> None:
        """Queue a stopped, failed or interrupted run again."""
        self._current().resume(run)

    def put(self, run: Run) -> None:
        """Queue a run that is claimed as *queued* by this process."""
        try:
            executor = self._current()
        except ClusterError as error:
            run.end(run.state(), "interrupted", f"{error}; then resume")
            raise
        executor.put(run)

    def stop(self, run: Run) -> None:
        """Ask a run to stop after its step (a paused one stops at once), or take it out of the queue."""
        holder = self._ray if self._ray is not None and run.id in self._ray.held() else self.local
        holder.stop(run)

    def position(self, run_id: str) -> int | None:
        """Place in its queue, 1 for the next; None when not waiting here."""
        place = self.local.position(run_id)
        return self._ray.position(run_id) if place is None and self._ray is not None else place

    def held(self) -> list[str]:
        """Ids of the runs that wait here or are worked on."""
        return self.local.held() + (self._ray.held() if self._ray is not None else [])

    def _current(self) -> Executor:
        if self.choice.executor == "local":
            return self.local
        if self._connecting is not None:
            self._connecting.join(cluster_link.STARTING)
        if self._ray is None:
            fault = self.fault or f"the cluster {self.choice.address} does not answer yet"
            raise Unreachable(f"{fault}; or choose this machine on the System page")
        return self._ray
