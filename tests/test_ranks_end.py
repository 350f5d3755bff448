"""How ranks leave: all done, one killed, one failed by itself; and how they pause and stop together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from launched import PATIENCE, PRUNEDM, THREE, TORCHRUN, environment, launch

from prunedm import owner, parallel, pipeline, shared_run, store
from prunedm.__main__ import main
from prunedm.recipe import Recipe

LAUNCHES, AT_ONCE = 10, 2
STEPS = 60  # of a run whose rank is killed before it is done
pytestmark = pytest.mark.timeout(900)  # a launch may take as long as PATIENCE
SAVES_OFTEN = """
import time
from prunedm import parallel, stage_training
from prunedm.__main__ import main
stage_training.CHECKPOINT_SECONDS = stage_training.CHECKPOINT_SHARE = 0.0  # after each step
save = stage_training.StageTraining.save_checkpoint
def slowly(self):  # not done before it is killed; more steps would take roundings of other ranks further apart
    save(self)
    time.sleep(0.2)
stage_training.StageTraining.save_checkpoint = slowly
if __name__ == "__main__":
    parallel.leave(main())
"""
RAISES = """
from prunedm import learn, parallel
from prunedm.__main__ import main
real = learn.GumbelMasks.step
def step(self, task, batch, step, train):
    if step == 3 and parallel.rank() in {ranks}:
        raise {error}
    return real(self, task, batch, step, train)
learn.GumbelMasks.step = step
if __name__ == "__main__":
    parallel.leave(main())
"""
LIGHT = """
from prunedm import parallel
parallel.join()
import torch
ones = torch.ones(3)
parallel.sum_([ones])
parallel.leave(0 if ones.tolist() == [2.0] * 3 else 3)
"""


@pytest.mark.slow
def test_ranks_that_are_done_always_leave_with_0(tmp_path):
    """Left to the interpreter's end, about one launch in five is aborted by gloo's threads."""
    script = tmp_path / "light.py"
    script.write_text(LIGHT)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = list(pool.map(launch, [[*TORCHRUN, str(script)]] * LAUNCHES))
    assert [one.returncode for one in ended] == [0] * LAUNCHES, [one.stderr for one in ended if one.returncode]


# --- two ranks that work on a run ----------------------------------------------------------------
@contextmanager
def at_work(recipe: Recipe, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose two ranks work on a run and save after each step; ended with the test."""
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "saves_often.py").write_text(SAVES_OFTEN)
    command = [*TORCHRUN, "saves_often.py", "run", "recipe.yaml", "--runs-dir", "runs"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment(), **pipes) as launcher:
        try:
            yield launcher
        finally:
            launcher.terminate()  # which ends its ranks; it has ended unless something went wrong


def until(launcher: subprocess.Popen[str], say: Callable[[], Any]) -> Any:
    """What ``say()`` gives once that is something, while the launcher lives."""
    deadline = time.monotonic() + PATIENCE
    while not (found := say()):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def saved(runs_dir: Path, stage: str = "mask") -> store.Run | None:
    """The run, once it has a checkpoint of some steps of a stage."""
    for run in store.all_runs(runs_dir) if runs_dir.is_dir() else []:
        found = run.load_checkpoint(stage)
        if found is not None and found[1]["done"] > 1:
            return run
    return None


def kill(launcher: subprocess.Popen[str], rank: int) -> None:
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    next(child for child in ranks if child.environ().get("RANK") == str(rank)).kill()


def each_step_once(run: store.Run) -> bool:
    steps = [(record["stage"], record["step"]) for record in run.metrics()]
    return len(steps) == len(set(steps))


@pytest.fixture(scope="module")
def long_masks(micro) -> Recipe:
    return micro(train={"precision": "fp32"}, mask={"method": "gumbel", "lr": 0.15, "steps": STEPS})


