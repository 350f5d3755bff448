"""The command line: exit statuses, one line for bad input, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from prunedm import store
from prunedm.__main__ import main
from prunedm.interrupts import interruptions


def arguments(recipe, runs_dir):
    pairs = [("model.source", recipe.model.source), ("data.source", recipe.data.source)]
    pairs += [("prune.target", 0.3), ("prune.finetune_steps", 3), ("mask.steps", 3), ("mask.recover_steps", 3)]
    pairs += [("eval.images", 4), ("eval.steps", 2), ("data.batch_size", 8), ("device", "cpu")]
    return ["run", "--runs-dir", str(runs_dir), *[a for k, v in pairs for a in ("--set", f"{k}={v}")]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, micro):
    runs_dir = tmp_path_factory.mktemp("cli")
    assert main([*arguments(micro(), runs_dir), "--name", "first"]) == 0
    return runs_dir


def test_run_prints_one_json_object_last(micro, tmp_path, capsys):
    assert main([*arguments(micro(), tmp_path), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["run"] == store.all_runs(tmp_path)[0].id and set(last["variants"]) == {"dense", "structured", "nm"}


def test_ls_and_show(runs, capsys):
    assert main(["ls", "--runs-dir", str(runs)]) == 0
    run_id = store.all_runs(runs)[0].id
    assert run_id in capsys.readouterr().out
    assert main(["ls", "--runs-dir", str(runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["status"] == "done"
    assert main(["show", run_id, "--runs-dir", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "done" in out and "Validation loss" in out and "finetune_steps: 3" in out


def test_ls_lists_a_broken_run_as_unreadable(runs, capsys):
    (runs / "broken").mkdir(exist_ok=True)
    (runs / "broken" / "recipe.yaml").write_text("mask: [")
    assert main(["ls", "--runs-dir", str(runs), "--json"]) == 0
    found = {row["run"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert found["broken"] == "unreadable" and "done" in found.values()


def test_masks_are_extracted_shown_verified_and_used_again(runs, micro, tmp_path, capsys):
    run = next(run for run in store.all_runs(runs) if run.id.endswith("first"))
    out = tmp_path / "kept" / "m.safetensors"
    there = ["--runs-dir", str(runs)]
    assert main(["masks", "extract", run.id, "--out", str(out), *there]) == 0
    assert main(["masks", "verify", str(out)]) == 0 == main(["masks", "verify", run.id, *there])
    assert "every pruned weight of" in capsys.readouterr().out
    assert main(["masks", "show", str(out)]) == 0 and "mid_block.resnets.0.conv1" in capsys.readouterr().out
    assert main(["masks", "show", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["run"] == run.id and all(layer["density"] == 0.5 for layer in shown["layers"])
    recipe = ["--set", f"mask.initial={out}", "--set", "mask.method=fixed", "--name", "again"]
    assert main([*arguments(micro(), runs), *recipe]) == 0
    out.write_bytes(out.read_bytes()[:-1])
    assert main(["masks", "verify", str(out)]) == 1 and "PROBLEM" in capsys.readouterr().out
    assert main(["masks", "show", "nothing-here", *there]) == 2
    assert main(["masks", "extract", run.id, "--out", "m.npz", *there]) == 2


def test_masks_baseline_prints_the_loss_of_each_timestep_bin(micro, tmp_path, capsys):
    given = arguments(micro(), tmp_path)[3:]
    assert main(["masks", "baseline", *given, "--set", "mask.initial=fisher", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["initial"] == "fisher 2:4" and len(found["m0"]) == 10 and found["dense_mean"] > 0
    assert main(["masks", "baseline", *given]) == 0
    assert "magnitude 2:4" in capsys.readouterr().out


def test_dry_run_shows_layers_with_reasons_and_writes_nothing(micro, tmp_path, capsys):
    assert main([*arguments(micro(), tmp_path / "runs"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "first convolution, kept dense" in out and "mid_block.resnets.0.conv1" in out and "2:4" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--set", "mask.n=4"], "must be less than m=4"),
        (["--set", "prune.colour=1"], "not a field"),
        (["--set", "prune.target=2"], "prune.target=2"),
        (["--set", "nonsense"], "is not section.field=value"),
        (["--set", "model.source=/nowhere"], "is not there"),
        (["--set", "data.source=EMPTY"], "holds 0 readable images"),
        (["--set", "device=cuda:99"], "CUDA devices"),
        (["--preset", "huge"], "preset 'huge' is not known"),
        (["missing.yaml"], "cannot be read"),
        (["--frobnicate"], "No such option"),
        (["--set", "mask.m=16", "--set", "mask.n=15", "--set", "data.source=bundled"], "data.source=bundled"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(micro, tmp_path, capsys, extra, says):
    (tmp_path / "empty").mkdir()
    extra = [word.replace("EMPTY", str(tmp_path / "empty")) for word in extra]
    assert main([*arguments(micro(), tmp_path / "runs"), *extra]) == 2
    printed = capsys.readouterr()
    assert says in printed.err and len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err + printed.out
    assert not list((tmp_path / "runs").glob("*")), "nothing is half-written"


@pytest.mark.parametrize("command", ["show", "resume"])
@pytest.mark.parametrize("run_id", ["none", "../../etc", ""])
def test_unknown_runs_are_exit_2(tmp_path, capsys, command, run_id):
    assert main([command, run_id, "--runs-dir", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_done_run_is_not_resumed(runs, capsys):
    run_id = next(r.id for r in store.all_runs(runs) if r.id.endswith("first"))
    assert main(["resume", run_id, "--runs-dir", str(runs)]) == 2
    assert "is done" in capsys.readouterr().err


def test_failure_is_exit_1(micro, tmp_path, capsys, monkeypatch):
    from prunedm import structured

    def broken(*args):
        raise RuntimeError("the tool broke")

    monkeypatch.setattr(structured, "prune", broken)
    assert main([*arguments(micro(), tmp_path), "--json"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["status"] == "failed" and last["error"] == "RuntimeError: the tool broke"


def test_an_interruption_that_nobody_can_be_told_of_is_one(monkeypatch):
    """As where a launcher is killed: its ranks write into a pipe that nobody reads, and still stop after the step."""
    told = []

    def broken(text):
        told.append(text)
        raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patch, interruptions("run") as stop:
        patch.setattr(sys, "stderr", SimpleNamespace(write=broken, flush=lambda: None))
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop() and told == ["stopping after this step; the run can be resumed"]


def test_ctrl_c_saves_and_exits_130_and_resume_finishes(micro, tmp_path):
    command = [sys.executable, "-m", "prunedm", *arguments(micro(), tmp_path), "--set", "mask.steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        runs = store.all_runs(tmp_path)
        if runs and any(r["stage"] == "mask" for r in runs[0].metrics()):
            break
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    run = store.all_runs(tmp_path)[0]
    assert run.state().status == "stopped"
    done = run.load_checkpoint("mask")[1]["done"]
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 100000", f"steps: {done + 2}"))
    assert main(["resume", run.id, "--runs-dir", str(tmp_path)]) == 0
    assert run.state().status == "done"


def test_doctor_names_what_it_looked_at(tmp_path, capsys):
    assert main(["doctor", "--runs-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "memory", "device", "fashion-ddpm", "disk"):
        assert word in out
    assert main(["doctor", "--runs-dir", str(tmp_path), "--json"]) == 0
    assert all(check["ok"] for check in json.loads(capsys.readouterr().out))


def test_help_needs_no_terminal():
    for extra in ([], ["run"], ["resume"], ["ls"], ["show"], ["doctor"]):
        found = subprocess.run(
            [sys.executable, "-m", "prunedm", *extra, "--help"], capture_output=True, text=True, env=os.environ
        )
        assert found.returncode == 0 and "Usage" in found.stdout
