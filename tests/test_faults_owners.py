"""Several processes on one runs folder: one works on a run, the others are told who; no clock and no pid fools them."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from prunedm import owner, pipeline, store
from prunedm.__main__ import main
from prunedm.jobs import Jobs
from prunedm.recipe import Recipe

SIDE = """
import sys, time
from pathlib import Path
from prunedm import owner, store
run = store.Run(Path(sys.argv[1]))
owner.call_this_process("another lab")
"""
HOLDS = SIDE + "with run.lock():\n    print('held', flush=True)\n    sys.stdin.read()"
QUEUES = SIDE + "run.claim(run.state(), 'queued')\nprint('queued', flush=True)\nsys.stdin.read()"
TAKES = """
sys.stdin.readline()
try:
    run.take()
    print('took', flush=True)
except store.StoreError as error:
    print(error, flush=True)
sys.stdin.read()
"""
RESUMES = """
from prunedm.jobs import Jobs, load_engine
load_engine()
jobs = Jobs(run.folder.parent)
print('ready', flush=True)
sys.stdin.readline()
try:
    jobs.resume(run)
    while run.state().status in ('queued', 'running'):
        time.sleep(0.05)
    print('did it', flush=True)
except store.StoreError as error:
    print(error, flush=True)
"""


@pytest.fixture
def side():
    """Starts scripts in processes of their own, which end with the test."""
    started = []

    def start(code, run):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(run.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def stopped(tmp_path):
    run = store.create(tmp_path, Recipe())
    run.end(run.state(), "stopped", None)
    return run


def answers(processes):
    """What each says, once all were told to begin at the same time."""
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes]


def test_the_second_is_told_who_holds_a_run_and_since_when(side, stopped, capsys):
    holder = side(HOLDS, stopped)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(store.Busy) as caught, stopped.lock():
        pass
    said = str(caught.value)
    assert f"another lab (pid {holder.pid} on {socket.gethostname()}, since {time.strftime('%Y-')}" in said
    assert main(["resume", stopped.id, "--runs-dir", str(stopped.folder.parent)]) == 2
    assert f"being worked on by another lab (pid {holder.pid}" in capsys.readouterr().err
    holder.stdin.close()
    holder.wait(30)
    with stopped.lock():
        pass


def test_a_holder_that_was_killed_holds_no_more(side, stopped):
    holder = side(HOLDS, stopped)
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with stopped.lock():
        pass


def test_of_two_that_resume_a_run_at_once_one_takes_it(side, stopped):
    both = [side(SIDE + TAKES, stopped) for _ in range(2)]
    said = answers(both)
    assert said.count("took") == 1, said
    (other,) = [line for line in said if line != "took"]
    taker = both[said.index("took")]
    assert f"another lab (pid {taker.pid}" in other
    assert stopped.state().status == "queued" and stopped.state().pid == taker.pid


def test_a_run_in_the_queue_of_one_server_is_neither_run_nor_ended_by_another(side, stopped, micro):
    waiting = side(QUEUES, stopped)
    assert waiting.stdout.readline() == "queued\n"
    before = (stopped.folder / "state.json").read_bytes()
    with pytest.raises(store.Busy, match=rf"queued by another lab \(pid {waiting.pid} on"):
        pipeline.execute(stopped)
    jobs = Jobs(stopped.folder.parent)
    with pytest.raises(store.StoreError, match="is queued by another lab"):
        jobs.resume(stopped)
    jobs._execute(stopped)  # as if both had read the state at the same moment
    assert (stopped.folder / "state.json").read_bytes() == before and not stopped.events()
    waiting.kill()
    waiting.wait()
    assert stopped.state().status == "interrupted", "what its owner cannot run any more, any other may"
    stopped.take()


@pytest.mark.slow
def test_two_servers_that_resume_a_run_at_once_run_it_once(side, tmp_path, micro):
    run = store.create(tmp_path, micro())
    assert pipeline.execute(run, stop=lambda: run.state().stage == "finetune") == "stopped"
    servers = [side(SIDE + RESUMES, run) for _ in range(2)]
    assert [server.stdout.readline() for server in servers] == ["ready\n"] * 2
    said = answers(servers)
    other = said[1 - said.index("did it")]
    assert said.count("did it") == 1 and ("by the lab (pid" in other or "is done" in other), said
    assert run.state().status == "done"
    assert [event["kind"] for event in run.events()].count("started") == 2, "once here, once in one of the servers"
    steps = [(record["stage"], record["step"]) for record in run.metrics()]
    assert len(steps) == len(set(steps)) == 18


# --- clocks and pids ---------------------------------------------------------------------------------
def rewritten(run, **changes):
    """The run as another process would have left it."""
    raw = json.loads((run.folder / "state.json").read_text())
    store.write_json(run.folder / "state.json", raw | {"status": "running"} | changes)
    return run


@pytest.mark.parametrize("jump", [-86_400.0, -30.0, 30.0, 86_400.0])
def test_a_clock_that_jumps_neither_orphans_a_living_run_nor_raises_a_dead_one(tmp_path, monkeypatch, jump):
    mine, dead = store.create(tmp_path, Recipe()), store.create(tmp_path, Recipe())
    rewritten(mine)
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    rewritten(dead, pid=process.pid)
    real, created = time.time, owner.psutil.Process.create_time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    monkeypatch.setattr(owner.psutil.Process, "create_time", lambda self: created(self) + jump)  # as on Linux
    assert (mine.state().status, dead.state().status) == ("running", "interrupted")


@pytest.mark.skipif(not owner.machine(), reason="pids are known by ticks on Linux alone")
def test_a_pid_that_is_used_again_is_another_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    began = owner.began(process.pid)
    run = rewritten(store.create(tmp_path, Recipe()), pid=process.pid, began=began)
    assert run.state().status == "running"
    rewritten(run, began=began - 1)
    assert run.state().status == "interrupted", "a tick earlier it was another one"
    rewritten(run, began=began)
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked after it
    assert run.state().status == "interrupted", "a zombie works on nothing"
    process.wait()


@pytest.mark.skipif(not owner.machine(), reason="boots are told apart on Linux alone")
def test_nothing_outlives_a_restart_of_the_machine(tmp_path):
    run = store.create(tmp_path, Recipe())
    rewritten(run, machine=f"another-boot {owner.machine().split(' ', 1)[1]}", heartbeat=time.time())
    assert run.state().status == "interrupted", "even with this pid, this tick and a fresh heartbeat"


class Clock:
    """A monotonic clock of the test's own."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(owner.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(owner, "_BEATS", owner.Beats())


