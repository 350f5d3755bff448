"""Pause and go on: the same result bit for bit, from any stage and any process, and not a second counted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from test_app import open_page, said
from test_pipeline import assert_same

from prunedm import pipeline, progress, store
from prunedm.__main__ import main
from prunedm.jobs import Jobs
from prunedm.progress import MetricsWriter
from prunedm.recipe import Recipe
from prunedm.records import STAGES, Step

STEPS = {"prune": 1, "finetune": 3, "mask": 4, "recover": 2, "evaluate": 2, "report": 1}
WORKER = """
import sys, time
from pathlib import Path
from prunedm import pipeline, store
run = store.Run(Path(sys.argv[1]))
run.claim(run.state(), "queued")  # which the process that made it hands over
pipeline.execute(run, lambda step: time.sleep(1))  # not done before it is stopped
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory, micro):
    run = store.create(tmp_path_factory.mktemp("runs"), micro())
    assert pipeline.execute(run) == "done", run.log_path.read_text()
    return run


class Pauses:
    """Asks for a pause at some steps, and answers each from another thread once the run holds."""

    def __init__(self, run, steps, answer=store.Run.clear_pause, wait=0.0):
        self.run, self.steps, self.answer, self.wait = run, steps, answer, wait
        self.held = []

    def __call__(self, step):
        if self.steps.get(step.stage) == step.step:
            self.run.request_pause()
            threading.Thread(target=self.reply, args=(step,), daemon=True).start()

    def reply(self, step):
        until(self.run, "paused")
        self.held.append((step.stage, step.step, self.run.has_checkpoint(step.stage)))
        time.sleep(self.wait)
        self.answer(self.run)


def until(run, status, seconds=180):
    deadline = time.monotonic() + seconds
    while run.state().status != status:
        assert time.monotonic() < deadline, (run.state().status, run.log_path.read_text())
        time.sleep(0.02)


def kinds(run):
    return [e["kind"] for e in run.events() if e["kind"] in ("paused", "continued")]


def test_a_run_paused_in_each_stage_ends_as_if_it_never_was(done, tmp_path, micro):
    run = store.create(tmp_path, micro())
    pauses = Pauses(run, STEPS)
    assert pipeline.execute(run, pauses) == "done", run.log_path.read_text()
    assert [(stage, step) for stage, step, _ in pauses.held] == list(STEPS.items()) and list(STEPS) == list(STAGES)
    saved = {stage for stage, _, there in pauses.held if there}
    assert saved == {"finetune", "mask", "recover"}, "stages of training have their checkpoint before they hold"
    assert kinds(run) == ["paused", "continued"] * len(STEPS) and not run.pause_requested()
    assert_same(done, run)


def test_a_pause_asked_for_before_the_start_holds_before_the_first_step(done, tmp_path, micro):
    run, seen = store.create(tmp_path, micro()), []
    run.request_pause()
    worker = threading.Thread(target=pipeline.execute, args=(run, seen.append))
    worker.start()
    until(run, "paused")
    time.sleep(0.5)
    assert not seen and not run.variants() and run.state().seconds == 0
    run.clear_pause()
    worker.join(60)
    assert run.state().status == "done"
    assert_same(done, run)


@pytest.mark.in_turn(3)
@pytest.mark.parametrize(("stage", "step"), [("prune", 1), ("mask", 4), ("evaluate", 2)])
def test_a_paused_run_stops_at_once_and_resumes_to_the_same_result(done, tmp_path, micro, stage, step):
    run, seen, held = store.create(tmp_path, micro()), [], []

    def stop(run):
        held.append((len(seen), time.monotonic()))
        run.request_stop()
        assert run.state().status in ("stopping", "stopped")

    pauses = Pauses(run, {stage: step}, stop)
    assert pipeline.execute(run, lambda one: (seen.append(one), pauses(one))) == "stopped"
    ((number, asked),) = held
    assert number == len(seen) and time.monotonic() - asked < 60, "not a step more"
    assert kinds(run) == ["paused"] and not run.pause_requested() and not run.stop_requested()
    run.take()
    assert pipeline.execute(run) == "done"
    assert_same(done, run)


def test_ctrl_c_of_the_process_itself_stops_a_paused_run(tmp_path, micro):
    run = store.create(tmp_path, micro())
    pauses = Pauses(run, {"finetune": 2}, lambda run: None)
    assert pipeline.execute(run, pauses, stop=lambda: bool(pauses.held)) == "stopped"
    assert kinds(run) == ["paused"]


def test_a_pause_is_counted_neither_as_running_nor_in_the_rate(tmp_path, micro, monkeypatch):
    held, asked = [], []
    monkeypatch.setattr(MetricsWriter, "held", lambda self, seconds: held.append((seconds, time.monotonic())))
    ask = store.Run.request_pause
    monkeypatch.setattr(store.Run, "request_pause", lambda run: (asked.append(time.monotonic()), ask(run)))
    run = store.create(tmp_path, micro(mask={"method": "none"}))
    began = time.monotonic()
    assert pipeline.execute(run, Pauses(run, {"finetune": 3}, wait=3.0)) == "done"
    took = time.monotonic() - began
    (event,) = [e for e in run.events() if e["kind"] == "continued"]
    ((seconds, until_then),) = held
    assert 2.9 <= event["seconds"] <= until_then - asked[0] + 0.01
    assert seconds == pytest.approx(event["seconds"], abs=0.01)
    assert 0 < run.state().seconds <= took - event["seconds"] + 0.01


