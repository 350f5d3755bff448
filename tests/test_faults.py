"""Damage done on purpose: what a run survives, and with what result."""

import random
import shutil
from pathlib import Path

import faulty
import pytest
from test_app import open_page, said
from test_pipeline import assert_same

from prunedm import pipeline, shelf, store
from prunedm.records import STAGES

KILLS = 25


@pytest.fixture(scope="module")
def whole(tmp_path_factory, micro):
    """A run that nothing hurt, and the stage that it was in at each moment."""
    run = store.create(tmp_path_factory.mktemp("whole"), micro())
    return run, faulty.execute(run)


def deadly_moments(stages: list[str]) -> list[int]:
    """Moments of every stage in turn, drawn with one seed."""
    draw, left = random.Random(0), {stage: [] for stage in STAGES}
    for moment, stage in enumerate(stages, 1):
        left.setdefault(stage or STAGES[0], []).append(moment)
    for moments in left.values():
        draw.shuffle(moments)
    chosen: list[int] = []
    while len(chosen) < KILLS:
        chosen += [moments.pop() for moments in left.values() if moments]
    return chosen[:KILLS]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(whole, tmp_path, number):
    unhurt, stages = whole
    run = store.create(tmp_path, unhurt.recipe())
    moment = deadly_moments(stages)[number]
    faulty.execute(run, moment)
    assert run.state().status == "interrupted", f"killed at moment {moment} in {stages[moment - 1]}"
    faulty.execute(run)
    assert run.state().status == "done"
    assert_same(unhurt, run)
    steps = [(record["stage"], record["step"]) for record in run.metrics()]
    assert steps == [(record["stage"], record["step"]) for record in unhurt.metrics()], "no line is lost or doubled"


SECRET = "what lies outside is nobody's business"
DAMAGES = ("torn", "empty", "random", "unreadable", "link")
PLACES = (("home", {}), ("runs", {}), ("monitor", {}), ("monitor", {"tab": "Masks"}), ("monitor", {"tab": "Samples"}))
PLACES += (("monitor", {"tab": "Compliance"}), ("monitor", {"tab": "Log"}), ("monitor", {"tab": "System"}))
PLACES += (("compare", {}), ("models", {}))
FILES = (
    *("recipe.yaml", "state.json", "metrics.jsonl", "events.jsonl", "mask-layers.jsonl", "system.jsonl", "log.txt"),
    *("layers.json", "evaluation.json", "report.html", "masks/*.npz", "samples/*.png", "checkpoints/*.safetensors"),
    *("variants/nm/unet/*.safetensors", "variants/nm/unet/config.json", "variants/nm/model_index.json"),
    *("allocation.json", "notes.json", ".lock", ".heartbeat", "variants/nm/masks.json", "variants/nm/*.safetensors"),
    *("variants/nm/prunedm.json", "variants/nm/samples.png", "variants/nm/README.md", "variants/nm/unet/*.py"),
    *("variants/nm/scheduler/*.json", "layers-*.json"),
)


@pytest.fixture(scope="module")
def hurt_run(tmp_path_factory, micro):
    """A finished run, to be copied and hurt."""
    run = store.create(tmp_path_factory.mktemp("to-hurt"), micro(mask={"density": 0.5}))
    assert pipeline.execute(run) == "done"
    shelf.retag(run, ["kept"])
    run.beat()
    return run


def test_no_kind_of_file_is_left_unhurt(hurt_run):
    hurt_ones = {path for pattern in FILES for path in hurt_run.folder.glob(pattern)}
    others = {hurt_run.variant(name) for name in ("dense", "structured")}  # as the third
    there = {path for path in hurt_run.folder.rglob("*") if path.is_file() and not others & set(path.parents)}
    assert there == hurt_ones


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
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_text(SECRET)
    whole, broken = runs / "20260101-000000-whole", runs / "20260102-000000-broken"
    for folder in (whole, broken):
        shutil.copytree(hurt_run.folder, folder)
    files = sorted(broken.glob(pattern))
    if not files:
        pytest.skip(f"a finished run has no {pattern}")
    hurt(files[-1], damage, outside)
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


def everything(app) -> str:
    """All that a page sent to the browser, as text."""
    return str(app)