@pytest.mark.parametrize("elsewhere", ["another host", "another container of this host"])
@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_a_run_elsewhere_lives_by_beats_that_change_whatever_its_clock_says(tmp_path, monkeypatch, elsewhere, skew):
    run, clock = store.create(tmp_path, Recipe()), Clock(monkeypatch)
    beat, boot = time.time() + skew, owner.machine().split(" ")[0]
    place = {"host": "elsewhere"} if elsewhere == "another host" else {"machine": f"{boot} pid:[1]"}
    if "machine" in place and not boot:
        pytest.skip("containers are told apart on Linux alone")
    rewritten(run, heartbeat=beat, **place)
    first = run.state().status
    assert first == ("interrupted" if skew < 0 else "running"), "at the first look there are only the two clocks"
    for _ in range(3):
        clock.now += 5
        beat += 5
        rewritten(run, heartbeat=beat, **place)
        assert run.state().status == "running", "it beats"
    clock.now += store.STALE_AFTER - 1
    assert run.state().status == "running"
    clock.now += 2
    assert run.state().status == "interrupted", "it beats no more, however late its clock says it did"


def test_a_state_of_an_earlier_version_is_known_by_its_process_time(tmp_path):
    run = store.create(tmp_path, Recipe())
    raw = json.loads((run.folder / "state.json").read_text())
    old = {key: raw[key] for key in raw if key not in ("machine", "began", "program")} | {"schema": 1}
    store.write_json(run.folder / "state.json", old | {"status": "running"})
    assert run.state().status == "running"
    store.write_json(run.folder / "state.json", old | {"status": "running", "pid_started": old["pid_started"] - 50})
    assert run.state().status == "interrupted"
    assert dataclasses.replace(run.state()).machine is None
