"""Many runs on many machines: each run is a Ray task, and Ray queues, places and retries it.

The run folder is all that the machines share (a network file system): whoever works on a run writes there what the
lab and the command line read, and is told to stop or to pause through it. A task whose worker or machine dies is
started again by Ray and goes on from the run's last checkpoint. Ray itself is imported late: it is an optional extra.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import failure, store
from .cluster_link import LOCAL, STARTING, ClusterError, Link, Unreachable, require_ray
from .cluster_task import RETRIES, SENT, Unended, died_too_often, take_back, work
from .jobs import Line, load_engine, made, require_inputs
from .recipe import Recipe, Resources
from .store import Busy, Run, StoreError

LOG = logging.getLogger("prunedm.cluster")
ROOT = Path(__file__).resolve().parents[1]
LOOK_EVERY, BEAT_EVERY = 0.5, 30.0  # seconds between two looks at the tasks, and two signs of life of those that wait
ASK_EVERY = 10.0  # seconds between two questions to the cluster whether it is there


class RayExecutor(Line):
    """Runs of this process that are tasks on a Ray cluster: an Executor as jobs.py defines it.

    address: as of Link. The tasks are this process's: when it ends, so do they, and their runs can be resumed.
    :class:`ClusterError` when Ray is not installed or the cluster does not answer.
    """

    def __init__(self, runs_dir: Path, address: str = LOCAL) -> None:
        require_ray()
        store.check_writable(runs_dir)
        self.runs_dir, self.address, self.link = runs_dir.absolute(), address, Link(address)
        self._tasks: dict[str, Any] = {}  # run id to the reference of its task
        super().__init__()
        self._closing, self._ready = threading.Event(), threading.Event()
        self._said: set[str] = set()  # runs of which it is logged that they cannot be looked at
        self._fault, self.trouble = "", ""  # trouble: what the thread that watches met last, empty while all is well
        self._thread = threading.Thread(target=self._watch, name="prunedm-ray", daemon=True)
        self._thread.start()
        if not self._ready.wait(STARTING):
            self._fault = f"no answer within {STARTING:.0f} s"
        if self._fault:
            self._closing.set()
            raise ClusterError(f"the Ray cluster {address} cannot be used ({self._fault}); check it with: ray status")

    # --- as an Executor ------------------------------------------------------------------------
    def submit(self, recipe: Recipe) -> Run:
        """Queue a new run. ValueError in one line when the recipe cannot run."""
        require_reserved(recipe)
        load_engine()
        require_inputs(recipe, self.runs_dir, is_here=False)
        run = made(recipe, self.runs_dir)
        self.put(run)
        return run

    def resume(self, run: Run) -> None:
        """Queue a stopped, failed or interrupted run again."""
        require_reserved(run.recipe())
        if run.id in self.held():
            raise StoreError(f"run {run.id} is {run.state().status} on the cluster; it cannot be resumed")
        run.take()
        self.put(run)

    def stop(self, run: Run) -> None:
        """Ask a run to stop after its step (a paused one stops at once), or take it out of the queue."""
        if not self._take_out(run):
            run.request_stop()

    def held(self) -> list[str]:
        """Ids of the runs that wait or are worked on."""
        with self._lock:
            return list(self._tasks)

    def machines(self) -> list[dict[str, float]]:
        """CPUs and GPUs of each machine of the cluster, used or not. Unreachable where it does not answer."""
        return self.link.machines()

    def close(self) -> None:
        """Let go of the cluster. Runs that are worked on are interrupted where it was LOCAL."""
        self._closing.set()
        self._thread.join(timeout=30)

    # --- tasks ---------------------------------------------------------------------------------
    def put(self, run: Run) -> None:
        """Make a task of a run that is claimed as *queued* by this process."""
        try:
            recipe = run.recipe()
            require_reserved(recipe)
            task = self._sent(run, recipe.resources)
        except Unreachable as error:
            run.end(run.state(), "interrupted", f"{error}; resume once it does")
            raise
        except Exception as error:  # whatever it is: it must not stay queued where nobody takes it
            run.end(run.state(), "failed", failure.plain_words(error))
            raise
        self._said.discard(run.id)
        with self._lock:
            self._waiting.append(run.id)
            self._tasks[run.id] = task

    def _sent(self, run: Run, wanted: Resources) -> Any:
        """The reference of a run's new task."""
        if not any(one["cpus"] >= wanted.cpus and one["gpus"] >= wanted.gpus for one in self.machines()):
            text = f"no machine of the cluster has {wanted.cpus} CPUs and {wanted.gpus:g} GPUs: the run waits for one"
            run.event("alert", stage="", step=0, what="no such machine", text=text, remedy="ask for less in resources")
            run.log(f"ALERT: {text}")
        run.event(SENT, executor="ray", cpus=wanted.cpus, gpus=wanted.gpus)
        run.log(f"sent to Ray: {wanted.cpus} CPUs, {wanted.gpus:g} GPUs")
        options = {
            "name": f"prunedm {run.id}",
            "num_cpus": wanted.cpus,
            "num_gpus": wanted.gpus,
            "max_retries": RETRIES,
            "retry_exceptions": [Busy, Unended],  # besides workers that die
            "runtime_env": {"env_vars": _environment(wanted.gpus)},
        }
        with self.link.asking():
            return self._task.options(**options).remote(str(run.folder.absolute()))

    def _take_out(self, run: Run) -> bool:
        """End a run that no worker holds; False when one does, or when it is none of this process's."""
        import ray

        with self._lock:
            task = self._tasks.get(run.id)
            if task is None:
                return False
            try:
                with run.lock():
                    state = run.state()
                    if state.status not in ("queued", "stopping", "interrupted"):
                        return False
                    run.end(state, "stopped", None)
            except StoreError:  # a worker has the lock
                return False
            self._forget(run.id, task)
        with suppress(Exception):  # of a cluster that is gone; a task that began meanwhile finds its run stopped
            ray.cancel(task)
        return True

    def _forget(self, run_id: str, task: Any) -> None:
        """A task that waits no longer and is worked on no more; its run may have another one by now."""
        with self._lock:
            if self._tasks.get(run_id) is not task:
                return
            del self._tasks[run_id]
            if run_id in self._waiting:
                self._waiting.remove(run_id)

    # --- the thread that watches ---------------------------------------------------------------
    def _watch(self) -> None:
        """Connects, and then looks at all tasks until closed. Ray's processes live no longer than the thread that
        started them, so that no page's thread may."""
        self._fault = self.link.connect()
        if self._fault:
            self._ready.set()
            return
        import ray

        self._task = ray.remote(work)
        self._ready.set()
        beaten = asked = time.monotonic()
        while not self._closing.is_set():
            if time.monotonic() - beaten > BEAT_EVERY:
                beaten = time.monotonic()
                self._beat()
            try:
                self._look_at_tasks()
                if self.trouble or time.monotonic() - asked > ASK_EVERY:  # tasks are waited for without an answer too
                    asked = time.monotonic()
                    self.machines()
                    self.trouble = ""
            except ClusterError as error:
                self._note_trouble(str(error))
        self.link.close()

    def _note_trouble(self, words: str) -> None:
        """The thread lives on, as runs wait for what it does next: said once, and tried again."""
        if not self.trouble:
            LOG.error("%s; its runs are looked at again as soon as it does", words)
        self.trouble = words
        self._closing.wait(LOOK_EVERY)

    def _ended(self, tasks: list[Any]) -> set[Any]:
        """Those that have ended, after a moment in which one may."""
        import ray

        if not tasks:
            self._closing.wait(LOOK_EVERY)
            return set()
        with self.link.asking():
            ray.wait(tasks, num_returns=1, timeout=LOOK_EVERY)
            return set(ray.wait(tasks, num_returns=len(tasks), timeout=0)[0])

    def _look_at_tasks(self) -> None:
        with self._lock:
            tasks = dict(self._tasks)
        ended = self._ended(list(tasks.values()))
        for run_id, task in tasks.items():
            run = Run(self.runs_dir / run_id)
            try:
                if task in ended:
                    self._conclude(run, task)
                else:
                    self._look_at(run, task)
            except ClusterError:
                raise
            except (OSError, StoreError):
                pass  # its folder is gone or full: the others are looked at all the same
            except Exception:  # of whatever its files hold: the thread must live, as other runs wait for it
                if run_id not in self._said:
                    self._said.add(run_id)
                    LOG.exception("run %s cannot be looked at", run_id)
            if task in ended:
                self._forget(run_id, task)

    def _look_at(self, run: Run, task: Any) -> None:
        """Where a run is that Ray has not ended: waiting, worked on, or lost with its worker."""
        state = run.state()
        if state.status == "interrupted" and self._is_lost(run, task):
            return
        with self._lock:
            if state.status in ("running", "paused") and run.id in self._waiting:
                self._waiting.remove(run.id)
        if run.id in self._waiting and run.stop_requested():
            self._take_out(run)

    def _is_lost(self, run: Run, task: Any) -> bool:
        """Whether a run's worker died; the run is then among those that wait."""
        import ray

        try:
            with run.lock():
                state = run.state()
                if state.status != "interrupted":
                    return False
                if not take_back(run, state):
                    self._forget(run.id, task)
                    with self.link.asking():
                        ray.cancel(task)
                    return True
        except StoreError:  # another worker has it by now
            return False
        with self._lock:
            if run.id not in self._waiting:
                self._waiting.insert(0, run.id)
        return True

    def _conclude(self, run: Run, task: Any) -> None:
        """A task ended; where it did not end its run, say why."""
        import ray

        try:
            ray.get(task)
            return
        except ray.exceptions.TaskCancelledError:
            return  # its run is stopped
        except ray.exceptions.RayTaskError as error:  # the folder is gone or full, or its code is not ours
            if isinstance(error, Busy):  # Ray's error is of the cause's type too
                run.log(f"not gone on with: {_last_line(error)}")
                return  # the worker that has the run says what becomes of it
            if isinstance(error, Unended):
                status, cause = "interrupted", _lost_words(run, error)
            else:
                status, cause = "failed", f"the task failed on the cluster: {_last_line(error)}"
        except ray.exceptions.RayError as error:
            status, cause = "interrupted", _lost_words(run, error)
        with run.lock():
            state = run.state()
            if state.status not in ("done", "stopped", "failed"):
                run.end(state, status, f"{cause}; mend that and resume")

    def _beat(self) -> None:
        """Runs that wait are this process's: other machines are to see that it lives."""
        with self._lock:
            waiting = list(self._waiting)
        for run_id in waiting:
            with suppress(OSError):
                Run(self.runs_dir / run_id).beat()


