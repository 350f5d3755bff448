"""Tags, notes, archive, trash, lineage and disk use: nothing is lost, nothing outside the runs folder is touched."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunedm import recipe as recipes
from prunedm import shelf, store
from prunedm.__main__ import main
from prunedm.recipe import Recipe
from prunedm.shelf import Notes
from prunedm.store import Run, StoreError

HOSTILE = [
    "../x",
    "..",
    ".",
    "",
    "/etc",
    "a/b",
    ".trash",
    "a\nb",
    "a\\b",
    "%2e",
    "x" * 300,
    "../../etc-20260101T000000Z",
]
tags = st.lists(st.from_regex(shelf.TAG, fullmatch=True), max_size=shelf.MOST_TAGS, unique=True).map(tuple)
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t"), max_size=200)


@pytest.fixture
def run(tmp_path):
    return made(tmp_path)


def made(runs_dir, status="done", **changes):
    run = store.create(runs_dir, recipes.build(recipes.merge(Recipe().model_dump(), changes)))
    run.end(run.state(), status, None)
    return run


def content(folder):
    """Every file's bytes, every folder and every link, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


# --- notes -----------------------------------------------------------------------------------------
@given(st.builds(Notes, tags, texts, st.booleans()))
def test_notes_are_read_back_as_they_were_written(notes):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        shelf.write_notes(run, notes)
        assert shelf.read_notes(run) == notes


def test_a_run_without_notes_has_none_and_reading_writes_nothing(run):
    before = content(run.folder)
    assert shelf.read_notes(run) == Notes() and content(run.folder) == before


@given(tags, tags, st.data())
def test_tags_are_added_once_in_order_and_removed(first, second, data):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        both = tuple(dict.fromkeys(first + second))
        shelf.write_notes(run, Notes(first, "stays", True))
        if len(both) > shelf.MOST_TAGS:
            with pytest.raises(StoreError, match="remove some"):
                shelf.retag(run, second)
            assert shelf.read_notes(run).tags == first
            return
        assert shelf.retag(run, second) == Notes(both, "stays", True) == shelf.read_notes(run)
        if both:
            gone = data.draw(st.lists(st.sampled_from(both), unique=True))
            assert shelf.retag(run, remove=gone).tags == tuple(t for t in both if t not in gone)


@pytest.mark.parametrize("tag", ["", " a", "-a", "a b", "a,b", "a" * 41, "a\n", "a<b>", "\ud800", "*", 3, None])
def test_what_is_no_tag_is_refused_in_one_line(run, tag):
    with pytest.raises(StoreError) as caught:
        shelf.retag(run, [tag])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not (run.folder / shelf.NOTES).exists()


def test_an_absent_tag_cannot_be_removed_and_nothing_changes(run):
    shelf.retag(run, ["a"])
    with pytest.raises(StoreError, match="no tag 'b'; its tags: a"):
        shelf.retag(run, ["c"], ["a", "b"])
    assert shelf.read_notes(run).tags == ("a",)


@pytest.mark.parametrize("note", ["x" * 10_001, "a\x00b", "a\x1bb", "\ud800", 3, None])
def test_what_is_no_note_is_refused(run, note):
    with pytest.raises(StoreError, match="at most 10,000 characters"):
        shelf.write_notes(run, Notes((), note))


def test_a_note_is_tidied_and_leaves_tags_and_archive_alone(run):
    shelf.retag(run, ["a"])
    shelf.archive(run)
    assert shelf.annotate(run, "  one\r\ntwo\rthree \n") == Notes(("a",), "one\ntwo\nthree", True)
    assert shelf.archive(run, False) == Notes(("a",), "one\ntwo\nthree", False)
    assert shelf.annotate(run, "").note == ""


GOOD = {"schema": 1, "tags": ["a"], "note": "n", "archived": False}
DAMAGED = [
    b"", b"{", b"[]", b"null", b"\xff\x00", b'{"schema": 1}', b'"tags"',
    *(json.dumps(GOOD | change).encode() for change in (
        {"schema": 2}, {"schema": True}, {"schema": "1"}, {"tags": "a"}, {"tags": ["a", "a"]}, {"tags": [1]},
        {"tags": [["a"]]}, {"tags": ["<b>"]}, {"tags": [f"t{i}" for i in range(21)]}, {"note": None},
        {"note": "x" * 10_001}, {"archived": 1}, {"extra": 0}, {"tags": None},
    )),
]  # fmt: skip


