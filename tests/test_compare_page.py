"""Compare through AppTest: variants of runs, imported models and folders side by side, by picker and by address."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from apptest import click, labels, open_page, said, shown, sound, wait_for
from conftest import make_unet
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from streamlit.delta_generator import DeltaGenerator

from app import compare_choice, compare_samples, compare_views, curve_views, judgements, lab, parts
from app.compare_choice import Known
from prunedm import cache, comparison, imports, judging, pictures, pipeline, report_page, seed_sheets, store, subject
from prunedm import recipe as recipes
from prunedm import unet as unets
from prunedm.recipe import Eval

MARKUP = "<b>a<b> ![x](http:example.invalid) *b*, 50%"
PICK = "compare_pick"


@pytest.fixture(scope="module")
def done_run(tmp_path_factory, micro):
    run = store.create(tmp_path_factory.mktemp("done"), micro())
    assert pipeline.execute(run) == "done"
    return run


@pytest.fixture
def with_done(runs, done_run):
    shutil.copytree(done_run.folder, runs / done_run.id)
    return store.Run(runs / done_run.id)


@pytest.fixture
def user(tmp_path_factory, monkeypatch):
    """A folder of the user's own, with a cache and quick timing of its own."""
    monkeypatch.setenv(cache.ENV, str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(judging, "BATCHES", dict.fromkeys(judging.BATCHES, (1,)))
    return tmp_path_factory.mktemp("user")


def model(folder, factor=1.0, **changes):
    made = make_unet(**changes)
    with torch.no_grad():
        made.conv_out.weight.mul_(factor)
    unets.save(made, DDPMScheduler(), folder, {"variant": "dense"})
    return folder


def link(*keys):
    return ",".join(compare_choice.written(str(key)) for key in keys)


def chosen(app):
    return list(app.multiselect(key=PICK).value)


def at(app, tab):
    """Another tab of the page: only the open one is drawn."""
    app.session_state["view"] = tab
    return sound(app.run())


def rest(app):
    """When the background is through, the page again."""
    wait_for(lambda: not judgements.judgements().at_work())
    return sound(app.run())


def grid(app):
    """The grid's header, and what each row shows: alt texts, or that a picture is not drawn."""
    (html,) = [h.proto.body for h in app.get("html") if "class='seeds'" in h.proto.body]
    head = re.findall(r"<th scope='col'>(.*?)</th>", html)
    rows = re.findall(r"<tr><th scope='row'>(\d+)</th>(.*?)</tr>", html)
    return head[1:], {int(n): re.findall(r"<td>(?:<img alt='(.*?)'.*?>|(not drawn))</td>", row) for n, row in rows}


def losses(app):
    """The row of validation losses."""
    figures = at(app, "Figures").table[0].value
    return figures.loc[next(name for name in figures.index if name.startswith("Validation loss"))]


def add_folder(app, path):
    app.text_input(key="compare_path").set_value(str(path))
    return click(app, "Add")


# --- the picker --------------------------------------------------------------------------------------
def test_several_runs_are_compared_once_each_and_their_recipes_differ(with_done, runs, done_run):
    for suffix, n in (("b", 1), ("c", 2)):
        copy = store.Run(shutil.copytree(done_run.folder, runs / f"{done_run.id}-{suffix}"))
        recipe = recipes.merge(copy.recipe().model_dump(), {"mask": {"n": n}, "name": suffix})
        (copy.folder / "recipe.yaml").write_text(recipes.build(recipe).to_yaml())
    app = open_page("compare")
    for run_id in (f"{done_run.id}-b", done_run.id):
        app.multiselect(key=PICK).select(f"{run_id}/nm").run()
        assert not app.exception and not app.error
    assert len(chosen(app)) == 5 and "Recipe differences" in said(at(app, "Recipes"))
    differing = app.dataframe[0].value.set_index("field")
    ids = [f"{done_run.id}-c", f"{done_run.id}-b", done_run.id]
    assert list(differing.columns) == ids and list(differing.index) == ["name", "mask.n"]
    assert differing.loc["name"].tolist() == ["c", "b", "micro"]
    assert differing.loc["mask.n"].tolist() == ["2", "1", "2"], "also where it is as in the first"


def test_a_link_to_runs_shows_the_dense_model_that_they_share_once(with_done, runs, done_run):
    copy = shutil.copytree(done_run.folder, runs / f"{done_run.id}-b")
    app = open_page("compare", runs=f"{with_done.id},{copy.name}")
    assert len(chosen(app)) == 5 and sum(key.endswith("/dense") for key in chosen(app)) == 1
    assert app.query_params["models"] == ",".join(chosen(app)), "the address names what is shown"


def test_a_link_to_single_models_and_seeds_shows_them(with_done):
    app = open_page("compare", models=f"{with_done.id}/dense,{with_done.id}/nm", seeds="3,5")
    assert chosen(app) == [f"{with_done.id}/dense", f"{with_done.id}/nm"]
    assert app.multiselect(key="compare_seeds").value == [3, 5]
    app.query_params["seeds"] = "2,999"  # another link, followed in the same tab
    app.run()
    assert app.multiselect(key="compare_seeds").value == [2] and "There is no seed 999 here" in said(app)


def test_an_imported_model_is_picked_from_the_list_and_a_folder_by_its_path(with_done, runs, user):
    one = imports.from_path(model(user / "one"), runs)
    app = open_page("compare")
    before = chosen(app)
    assert f"{one.name} (imported)" in app.multiselect(key=PICK).options
    app.multiselect(key=PICK).select(f"models/{one.name}").run()
    add_folder(app, model(user / "two", 0.5))
    assert not app.error and chosen(app) == [*before, f"models/{one.name}", str(user / "two")]
    assert app.text_input(key="compare_path").value == ""
    assert "Not judged yet: one (imported), two." in shown(app)
    figures = at(app, "Figures").table[0].value
    assert figures.loc["Parameters"].iloc[-1] == f"{unets.parameters(make_unet()):,}", "known before it is judged"


def test_the_address_reproduces_the_view_also_of_names_with_commas_and_markup(with_done, runs, user):
    odd = model(user / MARKUP)
    one = imports.from_path(model(user / "one"), runs)
    app = open_page("compare")
    app.multiselect(key=PICK).set_value([f"{with_done.id}/nm"]).run()
    add_folder(app, odd)
    app.multiselect(key=PICK).select(f"models/{one.name}").run()
    app.multiselect(key="compare_seeds").set_value([2, 1]).run()
    address = {key: app.query_params[key] for key in ("models", "seeds", "by")}
    again = open_page("compare", **address)
    assert chosen(again) == [f"{with_done.id}/nm", str(odd), f"models/{one.name}"] and not again.warning
    assert again.multiselect(key="compare_seeds").value == [2, 1]
    assert grid(again) == grid(app)
    at(again, "Figures")
    text = said(again) + str([t.value.to_string() for t in again.table])
    assert MARKUP in text.replace("\\", "") and not re.search(r"(?<!\\)(<b>|!\[|\]\(|\*b)", text)


@given(keys=st.lists(st.text(min_size=1).filter(lambda t: "\x00" not in t), min_size=1, max_size=8))
def test_any_path_survives_the_address(keys):
    from urllib.parse import unquote

    assert [unquote(part) for part in link(*keys).split(",")] == keys


def faults(user, runs):
    """What an address may ask for in vain, and a word of what is said of it."""
    gone = imports.from_path(model(user / "gone"), runs)
    shutil.rmtree(user / "gone")
    other = model(user / "other")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    huge = model(user / "huge")
    (huge / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [10**9]}))
    torn = model(user / "torn")
    (torn / "unet" / unets.WEIGHTS).write_bytes(b"torn")
    pickled = model(user / "pickled")
    (pickled / "unet" / unets.WEIGHTS).rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    return {
        user / "nowhere": "is not there, or not a folder",
        user: "has no config.json",
        "/": "has no config.json",
        other: "only UNet2DModel is supported",
        huge: "block_out_channels must be",
        torn: "is no safetensors file, or torn",
        pickled: "only pickled weights, which are never loaded",
        f"models/{gone.name}": f"{user / 'gone'} is not there, or not a folder",
        "models/unknown": "no imported model",
        "models/../../etc": "no imported model",
        "models/<b>x</b>": "no imported model",
        "20000101-000000-none/nm": "There is no run 20000101-000000-none/nm",
        "google/ddpm-cifar10-32": "There is no run google/ddpm-cifar10-32",
        "../x": "There is no run ../x",
    }


