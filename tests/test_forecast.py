"""Forecasts: bytes and MACs against what the engine then counts, times against plain arithmetic."""

import socket

import pytest
import torch

from prunedm import evaluate, forecast, inputs, packed, store
from prunedm.recipe import Recipe
from prunedm.unet import load

MACS = {"dense": 1000, "structured": 500}


def recipe(**changes) -> Recipe:
    base = {
        "prune": {"finetune_steps": 10, "target": 0.4},
        "mask": {"steps": 20, "recover_steps": 5},
        "eval": {"images": 8},
    }
    for section, values in changes.items():
        base[section] = base.get(section, {}) | values
    return Recipe.model_validate(base)


def finished(runs, spec=None, pace=None, macs=MACS, status="done", host=None, pause=0.0):
    """A run folder with step records at an even pace and a second of work around each stage's steps."""
    spec, pace = spec or recipe(), pace or {"finetune": 0.1, "mask": 0.2, "recover": 0.3}
    run = store.create(runs, spec)
    state = run.state()
    state.status, state.host = status, host or socket.gethostname()
    run.write_state(state)
    now, lines, events = 1000.0, [], [{"time": 1000.0, "kind": "started"}]
    steps = forecast.planned(spec)
    for stage in ("prune", "finetune", "mask", "recover", "evaluate", "report"):
        events.append({"time": now, "kind": "stage", "stage": stage})
        now += 1.0
        for step in range(steps.get(stage, 0)):
            now += pace[stage]
            if stage == "mask" and step == 10 and pause:
                now += pause
                events.append({"time": now, "kind": "continued", "seconds": pause})
            lines.append({"stage": stage, "step": step + 1, "time": now, "loss": 1.0})
        events.append({"time": now, "kind": "stage_done", "stage": stage})
    run.append("metrics.jsonl", lines)
    run.append("events.jsonl", events)
    figures = {"parameters": 1, "nonzero_parameters": 1, "bytes": 1}
    run.write_evaluation({name: figures | {"macs": count} for name, count in macs.items()})
    return run


def test_no_run_no_figure(tmp_path):
    assert forecast.all_past(tmp_path) == []
    assert forecast.forecast(recipe(), 1000, 500, []) is None


@pytest.mark.parametrize("pause", [0.0, 500.0])
def test_the_time_is_steps_by_seconds_by_macs(tmp_path, pause):
    run = finished(tmp_path, pause=pause)
    known = forecast.all_past(tmp_path)
    same = forecast.forecast(recipe(), 1000, 500, known)
    assert same.stages["finetune"] == pytest.approx(10 * 0.1 + 1)
    assert same.stages["mask"] == pytest.approx(20 * 0.2 + 1)
    assert same.stages["recover"] == pytest.approx(5 * 0.3 + 1)
    assert same.seconds == pytest.approx(10 * 0.1 + 20 * 0.2 + 5 * 0.3 + 6) and same.unknown == ()
    assert same.runs == (run.id,)
    other = forecast.forecast(recipe(mask={"steps": 40}), 1000, 250, known)
    assert other.stages["mask"] == pytest.approx(40 * 0.2 / 2 + 1)
    assert other.stages["evaluate"] == pytest.approx(0.5)


def test_the_middle_of_several_runs_counts(tmp_path):
    for seconds in (0.1, 0.2, 9.0):
        finished(tmp_path, pace={"finetune": seconds, "mask": seconds, "recover": seconds})
    found = forecast.forecast(recipe(), 1000, 500, forecast.all_past(tmp_path))
    assert found.stages["mask"] == pytest.approx(20 * 0.2 + 1) and len(found.runs) == 3


@pytest.mark.parametrize(
    "changes",
    [{"data": {"batch_size": 32}}, {"train": {"precision": "bf16"}}, {"model": {"source": "a/b"}}],
)
def test_runs_of_another_setup_tell_nothing(tmp_path, changes):
    finished(tmp_path)
    assert forecast.forecast(recipe(**changes), 1000, 500, forecast.all_past(tmp_path)) is None


@pytest.mark.parametrize("changes", [{"status": "failed"}, {"status": "stopped"}, {"host": "elsewhere"}])
def test_runs_that_failed_or_ran_elsewhere_tell_nothing(tmp_path, changes):
    finished(tmp_path, **changes)
    assert forecast.all_past(tmp_path) == []


def test_what_no_run_tells_of_is_named_and_not_invented(tmp_path):
    finished(tmp_path)
    found = forecast.forecast(
        recipe(mask={"method": "reinforce"}, eval={"images": 16}), 1000, 500, forecast.all_past(tmp_path)
    )
    assert found.unknown == ("mask", "evaluate") and set(found.stages) == {"prune", "finetune", "recover", "report"}


def test_a_resumed_run_tells_its_pace_only(tmp_path):
    run = finished(tmp_path)
    run.append("events.jsonl", [{"time": 2000.0, "kind": "started"}])
    (one,) = forecast.all_past(tmp_path)
    assert one.rest == {} and one.pace["mask"] == pytest.approx(0.2 / 500)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "evaluation.json", "state.json", "recipe.yaml"])
@pytest.mark.parametrize("content", ["{", "[1]\n", '{"a": 1}\n', ""])
def test_a_damaged_run_tells_nothing_and_breaks_nothing(tmp_path, name, content):
    run = finished(tmp_path)
    (run.folder / name).write_text(content)
    forecast.forecast(recipe(), 1000, 500, forecast.all_past(tmp_path))


def test_planned_steps_are_those_of_the_stages():
    assert forecast.planned(recipe(prune={"target": 0.0}))["finetune"] == 0
    assert forecast.planned(recipe(prune={"rounds": 3, "round_steps": 7}))["prune"] == 14
    assert forecast.planned(recipe(mask={"method": "magnitude"}))["mask"] == 0
    assert forecast.planned(recipe(mask={"method": "none"}))["recover"] == 0


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8), (1, 2)])
def test_bytes_and_macs_are_those_of_the_finished_model(model_folder, tmp_path, micro, pattern):
    n, m = pattern
    spec = micro(prune={"target": 0}, mask={"n": n, "m": m})
    found = inputs.preview(spec, tmp_path)
    model = load(str(model_folder)).unet
    patterns = {row["layer"]: row["pattern"] for row in found["layers"] if row["eligible"]}
    looked = forecast.look_up(str(model_folder), tmp_path)
    assert looked["shape"] == (1, 8, 8)
    assert forecast.sparse_macs(found["macs"]["structured"], found["layers"], looked["positions"]) == pytest.approx(
        evaluate.sparse_macs(model, patterns), abs=1
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.removesuffix(".weight") in patterns:
                grouped = weight.movedim(1, -1).reshape(-1, m)
                grouped = torch.cat([grouped[:, :n], torch.zeros_like(grouped[:, n:])], 1)
                weight.copy_(grouped.reshape(weight.movedim(1, -1).shape).movedim(-1, 1))
    path = tmp_path / "packed.safetensors"
    packed.write(path, dict(model.state_dict()), patterns, {}, torch.float16)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    held = forecast.stored_bytes(found["parameters"]["structured"], found["layers"])
    assert held["packed"] == path.stat().st_size - header
    assert held["dense"] == 2 * found["parameters"]["dense"]


def test_a_budget_has_no_packed_size_before_the_run():
    assert forecast.stored_bytes(10, [], chosen_later=True) == {"dense": 20, "packed": None}


def test_the_module_imports_no_torch():
    import subprocess
    import sys

    code = "import prunedm.forecast, prunedm.imports, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