@pytest.mark.parametrize("damaged", DAMAGED)
def test_damaged_notes_are_one_line_and_are_never_overwritten_unasked(run, damaged):
    (run.folder / shelf.NOTES).write_bytes(damaged)
    for action in (shelf.read_notes, shelf.archive, lambda r: shelf.retag(r, ["b"]), lambda r: shelf.annotate(r, "x")):
        with pytest.raises(StoreError) as caught:
            action(run)
        said, remedy = str(caught.value), "update prunedm" if b'"schema": 2' in damaged else "delete"
        assert "\n" not in said and "notes.json" in said and remedy in said
    assert (run.folder / shelf.NOTES).read_bytes() == damaged
    assert [r.id for r in store.all_runs(run.folder.parent)] == [run.id] and run.state().status == "done"
    shelf.write_notes(run, Notes())
    assert shelf.read_notes(run) == Notes()


# --- trash -----------------------------------------------------------------------------------------
trees = st.dictionaries(
    st.lists(st.sampled_from(["variants", "nm", "a b", "é", ".hidden"]), min_size=1, max_size=3).map("/".join),
    st.binary(max_size=50),
    max_size=6,
)


@settings(max_examples=40)
@given(trees, st.booleans(), st.booleans())
def test_delete_and_restore_leave_every_byte(tree, locked_before, linked):
    with tempfile.TemporaryDirectory() as folder:
        run = made(Path(folder))
        for name, data in tree.items():
            path = run.folder / f"{name}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if locked_before:
            with run.lock():
                pass
        if linked:
            (run.folder / "link").symlink_to("/etc")
        before, listed = content(run.folder), store.all_runs(Path(folder))
        gone = shelf.delete(run)
        assert store.all_runs(Path(folder)) == [] and not run.folder.exists()
        assert content(gone.folder) == before and gone.bytes == shelf.folder_bytes(gone.folder)
        assert [(t.name, t.run_id) for t in shelf.trashed(Path(folder))] == [(gone.name, run.id)]
        assert shelf.restore(Path(folder), gone.name).folder == run.folder
        assert content(run.folder) == before and shelf.trashed(Path(folder)) == []
        assert [r.id for r in listed] == [r.id for r in store.all_runs(Path(folder))]


@pytest.mark.parametrize("status", ["queued", "running", "paused", "stopping"])
def test_an_active_run_is_refused(tmp_path, status):
    run = store.create(tmp_path, Recipe())
    run.claim(run.state(), "running" if status == "stopping" else status)
    if status == "stopping":
        run.request_stop()
    before = content(run.folder)
    with pytest.raises(StoreError, match=f"{status}; stop it"):
        shelf.delete(run)
    assert {k: v for k, v in content(run.folder).items() if k != ".lock"} == before


def test_a_locked_run_is_refused_from_this_and_from_another_process(run):
    code = (
        "import sys; from pathlib import Path; from prunedm import shelf; from prunedm.store import Run, StoreError\n"
    )
    code += "try:\n    shelf.delete(Run(Path(sys.argv[1])))\nexcept StoreError as error: print(error)"
    with run.lock():
        with pytest.raises(StoreError, match="being worked on"):
            shelf.delete(run)
        other = subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True)
        assert "being worked on" in other.stdout, other.stderr
    assert run.folder.is_dir()


def test_interrupted_and_unreadable_runs_can_be_deleted(tmp_path):
    interrupted, broken = store.create(tmp_path, Recipe()), made(tmp_path)
    raw = store.read_json(interrupted.folder / "state.json")
    store.write_json(interrupted.folder / "state.json", raw | {"status": "running", "began": 1.0})
    (broken.folder / "state.json").write_text("{")
    (broken.folder / "recipe.yaml").write_text("mask: [")
    for run in (interrupted, broken):
        shelf.delete(run)
    assert store.all_runs(tmp_path) == [] and len(shelf.trashed(tmp_path)) == 2