def test_each_fault_of_an_address_is_one_line_and_loses_nothing(with_done, runs, user, monkeypatch):
    monkeypatch.setattr(unets, "download", lambda *given: pytest.fail("an address must not fetch anything"))
    good = str(model(user / "good"))
    for key, words in faults(user, runs).items():
        app = open_page("compare", models=link(f"{with_done.id}/nm", key, good))
        told = [*app.warning, *app.error]
        assert len(told) == 1 and words in told[0].value.replace("\\", ""), (key, [t.value for t in told])
        assert "\n" not in told[0].value and "<b>" not in told[0].value
        assert chosen(app) == [f"{with_done.id}/nm", good], key
    alone = open_page("compare", models="/no/such/folder")
    assert len(chosen(alone)) == 3, "the newest run, as without an address"


def test_an_address_names_at_most_eight(with_done, user):
    folders = [model(user / f"m{i}") for i in range(9)]
    app = open_page("compare", models=link(*folders))
    assert len(chosen(app)) == 8 and "The address names 9 models: the first 8 are shown" in shown(app)
    add_folder(app, folders[8])
    assert "8 models are compared at most" in shown(app) and len(chosen(app)) == 8
    assert app.text_input(key="compare_path").value == str(folders[8]), "what was typed stays"


@pytest.mark.parametrize("typed", ["/no/such/folder", "relative/folder", "~nobody-of-this-name", "a\0b", "/dev/null"])
def test_a_wrong_folder_is_said_and_what_was_typed_stays(with_done, typed):
    app = open_page("compare")
    before = chosen(app)
    add_folder(app, typed)
    assert len(app.error) == 1 and "is not there, or not a folder" in shown(app)
    assert chosen(app) == before and app.text_input(key="compare_path").value == typed
    assert not add_folder(app, "  ").error, "nothing typed, nothing said"


