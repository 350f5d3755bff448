"""A run's copy at a URL: kept up to date while the run is worked on, whole at its end, and brought back."""

import filecmp
import json
import os
import threading

import fsspec
import pytest

from prunedm import artifacts, pipeline, store
from prunedm import recipe as recipes
from prunedm.__main__ import main
from prunedm.artifacts import ArtifactError, Mirror
from prunedm.recipe import Recipe

MEMORY = "memory://bucket/runs"


@pytest.fixture
def memory():
    """fsspec's file system in memory, which stands for a bucket."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def run(tmp_path):
    made = store.create(tmp_path / "runs", Recipe())
    made.log("a line")
    made.variant("dense").mkdir(parents=True)
    (made.variant("dense") / "weights.bin").write_bytes(os.urandom(2 * artifacts.WHOLE))
    return made


def at(system, run):
    return sorted(name.partition(f"{run.id}/")[2] for name in system.find(f"/bucket/runs/{run.id}"))


def test_only_what_changed_is_sent_and_what_is_gone_is_dropped(memory, run):
    mirror = Mirror(run, MEMORY)
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "mask.safetensors").write_bytes(b"1")
    run.request_pause()
    with run.lock():
        run.beat()
        assert mirror.push() == 5
    expected = ["checkpoints/mask.safetensors", "log.txt", "recipe.yaml", "state.json", "variants/dense/weights.bin"]
    assert at(memory, run) == expected
    assert mirror.push() == 0
    run.log("another line")
    run.drop_checkpoint("mask")
    assert mirror.push() == 1 and at(memory, run) == expected[1:]
    assert memory.cat(f"/bucket/runs/{run.id}/log.txt") == run.log_path.read_bytes()


def test_a_checkpoint_that_a_killed_worker_left_in_the_copy_goes(memory, run):
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "finetune.safetensors").write_bytes(b"1")
    Mirror(run, MEMORY).push()
    run.drop_checkpoint("finetune")
    Mirror(run, MEMORY).push()
    assert not [name for name in at(memory, run) if name.startswith("checkpoints")]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_run_is_copied_while_it_works_and_comes_back_whole(kind, memory, micro, tmp_path, capsys):
    url = MEMORY if kind == "memory" else f"file://{tmp_path}/bucket/runs"
    run = store.create(tmp_path / "runs", micro(resources={"artifacts": url}))
    assert pipeline.execute(run) == "done"
    other = tmp_path / "other"
    assert main(["fetch", url, run.id, "--runs-dir", str(other)]) == 0
    assert f"{run.id} is in" in capsys.readouterr().out
    ours = sorted(p.relative_to(run.folder) for p in run.folder.rglob("*") if p.is_file())
    names = [str(name) for name in ours if name.name not in artifacts.PASSING]
    assert len(names) > 20
    same, other_content, missing = filecmp.cmpfiles(run.folder, other / run.id, names, shallow=False)
    assert sorted(same) == sorted(names) and not other_content and not missing
    assert store.find(other, run.id).state().status == "done"
    assert main(["fetch", url, run.id, "--runs-dir", str(other)]) == 2
    assert "already; delete it" in capsys.readouterr().err


def test_lines_arrive_while_the_run_is_worked_on(memory, run, monkeypatch):
    arrived = threading.Event()
    real = Mirror.push

    def push(self):
        count = real(self)
        if b"news" in memory.cat(f"/bucket/runs/{run.id}/log.txt"):
            arrived.set()
        return count

    monkeypatch.setattr(Mirror, "push", push)
    store.write_atomic(run.folder / "recipe.yaml", Recipe(resources={"artifacts": MEMORY}).to_yaml().encode())
    with artifacts.mirrored(run, every=0.02):
        run.log("news")
        assert arrived.wait(60)


def test_a_place_that_cannot_be_written_costs_the_run_nothing(run, tmp_path):
    (tmp_path / "full").write_text("a file, and no folder")
    recipe = Recipe(resources={"artifacts": f"file://{tmp_path}/full/runs"})
    store.write_atomic(run.folder / "recipe.yaml", recipe.to_yaml().encode())
    with artifacts.mirrored(run, every=0.01):
        run.log("at work")
    log = run.log_path.read_text()
    assert log.count("cannot be written") == 1 and "the run goes on" in log


def test_a_url_of_no_known_kind_is_refused_in_one_line(run, capsys):
    with pytest.raises(ArtifactError, match="nosuch://x is no place for artifacts"):
        Mirror(run, "nosuch://x")
    assert main(["copy", run.id, "nosuch://x", "--runs-dir", str(run.folder.parent)]) == 2
    assert "give a URL that fsspec knows" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["bucket/runs", "s3://key:secret@bucket/runs", "s3://a b", "://x"])
def test_a_recipe_holds_no_passwords_and_no_plain_paths(url):
    with pytest.raises(recipes.RecipeError) as caught:
        recipes.build({"resources": {"artifacts": url}})
    assert "no URL without user and password" in str(caught.value)


def test_copy_by_hand_and_what_is_not_there(memory, run, tmp_path, capsys):
    folder = str(run.folder.parent)
    assert main(["copy", run.id, MEMORY, "--runs-dir", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 4
    for name, words in (("20200101-000000-x", "no run 20200101-000000-x at"), ("../x", "is not an id")):
        assert main(["fetch", MEMORY, name, "--runs-dir", str(tmp_path / "new")]) == 2
        assert words in capsys.readouterr().err
    assert not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", ["../../evil", "x/../../evil", "a\\b"])
def test_a_copy_writes_nothing_outside_its_folder(memory, run, tmp_path, monkeypatch, name):
    Mirror(run, MEMORY).push()
    root = f"/bucket/runs/{run.id}"
    monkeypatch.setattr(type(memory), "find", lambda self, path, **given: [f"{root}/recipe.yaml", f"{root}/{name}"])
    with pytest.raises(ArtifactError, match="lies outside"):
        artifacts.fetch(MEMORY, run.id, tmp_path / "new")
    assert not any((tmp_path / "new").iterdir()) and not (tmp_path / "evil").exists()