def test_an_id_that_is_in_use_again_is_not_overwritten(run, tmp_path):
    gone = shelf.delete(run)
    run.folder.mkdir()
    (run.folder / "mine").write_text("x")
    with pytest.raises(StoreError, match="there is a run"):
        shelf.restore(tmp_path, gone.name)
    assert content(run.folder) == {"mine": b"x"} and gone.folder.is_dir()
    shutil.rmtree(run.folder)
    run.folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="there is a run"):
        shelf.restore(tmp_path, gone.name)


def test_the_same_id_can_lie_in_the_trash_twice(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    first = shelf.delete(run)
    copy.rename(run.folder)
    second = shelf.delete(run)
    assert [t.name for t in shelf.trashed(tmp_path)] == [second.name, first.name]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_reach_nothing(tmp_path, name):
    runs_dir = tmp_path / "runs"
    victim = tmp_path / "x"
    for folder in (runs_dir, victim):
        folder.mkdir()
    (victim / "recipe.yaml").write_text("{}")
    before = content(tmp_path)
    assert main(["rm", "--runs-dir", str(runs_dir), "--", name]) == 2
    for given_name in (name, f"{name}-20260101T000000.000000Z"):
        with pytest.raises(StoreError):
            shelf.restore(runs_dir, given_name)
    assert content(tmp_path) == before


@given(st.text(max_size=120))
def test_no_name_at_all_leaves_the_trash(name):
    with tempfile.TemporaryDirectory() as folder:
        before = content(Path(folder))
        with pytest.raises(StoreError):
            shelf.restore(Path(folder), name)
        assert content(Path(folder)) == before


def test_links_are_never_followed(run, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    shutil.copytree(run.folder, outside / "kept")
    (tmp_path / "link").symlink_to(outside / "kept")
    with pytest.raises(StoreError, match="no run"):
        shelf.delete(Run(tmp_path / "link"))
    gone = shelf.delete(run)
    (gone.folder / "inner").symlink_to(outside)
    name = "link-20260101T000000.000000Z"
    (tmp_path / shelf.TRASH / name).symlink_to(outside / "kept")
    (tmp_path / shelf.TRASH / f"{shelf.GOING}{name}").symlink_to(outside / "kept")
    before = content(outside)
    assert [t.name for t in shelf.trashed(tmp_path)] == [gone.name]
    with pytest.raises(StoreError, match="not in the trash"):
        shelf.restore(tmp_path, name)
    assert gone.bytes < 10_000
    assert [t.name for t in shelf.empty_trash(tmp_path)] == [gone.name]
    assert content(outside) == before


def test_a_trash_that_is_a_link_is_refused(run, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    outside.mkdir()
    (tmp_path / shelf.TRASH).symlink_to(outside)
    for action in (lambda: shelf.delete(run), lambda: shelf.trashed(tmp_path), lambda: shelf.empty_trash(tmp_path)):
        with pytest.raises(StoreError, match="is a link"):
            action()
    assert run.folder.is_dir() and not list(outside.iterdir())


def test_emptying_spares_what_is_younger_and_finishes_what_a_crash_left(tmp_path):
    old, new = (shelf.delete(made(tmp_path)) for _ in range(2))
    aged = old.folder.with_name(f"{old.run_id}-20200101T000000.000000Z")
    old.folder.rename(aged)
    (tmp_path / shelf.TRASH / f"{shelf.GOING}x").mkdir()
    (tmp_path / shelf.TRASH / "not-ours").mkdir()
    (tmp_path / shelf.TRASH / "x-20269999T000000.000000Z").mkdir()
    assert [t.name for t in shelf.empty_trash(tmp_path, timedelta(days=30))] == [aged.name]
    assert [t.name for t in shelf.trashed(tmp_path)] == [new.name]
    assert [t.name for t in shelf.empty_trash(tmp_path)] == [new.name] and shelf.trashed(tmp_path) == []
    left = {p.name for p in (tmp_path / shelf.TRASH).iterdir()}
    assert left == {"not-ours", "x-20269999T000000.000000Z"}, "only what the trash put there is removed"


def test_a_folder_that_cannot_be_moved_is_said(run, monkeypatch):
    def refused(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(StoreError, match="Permission denied"):
        shelf.delete(run)
    assert run.folder.is_dir() and not (run.folder / ".lock.part").exists()


def test_a_trash_without_a_runs_folder_is_empty(tmp_path):
    assert shelf.trashed(tmp_path / "none") == [] and shelf.empty_trash(tmp_path / "none") == []


# --- lineage ---------------------------------------------------------------------------------------
def recipe_from(source="bundled", masks=None):
    mask = {"initial": masks} if masks else {}
    return recipes.build(recipes.merge(Recipe().model_dump(), {"model": {"source": source}, "mask": mask}))


def test_a_chain_is_found_by_id_by_variant_and_by_path(tmp_path):
    found = shelf.lineage(
        {
            "dense": recipe_from(),
            "pruned": recipe_from("dense/structured"),
            "learned": recipe_from(str(tmp_path / "pruned" / "variants" / "nm")),
            "again": recipe_from("learned", str(tmp_path / "pruned" / "variants" / "nm" / store.MASKS)),
        },
        tmp_path,
    )
    links = [(k.parent, k.child, k.variant, k.what) for own in found.parents.values() for k in own]
    assert links == [
        ("dense", "pruned", "structured", "weights"),
        ("pruned", "learned", "nm", "weights"),
        ("learned", "again", "", "weights"),
        ("pruned", "again", "nm", "masks"),
    ]
    for one in ("dense", "pruned", "learned", "again"):
        assert found.around(one) == [(0, "dense"), (1, "pruned"), (2, "learned"), (3, "again")]


@pytest.mark.parametrize(
    ("source", "parent"),
    [
        ("bundled", None),
        ("google/ddpm-cifar10-32", None),
        ("/models/some", None),
        ("~/model", None),
        ("gone/nm", "gone"),
        ("20260101-120000-gone", "20260101-120000-gone"),
        ("RUNS/gone/variants/structured", "gone"),
        ("RUNS/../outside", None),
        ("RUNS/.trash/x/variants/nm", None),
        ("RUNS", None),
    ],
)
def test_missing_parents_are_named_and_other_sources_are_none(tmp_path, source, parent):
    found = shelf.lineage({"child": recipe_from(source.replace("RUNS", str(tmp_path)))}, tmp_path)
    assert [link.parent for link in found.parents.get("child", ())] == ([parent] if parent else [])
    assert found.around("child") == ([(0, parent), (1, "child")] if parent else [(0, "child")])
    assert not found.missing("child") and (not parent or found.missing(parent))


def test_an_unreadable_parent_is_there(tmp_path):
    found = shelf.lineage({"child": recipe_from("broken/nm")}, tmp_path, known=["broken", "child"])
    assert not found.missing("broken")


def test_circles_end(tmp_path):
    circle = {"a": recipe_from("c"), "b": recipe_from("a"), "c": recipe_from("b"), "self": recipe_from("self")}
    found = shelf.lineage(circle, tmp_path)
    assert {one for _, one in found.around("b")} == {"a", "b", "c"}
    assert found.around("self") == [(0, "self")]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=30))
def test_parents_stand_before_children_and_deeper_is_later_made(choices):
    """Run i is made from an earlier one, or from nothing."""
    made_from = {f"r{i}": recipe_from(f"r{c % i}" if i and c % 3 else "bundled") for i, c in enumerate(choices)}
    found = shelf.lineage(made_from, Path("/nowhere"))
    for one in made_from:
        placed = found.around(one)
        order, depth = [name for _, name in placed], {name: d for d, name in placed}
        assert len(order) == len(set(order)) and one in order
        for link in (link for name in order for link in found.parents.get(name, ())):
            if link.parent in depth:
                assert order.index(link.parent) < order.index(link.child) and depth[link.parent] < depth[link.child]


def test_a_thousand_generations_are_no_depth_to_fail_on(tmp_path):
    recipe = recipe_from()
    made_from = {"r0": recipe}
    for i in range(1, 1500):
        made_from[f"r{i}"] = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"source": f"r{i - 1}"})}
        )
    assert shelf.lineage(made_from, tmp_path).around("r700")[-1] == (1499, "r1499")