@pytest.fixture(scope="module")
def whole(long_masks, tmp_path_factory) -> float:
    """The validation loss of one process that nothing happened to."""
    run = store.create(tmp_path_factory.mktemp("whole"), long_masks)
    assert pipeline.execute(run) == "done"
    return run.evaluation()["nm"]["validation_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "status", "words", "next_ranks"),
    [
        (0, "interrupted", "rank 1: rank 0 has died; run ", [sys.executable]),
        (1, "interrupted", "ranks has ended or does not answer", THREE),
    ],
)
def test_a_killed_rank_ends_the_run_in_one_line_and_one_rank_or_three_go_on(
    rank, status, words, next_ranks, long_masks, whole, tmp_path
):
    with at_work(long_masks, tmp_path) as launcher:
        run = until(launcher, lambda: saved(tmp_path / "runs"))
        kill(launcher, rank)
        told = launcher.communicate(timeout=PATIENCE)[0]
    assert launcher.returncode != 0
    said = " ".join(told.split())  # a terminal of 120 columns breaks lines
    assert said.count(words) == 1 and f"prunedm resume {run.id}" in said, told
    state = run.state()
    assert state.status == status and (rank == 0 or words in state.error), state
    before = run.load_checkpoint("mask")[1]["done"]
    assert 0 < before < STEPS
    ended = launch([*next_ranks, *PRUNEDM, "resume", run.id, "--runs-dir", str(tmp_path / "runs")])
    assert ended.returncode == 0, ended.stderr
    assert run.state().status == "done"
    first, second = (event for event in run.events() if event["kind"] == "started")
    assert (
        first["ranks"] == 2
        and second.get("ranks", 1) == (3 if next_ranks is THREE else 1)
        and "finetune" in second["stages_done"]
        and "mask" not in second["stages_done"]
    )
    assert each_step_once(run)
    assert run.evaluation()["nm"]["validation_loss"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "words"), [(0, "rank 1: rank 0 has died; run "), (1, "ranks has ended or does not answer")]
)
def test_a_killed_rank_of_a_shared_model_ends_the_run_likewise_and_one_rank_goes_on(rank, words, micro, tmp_path):
    """FSDP's own messages meet the end of the other rank; its checkpoints hold whole tensors."""
    recipe = micro(train={"precision": "fp32", "shard": True}, prune={"finetune_steps": STEPS}, mask={"method": "none"})
    whole = store.create(tmp_path / "whole", recipe)
    assert pipeline.execute(whole) == "done"
    with at_work(recipe, tmp_path) as launcher:
        run = until(launcher, lambda: saved(tmp_path / "runs", "finetune"))
        kill(launcher, rank)
        told = launcher.communicate(timeout=PATIENCE)[0]
    state, said = run.state(), " ".join(told.split())
    assert state.status == "interrupted" and words in said and (rank == 0 or words in state.error), told
    assert not [event for event in run.events() if event["kind"] == shared_run.RANK_FAILED]
    ended = launch([sys.executable, *PRUNEDM, "resume", run.id, "--runs-dir", str(tmp_path / "runs")])
    assert ended.returncode == 0, ended.stderr
    assert each_step_once(run)
    losses = [one.evaluation()["structured"]["validation_loss"] for one in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "error", "told", "remedy"),
    [
        ((1,), "MemoryError('no')", "rank 1: out of memory; halve data.batch_size (no)", {"data.batch_size": 4}),
        ((0, 1), "ValueError('this is wrong')", "this is wrong", {}),
    ],
)
def test_what_a_rank_raises_is_the_runs_error(ranks, error, told, remedy, micro, tmp_path):
    (tmp_path / "recipe.yaml").write_text(micro().to_yaml())
    script = tmp_path / "raises.py"
    script.write_text(RAISES.format(ranks=ranks, error=error))
    ended = launch([*TORCHRUN, str(script), "run", str(tmp_path / "recipe.yaml"), "--runs-dir", str(tmp_path / "runs")])
    assert ended.returncode != 0
    (run,) = store.all_runs(tmp_path / "runs")
    state = run.state()
    assert (state.status, state.error, state.remedy) == ("failed", told, remedy)
    said = " ".join((ended.stdout + ended.stderr).split())
    times = 2 if ranks == (1,) else 1  # by the rank that failed by itself, and by rank 0 at the run's end
    assert said.count(told) == times, said


@pytest.mark.slow
def test_two_ranks_pause_go_on_and_stop_when_another_process_asks(micro, tmp_path, capsys):
    with at_work(micro(mask={"method": "gumbel", "steps": 5000}), tmp_path) as launcher:
        run = until(launcher, lambda: saved(tmp_path / "runs"))
        given = [run.id, "--runs-dir", str(tmp_path / "runs"), "--wait", str(PATIENCE)]
        assert main(["pause", *given]) == 0 and f"{run.id} is paused" in capsys.readouterr().out
        held = run.load_checkpoint("mask")[1]["done"]
        time.sleep(1)
        assert run.state().status == "paused" and run.load_checkpoint("mask")[1]["done"] == held == run.state().step
        assert main(["continue", *given]) == 0 and f"{run.id} is running" in capsys.readouterr().out
        until(launcher, lambda: run.load_checkpoint("mask")[1]["done"] > held)
        assert main(["stop", *given]) == 0 and f"{run.id} is stopped" in capsys.readouterr().out
        told = launcher.communicate(timeout=PATIENCE)[0]
    assert f"{run.id} stopped" in told and "has ended or does not answer" not in told, told
    kinds = [event["kind"] for event in run.events()]
    assert [kinds.count(kind) for kind in ("paused", "continued", "stopped")] == [1, 1, 1]
    assert each_step_once(run)
    assert run.load_checkpoint("mask")[1]["done"] == run.metrics()[-1]["step"] == run.state().step