def test_a_folder_twice_is_said(with_done, user):
    app = add_folder(open_page("compare"), model(user / "one"))
    add_folder(app, f"{user}/./one/")
    assert "is among the models already" in shown(app) and len(chosen(app)) == 4


def test_a_folder_that_goes_away_is_taken_off_and_the_others_stay(with_done, user):
    folder = model(user / "one")
    app = open_page("compare", models=link(f"{with_done.id}/nm", folder))
    shutil.rmtree(folder)
    app.run()
    assert not app.exception and "one is left out:" in shown(app) and chosen(app) == [f"{with_done.id}/nm"]


def test_models_are_compared_where_there_is_no_run(runs, user):
    a, b = model(user / "a" / "unet-of-mine"), model(user / "b" / "unet-of-mine", 0.5)
    app = open_page("compare", models=link(a, b))
    assert "2,734,945" in said(app), "the page is never empty"
    assert chosen(app) == [str(a), str(b)] and "These models have no samples yet" in said(app)
    assert set(app.multiselect(key=PICK).options) == {str(a), str(b)}, "folders of one name are told apart"
    click(app, "Draw what is missing")
    head, rows = grid(rest(app))
    assert head == [str(a), str(b)] and len(rows) == compare_samples.FIRST_SEEDS
    assert all(alt for row in rows.values() for alt, absent in row)


def test_each_tab_has_its_address_and_draws_itself_alone(with_done):
    for tab in ("Samples", "Figures", "Pareto", "Latency", "Curves", "Recipes", "Report"):
        app = open_page("compare", view=tab)
        assert not app.error and bool(app.table) == (tab == "Figures"), tab
        assert ("Same seeds, side by side" in said(app)) == (tab == "Samples"), tab


def test_the_address_names_the_pair_under_the_slider(with_done):
    app = open_page("compare")
    keys = chosen(app)
    assert "left" not in app.query_params, "what is offered first is not named"
    app.selectbox(key="compare_left").set_value(keys[1]).run()
    app.selectbox(key="compare_seed").set_value(3).run()
    sound(at(at(app, "Figures"), "Samples"))
    assert app.selectbox(key="compare_left").value == keys[1], "a look at another tab loses nothing"
    app.multiselect(key="compare_seeds").set_value([2, 3]).run()
    sound(at(at(app, "Figures"), "Samples"))
    assert app.multiselect(key="compare_seeds").value == [2, 3] and app.query_params["seeds"] == "2,3"
    address = {key: app.query_params[key] for key in ("models", "seeds", "left", "seed")}
    again = open_page("compare", **address)
    pair = [again.selectbox(key=f"compare_{name}").value for name in ("left", "right", "seed")]
    assert pair == [keys[1], keys[-1], 3] and not again.warning
    again.selectbox(key="compare_left").set_value(keys[0]).run()
    assert again.selectbox(key="compare_left").value == keys[0] and "left" not in again.query_params