# --- disk ------------------------------------------------------------------------------------------
def test_disk_use_is_by_part_and_adds_up(run):
    rest = sum(p.stat().st_size for p in run.folder.rglob("*") if p.is_file())
    for name, size in (("variants/nm/unet/w.bin", 1000), ("checkpoints/c.bin", 200), ("exports/e.bin", 30)):
        path = run.folder / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * size)
    (run.folder / "samples").write_bytes(b"a file of a part's name")
    found = shelf.disk_use(run)
    assert (found["variants"], found["checkpoints"], found["exports"], found["masks"]) == (1000, 200, 30, 0)
    assert found[shelf.REST] == rest + 23 and sum(found.values()) == shelf.folder_bytes(run.folder)
    assert shelf.disk_use(Run(run.folder / "none")) == dict.fromkeys((*shelf.PARTS, shelf.REST), 0)
    assert shelf.free_bytes(run.folder / "not" / "yet") > 0


# --- command line ----------------------------------------------------------------------------------
def call(capsys, tmp_path, *words, status=0):
    assert main([*words, "--runs-dir", str(tmp_path)]) == status, words
    found = capsys.readouterr()
    if status:
        assert len(found.err.strip().splitlines()) == 1 and "Traceback" not in found.err
    return found.err if status else found.out


