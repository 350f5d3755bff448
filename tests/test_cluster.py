"""Runs as Ray tasks, on a cluster of two CPUs on loopback: queued, stopped, retried when their worker is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from apptest import click, open_page, shown
from safetensors.torch import load_file

from app import lab
from prunedm import cluster, cluster_link, cluster_task, jobs, store
from prunedm import recipe as recipes
from prunedm.__main__ import main
from prunedm.cluster import RayExecutor
from prunedm.cluster_link import ClusterError
from prunedm.executors import Choice
from prunedm.recipe import Recipe
from prunedm.records import ACTIVE, RunState
from prunedm.store import Run

PATIENCE = 300  # seconds, on a machine that does much else


def until(say, patience=PATIENCE):
    """What ``say()`` gives once that is something."""
    deadline = time.monotonic() + patience
    while not (found := say()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def at_work(run: Run, stage: str, step: int):
    """The run's state once it is so far; an error where it ended before."""

    def reached():
        state = run.state()
        assert state.status in (*ACTIVE, "interrupted"), state.error
        return state.stage == stage and state.step >= step and state

    return until(reached)


def ended(run: Run) -> str:
    return until(lambda: run.state().status not in (*ACTIVE, "interrupted") and run.state().status)


def kinds(run: Run) -> list[str]:
    return [event["kind"] for event in run.events()]