def require_reserved(recipe: Recipe) -> None:
    """:class:`ClusterError` when a run would use a GPU that it does not reserve, or not use one that it does."""
    device, gpus = recipe.device, recipe.resources.gpus
    kind, _, number = device.partition(":")
    if kind in ("cpu", "mps") and gpus > 0:
        raise ClusterError(
            f"device={device} uses no GPU and resources.gpus={gpus:g} reserves some; set resources.gpus=0"
        )
    if kind == "cuda" and gpus == 0:
        raise ClusterError(f"device={device} needs a GPU and resources.gpus=0 reserves none; set resources.gpus=1")
    if number and (int(number) or gpus > 1):
        raise ClusterError(f"device={device}: a run sees only the GPUs that it reserves, one a rank; set device=cuda")


def _environment(gpus: float) -> dict[str, str]:
    """What a worker's process is to see: this code, and no GPU that it did not reserve."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})


def _lost_words(run: Run, error: BaseException) -> str:
    """Why Ray gave a run up: its workers died too often, or Ray itself is gone."""
    what = f"its workers died {RETRIES + 1} times" if died_too_often(run) else "the cluster lost its task"
    return f"{what} ({_last_line(error)})"


def _last_line(error: BaseException) -> str:
    """What an error says at its end: Ray puts the whole trace of the other machine before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