def test_tags_notes_and_archive_on_the_command_line(run, tmp_path, capsys):
    assert "no tags" in call(capsys, tmp_path, "tag", run.id)
    call(capsys, tmp_path, "tag", run.id, "a", "b")
    assert f"{run.id}: b, c" in call(capsys, tmp_path, "tag", run.id, "c", "--remove", "a")
    call(capsys, tmp_path, "note", run.id, "first line\nsecond")
    assert "second" in call(capsys, tmp_path, "note", run.id)
    assert "archived" in call(capsys, tmp_path, "archive", run.id)
    found = json.loads(call(capsys, tmp_path, "tag", run.id, "--json"))
    assert found == {"run": run.id, "tags": ["b", "c"], "note": "first line\nsecond", "archived": True}
    assert "not archived" in call(capsys, tmp_path, "archive", run.id, "--undo")
    assert "is not a tag" in call(capsys, tmp_path, "tag", run.id, "a b", status=2)
    assert "no tag 'x'" in call(capsys, tmp_path, "tag", run.id, "--remove", "x", status=2)


def test_trash_on_the_command_line(tmp_path, capsys, monkeypatch):
    first, second, active = made(tmp_path), made(tmp_path), store.create(tmp_path, Recipe())
    assert "the trash is empty" in call(capsys, tmp_path, "trash")
    assert "no run" in call(capsys, tmp_path, "rm", first.id, "20260101-nothing", status=2) and first.folder.exists()
    assert "stop it" in call(capsys, tmp_path, "rm", active.id, status=2)
    assert "trash restore" in call(capsys, tmp_path, "rm", first.id, second.id, first.id)
    rows = json.loads(call(capsys, tmp_path, "trash", "--json"))
    assert {row["run"] for row in rows} == {first.id, second.id} and all(row["bytes"] > 0 for row in rows)
    name = next(row["name"] for row in rows if row["run"] == first.id)
    assert f"{first.id} is back" in call(capsys, tmp_path, "trash", "restore", name)
    assert "not in the trash" in call(capsys, tmp_path, "trash", "restore", name, status=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert "use --yes" in call(capsys, tmp_path, "trash", "empty", status=2) and len(shelf.trashed(tmp_path)) == 1
    assert "removed 0" in call(capsys, tmp_path, "trash", "empty", "--older-than", "1", "--yes")
    assert main(["trash", "--runs-dir", str(tmp_path), "empty", "--yes"]) == 0
    assert shelf.trashed(tmp_path) == [] and first.folder.exists() and active.folder.exists()


@pytest.mark.parametrize("command", ["tag", "note", "archive", "rm"])
@pytest.mark.parametrize("run_id", ["none", "../../etc", ""])
def test_unknown_runs_are_exit_2(tmp_path, capsys, command, run_id):
    call(capsys, tmp_path, command, run_id, status=2)
