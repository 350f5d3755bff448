"""Run folders of other versions: older ones open and go on, newer ones are refused in one line and left alone.

old_runs.zip holds folders as earlier versions of the program left them: a finished and a stopped run of the first day,
whose checkpoint is older than anything that can be gone on from, and a stopped run of the second day, all of schema 1.
"""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from test_app import PAGES, open_page, said

from prunedm import pipeline, seed_sheets, state_file, store
from prunedm.__main__ import main
from prunedm.recipe import Eval

OLD = Path(__file__).with_name("old_runs.zip")
DONE, FIRST, SECOND = "20261123-first-done", "20261123-first-stopped", "20261124-second-stopped"


@pytest.fixture
def old(runs, image_folder):
    """The older runs, in a lab's folder; their model and images are elsewhere now."""
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(runs)
    for run in store.all_runs(runs):
        path = run.folder / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe["model"]["source"], recipe["data"]["source"] = str(run.variant("dense")), str(image_folder)
        path.write_text(yaml.safe_dump(recipe))
    return runs


def states(runs):
    return {run.id: (run.folder / "state.json").read_bytes() for run in store.all_runs(runs)}


def test_older_runs_open_as_they_are(old, capsys):
    before = states(old)
    assert all(json.loads(content)["schema"] < state_file.SCHEMA for content in before.values())
    assert {run.id: run.state().status for run in store.all_runs(old)} == {
        DONE: "done", FIRST: "stopped", SECOND: "stopped",
    }  # fmt: skip
    for command in (["ls"], ["show", DONE], ["show", SECOND], ["report", DONE], ["compare", DONE, "--json"]):
        assert main([*command, "--runs-dir", str(old)]) == 0, (command, capsys.readouterr().err)
    finished = store.find(old, DONE)
    assert set(finished.evaluation()) == {"dense", "structured", "nm"} and finished.metrics() and finished.layers()
    assert states(old) == before, "reading changes nothing"


@pytest.mark.parametrize("page", PAGES)
def test_each_page_opens_with_older_runs(old, page):
    app = open_page(page)
    assert not app.error, said(app)
    if page in ("monitor", "models"):
        for run in (DONE, FIRST, SECOND):
            assert not open_page(page, run=run).error


def test_an_older_stopped_run_goes_on_to_its_end(old):
    run = store.find(old, SECOND)
    begun = [record for record in run.metrics() if record["stage"] == "finetune"]
    run.take()
    assert pipeline.execute(run) == "done", run.state().error
    assert run.state().schema == state_file.SCHEMA and set(run.evaluation()) == {"dense", "structured", "nm"}
    assert run.metrics()[: len(begun)] == begun, "what it had done stays done"


def test_a_checkpoint_that_is_too_old_says_what_to_do_and_that_works(old):
    run = store.find(old, FIRST)
    assert pipeline.execute(run) == "failed"
    path = run.checkpoint("mask")
    assert f"{path} has no 'entropy'" in run.state().error
    assert "of another version of prunedm; delete the file and resume" in run.state().error
    path.unlink()
    run.take()
    assert pipeline.execute(run) == "done", run.state().error


# --- newer ones --------------------------------------------------------------------------------------
@pytest.fixture
def newer(runs, micro):
    """A run of the next version, stopped in the middle, beside one of this version."""
    run, beside = store.create(runs, micro()), store.create(runs, micro(name="beside"))
    for each in (run, beside):
        each.end(each.state(), "stopped", None)
    raw = json.loads((run.folder / "state.json").read_text())
    store.write_json(run.folder / "state.json", raw | {"schema": state_file.SCHEMA + 1, "colour": "blue"})
    return run


REFUSAL = (
    f"is of version {state_file.SCHEMA + 1} and this prunedm reads up to {state_file.SCHEMA}; update prunedm to open it"
)


@pytest.mark.parametrize("command", ["resume", "pause", "continue", "stop", "report"])
def test_a_newer_run_is_refused_and_left_alone(newer, capsys, command):
    before = {path: path.read_bytes() for path in newer.folder.rglob("*") if path.is_file()}
    assert main([command, newer.id, "--runs-dir", str(newer.folder.parent)]) == 2
    said_ = capsys.readouterr().err
    assert REFUSAL in said_ and "Traceback" not in said_ and said_.count("\n") == 1
    after = {path: path.read_bytes() for path in newer.folder.rglob("*") if path.is_file()}
    assert {path for path in before if after.get(path) != before[path]} == set()
    assert {path.name for path in after.keys() - before.keys()} <= {".lock"}
    with pytest.raises(store.StoreError, match="update prunedm"):
        pipeline.execute(newer)


@pytest.mark.parametrize(
    "command",
    [
        ["run", "{recipe}", "--set", "model.source={run}"],
        ["run", "{recipe}", "--set", "model.source={run}/dense"],
        ["run", "{recipe}", "--set", "mask.initial={run}"],
        ["run", "{recipe}", "--dry-run", "--set", "model.source={run}"],
        ["plan", "{recipe}", "--set", "model.source={run}"],
        ["export", "{run}", "--format", "packed", "--out", "{out}"],
        ["compare", "{run}"],
        ["show", "{run}"],
        ["show", "{run}", "--json"],
    ],
)
def test_a_newer_run_is_no_source_of_anything(newer, micro, tmp_path, capsys, command):
    """Its files may mean something else: here they are what this version would take for a finished variant."""
    shutil.copytree(micro().model.source, newer.variant("dense"))
    store.write_json(newer.variant("dense") / store.VARIANT_RECORD, {})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(micro().to_yaml())
    there, runs_dir = states(newer.folder.parent), str(newer.folder.parent)
    words = [word.format(recipe=recipe, run=newer.id, out=tmp_path / "out") for word in command]
    assert main([*words, "--runs-dir", runs_dir]) == 2
    said_ = capsys.readouterr().err
    assert REFUSAL in said_ and "Traceback" not in said_ and said_.count("\n") == 1
    assert states(newer.folder.parent) == there


def test_no_further_samples_are_drawn_of_a_newer_run(newer):
    newer.variant("dense").mkdir(parents=True)
    store.write_json(newer.variant("dense") / store.VARIANT_RECORD, {})
    with pytest.raises(store.StoreError, match="update prunedm"):
        seed_sheets.draw(f"{newer.id}/dense", 0, newer.folder.parent, Eval())


@pytest.mark.parametrize("page", PAGES)
def test_a_newer_run_breaks_no_page(newer, page):
    app = open_page(page)
    if page == "monitor":
        assert REFUSAL in said(open_page(page, run=newer.id))
    if page == "runs":
        assert "unreadable" in str(app) and "stopped" in str(app)


def test_a_newer_run_is_listed_as_unreadable_beside_the_others(newer, capsys):
    assert main(["ls", "--json", "--runs-dir", str(newer.folder.parent)]) == 0
    out = capsys.readouterr().out
    assert "unreadable" in out and "stopped" in out