def test_the_writer_leaves_a_pause_out_of_rate_and_time_left(tmp_path, monkeypatch):
    """Five seconds of work and a pause of a hundred."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    run = store.create(tmp_path, Recipe())
    writer = MetricsWriter(run, run.state(), every=1000)
    writer.begin("mask", 0, 20)
    now[0] = 105.0
    writer.held(100)
    writer.add(Step("mask", 10, 20, {"loss": 1.0}))
    assert (writer.state.rate, writer.state.eta) == (2, 5)


def test_a_paused_run_shows_signs_of_life_and_its_state_is_written_once(tmp_path, micro, monkeypatch):
    monkeypatch.setattr(pipeline, "HEARTBEAT", 0.5)
    run, spans = store.create(tmp_path, micro()), []

    def answer(run):
        began, first = time.monotonic(), run.state().heartbeat
        while run.state().heartbeat <= first and time.monotonic() < began + 60:
            time.sleep(0.1)
        time.sleep(0.9)
        beats = run.state().heartbeat > first
        run.request_stop()
        spans.append((beats, began))

    write, written = store.Run.write_state, []

    def counted(self, state):
        written.append(state.status)
        write(self, state)

    monkeypatch.setattr(store.Run, "write_state", counted)
    assert pipeline.execute(run, Pauses(run, {"finetune": 2}, answer)) == "stopped"
    ((beats, began),) = spans
    most = (time.monotonic() - began) / 0.5 + 3
    assert beats and 2 <= written.count("paused") <= most, "once, and then for each sign of life"


@pytest.fixture
def elsewhere(tmp_path, micro):
    """A run that waits, paused, in a process of its own."""
    run = store.create(tmp_path / "runs", micro())
    run.request_pause()
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(run.folder)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    until(run, "paused")
    yield run, process
    process.kill()
    process.wait()


def test_the_commands_reach_a_run_of_another_process(done, elsewhere, capsys):
    run, process = elsewhere
    there = ["--runs-dir", str(run.folder.parent), "--wait", "120"]
    assert main(["pause", run.id, *there]) == 0
    out = capsys.readouterr().out
    assert f"{run.id} is paused" in out and f"continue {run.id}" in out
    assert main(["continue", run.id, *there]) == 0 and f"{run.id} is running" in capsys.readouterr().out
    assert main(["pause", run.id, *there, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": run.id, "status": "paused"}
    assert main(["stop", run.id, *there]) == 0
    out = capsys.readouterr().out
    assert f"{run.id} is stopped" in out and f"resume {run.id}" in out
    process.wait(120)
    for command in ("pause", "continue", "stop"):
        assert main([command, run.id, *there]) == 2
        assert "is stopped; only a run that is being worked on" in capsys.readouterr().err
    assert pipeline.execute(run) == "done"
    assert_same(done, run)


def test_a_run_killed_while_paused_is_interrupted_and_resumes(done, elsewhere, capsys):
    run, process = elsewhere
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run.state().status == "interrupted" and run.pause_requested()
    run.take()
    assert not run.pause_requested()
    assert pipeline.execute(run) == "done"
    assert_same(done, run)


def test_a_command_does_not_wait_for_ever(tmp_path, capsys):
    run = store.create(tmp_path, Recipe())
    there = [run.id, "--runs-dir", str(tmp_path), "--wait", "0.2"]
    assert main(["pause", *there]) == 0 and "is queued; it pauses as soon as it starts" in capsys.readouterr().out
    assert main(["continue", *there]) == 0 and "is queued" in capsys.readouterr().out
    assert not run.pause_requested()
    run.claim(run.state(), "running")
    assert main(["pause", *there]) == 0 and "is running; it pauses after the step" in capsys.readouterr().out
    assert main(["stop", *there]) == 0 and "is stopping; it stops after the step" in capsys.readouterr().out
    assert main(["pause", *there]) == 2 and "cannot be paused" in capsys.readouterr().err


def test_jobs_stop_and_resume_a_paused_run(tmp_path, micro, monkeypatch):
    jobs = Jobs(tmp_path)
    run = jobs.submit(micro())
    run.request_pause()
    until(run, "paused")
    jobs.stop(run)
    until(run, "stopped")
    run.request_pause()  # late, by a page that still showed the button
    jobs.resume(run)
    until(run, "done")


def in_state(runs, status):
    run = store.create(runs, Recipe(name=status))
    state = run.state()
    state.stage, state.step, state.of, state.rate, state.eta = "mask", 3, 10, 2.0, 3.5
    run.claim(state, status)
    return run


def labels(app):
    return [b.label for b in app.button]


def test_monitor_pauses_and_continues(runs):
    run = in_state(runs, "running")
    app = open_page("monitor")
    assert labels(app) == ["Pause", "Stop this run"]
    next(b for b in app.button if b.label == "Pause").click().run()
    assert run.pause_requested() and labels(app) == ["Pausing…", "Stop this run"] and app.button[0].disabled
    run.claim(run.state(), "paused")
    app.run()
    assert labels(app) == ["Continue", "Stop this run"]
    assert "❚❚ paused" in said(app) and "left in this stage" not in said(app)
    next(b for b in app.button if b.label == "Continue").click().run()
    assert not app.exception and not run.pause_requested()


@pytest.mark.parametrize("page", ["home", "launch", "compare", "models", "system"])
def test_other_pages_open_with_a_paused_run(runs, page):
    in_state(runs, "paused")
    open_page(page)
