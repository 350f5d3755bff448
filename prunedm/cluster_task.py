"""What a Ray task does: works on, or goes on with, the run in a folder, alone or by ranks; cluster.py sends them."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import owner, parallel
from .interrupts import answered, interruptions
from .jobs import Stop, load_engine
from .recipe import Recipe
from .records import RunState
from .store import Run, StoreError

RETRIES = 3  # of a run whose worker died
PATIENCE = 60.0  # seconds that a worker waits for the one before it to be gone
PARENT = "PRUNEDM_TASK"  # the variable with the pid of the worker that a rank belongs to
LAST_SAID = 8000  # characters of what ranks said that go into the run's log
SENT, LOST = "sent", "worker_lost"  # events of a run


class Unended(RuntimeError):  # noqa: N818
    """Work that came to its end before the run did, with its ranks or its machine: Ray has it gone on with."""


def work(folder: str) -> str:
    """The Ray task: run, or go on with, the run in this folder; returns its final status.

    A run that reserves several GPUs is worked on by as many ranks of its machine, which a launcher starts. Unended
    where the run is left to the next worker.
    """
    run = Run(Path(folder))
    if not (run.folder / "recipe.yaml").is_file():
        raise StoreError(f"{socket.gethostname()} sees no {folder}; give all machines of the cluster one --runs-dir")
    ranks = ranks_of(run.recipe())
    told = threading.Event()
    with answered(lambda number, frame: told.set(), signal.SIGTERM):  # Ray's own answer makes the run a failed one
        if ranks > 1:
            return _launched(run, ranks, told)
        status = _work(run, told.is_set)
        if told.is_set() and status == "interrupted":
            raise Unended(f"the worker of run {run.id} was told to end, as by a machine that goes down")
        return status


def _work(run: Run, stop: Stop = lambda: False) -> str:
    """What this process, or each of the ranks, does on a run. Another worker goes on with one that ``stop`` ends."""
    load_engine()
    from . import pipeline, shared_run

    own = shared_run.of(run)
    with own.lock(PATIENCE):
        ended = parallel.shared(lambda: _ended_or_taken(run))
        return ended or pipeline.work(own, stop=stop, stopped="interrupted")


def _ended_or_taken(run: Run) -> str:
    """The status of a run that nothing is left to do of; else empty, and the run is this process's from here on."""
    state = run.state()
    if state.status in ("done", "stopped", "failed"):
        return state.status  # stopped while it waited
    if state.status not in ("queued", "stopping") and not take_back(run, state):
        return "interrupted"
    run.claim(state, "queued")
    return ""


def ranks_of(recipe: Recipe) -> int:
    """How many ranks work on a run of the cluster: one for each GPU that it reserves."""
    return max(1, math.floor(recipe.resources.gpus))


def _launched(run: Run, ranks: int, told: threading.Event) -> str:
    """Ranks of this machine at work on a run: the status that they leave. Unended where they leave none, and Busy where
    another worker has the run. told: to end, as they are then."""
    with run.lock(PATIENCE):
        pass  # the ranks could not say so
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, "-m", "prunedm.cluster_task", str(run.folder)]
    threads = max(1, run.recipe().resources.cpus // ranks)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as launcher:
        try:
            said = _said_by(launcher, told)
        finally:
            launcher.kill()
    state = run.state()
    if state.status not in ("done", "stopped", "failed") and _times_lost(run) <= RETRIES:
        run.log(f"its {ranks} ranks left it {state.status}; the last that they said:\n{said}")
        raise Unended(f"the {ranks} ranks of run {run.id} ended (exit status {launcher.returncode}); see its log")
    return state.status


def _said_by(launcher: subprocess.Popen[bytes], told: threading.Event) -> str:
    """The last that a launcher and its ranks said, once they have ended, by themselves or because they are told to."""
    while True:
        try:
            return launcher.communicate(timeout=1.0)[0].decode(errors="replace")[-LAST_SAID:]
        except subprocess.TimeoutExpired:
            if told.is_set():
                launcher.terminate()
                told.clear()  # once: a second time would not wait for the step at hand


def _end_with(parent: int) -> None:
    """End this rank when its launcher, or the worker that had it started, is gone: what was reserved is another's by
    then. Neither's end would end it, and Ray does not know of it."""
    launcher, began = os.getppid(), owner.began(parent)
    while began is not None and owner.began(parent) == began and os.getppid() == launcher:
        time.sleep(1.0)
    os._exit(1)


def _rank(folder: str) -> int:
    """One of the ranks of a task: its exit status. A launcher that ends them all, as its machine does before it goes
    down, is obeyed after the step at hand."""
    threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    parallel.join()
    with interruptions("run") as stop:
        return 0 if _work(Run(Path(folder)), stop) == "done" else 1


def take_back(run: Run, state: RunState) -> bool:
    """A run whose worker died waits for another one, if there were not too many before. The run's lock is held."""
    lost = _times_lost(run) + 1
    run.event(LOST, host=state.host, pid=state.pid)
    if lost > RETRIES:  # Ray itself would retry for ever a task that uses all memory
        cause = f"its worker died {lost} times, the last one on {state.host}; give it more memory, or smaller batches"
        run.end(state, "interrupted", f"{cause}, and resume")
        run.log(cause)
        return False
    run.log(f"its worker on {state.host} died; another one goes on from the last checkpoint ({lost} of {RETRIES})")
    run.claim(state, "queued")
    return True


def died_too_often(run: Run) -> bool:
    """Whether a run's workers died as often as Ray has others go on with it."""
    return _times_lost(run) >= RETRIES


def _times_lost(run: Run) -> int:
    """How many workers of a run died since it was sent."""
    events = run.events()
    sent = max((i for i, event in enumerate(events) if event["kind"] == SENT), default=0)
    return sum(event["kind"] == LOST for event in events[sent:])


if __name__ == "__main__":
    parallel.leave(_rank(sys.argv[1]))
