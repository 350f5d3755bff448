"""Damage done on purpose: what a run survives, and with what result."""

import json
import random
import shutil
from pathlib import Path

import faulty
import pytest
from test_app import open_page, said
from test_pipeline import assert_same

from prunedm import pipeline, seed_sheets, shelf, store
from prunedm.__main__ import main
from prunedm.records import STAGES

KILLS = 25
# Where a resumed run finds these it takes what goes with them as done.
ONCE = ("variants/dense/prunedm.json", "checkpoints/pruned.safetensors", "checkpoints/m0.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, micro):
    """A run that nothing hurt, and the stage that it was in at each moment."""
    run = store.create(tmp_path_factory.mktemp("whole"), micro())
    return run, faulty.execute(run)


def deadly_moments(moments: list[faulty.Moment]) -> list[int]:
    """Those around what is written once; then of every stage in turn, half of them tears, drawn with one seed."""
    chosen = [number for name in ONCE for number in around(moments, name)]
    draw, left = random.Random(0), {(stage, tears): [] for tears in (True, False) for stage in STAGES}
    for number, moment in enumerate(moments, 1):
        tears = moment.what == "tear" and moment.name != "state.json"
        left[moment.stage or STAGES[0], tears].append(number)
    for numbers in left.values():
        draw.shuffle(numbers)
    while len(chosen) < KILLS:
        chosen += [numbers.pop() for numbers in left.values() if numbers]
    return chosen[:KILLS]


def around(moments: list[faulty.Moment], name: str) -> tuple[int, int]:
    """As a file is first written, and just after it is in its place."""
    of_it = [(number, moment.what) for number, moment in enumerate(moments, 1) if moment.name == name]
    replaces = [number for number, what in of_it if what == "replace"]
    return next(number for number, what in of_it if what == "tear"), replaces[1]


@pytest.mark.slow
def test_the_kills_tear_checkpoints_and_come_in_every_stage(whole):
    _, moments = whole
    chosen = [moments[number - 1] for number in deadly_moments(moments)]
    assert {moment.stage for moment in chosen} >= set(STAGES)
    assert [m for m in chosen if m.what == "tear" and m.name.startswith("checkpoints/")]
    assert [m for m in chosen if m.stage == "evaluate" and m.name]


@pytest.mark.slow
def test_the_moments_are_the_same_in_each_process(whole, tmp_path):
    unhurt, moments = whole
    assert faulty.execute(store.create(tmp_path, unhurt.recipe())) == moments


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(whole, tmp_path, number):
    unhurt, moments = whole
    run, moment = store.create(tmp_path, unhurt.recipe()), deadly_moments(moments)[number]
    faulty.execute(run, moment)
    assert run.state().status == "interrupted", f"killed at moment {moment}: {moments[moment - 1]}"
    faulty.execute(run)
    assert run.state().status == "done"
    assert_same(unhurt, run)
    steps = [(record["stage"], record["step"]) for record in run.metrics()]
    assert steps == [(record["stage"], record["step"]) for record in unhurt.metrics()], "no line is lost or doubled"
    assert recorded(run) == recorded(unhurt), "no event is lost or doubled"
    assert [path.name for path in run.samples()] == [path.name for path in unhurt.samples()]


def recorded(run: store.Run) -> list[dict]:
    """The events that tell what a run did, and not how often it was begun."""
    kinds = ("pruned", "baseline", "sample")
    found = [{k: v for k, v in event.items() if k != "time"} for event in run.events() if event["kind"] in kinds]
    return sorted(found, key=json.dumps)


SECRET = "what lies outside is nobody's business"
DAMAGES = ("torn", "empty", "random", "unreadable", "link")
PLACES = (("home", {}), ("runs", {}), ("monitor", {}), ("monitor", {"tab": "Masks"}), ("monitor", {"tab": "Samples"}))
PLACES += (("monitor", {"tab": "Compliance"}), ("monitor", {"tab": "Log"}), ("monitor", {"tab": "System"}))
PLACES += (("monitor", {"tab": "Recipe"}), ("launch", {}), ("sweep", {}), ("system", {}))
PLACES += (("compare", {}), ("models", {}))
COMMANDS = (["ls"], ["ls", "--json"], ["show", "{}"], ["show", "{}", "--json"], ["report", "{}"])
COMMANDS += (["compare", "{}", "--quick", "--images", "8", "--steps", "3"],)
FILES = (
    *("recipe.yaml", "state.json", "metrics.jsonl", "events.jsonl", "mask-layers.jsonl", "system.jsonl", "log.txt"),
    *("layers.json", "evaluation.json", "report.html", "masks/*.npz", "samples/*.png", "checkpoints/*.safetensors"),
    *("variants/nm/unet/*.safetensors", "variants/nm/unet/config.json", "variants/nm/model_index.json"),
    *("allocation.json", "notes.json", ".lock", ".heartbeat", "variants/nm/masks.json", "variants/nm/*.safetensors"),
    *("variants/nm/prunedm.json", "variants/nm/samples.png", "variants/nm/README.md", "variants/nm/unet/*.py"),
    *(
        "variants/nm/scheduler/*.json",
        "evaluations/*.json",
        "evaluations/*.png",
        "exports/*",
        "log.txt.1",
        "layers-*.json",
    ),
)


@pytest.fixture(scope="module")
def hurt_run(tmp_path_factory, micro):
    """A finished run that was judged and exported too, to be copied and hurt."""
    run = store.create(tmp_path_factory.mktemp("to-hurt"), micro(mask={"density": 0.5}))
    assert pipeline.execute(run) == "done"
    shelf.retag(run, ["kept"])
    run.beat()
    run.log_path.rename(run.folder / "log.txt.1")
    run.log("the log has moved on")
    runs_dir = ["--runs-dir", str(run.folder.parent)]
    assert main([*[word.format(run.id) for word in COMMANDS[-1]], *runs_dir]) == 0
    seed_sheets.draw(f"{run.id}/nm", 8, run.folder.parent, run.recipe().eval)
    run.exports.mkdir()
    assert main(["export", run.id, "--format", "packed", "--out", str(run.exports / "nm.safetensors"), *runs_dir]) == 0
    return run


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, micro):
    """A run that was stopped while it learnt its masks."""
    run = store.create(tmp_path_factory.mktemp("stopped"), micro(mask={"density": 0.5}))
    seen = []
    assert pipeline.execute(run, on_step=seen.append, stop=lambda: seen[-1:] and is_amid_masks(seen[-1])) == "stopped"
    return run