# --- what each rank says, without a second process -------------------------------------------------
@pytest.fixture
def shared(tmp_path, monkeypatch) -> Callable[..., shared_run.SharedRun]:
    """A run as a rank sees it that has or has not lost the others."""
    made = store.create(tmp_path, Recipe())
    made.event("started", ranks=2)

    def seen(rank: int, is_lost: bool) -> shared_run.SharedRun:
        for name, value in (("size", 2), ("rank", rank), ("is_lost", is_lost)):
            monkeypatch.setattr(parallel._Ranks, name, value)
        return shared_run.SharedRun(made.folder)

    return seen


def test_a_rank_that_fails_by_itself_leaves_its_reason_and_remedy_to_rank_0(shared, capsys, monkeypatch):
    monkeypatch.setattr(shared_run, "LAST_WORDS", 0.2)
    run = shared(1, is_lost=False)
    run.end(run.state(), "failed", "out of memory; halve data.batch_size (no more)", {"data.batch_size": 32})
    assert "rank 1: out of memory" in capsys.readouterr().err
    run, lost = shared(0, is_lost=True), "another of the 2 ranks has ended or does not answer; resume"
    reason = ("failed", "rank 1: out of memory; halve data.batch_size (no more)", {"data.batch_size": 32})
    assert run.ending("failed", lost, {}) == reason
    run.event("started", ranks=2)
    assert run.ending("failed", lost, {}) == ("interrupted", lost, {}), "what an earlier start left is not its reason"
    run = shared(0, is_lost=False)
    assert run.ending("failed", "this is wrong", {}) == ("failed", "this is wrong", {})


def test_what_all_ranks_failed_of_is_said_once(shared, capsys, monkeypatch):
    monkeypatch.setattr(shared_run, "LAST_WORDS", 0.2)
    run = shared(0, is_lost=False)
    run.end(run.state(), "failed", "loss is nan after step 3", {"mask.lr": 0.1})
    run = shared(1, is_lost=False)
    run.end(run.state(), "failed", "loss is nan after step 3", {"mask.lr": 0.1})
    assert capsys.readouterr().err == ""
    run.end(run.state(), "failed", "out of memory; halve data.batch_size")
    assert "rank 1: out of memory" in capsys.readouterr().err


def test_a_rank_that_said_nothing_leaves_after_rank_0(shared, monkeypatch):
    """Which may still be copying the run to where its recipe says."""
    run = shared(0, is_lost=False)
    run.end(run.state(), "failed", "loss is nan after step 3")
    waited = []
    monkeypatch.setattr(store.Run, "lock", lambda run, patience: waited.append(patience) or nullcontext())
    run = shared(1, is_lost=False)
    run.end(run.state(), "failed", "loss is nan after step 3")
    assert waited == [shared_run.LAST_COPIES]


def test_a_rank_speaks_for_rank_0_only_where_that_is_dead(shared, monkeypatch, capsys):
    monkeypatch.setattr(shared_run, "LAST_WORDS", 0.2)
    run = shared(1, is_lost=True)
    run.end(run.state(), "failed", "another of the 2 ranks has ended or does not answer; resume")
    assert capsys.readouterr().err == "", "rank 0 lives, and will say so itself"
    monkeypatch.setattr(owner, "began", lambda pid: None)
    state = run.state()
    state.status, state.ended = "interrupted", time.time()
    monkeypatch.setattr(shared_run.SharedRun, "state", lambda run: state)
    run.end(state, "failed", "another of the 3 ranks has ended or does not answer; resume")
    assert capsys.readouterr().err == "", "rank 0 lost another one and has written so"
    monkeypatch.undo()
    run = shared(1, is_lost=True)
    monkeypatch.setattr(shared_run, "LAST_WORDS", 0.2)
    monkeypatch.setattr(owner, "began", lambda pid: None)
    run.end(run.state(), "failed", "another of the 2 ranks has ended or does not answer; resume")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"rank 0 has died; run {run.id} is interrupted" in told
    assert f"prunedm resume {run.id} --runs-dir {run.folder.parent}" in told
    assert json.loads(run.state_path.read_text())["status"] == "queued", "it is rank 0's to write"
