"""A disk that fills up at any moment: the cause in words, the last checkpoint kept, and on once there is room."""

import json

import pytest
from apptest import wait_for
from full_disk import MIB, FailingWriter, SmallDisk
from test_pipeline import assert_same

from prunedm import failure, files, jobs, pipeline, progress, stage_training, state_file, store
from prunedm.__main__ import main
from prunedm.jobs import Jobs
from prunedm.jsonl import read_jsonl
from prunedm.recipe import Recipe
from prunedm.records import Step

CAUSE = "the disk is full; free some space and resume"


@pytest.fixture(params=["a small disk", "a failing writer"])
def disk(request, tmp_path, monkeypatch):
    """A folder on a disk that can be filled."""
    is_real = request.param == "a small disk"
    made = SmallDisk(tmp_path, 24 * MIB) if is_real else FailingWriter(tmp_path, monkeypatch)
    yield made
    made.close()


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory, micro):
    run = store.create(tmp_path_factory.mktemp("unhurt"), micro())
    assert pipeline.execute(run) == "done"
    return run


def at(monkeypatch, run_name, stage, step, do):
    """Do something once, right after a step of a run was recorded."""
    plain, done = progress.MetricsWriter.add, []

    def add(self, record):
        plain(self, record)
        if (record.stage, record.step) == (stage, step) and self.run.id.endswith(run_name) and not done:
            done.append(True)
            do()

    monkeypatch.setattr(progress.MetricsWriter, "add", add)


def recorded(run):
    """The status that stands in the file, whatever this process knows."""
    return json.loads((run.folder / "state.json").read_text())["status"]


MOMENTS = [  # and how many bytes are left: enough for lines and states, or for nothing at all
    *(("prune", 1, 0), ("finetune", 3, 0), ("mask", 4, 200_000), ("mask", 4, 0), ("mask", 6, 0), ("recover", 2, 0)),
    *(("evaluate", 2, 0), ("report", 1, 0)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step", "left"), MOMENTS)
def test_a_disk_that_fills_up_costs_a_run_nothing_but_time(disk, unhurt, micro, monkeypatch, stage, step, left):
    monkeypatch.setattr(stage_training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(stage_training, "CHECKPOINT_SHARE", 0.0)
    monkeypatch.setattr(jobs, "RETRY", 0.05)
    server = Jobs(disk.folder)
    at(monkeypatch, "-first", stage, step, lambda: disk.fill(left))
    first, second = server.submit(micro(name="first")), server.submit(micro(name="second"))
    wait_for(lambda: first.state().status in ("failed", "done"))
    if stage == "report":
        wait_for(lambda: first.state().error is None or CAUSE in first.state().error)
    else:
        assert first.state().status == "failed" and first.state().error == CAUSE and not first.state().remedy
    checkpoint = first.load_checkpoint(stage) if stage in ("finetune", "mask", "recover") else None
    if checkpoint is not None:
        assert 1 <= checkpoint[1]["done"] <= step, "the last good checkpoint stays whole"
    wait_for(lambda: second.state().status == "failed")
    assert second.state().error == CAUSE, "the server goes on with its queue"
    if not left:
        with pytest.raises(OSError, match="No space"):
            server.submit(micro(name="third"))
        assert len(store.all_runs(disk.folder)) == 2, "a run that could not be made leaves nothing"
    disk.free()
    wait_for(lambda: recorded(second) == "failed" and recorded(first) in ("failed", "done"))
    for run in (first, second):
        if run.state().status != "done":
            server.resume(run)
        wait_for(lambda run=run: run.state().status in ("failed", "done"))
        assert run.state().status == "done", run.state().error
        assert_same(unhurt, run)


def test_an_ending_that_cannot_be_written_is_known_here_and_written_later(disk, tmp_path):
    run = store.create(tmp_path, Recipe())
    run.claim(run.state(), "running")
    disk.fill()
    run.end(run.state(), "failed", CAUSE, {"data.batch_size": 7})
    assert (run.state().status, run.state().error) == ("failed", CAUSE) and recorded(run) == "running"
    assert not store.write_endings(), "still full"
    disk.free()
    assert store.write_endings() and recorded(run) == "failed"
    assert store.Run(run.folder).state().remedy == {"data.batch_size": 7}


def test_an_ending_that_is_written_while_the_file_is_read_is_not_missed(tmp_path, monkeypatch):
    run, disk = store.create(tmp_path, Recipe()), FailingWriter(tmp_path, monkeypatch)
    run.claim(run.state(), "running")
    disk.fill()
    run.end(run.state(), "failed", CAUSE)
    disk.free()
    read = state_file.read

    def written_just_after(path):
        found = read(path)
        assert store.write_endings()
        return found

    monkeypatch.setattr(state_file, "read", written_just_after)
    assert (run.state().status, run.state().error) == ("failed", CAUSE)


def test_a_new_claim_forgets_an_ending_that_was_never_written(tmp_path, monkeypatch):
    run, disk = store.create(tmp_path, Recipe()), FailingWriter(tmp_path, monkeypatch)
    disk.fill()
    run.end(run.state(), "failed", CAUSE)
    disk.free()
    run.take()
    assert store.write_endings() and run.state().status == "queued"


def test_lines_are_added_whole_or_not_at_all(disk, tmp_path):
    path = tmp_path / "lines.jsonl"
    files.append(path, [{"step": 1}])
    before = path.read_bytes()
    disk.fill()
    with pytest.raises(OSError, match="No space"):
        files.append(path, [{"step": step, "text": "x" * 100} for step in range(2, 200)])
    assert path.read_bytes() == before, "no half of a line, and none that would be there twice"
    disk.free()
    files.append(path, [{"step": 2}])
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]


def test_the_writer_keeps_the_lines_that_it_could_not_write(tmp_path, monkeypatch):
    run, disk = store.create(tmp_path, Recipe()), FailingWriter(tmp_path, monkeypatch)
    writer = progress.MetricsWriter(run, run.state(), every=1000)
    writer.add(Step("mask", 1, 9, {"loss": 1.0}))
    disk.fill()
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    disk.free()
    writer.flush()
    writer.flush()
    assert [record["step"] for record in run.metrics()] == [1]


def test_the_command_says_the_cause_and_the_run_can_be_resumed(disk, tmp_path, micro, monkeypatch, capsys):
    run = store.create(tmp_path, micro())
    run.end(run.state(), "stopped", None)
    at(monkeypatch, run.id, "finetune", 2, disk.fill)
    monkeypatch.setattr(stage_training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(stage_training, "CHECKPOINT_SHARE", 0.0)
    assert main(["resume", run.id, "--runs-dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"{run.id} failed: {CAUSE}" in out and f"resume {run.id}" in out
    disk.free()
    assert run.state().status == "failed"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_by_whatever_library_meets_it(error):
    assert failure.plain_words(error) == CAUSE
    wrapped = ValueError("the model was not saved")
    wrapped.__cause__ = error
    assert failure.plain_words(wrapped) == CAUSE
