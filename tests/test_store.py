"""The run folder: atomic, readable after damage, never outside the runs folder."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from prunedm import files, owner, store
from prunedm.progress import MetricsWriter
from prunedm.recipe import Recipe
from prunedm.records import Step
from prunedm.store import StoreError


@pytest.fixture
def run(tmp_path):
    return store.create(tmp_path, Recipe())


def test_a_new_run_is_queued_by_this_process_and_reads_back(run, tmp_path):
    state = run.state()
    assert (state.status, state.pid) == ("queued", os.getpid())
    assert run.recipe() == Recipe()
    assert [r.id for r in store.all_runs(tmp_path)] == [run.id]
    assert store.find(tmp_path, run.id).folder == run.folder


def test_runs_of_the_same_second_get_names_of_their_own(tmp_path):
    assert len({store.create(tmp_path, Recipe()).id for _ in range(5)}) == 5


@pytest.mark.parametrize("bad", ["../x", "a/b", "", ".hidden", "a\nb", "x" * 200, "..", "a\\b", "%2e%2e"])
def test_ids_are_checked_before_they_join_a_path(tmp_path, bad):
    with pytest.raises(StoreError):
        store.find(tmp_path, bad)


def test_a_link_is_not_a_run(run, tmp_path):
    (tmp_path / "link").symlink_to(run.folder)
    with pytest.raises(StoreError, match="no run"):
        store.find(tmp_path, "link")
    assert [r.id for r in store.all_runs(tmp_path)] == [run.id]


def test_a_run_of_a_dead_process_is_interrupted(run):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    raw = json.loads((run.folder / "state.json").read_text())
    store.write_json(run.folder / "state.json", raw | {"status": "running", "pid": process.pid})
    assert run.state().status == "interrupted"


def test_a_reused_pid_does_not_keep_a_run_alive(run):
    raw = json.loads((run.folder / "state.json").read_text())
    store.write_json(run.folder / "state.json", raw | {"status": "running", "began": raw["began"] - 50})
    assert run.state().status == "interrupted"


def test_a_run_on_another_host_lives_by_its_heartbeat(run, monkeypatch):
    raw = json.loads((run.folder / "state.json").read_text()) | {"status": "running", "host": "elsewhere"}
    store.write_json(run.folder / "state.json", raw | {"heartbeat": time.time() - 5})
    assert run.state().status == "running"
    monkeypatch.setattr(owner, "_BEATS", owner.Beats())  # a first look compares with the clock
    store.write_json(run.folder / "state.json", raw | {"heartbeat": time.time() - 2 * store.STALE_AFTER})
    assert run.state().status == "interrupted"
    run.beat()
    assert run.state().status == "running", "its owner has no news, and says that it lives"


def test_a_stop_request_shows_as_stopping(run):
    run.claim(run.state(), "running")
    run.request_stop()
    assert run.state().status == "stopping" and run.stop_requested()
    run.clear_stop()
    assert run.state().status == "running"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\x00", b'{"schema": 99}', b'{"colour": 1}'])
def test_a_damaged_state_is_said_and_not_guessed(run, content):
    (run.folder / "state.json").write_bytes(content)
    with pytest.raises(StoreError) as caught:
        run.state()
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(run, monkeypatch):
    figures = {"parameters": 1, "nonzero_parameters": 1, "macs": 1, "bytes": 1}
    run.write_evaluation({"dense": figures})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_evaluation({"dense": figures | {"parameters": 2}})
    assert run.evaluation() == {"dense": figures}
    assert not list(run.folder.glob(".*.part")), "the part is gone: its space is needed"


def test_a_torn_last_line_is_ignored_and_then_cut_off(run):
    run.append("metrics.jsonl", [{"stage": "mask", "step": s, "loss": 0.1} for s in (1, 2, 3)])
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "mask", "st')
    assert [r["step"] for r in run.metrics()] == [1, 2, 3]
    run.forget_after("mask", 2)
    run.append("metrics.jsonl", [{"stage": "mask", "step": 3, "loss": 0.2}])
    assert [(r["step"], r["loss"]) for r in run.metrics()] == [(1, 0.1), (2, 0.1), (3, 0.2)]


def test_forgetting_spares_other_stages_and_earlier_pictures(run):
    run.append("metrics.jsonl", [{"stage": "finetune", "step": 9}, {"stage": "mask", "step": 9}])
    for step in (4, 9):
        files.write_npz(run.snapshot_path("mask", step), bits=[0])
    run.forget_after("mask", 5)
    assert [r["stage"] for r in run.metrics()] == ["finetune"]
    assert [p.stem for p in run.mask_snapshots()] == ["mask-0000004"]


def test_checkpoints_round_trip_and_damage_is_said(run):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(3), "t": torch.randn(4, 6).t()}
    run.save_checkpoint("mask", tensors, {"done": 7})
    found, meta = run.load_checkpoint("mask")
    assert meta == {"done": 7} and all(torch.equal(found[k], v) for k, v in tensors.items())
    assert run.load_checkpoint("none") is None
    path = run.folder / "checkpoints" / "mask.safetensors"
    for content in (path.read_bytes()[:50], b"", os.urandom(300)):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="cannot be read"):
            run.load_checkpoint("mask")


def test_only_one_process_works_on_a_run(run):
    code = (
        "import sys; from pathlib import Path; from prunedm.store import Run, StoreError\n"
        "try:\n    with Run(Path(sys.argv[1])).lock(): print('got it')\n"
        "except StoreError as error: print(error)"
    )
    with run.lock():
        other = subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True)
        assert "is being worked on by" in other.stdout, other.stderr
    other = subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True)
    assert "got it" in other.stdout


def test_the_writer_records_steps_and_progress(run):
    writer = MetricsWriter(run, run.state(), every=1000)
    writer.begin("mask", 10, 20)
    time.sleep(0.01)
    for step in range(11, 16):
        writer.add(Step("mask", step, 20, {"loss": step / 100}))
    writer.flush()
    state = run.state()
    assert (state.stage, state.step, state.of) == ("mask", 15, 20)
    assert state.rate > 0 and state.eta == pytest.approx(5 / state.rate, rel=0.01)
    assert [r["step"] for r in run.metrics()] == [11, 12, 13, 14, 15]


def test_a_runs_folder_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        store.create(tmp_path / "file" / "runs", Recipe())