# --- curves ------------------------------------------------------------------------------------------
def test_curves_of_runs_lie_over_one_another_those_at_work_too(with_done, runs):
    busy = store.Run(shutil.copytree(with_done.folder, runs / f"{with_done.id}-busy"))
    (busy.folder / "evaluation.json").unlink()
    busy.claim(busy.state(), "running")
    app = open_page("compare", view="Curves")
    app.multiselect(key="compare_more").select(busy.id).run()
    assert app.query_params["curves"] == busy.id
    for figure in ("loss", "entropy", "grad_norm"):
        app.selectbox(key="compare_figure").set_value(figure).run()
        assert not app.exception and not app.error
    app.segmented_control(key="curve_axis").set_value("Time").run()
    assert app.selectbox(key="compare_stage").value == "all", "never an empty list"
    app.selectbox(key="compare_stage").set_value("mask").run()
    assert not app.exception and not app.error
    again = open_page("compare", view="Curves", curves=busy.id)
    assert again.multiselect(key="compare_more").value == [busy.id] and not again.warning


CURVES = {"figure": "grad_norm", "stage": "mask", "over": "time", "smoothing": "0.35", "log": "yes"}
CURVE_KEYS = ("compare_figure", "compare_stage", "curve_axis", "curve_smoothing", "log_loss")


def looked_at(app) -> list:
    """What the curves' widgets hold."""
    return [app.session_state[key] for key in CURVE_KEYS]


def test_the_address_names_how_curves_are_looked_at(with_done):
    app = open_page("compare", view="Curves")
    assert not set(CURVES) & set(app.query_params), "what is offered first is not named"
    app.selectbox(key="compare_figure").set_value("grad_norm").run()
    app.selectbox(key="compare_stage").set_value("mask").run()
    app.segmented_control(key="curve_axis").set_value("Time").run()
    app.slider(key="curve_smoothing").set_value(0.35).run()
    sound(app.toggle(key="log_loss").set_value(True).run())
    assert {key: app.query_params[key] for key in CURVES} == CURVES
    again = open_page("compare", view="Curves", **CURVES)
    assert looked_at(again) == looked_at(app) == ["grad_norm", "mask", "Time", 0.35, True]
    assert not again.warning and not again.error
    again.selectbox(key="compare_stage").set_value("all").run()
    assert again.selectbox(key="compare_stage").value == "all" and "stage" not in again.query_params
    wrong = open_page("compare", view="Curves", figure="<b>", stage="none", over="x", smoothing="nan", log="maybe")
    assert looked_at(wrong) == looked_at(open_page("compare", view="Curves")) and not wrong.error


def test_one_stage_alone_begins_at_zero_in_every_run(with_done):
    steps = lab.steps(with_done)
    kept, minutes = curve_views.part(with_done, steps, "mask", in_time=True)
    assert {stretch.stage for stretch in kept.stretches} == {"mask"} and minutes[0] == 0
    times = [record["time"] for record in with_done.metrics() if record["stage"] == "mask"]
    assert minutes == pytest.approx([(time - times[0]) / 60 for time in times], abs=1e-3)
    assert curve_views.part(with_done, steps, None, in_time=False) == (steps, None)


# --- pareto ------------------------------------------------------------------------------------------
def test_links_below_the_plots_lead_to_the_runs_on_a_front_alone(with_done, runs):
    worse = store.Run(shutil.copytree(with_done.folder, runs / f"{with_done.id}-worse"))
    figures = worse.evaluation()
    numbers = ("parameters", "nonzero_parameters", "macs", "bytes", "validation_loss", "fid", "latency_ms")
    doubled = {key: 2 * figures["nm"][key] for key in numbers if figures["nm"].get(key)}
    store.write_json(worse.folder / "evaluation.json", figures | {"nm": figures["nm"] | doubled | {"sizes": {}}})
    app = open_page("compare", view="Pareto", models=link(f"{with_done.id}/nm", f"{worse.id}/nm"))
    assert not app.error and "Runs with a model on a front" in said(app) and app.get("plotly_chart")
    found = [(one.proto.page, one.proto.query_string) for one in app.get("page_link")]
    assert found == [("monitor", f"run={with_done.id}")]


