"""What Launch shows beside the form: faults, files, earlier runs, images, sizes, time, queue."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from app import forms, launch_views
from prunedm import pipeline, store
from prunedm import recipe as recipes
from prunedm.jobs import Jobs
from prunedm.recipe import Recipe, RecipeError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def done_run(tmp_path_factory, micro):
    run = store.create(tmp_path_factory.mktemp("done"), micro(data={"limit": 30}))
    assert pipeline.execute(run) == "done"
    return run


def open_page(page="launch"):
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60).run()
    app.switch_page(f"../pages/{page}.py").run()
    assert not app.exception, app.exception
    return app


def said(app):
    kinds = ("markdown", "caption", "error", "warning", "success", "info", "subheader", "header")
    return "\n".join(str(e.value) for kind in kinds for e in getattr(app, kind)).replace("\\", "")


def metric(app, label):
    return next(m.value for m in app.metric if m.label == label)


# --- faults --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("document", "path", "rule"),
    [
        ({"mask": {"n": 4}}, "mask.n", "must be less than m=4"),
        ({"mask": {"n": 99}}, "mask.n", "less than or equal to 15"),
        ({"name": "a b"}, "name", "must be 1 to 40 letters"),
        ({"data": {"held_out": 0.2}}, "data.held_out", "not read by source"),
        ({"mask": {"layers": [{"match": "x", "pattern": "4:2"}]}}, "mask.layers", "N:M"),
        ({"prune": {"rounds": "many"}}, "prune.rounds", "integer"),
        ({"mask": {"weights_from": 0.5}}, "mask.weights_from", "read when the weights train"),
        (
            {"mask": {"method": "reinforce", "cached_batches": 2}, "train": {"timesteps": "importance"}},
            "mask.cached_batches", "use uniform",
        ),
        ({"eval": {"sampler": "ddpm", "eta": 0.5}}, "eval.eta", "not read by sampler"),
    ],
)  # fmt: skip
def test_each_fault_has_its_field(document, path, rule):
    found = forms.faults(document)
    assert list(found) == [path] and rule in found[path]
    assert forms.faults({}) == {}


def test_a_fault_is_said_above_the_form_and_beside_its_field(runs):
    app = open_page()
    app.number_input(key="recipe.mask.n").set_value(4).run()
    texts = [e.value for e in app.error]
    assert len(texts) == 2 and all("must be less than m" in text for text in texts)
    app.number_input(key="recipe.mask.n").set_value(2)
    app.text_input(key="recipe.name").set_value("a b").run()
    assert len(app.error) == 2 and "Start" not in [b.label for b in app.button]
    app.text_input(key="recipe.name").set_value("ok").run()
    assert not app.error and "Start" in [b.label for b in app.button]


def test_a_fault_in_a_fold_opens_it(runs, open_folds):
    app = open_folds(open_page(), "data")
    app.text_input(key="recipe.data.limit").set_value("1").run()
    open_folds(app, "data", is_open=False)
    opened = [e for e in app.expander if e.label == "More settings" and e.proto.expanded]
    assert len(opened) == 1 and len(opened[0].error) == 1


@pytest.mark.parametrize("field", ["mask.layers", "mask.lr"])
def test_a_mapping_where_none_fits_is_a_fault_like_any_other(runs, open_folds, field):
    app = open_folds(open_page(), "mask")
    app.text_input(key=f"recipe.{field}").set_value("mid_block.*: 1:4").run()
    assert not app.exception and app.error and "Balanced" in [b.label for b in app.button]
    app.text_input(key=f"recipe.{field}").set_value("").run()
    assert not app.error


def test_an_arrow_of_a_small_number_adds_little(runs):
    app = open_page()
    for section in forms.FOLDED:
        app.session_state[f"launch.fold.{section}"] = True
    app.run()
    steps = {path: app.number_input(key=f"recipe.{path}").step for path in ("mask.sr_decay", "train.ema", "train.lr")}
    assert steps == {"mask.sr_decay": 1e-4, "train.ema": 1e-4, "train.lr": 1e-4}
    assert app.number_input(key="recipe.prune.target").step == forms.STEP


# --- files and earlier runs ----------------------------------------------------------------------
def upload(app, content, name="mine.yaml"):
    app.file_uploader[0].set_value((name, content, "application/yaml")).run()
    assert not app.exception
    return app


def test_a_recipe_file_fills_the_form(runs):
    app = upload(open_page(), b"name: from-file\nmask: {n: 1, steps: 77}\n")
    assert app.number_input(key="recipe.mask.steps").value == 77
    assert "The form holds the recipe of mine.yaml" in said(app)
    shown = recipes.build(recipes.parse(next(c.value for c in app.code if c.language == "yaml")))
    assert shown == recipes.build({"name": "from-file", "mask": {"n": 1, "steps": 77}})
    app.number_input(key="recipe.mask.steps").set_value(78).run()
    assert app.number_input(key="recipe.mask.steps").value == 78, "the file is taken once"


BAD = {
    "no field": b"masks: {}",
    "bad value": b"mask: {n: 9, m: 4}",
    "no yaml": b"a: [",
    "twice": b"seed: 1\nseed: 2",
    "a list": b"[1]",
    "no text": b"\xff\xfe\x00",
    "tag": b"!!python/object/apply:os.system ['true']",
    "large": b"#" * (launch_views.LARGEST_RECIPE + 1),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_in_one_line(content):
    with pytest.raises(RecipeError) as error:
        launch_views.recipe_of("mine.yaml", content)
    assert "\n" not in str(error.value)


def test_a_bad_file_leaves_the_form_as_it_is(runs):
    app = open_page()
    before = app.number_input(key="recipe.mask.steps").value
    upload(app, b"mask: {steps: -1}")
    assert "mask.steps" in said(app) and app.number_input(key="recipe.mask.steps").value == before


def test_an_earlier_run_fills_the_form(runs):
    run = store.create(runs, Recipe(name="earlier", seed=5))
    app = open_page()
    app.selectbox(key=launch_views.FROM_RUN).set_value(run.id).run()
    assert app.text_input(key="recipe.name").value == "earlier" and app.number_input(key="recipe.seed").value == 5


def test_the_recipe_can_be_downloaded(runs):
    assert [b.label for b in open_page().get("download_button")] == ["Download"]


# --- what it will do -----------------------------------------------------------------------------
def test_images_of_the_data_are_shown(runs, image_folder):
    app = open_page()
    assert "16 images of" in said(app) and "at 28x28" in said(app)
    app.text_input(key="recipe.data.source").set_value("/nowhere").run()
    assert not app.exception and "is not a folder" in said(app)
    app.text_input(key="recipe.data.source").set_value(str(image_folder)).run()
    assert "16 images of" in said(app)


def test_images_of_the_data_stand_in_the_forms_data(runs):
    order = [str(getattr(one, "label", None) or getattr(one, "value", "")) for one in open_page().main]
    assert order.index("Data") < order.index("Images of the data") < order.index("Stage 1: structured pruning")


def test_sixteen_images_are_those_of_the_data(image_folder):
    spec = recipes.Data(source=str(image_folder))
    name, arrays, _ = launch_views.sixteen(spec.model_dump_json(), (3, 8, 8), ())
    assert name == image_folder.name and len(arrays) == 16
    assert all(a.shape == (8, 8, 3) and a.dtype == np.uint8 and Image.fromarray(a) for a in arrays)


def test_sizes_density_and_macs_are_predicted(runs, open_folds):
    app = open_page()
    kept = int(metric(app, "Non-zero after stage 2").replace(",", ""))
    left = int(metric(app, "After stage 1").replace(",", ""))
    assert metric(app, "Density after stage 2") == f"{kept / left:.1%}"
    dense = float(metric(app, "File, dense fp16").split()[0])
    assert dense == pytest.approx(2 * left / 2**20, abs=0.06)
    assert 2 * kept / 2**20 < float(metric(app, "File, packed fp16").split()[0]) + 0.06 < dense
    macs = [float(metric(app, m).split()[0]) for m in ("MACs, N:M (theory)", "MACs after stage 1")]
    assert 0.45 * macs[1] < macs[0] < macs[1]
    app.selectbox(key="recipe.mask.method").set_value("none").run()
    assert metric(app, "File, packed fp16") == "no masks" and metric(app, "Density after stage 2") == "100.0%"
    app.selectbox(key="recipe.mask.method").set_value("gumbel")
    open_folds(app, "mask")
    app.text_input(key="recipe.mask.density").set_value("0.5").run()
    assert metric(app, "File, packed fp16") == "not known yet" and not app.exception


def test_time_rests_on_finished_runs_or_is_not_given(runs, done_run):
    assert "not known yet" in said(open_page())
    shutil.copytree(done_run.folder, runs / done_run.id)
    app = open_page()
    assert "not known yet" in said(app), "another model and batch size"
    app.selectbox(key=launch_views.FROM_RUN).set_value(done_run.id).run()
    text = said(app)
    assert not app.exception and "Time on this machine:** about" in text
    assert f"By 1 finished run of this model at this batch size, scaled by MACs: {done_run.id}" in text
    app.selectbox(key="recipe.mask.method").set_value("reinforce").run()
    assert "Not counted" in said(app) and "learn N:M masks" in said(app)


def test_the_queue_lists_what_waits_and_runs(runs, monkeypatch):
    assert "Queue" not in said(open_page())
    first, second = (store.create(runs, Recipe(name=name)) for name in ("one", "two"))
    state = first.state()
    state.stage, state.step, state.of = "mask", 3, 10
    first.claim(state, "running")
    monkeypatch.setattr(Jobs, "position", lambda self, run_id: 1 if run_id == second.id else None)
    app = open_page()
    text = said(app)
    assert "Queue" in text and "Learn N:M masks: 3 of 10" in text and "next" in text
    links = [link.label.replace("\\", "") for link in app.get("page_link")]
    assert links[-2:] == [first.id, second.id]


def test_an_empty_field_says_what_that_means(runs):
    app = open_page("launch")
    for section in forms.FOLDED:
        app.session_state[f"launch.fold.{section}"] = True
    said = {field.key.removeprefix("recipe."): field.placeholder for field in app.run().text_input}
    assert said["data.limit"] == "all" and said["mask.density"] == said["train.min_snr"] == "off"
    assert said["resources.artifacts"] == "none" and said["mask.lr"] == "the method's own"
    assert set(forms.EMPTY) <= set(said), "each is a field of the form"