def is_amid_masks(step) -> bool:
    return step.stage == "mask" and step.step == 3 and bool(step.values)


@pytest.mark.slow
def test_no_kind_of_file_is_left_unhurt(hurt_run):
    hurt_ones = {path for pattern in FILES for path in hurt_run.folder.glob(pattern)}
    others = {hurt_run.variant(name) for name in ("dense", "structured")}  # as the third
    there = {path for path in hurt_run.folder.rglob("*") if path.is_file() and not others & set(path.parents)}
    assert there == hurt_ones


def hurt_copy(whole: Path, runs: Path, pattern: str, damage: str, outside: Path) -> Path:
    """A copy of a run in which the last file of this kind is hurt; a link in it leads to a secret outside."""
    outside.write_text(SECRET)
    broken = shutil.copytree(whole, runs / "20260102-000000-broken")
    found = sorted(broken.glob(pattern))
    if not found:
        pytest.skip(f"such a run has no {pattern}")
    hurt(found[-1], damage, outside)
    return broken


def hurt(path: Path, damage: str, outside: Path) -> None:
    content = path.read_bytes()
    if damage == "link":
        path.unlink()
        path.symlink_to(outside)
    elif damage == "unreadable":  # to root everything is readable, a folder is not
        path.unlink()
        path.mkdir()
    else:
        noise = random.Random(1).randbytes(len(content))
        path.write_bytes({"torn": content[: len(content) // 2], "empty": b"", "random": noise}[damage])


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", FILES)
def test_a_hurt_file_breaks_no_page_and_no_other_run(runs, hurt_run, tmp_path_factory, pattern, damage):
    whole = shutil.copytree(hurt_run.folder, runs / "20260101-000000-whole")
    broken = hurt_copy(hurt_run.folder, runs, pattern, damage, tmp_path_factory.mktemp("outside") / "secret.txt")
    for page, query in PLACES:
        app = open_page(page, **({"run": broken.name} if page in ("monitor", "models") else {}), **query)
        assert not app.exception, (page, query, app.exception)
        assert SECRET not in everything(app), (page, query)
    healthy = open_page("monitor", run=whole.name)
    assert "6 of 6 stages done" in said(healthy) and not healthy.error
    if damage == "link":
        assert "is a link" in said(open_page("monitor", run=broken.name))
        with pytest.raises(store.StoreError, match="is a link"):
            store.find(runs, broken.name)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", FILES)
def test_a_hurt_file_is_said_in_one_line_by_each_command(runs, hurt_run, tmp_path, capfd, pattern, damage):
    broken = hurt_copy(hurt_run.folder, runs, pattern, damage, tmp_path / "secret.txt")
    for command in COMMANDS:
        assert_well_said(command, broken, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", FILES)
def test_a_stopped_run_goes_on_over_a_hurt_file_or_says_why_not(runs, stopped_run, tmp_path, capfd, pattern, damage):
    kind = pattern.replace("/nm/", "/structured/")  # the last variant that a stopped run has
    broken = hurt_copy(stopped_run.folder, runs, kind, damage, tmp_path / "secret.txt")
    assert_well_said(["resume", "{}"], broken, capfd)


def assert_well_said(command: list[str], run: Path, capfd) -> None:
    """Done, or an exit status of 1 or 2 and one line that says why; and nothing of what lies outside.

    Of a run that fails that line is its ending, among the results.
    """
    status = main([*[word.format(run.name) for word in command], "--runs-dir", str(run.parent)])
    told = capfd.readouterr()
    lines = told.err.splitlines() + told.out.splitlines()
    errors = [line for line in lines if line.startswith(("error: ", f"{run.name} failed:"))]
    assert status in (0, 1, 2) and len(errors) == (status != 0), (command, status, told.err, told.out)
    assert "Traceback" not in told.err + told.out and SECRET not in told.err + told.out, command


def everything(app) -> str:
    """All that a page sent to the browser, as text."""
    return str(app)