# --- figures -----------------------------------------------------------------------------------------
def test_all_kinds_are_judged_alike_in_the_background(with_done, runs, user, image_folder):
    one = imports.from_path(model(user / "one"), runs)
    two = model(user / "<b>two", 0.5)
    keys = [f"{with_done.id}/nm", f"models/{one.name}", str(two)]
    app = open_page("compare", models=link(*keys), by="quick")
    click(app, "Judge these 3 models alike")
    rest(app)
    assert not app.error and not [b for b in labels(app) if b.startswith("Judge")]
    at(app, "Figures")
    figures, conditions = app.table[0].value, app.table[-1].value
    assert list(figures.columns) == [parts.plain(name) for name in compare_choice.short_names(keys).values()]
    charts = [chart.proto.spec for tab in ("Pareto", "Latency") for chart in at(app, tab).get("plotly_chart")]
    assert len(charts) == 9 and all("<b>two" not in chart and "&lt;b&gt;two" in chart for chart in charts)
    assert not (losses(app) == "n/a").any() and len(set(losses(app))) == 3
    assert set(conditions.loc["real images"]) == {conditions.loc["real images"].iloc[0]}, "by the run's own images"
    assert set(conditions.loc["sampling steps"]) == {"10"}
    again = open_page("compare", models=link(*keys), by="quick", view="Figures")
    assert again.table[0].value.equals(figures), "the link shows the very figures"
    with torch.no_grad():
        model(two, 0.1)
    changed = open_page("compare", models=link(*keys), by="quick")
    assert "Judge these 3 models alike" in labels(changed), "another model lies there now"


def test_models_are_judged_as_engine_and_command_do(with_done, runs, user):
    """The page's figures of a folder are those of judging the same sources, under the page's names."""
    folder, keys = model(user / "one"), [f"{with_done.id}/dense", str(user / "one")]
    known = Known()
    known.add(str(folder), folder)
    known.judged[str(folder)].label = "theirs"
    judgements.judgements().judge(keys, "quick").future.result(120)
    found, _ = compare_views.judged_alike(keys, "quick", known)
    request = judging.Request("quick")
    expected = judging.judge(judging.entries(keys, runs), request)
    for key, other in zip(keys, expected):
        assert found[key].figures == other.figures and found[key].figures["fid"] is not None
    assert found[keys[1]].label == "theirs" and found[keys[0]].label == expected[0].label
    page = report_page.render(list(found.values()))
    assert "theirs" in page and "cannot be shown" not in page


def test_another_image_size_is_said_and_judged_without_quality(with_done, user):
    small, colour = model(user / "small"), model(user / "wide", sample_size=16, in_channels=3, out_channels=3)
    app = open_page("compare", models=link(f"{with_done.id}/nm", small, colour), by="quick")
    assert "8x8, grey (micro · N:M, small); 16x16, colour (wide)" in shown(app)
    click(app, "Judge these 3 models alike")
    rest(app)
    assert not app.error and "no real images of its size (16x16, colour) to judge by" in shown(app)
    assert list(losses(app) == "n/a") == [False, False, True]
    at(app, "Samples")
    click(app, "Draw what is missing")
    rest(app)
    assert "draw images of different sizes (8x8 and 16x16)" in shown(app), "the slider says why it is not there"
    same = open_page("compare", models=link(f"{with_done.id}/nm", small))
    assert "different sizes" not in shown(same)


def test_a_judgement_that_fails_is_one_line_and_keeps_what_was_recorded(with_done, user):
    folder = model(user / "one")
    weights = folder / "unet" / unets.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])  # its header is whole: only loading finds out
    app = open_page("compare", models=link(f"{with_done.id}/nm", folder), by="quick")
    click(app, "Judge these 2 models alike")
    rest(app)
    assert len(app.error) == 1 and str(weights) in shown(app) and "\n" not in app.error[0].value
    assert "figures that the runs recorded" in said(app) and "% of the dense model's weights are gone" in shown(app)
    assert "Judge these 2 models alike" in labels(app), "it can be tried again"