@pytest.fixture(scope="module")
def two_cpus():
    """A Ray cluster of this machine, which all executors of this process use."""
    ray = pytest.importorskip("ray", reason=cluster_link.INSTALL)
    for name, value in cluster_link.RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    ray.init(
        "local",  # and not one that is up on the machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@pytest.fixture
def executor(two_cpus, tmp_path):
    made = RayExecutor(tmp_path)
    yield made
    for run_id in made.held():
        made.stop(Run(tmp_path / run_id))
    until(lambda: not made.held())
    made.close()


def weights(run: Run) -> dict[str, torch.Tensor]:
    files = sorted((run.folder / "variants").glob("*/**/*.safetensors"))
    assert files
    return {f"{path.relative_to(run.folder)}:{name}": t for path in files for name, t in load_file(path).items()}


def test_a_killed_worker_is_retried_and_ends_with_the_uninterrupted_result(executor, micro):
    recipe = micro(mask={"steps": 400})
    whole, hurt = executor.submit(recipe), executor.submit(recipe)
    state = at_work(hurt, "mask", 1)
    assert state.pid != os.getpid() and hurt.state().status == "running"
    os.kill(state.pid, signal.SIGKILL)
    assert [ended(hurt), ended(whole)] == ["done", "done"]
    assert kinds(hurt).count("worker_lost") == 1 and kinds(hurt).count("started") == 2
    assert kinds(whole).count("worker_lost") == 0
    assert "another one goes on from the last checkpoint (1 of 3)" in hurt.log_path.read_text()
    expected, found = weights(whole), weights(hurt)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    plain = [[(m["stage"], m["step"], m["loss"]) for m in run.metrics() if "loss" in m] for run in (whole, hurt)]
    assert plain[0] == plain[1], "each step is recorded once, as if nothing had happened"
    assert [event["stage"] for event in hurt.events() if event["kind"] == "stage"].count("finetune") == 1


def test_runs_wait_for_what_they_reserve_and_are_stopped_waiting_or_working(executor, micro):
    recipe = micro(mask={"steps": 5000}, resources={"cpus": 2})
    first, second, third = (executor.submit(recipe) for _ in range(3))
    until(lambda: first.state().status == "running" and executor.position(first.id) is None)
    assert [executor.position(run.id) for run in (second, third)] == [1, 2]
    with pytest.raises(store.StoreError, match="is queued on the cluster; it cannot be resumed"):
        executor.resume(second)
    executor.stop(second)
    assert second.state().status == "stopped" and executor.position(third.id) == 1
    assert executor.held() == [first.id, third.id] and "started" not in kinds(second)
    at_work(first, "mask", 0)
    first.request_pause()
    until(lambda: first.state().status == "paused")
    first.clear_pause()
    until(lambda: first.state().status == "running")
    first.request_stop()  # as `prunedm stop` does, from whichever process
    assert ended(first) == "stopped"
    until(lambda: third.state().status == "running")
    executor.stop(third)
    assert ended(third) == "stopped"
    until(lambda: not executor.held())
    executor.resume(third)
    assert third.state().status == "queued" and executor.position(third.id) == 1
    third.request_stop()  # of one that waits: the executor sees it
    assert ended(third) == "stopped"


def test_what_fails_on_the_cluster_is_said_in_the_run(executor, micro):
    wrong = executor.submit(micro(device="mps"))  # whether it is there is the worker's to find out
    bigger = executor.submit(micro(resources={"cpus": 64}))
    assert ended(wrong) == "failed" and "mps" in wrong.state().error
    (alert,) = [event for event in bigger.events() if event["kind"] == "alert"]
    assert "no machine of the cluster has 64 CPUs" in alert["text"]
    until(lambda: executor.held() == [bigger.id])
    assert executor.position(bigger.id) == 1


def test_a_run_is_followed_as_if_it_were_here(executor, micro):
    steps = []
    run = jobs.made(micro(), executor.runs_dir)
    assert jobs.through(executor, poll=0.05)(run, steps.append, lambda: False) == "done"
    expected = [(record["stage"], record["step"]) for record in run.metrics()]
    assert [(step.stage, step.step) for step in steps] == expected and expected
    assert run.evaluation()["nm"]["validation_loss"] > 0 and run.report_path.exists()


def test_steps_of_stages_that_went_by_between_two_looks_have_their_number():
    """Else the progress bar of a quick stage would never be drawn."""
    told = [("finetune", 1), ("finetune", 2), ("mask", 1), ("mask", 2), ("mask", 3), ("recover", 1)]
    lines = [json.dumps({"stage": stage, "step": step, "loss": 0.1}).encode() for stage, step in told]
    found = jobs._steps([*lines, b"torn {"], RunState(stage="recover", of=9))
    assert [(step.stage, step.step) for step in found] == told
    assert [step.of for step in found] == [2, 2, 3, 3, 3, 9] and found[0].values == {"loss": 0.1}
    found = jobs._steps(lines, RunState(stage="mask", of=9))
    assert [step.of for step in found] == [2, 2, 9, 9, 9, 0], "what has begun since is of a number that is not known"


@pytest.mark.slow
def test_run_by_ray_is_one_command_that_ends_with_its_figures(two_cpus, micro, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "recipe.yaml").write_text(micro().to_yaml())
    given = ["run", str(tmp_path / "recipe.yaml"), "--runs-dir", str(tmp_path / "runs")]
    assert main([*given, "--executor", "ray", "--json"]) == 0
    (run,) = store.all_runs(tmp_path / "runs")
    assert run.state().status == "done" and run.state().pid != os.getpid() and "sent" in kinds(run)
    told = capsys.readouterr()
    assert f"{run.id} done in" in told.out and "Learn N:M masks" in told.err
    assert json.loads(told.out.splitlines()[-1])["variants"]["nm"]["validation_loss"] > 0


@pytest.mark.slow
def test_the_monitor_page_follows_pauses_and_stops_a_run_on_the_cluster(two_cpus, runs, micro, monkeypatch):
    monkeypatch.setenv("PRUNEDM_EXECUTOR", "ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = lab.jobs().submit(micro(mask={"steps": 5000}))
    try:
        at_work(run, "mask", 1)
        assert run.state().pid != os.getpid() and lab.jobs().local.held() == []
        app = open_page("monitor", run=run.id)
        assert re.search(r"[1-9]\d* of 5,?000", shown(app)), shown(app)
        click(app, "Pause")
        until(lambda: run.state().status == "paused")
        step = run.state().step
        click(open_page("monitor", run=run.id), "Continue")
        assert at_work(run, "mask", step + 1).status == "running"
        click(open_page("monitor", run=run.id), "Stop this run")
        assert ended(run) == "stopped"
        assert "stopped" in shown(open_page("monitor", run=run.id)).lower()
    finally:
        lab.jobs().stop(run)
        until(lambda: not lab.jobs().held())
        lab.jobs().choose(Choice())  # which lets go of the cluster


# --- without a cluster ---------------------------------------------------------------------------
def test_without_ray_the_choice_says_how_to_install_it(tmp_path, monkeypatch, capsys, micro):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *given: None if name == "ray" else real(name, *given))
    with pytest.raises(ClusterError, match="make cluster"):
        RayExecutor(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(micro().to_yaml())
    assert main(["run", str(path), "--runs-dir", str(tmp_path), "--executor", "ray"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install -r requirements-cluster.txt" in said
    assert not store.all_runs(tmp_path), "nothing is left behind"


def test_an_address_without_ray_and_ray_under_a_launcher_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = ["run", "--preset", "smoke", "--runs-dir", str(tmp_path)]
    assert main([*given, "--address", "auto"]) == 2
    assert "--address auto is read by --executor ray alone" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*given, "--executor", "ray"]) == 2
    assert "without a launcher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [
        ("cuda", 0, "resources.gpus=1"),
        ("cuda:1", 1, "device=cuda$"),
        ("cuda:0", 2, "device=cuda$"),
        ("cuda:0", 0.5, None),
        ("cpu", 4, "resources.gpus=0"),
        ("cuda", 2, None),
        ("auto", 0, None),
    ],
)
def test_a_run_uses_no_gpu_that_it_did_not_reserve(device, gpus, words):
    recipe = Recipe(device=device, resources={"gpus": gpus})
    if words is None:
        cluster.require_reserved(recipe)
        return
    with pytest.raises(ClusterError, match=words):
        cluster.require_reserved(recipe)