def test_a_model_of_no_run_is_lent_images_only_where_shape_and_runs_agree(with_done, runs, user, image_folder):
    small, colour = str(model(user / "small")), str(model(user / "wide", in_channels=3, out_channels=3))
    other = store.Run(shutil.copytree(with_done.folder, runs / f"{with_done.id}-other"))
    found = judging.entries([f"{with_done.id}/nm", small, colour], runs)
    assert found[1].subject.data == found[0].subject.data and found[2].subject.data is None
    recipe = recipes.merge(other.recipe().model_dump(), {"data": {"limit": 20}})
    (other.folder / "recipe.yaml").write_text(recipes.build(recipe).to_yaml())
    found = judging.entries([f"{with_done.id}/nm", f"{other.id}/nm", small], runs)
    assert found[2].subject.data is None, "the runs disagree"
    recipe = recipes.merge(with_done.recipe().model_dump(), {"data": {"batch_size": 3}})
    (other.folder / "recipe.yaml").write_text(recipes.build(recipe).to_yaml())
    found = judging.entries([f"{with_done.id}/nm", f"{other.id}/nm", small], runs)
    assert found[2].subject.data == found[0].subject.data, "another batch size makes no other images"


def test_the_whiskers_of_the_latency_are_its_percentiles(with_done):
    app = open_page("compare", view="Latency")
    (chart,) = app.get("plotly_chart")
    (bars,) = json.loads(chart.proto.spec)["data"]
    figures = list(with_done.evaluation().values())
    middle, low, high = ([f[key] for f in figures] for key in ("latency_ms", "latency_ms_p10", "latency_ms_p90"))
    assert bars["y"] == middle and bars["error_y"]["symmetric"] is False
    assert [y + above for y, above in zip(middle, bars["error_y"]["array"])] == pytest.approx(high)
    assert [y - below for y, below in zip(middle, bars["error_y"]["arrayminus"])] == pytest.approx(low)
    assert all(a < b < c for a, b, c in zip(low, middle, high))
    assert compare_views._spread(comparison.Judged("of old", {"latency_ms": 2.0})) == (2.0, 2.0)


def test_the_reports_buttons_offer_what_is_compared(with_done, monkeypatch):
    """AppTest cannot press them: what they would be handed is looked at."""
    offered = {}

    def button(self, label, data, file_name, mime, **_):
        offered[file_name] = (data(), mime)

    monkeypatch.setattr(DeltaGenerator, "download_button", button)
    app = open_page("compare", models=f"{with_done.id}/dense,{with_done.id}/nm", view="Report")
    assert not app.error and {name: mime for name, (_, mime) in offered.items()} == {
        "comparison.html": "text/html", "comparison.csv": "text/csv", "comparison.md": "text/markdown",
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(offered["comparison.csv"][0])))
    assert [(row["run"], row["variant"]) for row in rows] == [(with_done.id, "dense"), (with_done.id, "nm")]
    page, text = offered["comparison.html"][0], offered["comparison.md"][0]
    assert page.startswith("<!doctype html>") and "cannot be shown" not in page
    for figures in (with_done.evaluation()[name] for name in ("dense", "nm")):
        shown = f"{figures['nonzero_parameters']:,}"
        assert shown in page and shown in text


# --- samples -----------------------------------------------------------------------------------------
def test_the_grid_draws_what_is_missing_of_every_kind(with_done, runs, user):
    one = imports.from_path(model(user / "one"), runs)
    keys = [f"{with_done.id}/dense", f"models/{one.name}", str(model(user / "two", 0.5))]
    app = open_page("compare", models=link(*keys))
    head, rows = grid(app)
    assert head == [compare_choice.short_names(keys)[key] for key in keys]
    assert [bool(alt) for alt, _ in rows[0]] == [True, False, False]
    click(app, "Draw what is missing")
    rest(app)
    _, rows = grid(app)
    assert all(alt for row in rows.values() for alt, _ in row) and list(rows) == list(range(8))
    again = open_page("compare", models=link(*keys))
    assert grid(again) == grid(app), "what was drawn lies on disk"
    assert "Draw what is missing" in labels(again), "the run's own sheet has 8 samples, the others' 64"
    click(again, "Draw what is missing")
    rest(again)
    assert "Draw 64 more seeds" in labels(again) and "Not drawn" not in said(again)