@pytest.mark.parametrize(("gpus", "is_valid"), [(0, True), (0.25, True), (2, True), (1.5, False), (-1, False)])
def test_gpus_are_a_share_or_a_whole_number(gpus, is_valid):
    changes = {"resources": {"gpus": gpus}}
    if is_valid:
        assert recipes.build(recipes.merge({}, changes)).resources.gpus == gpus
    else:
        with pytest.raises(recipes.RecipeError, match="gpus"):
            recipes.build(recipes.merge({}, changes))


@pytest.mark.slow
def test_a_task_of_several_gpus_is_worked_on_by_as_many_ranks(micro, tmp_path, monkeypatch):
    """Here they are ranks on the CPU."""
    assert [cluster_task.ranks_of(Recipe(resources={"gpus": gpus})) for gpus in (0, 0.5, 1, 4)] == [1, 1, 1, 4]
    monkeypatch.setattr(cluster_task, "ranks_of", lambda recipe: 2)
    run = store.create(tmp_path, micro())
    assert cluster_task.work(str(run.folder)) == "done"
    (started,) = [event for event in run.events() if event["kind"] == "started"]
    assert started["ranks"] == 2 and run.evaluation()["nm"]["validation_loss"] > 0
    refused = store.create(tmp_path, micro(name="refused"))
    with refused.lock(), monkeypatch.context() as patch, pytest.raises(store.Busy):
        patch.setattr(cluster_task, "PATIENCE", 0.0)
        cluster_task.work(str(refused.folder))
    dies = store.create(tmp_path, micro(name="dies"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(cluster_task.Unended, match="the 2 ranks of run"):
        cluster_task.work(str(dies.folder))
    assert "its 2 ranks left it queued" in dies.log_path.read_text()


@pytest.mark.slow
def test_ranks_of_a_machine_that_goes_down_leave_their_run_to_others(micro, tmp_path, monkeypatch):
    """It tells all processes to end, the launcher among them."""
    monkeypatch.setattr(cluster_task, "ranks_of", lambda recipe: 2)
    run, raised = store.create(tmp_path, micro(mask={"steps": 3000})), []

    def work():
        with pytest.raises(cluster_task.Unended) as caught:
            cluster_task.work(str(run.folder))
        raised.append(str(caught.value))

    task = threading.Thread(target=work)
    task.start()
    at_work(run, "mask", 1)
    (launcher,) = [one for one in psutil.Process().children() if "torch.distributed.run" in one.cmdline()]
    launcher.terminate()
    task.join(PATIENCE)
    assert raised and run.state().status == "interrupted"
    step = run.load_checkpoint("mask")[1]["done"]
    assert 0 < step < 3000 and step == run.metrics()[-1]["step"], "after the step at hand"
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 3000", f"steps: {step + 2}"))
    assert cluster_task.work(str(run.folder)) == "done"
    assert kinds(run).count("worker_lost") == 1


@pytest.mark.slow
def test_what_a_rank_of_a_task_raises_is_the_runs_error(micro, tmp_path, monkeypatch):
    """The launcher ends the other at once, which must have the time to say so."""
    monkeypatch.setattr(cluster_task, "ranks_of", lambda recipe: 2)
    run = store.create(tmp_path, micro(data={"batch_size": 1}))
    assert cluster_task.work(str(run.folder)) == "failed"
    assert "a batch of 1 images is too small for 2 ranks" in run.state().error


def test_a_machine_without_the_runs_folder_says_so(tmp_path):
    with pytest.raises(store.StoreError, match=r"sees no .*gone; give all machines of the cluster one --runs-dir"):
        cluster_task.work(str(tmp_path / "gone"))


def test_the_thread_that_watches_outlives_what_ray_raises(executor, monkeypatch, caplog, micro):
    def broken():
        raise ConnectionError("the head node is gone")

    said = "the Ray cluster local does not answer (ConnectionError: the head node is gone)"
    with monkeypatch.context() as gone:
        gone.setattr(cluster, "ASK_EVERY", 0.0)
        gone.setattr(executor.link, "_nodes", broken)
        until(lambda: executor.trouble)
        assert executor.trouble == said
        with pytest.raises(cluster_link.Unreachable, match="the head node is gone"):
            executor.submit(micro())
        (run,) = store.all_runs(executor.runs_dir)
        assert (run.state().status, run.state().error) == ("interrupted", f"{said}; resume once it does")
    until(lambda: not executor.trouble)
    executor.resume(run)
    assert ended(run) == "done" and until(lambda: not executor.held())
    assert sum("does not answer" in record.message for record in caplog.records) == 1


def test_a_run_at_work_is_concluded_once_ray_can_be_asked_for_it_again(executor, monkeypatch, micro):
    import ray

    run = executor.submit(micro(mask={"steps": 5000}))
    at_work(run, "mask", 0)
    wait = ray.wait
    with monkeypatch.context() as gone:
        gone.setattr(ray, "wait", lambda *given, **named: wait("no task"))
        until(lambda: executor.trouble)
        run.request_stop()
        assert ended(run) == "stopped" and executor.held() == [run.id]
    until(lambda: not executor.held() and not executor.trouble)
    assert run.state().status == "stopped"


def test_a_worker_that_is_told_to_end_leaves_its_run_to_another(executor, micro):
    """As a machine that goes down tells it; Ray's own answer would make the run a failed one."""
    run = executor.submit(micro(mask={"steps": 5000}))
    os.kill(at_work(run, "mask", 1).pid, signal.SIGTERM)
    until(lambda: kinds(run).count("started") == 2)
    at_work(run, "mask", 1)
    run.request_stop()
    assert ended(run) == "stopped" and until(lambda: not executor.held())
    assert kinds(run).count("interrupted") == kinds(run).count("worker_lost") == 1 and "failed" not in kinds(run)
    steps = [record["step"] for record in run.metrics() if record["stage"] == "mask"]
    assert steps == list(range(1, len(steps) + 1)) and "are redone" not in run.log_path.read_text()


def test_a_head_that_is_gone_is_asked_once_and_waited_for_so_long_only(executor, monkeypatch):
    """Ray's own question would wait for ever, and a page with it."""
    import ray

    asked, back = [], threading.Event()

    def nodes():
        asked.append(1)
        assert back.wait(60)
        return []

    monkeypatch.setattr(cluster_link, "ANSWER", 0.2)
    monkeypatch.setattr(ray, "nodes", nodes)
    for _ in range(2):
        with pytest.raises(cluster_link.Unreachable, match=r"does not answer \(TimeoutError: nothing within 0.2 s\)"):
            executor.machines()
    assert len(asked) == 1
    back.set()
    until(lambda: executor.link._asked.done())
    assert executor.machines() == [] and len(asked) == 2


def test_what_cannot_be_read_of_one_run_keeps_no_other_one_waiting(executor, monkeypatch, caplog, micro):
    real = executor._look_at

    def broken(run, task):
        if run.id == hurt.id:
            raise KeyError("kind")
        real(run, task)

    monkeypatch.setattr(executor, "_look_at", broken)
    hurt = executor.submit(micro(mask={"steps": 5000}))
    other = executor.submit(micro())
    assert ended(other) == "done" and until(lambda: executor.held() == [hurt.id])
    hurt.request_stop()
    assert ended(hurt) == "stopped" and until(lambda: not executor.held())
    assert sum(f"run {hurt.id} cannot be looked at" in record.message for record in caplog.records) == 1


def test_lines_that_tell_no_event_are_no_lost_workers(tmp_path):
    run = store.create(tmp_path, Recipe())
    run.event(cluster_task.SENT)
    run.append("events.jsonl", [[], {"time": 1}, {"kind": cluster_task.LOST}])
    assert cluster_task._times_lost(run) == 1
    state = run.state()
    assert [cluster_task.take_back(run, state) for _ in range(3)] == [True, True, False]
    assert run.state().status == "interrupted" and "its worker died 4 times" in run.state().error


def test_a_run_that_reserves_what_it_does_not_use_is_refused_wherever_it_comes_from(executor, micro):
    """A sweep's trials do not come by `submit`."""
    run = jobs.made(micro(resources={"gpus": 1}), executor.runs_dir)
    with pytest.raises(cluster_link.ClusterError, match="uses no GPU"):
        executor.put(run)
    assert run.state().status == "failed" and "set resources.gpus=0" in run.state().error and not executor.held()


@pytest.mark.slow
def test_ranks_end_with_the_worker_that_had_them_started(micro, tmp_path):
    """It is killed; they would go on with what Ray takes to be free, and hold the run's lock."""
    run = store.create(tmp_path, micro(mask={"steps": 5000}))
    code = f"from prunedm import cluster_task as t; t.ranks_of = lambda recipe: 2; t.work({str(run.folder)!r})"
    worker = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(cluster.ROOT)})
    try:
        at_work(run, "mask", 1)
        worker.kill()
        worker.wait()
        assert until(lambda: run.state().status == "interrupted")
    finally:
        worker.kill()
    with run.lock(30):
        assert cluster_task.take_back(run, run.state())