def test_a_drawn_folder_is_the_same_noise_as_the_runs_beside_it(with_done, runs, user):
    """A folder with the very weights of a run's dense model gives the very pictures of its sheet."""
    folder = shutil.copytree(with_done.variant("dense"), user / "twin")
    settings = with_done.recipe().eval
    path = seed_sheets.draw(str(folder), 0, runs, settings)
    assert path == seed_sheets.of_folder(subject.fingerprint(folder), settings).path(0)
    assert not list(folder.rglob("seeds-*")), "nothing is written into the user's folder"
    theirs, info = pictures.read_sheet(path)
    ours, _ = pictures.read_sheet(with_done.sheet("dense"))
    assert len(theirs) == 64 and all(a.tobytes() == b.tobytes() for a, b in zip(ours, theirs))
    assert (info["sampler"], info["steps"], info["start"]) == (settings.sampler, settings.steps, 0)
    more, _ = pictures.read_sheet(seed_sheets.draw(f"{with_done.id}/dense", 4, runs, Eval()))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(theirs[4:], more)), "seeds are numbered, sheets overlap"


def test_gaps_are_filled_sheet_by_sheet():
    picture = object()
    drawn = {"a": dict.fromkeys(range(130), picture), "b": dict.fromkeys(range(8), picture), "c": {}}
    assert compare_samples.missing(drawn, list(range(130))) == [(key, start) for key in "bc" for start in (0, 64, 128)]
    assert compare_samples.missing({"a": drawn["a"]}, [0, 129]) == []


def test_a_judged_sheet_is_shown_only_where_it_is_the_same_noise(with_done):
    sheet, settings = with_done.sheet("dense"), with_done.recipe().eval
    assert len(compare_samples.of_sheet(sheet, settings)) == 8
    for change in ({"steps": 3}, {"seed": 9}, {"sampler": "ddpm"}, {"eta": 0.5}):
        assert compare_samples.of_sheet(sheet, settings.model_copy(update=change)) == {}


def test_one_model_that_cannot_be_drawn_costs_the_others_nothing(with_done, user):
    bad, good = model(user / "bad"), model(user / "good")
    weights = bad / "unet" / unets.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    app = open_page("compare", models=link(f"{with_done.id}/dense", bad, good))
    click(app, "Draw what is missing")
    rest(app)
    _, rows = grid(app)
    assert [bool(alt) for alt, _ in rows[0]] == [True, False, True]
    assert len(app.error) == 1 and "bad:" in shown(app) and str(weights) in shown(app)


def test_drawing_refuses_a_variant_that_is_not_there(with_done, runs):
    with pytest.raises(ValueError, match=r"has the variants dense, structured, nm; name one of them"):
        seed_sheets.draw(f"{with_done.id}/mn", 0, runs, Eval())


def test_the_pareto_plots_tell_models_of_no_run_apart():
    key, found = str(Path("/a")), {}
    for name in ("/a", "/b"):
        found[name] = comparison.Judged(name, {"macs": 1, "fid": 1.0})
    assert [compare_views._group(name, found) for name in found] == [key, "/b"]


def test_each_pareto_plot_says_what_its_figures_hold_for(with_done):
    app = open_page("compare", view="Pareto")
    words = [c.value.replace("\\", "") for c in app.caption]
    figures = next(iter(store.Run(with_done.folder).evaluation().values()))
    timed = f"{figures['device']}"
    distances = [text for text in words if text.startswith(figures["fid_extractor"])]
    losses = [text for text in words if text.startswith("Validation loss:")]
    assert len(distances) == len(losses) == len(comparison.COSTS), words
    assert all(f"{figures['fid_images']} images" in text for text in distances)
    assert all("held-out images" in text for text in losses)
    assert sum(timed in text for text in distances) == 1, "the device is said where times are drawn"


def test_nothing_picked_says_what_to_do(with_done):
    app = open_page("compare")
    app.multiselect(key=PICK).set_value([]).run()
    assert "choose two models or more above" in shown(app)


def test_the_lines_on_the_bars_of_latency_are_said_to_be_percentiles(with_done):
    app = open_page("compare", view="Latency")
    figures = with_done.evaluation()["nm"]
    (chart,) = app.get("plotly_chart")
    assert "from the 10th to the 90th percentile" in said(app)
    assert f"percentile {figures['latency_ms_p10']:.3g} to {figures['latency_ms_p90']:.3g}" in str(chart.proto)