def test_a_cluster_that_is_gone_takes_no_run(executor, monkeypatch, micro):
    import ray

    def gone():
        raise ConnectionError("the head node is gone")

    monkeypatch.setattr(ray, "nodes", gone)
    with pytest.raises(ClusterError, match="does not answer"):
        executor.submit(micro())
    (run,) = store.all_runs(executor.runs_dir)
    assert run.state().status == "interrupted" and "resume once it does" in run.state().error


def test_a_run_that_another_worker_has_is_left_to_it(executor, micro, monkeypatch):
    """As where a machine that was taken for dead works on."""
    import ray

    run = jobs.made(micro(), executor.runs_dir)
    cause = store.Busy("run x is being worked on")
    busy = ray.exceptions.RayTaskError("work", f"traceback\nBusy: {cause}", cause).as_instanceof_cause()

    def get(task):
        raise busy

    monkeypatch.setattr(ray, "get", get)
    executor._conclude(run, None)
    assert run.state().status == "queued" and "being worked on" in run.log_path.read_text()


def test_a_run_whose_workers_die_again_and_again_is_given_up(tmp_path):
    run = store.create(tmp_path, Recipe())
    run.event(cluster_task.SENT)
    for number in range(1, cluster_task.RETRIES + 1):
        assert cluster_task.take_back(run, run.state()) and run.state().status == "queued"
        assert f"({number} of {cluster_task.RETRIES})" in run.log_path.read_text()
    assert not cluster_task.take_back(run, run.state())
    assert run.state().status == "interrupted" and "its worker died 4 times" in run.state().error
    run.event(cluster_task.SENT)
    assert cluster_task.take_back(run, run.state()), "sent again, it counts anew"


def test_a_task_that_begins_after_its_run_was_stopped_leaves_it(tmp_path):
    run = store.create(tmp_path, Recipe())
    run.end(run.state(), "stopped", None)
    before = Path(run.folder / "state.json").read_bytes()
    assert cluster_task.work(str(run.folder)) == "stopped"
    assert (run.folder / "state.json").read_bytes() == before and json.loads(before)["status"] == "stopped"
