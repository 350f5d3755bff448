"""Each page through Streamlit's AppTest: empty, done, running, failed, interrupted, unreadable."""

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from apptest import components, said
from fake_runs import fake
from streamlit.testing.v1 import AppTest

from app import lab, mask_views, pace
from prunedm import learn, pictures, pipeline, seed_sheets, snapshots, store
from prunedm import recipe as recipes
from prunedm.failure import DISK_FULL
from prunedm.jobs import Jobs
from prunedm.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("home", "launch", "sweep", "monitor", "runs", "compare", "models", "system")


@pytest.fixture(scope="module")
def done_run(tmp_path_factory, micro):
    """A finished run with a budgeted allocation and an alert."""
    run = store.create(tmp_path_factory.mktemp("done"), micro(mask={"density": 0.4, "lr": 1e-9}))
    assert pipeline.execute(run) == "done"
    return run


@pytest.fixture
def with_done(runs, done_run):
    shutil.copytree(done_run.folder, runs / done_run.id)
    return store.Run(runs / done_run.id)


def in_state(runs, status, **changes):
    run = store.create(runs, Recipe(name=status))
    state = run.state()
    for key, value in changes.items():
        setattr(state, key, value)
    run.claim(state, status)
    return run


def interrupted(runs):
    run = in_state(runs, "running", stage="mask", step=3, of=10)
    raw = store.read_json(run.folder / "state.json")
    store.write_json(run.folder / "state.json", raw | {"began": 1.0})
    return run


def unreadable(runs):
    run = in_state(runs, "done")
    (run.folder / "state.json").write_text("{")
    return run


def failed(runs):
    run = store.create(runs, Recipe(name="failed"))
    run.end(run.state(), "failed", "the disk is full; free some space and resume")
    return run


STATES = {
    "running": lambda runs: in_state(runs, "running", stage="mask", step=3, of=10, rate=2.0, eta=3.5),
    "queued": lambda runs: in_state(runs, "queued"),
    "paused": lambda runs: in_state(runs, "paused", stage="finetune", step=3, of=10),
    "stopping": lambda runs: in_state(runs, "stopping", stage="evaluate", step=1, of=3),
    "stopped": lambda runs: in_state(runs, "stopped", stage="mask", step=3, of=10),
    "failed": failed,
    "interrupted": interrupted,
    "unreadable": unreadable,
}


# What is told as an error on purpose, and how it begins; any other is a section that could not be drawn.
TOLD = {("monitor", "failed"): "**Why it failed:**", ("monitor", "unreadable"): "This run cannot be read:"}


def open_page(page, **query):
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    if page != "home":
        app.switch_page(f"../pages/{page}.py").run()
    assert not app.exception, app.exception
    return app


@pytest.mark.parametrize("page", PAGES)
def test_each_page_opens_with_no_run_at_all(runs, page):
    app = open_page(page)
    assert app.title[0].value and not app.error


def test_a_fresh_server_has_read_the_recipes_of_its_runs_before_a_list_asks(runs, monkeypatch):
    fake(runs, "ahead")
    monkeypatch.setattr(Jobs, "warm_up", lambda self, *first: [call() for call in first])
    lab.jobs()
    monkeypatch.setattr(store.Run, "recipe", lambda self: pytest.fail("the recipe is read again"))
    (card,) = lab.cards()
    assert card.recipe is not None


def test_compare_is_never_empty(runs):
    text = said(open_page("compare"))
    assert "2,734,945" in text and "FD-fashion" in text


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("state", STATES)
def test_each_page_opens_with_a_run_in_each_state(runs, page, state):
    STATES[state](runs)
    errors = [error.value for error in open_page(page).error]
    if (page, state) in TOLD:
        assert len(errors) == 1 and errors[0].startswith(TOLD[page, state])
    else:
        assert errors == []


@pytest.mark.parametrize("page", PAGES)
def test_each_page_opens_with_many_runs_of_every_state(runs, with_done, page):
    for number in range(3):
        for state in STATES.values():
            state(runs)
        shutil.copytree(with_done.folder, runs / f"{with_done.id}-{number}")
    app = open_page(page)
    on_purpose = tuple(words for (where, _), words in TOLD.items() if where == page)
    assert [error.value for error in app.error if not error.value.startswith(on_purpose)] == []
    if page == "runs":
        assert len(app.dataframe[0].value) == 3 * (len(STATES) + 1) + 1


@pytest.mark.parametrize("state", STATES)
def test_monitor_says_the_state_in_words(runs, state):
    STATES[state](runs)
    app = open_page("monitor")
    word = "cannot be read" if state == "unreadable" else state
    assert word in said(app)


def test_monitor_offers_what_the_state_allows(runs):
    interrupted(runs)
    assert [b.label for b in open_page("monitor").button] == ["Resume"]
    shutil.rmtree(runs)
    STATES["running"](runs)
    assert [b.label for b in open_page("monitor").button] == ["Pause", "Stop this run"]


def test_a_failure_is_told_in_plain_words_with_the_traceback_folded(runs):
    run = in_state(runs, "failed")
    state = run.state()
    state.error = "the disk is full; free some space and resume"
    run.write_state(state)
    run.log("Traceback (most recent call last): ...")
    app = open_page("monitor")
    assert "the disk is full; free some space and resume" in said(app)
    assert [e.label for e in app.expander if "traceback" in e.label.lower()]


def test_an_interruption_is_told_with_the_way_on(runs):
    interrupted(runs)
    app = open_page("monitor")
    assert "Resume goes on from its checkpoint" in said(app) and "Resume" in [b.label for b in app.button]


def test_what_cannot_be_read_is_told_without_the_servers_paths(runs):
    run = unreadable(runs)
    for page in ("home", "monitor"):
        text = said(open_page(page, run=run.id)).replace("\\", "")
        assert "state.json cannot be read" in text and str(runs) not in text.replace(f"kept: {runs}", ""), page


def test_a_failure_that_the_recipe_can_mend_is_offered_as_a_filled_form(runs):
    run = store.create(runs, recipes.build(recipes.merge(recipes.preset("smoke"), {"seed": 5})))
    run.end(run.state(), "failed", "out of memory; halve data.batch_size", {"data.batch_size": 7})
    app = open_page("monitor")
    button = next(b for b in app.button if b.label == "Try again with data.batch_size = 7")
    button.click().run()
    app.switch_page("../pages/launch.py").run()  # AppTest does not follow the link itself
    assert not app.exception
    assert app.number_input(key="recipe.data.batch_size").value == 7 and app.number_input(key="recipe.seed").value == 5
    assert [r.id for r in store.all_runs(runs)] == [run.id], "nothing starts yet"


@pytest.mark.parametrize("error", ["FileNotFoundError: data/images is gone", DISK_FULL])
def test_a_failure_that_no_value_mends_has_its_ways_on(runs, error):
    """Resume, the recipe to change, and where to make room when that is what it takes."""
    run = store.create(runs, recipes.build(recipes.merge(recipes.preset("smoke"), {"seed": 5})))
    run.end(run.state(), "failed", error)
    app = open_page("monitor")
    offered = [b.label for b in app.button]
    assert "Resume" in offered and ("Free some space in Runs" in offered) == (error == DISK_FULL)
    next(b for b in app.button if b.label == "Change the recipe in Launch").click().run()
    app.switch_page("../pages/launch.py").run()
    assert not app.exception and app.number_input(key="recipe.seed").value == 5


def test_home_says_what_to_do_next(runs, with_done):
    finished = ["See what it cost", "Take it with you", "Try many settings"]
    assert suggestions() == finished
    STATES["interrupted"](runs)
    assert suggestions() == ["Bring it to its end", *finished[:2]]
    STATES["running"](runs)
    assert suggestions() == ["Watch it work", "Bring it to its end", finished[0]]


def test_home_suggests_nothing_but_the_demo_before_the_first_run(runs):
    assert suggestions() == []


def suggestions():
    app = open_page("home")
    assert {m.label for m in app.metric} >= {"Memory free", "GPU", "Disk free"}
    words = [m.value.strip("*") for m in app.markdown if m.value.startswith("**")]
    return [w for w in words if w.split()[0] in ("Watch", "Bring", "See", "Take", "Try")]


@pytest.mark.parametrize("page", PAGES)
def test_each_page_opens_with_a_finished_run(with_done, page):
    app = open_page(page)
    text = said(app)
    assert not app.error
    if page == "compare":
        assert "weights are gone" in text
    if page == "home":
        assert with_done.id in text


def test_deep_links_choose_the_run(with_done, runs):
    STATES["interrupted"](runs)
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60).run()
    app.query_params["run"] = with_done.id
    app.switch_page("../pages/monitor.py").run()
    assert app.selectbox[0].value == with_done.id


def test_a_query_is_never_rendered_as_markup(with_done):
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60).run()
    app.query_params["run"] = "![x](http://example.invalid/p.png)"
    app.switch_page("../pages/monitor.py").run()
    assert app.warning and not re.search(r"(?<!\\)[!\[<]", app.warning[0].value)


def test_the_form_holds_each_field_of_the_recipe_and_gives_it_back(runs, open_folds):
    from app import forms

    app = open_folds(open_page("launch"), *forms.FOLDED)
    expected = recipes.build(recipes.preset("smoke"))
    keys = {forms.key(path) for path in recipes.flatten(expected.model_dump())}
    drawn = [*app.text_input, *app.number_input, *app.selectbox, *app.toggle]
    assert {w.key for w in drawn} == keys
    assert [w.key for w in drawn if len((w.help or "").split()) < 2] == [], "each is explained in plain words"
    shown = next(c.value for c in app.code if c.language == "yaml")
    assert recipes.build(recipes.parse(shown)) == expected


def test_a_closed_fold_keeps_what_it_holds_and_takes_what_fills_the_form(runs, open_folds):
    def shown():
        return recipes.build(recipes.parse(next(c.value for c in app.code if c.language == "yaml")))

    app = open_folds(open_page("launch"), "mask")
    app.text_input(key="recipe.mask.tau_end").set_value("0.2").run()
    app.text_input(key="recipe.mask.snapshot_every").set_value("7").run()
    assert (shown().mask.tau_end, shown().mask.snapshot_every) == (0.2, 7)
    open_folds(app, "mask", is_open=False)
    app.number_input(key="recipe.seed").set_value(5).run()
    app.switch_page("../pages/home.py").run()
    app.switch_page("../pages/launch.py").run()
    assert "recipe.mask.tau_end" not in {w.key for w in app.text_input}
    assert (shown().mask.tau_end, shown().mask.snapshot_every, shown().seed) == (0.2, 7, 5)
    next(b for b in app.button if b.label == "Smoke").click().run()
    assert shown() == recipes.build(recipes.preset("smoke"))
    assert open_folds(app, "mask").text_input(key="recipe.mask.tau_end").value == ""


def test_the_form_predicts_and_prints_the_command(runs):
    app = open_page("launch")
    app.number_input(key="recipe.prune.target").set_value(0.6).run()
    assert not app.exception
    after = next(m for m in app.metric if m.label == "After stage 1")
    assert abs(1 - int(after.value.replace(",", "")) / 2_734_945 - 0.6) < 0.02
    command = next(c.value for c in app.code if c.language == "bash")
    assert "--set prune.target=0.6" in command


def test_the_printed_command_is_the_same_recipe():
    import shlex

    from app import forms

    recipe = recipes.resolve(preset_name="quality", assignments=["mask.train_weights=true", "mask.lr=1e-2", "seed=3"])
    words = shlex.split(forms.command_line(recipe, Path("runs")))
    name = words[words.index("--name") + 1]
    assignments = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert recipes.resolve(assignments=assignments, name=name) == recipe


def test_patterns_of_single_layers_are_typed_as_yaml(runs, open_folds):
    app = open_folds(open_page("launch"), "mask")
    app.text_input(key="recipe.mask.layers").set_value("[{match: mid_block.*, pattern: '1:4'}]").run()
    shown = recipes.build(recipes.parse(next(c.value for c in app.code if c.language == "yaml")))
    assert [(la.match, la.pattern) for la in shown.mask.layers] == [("mid_block.*", "1:4")]
    assert "masks" in next(e.label for e in app.expander if e.label.startswith("Layers:"))
    for text, fault in (("[{match: nothing, pattern: '1:4'}]", "matches no layer"), ("4:2", "mask.layers")):
        app.text_input(key="recipe.mask.layers").set_value(text).run()
        assert not app.exception and fault in said(app) and "Start" not in [b.label for b in app.button]


def test_monitor_shows_alerts_the_baseline_and_the_allocation(with_done):
    app = open_page("monitor", tab="Compliance")
    text = said(app)
    assert "No movement" in text and "raise mask.lr" in text
    assert "Which 2 of 4 positions are kept" in text, "in the patterns that the budget chose"
    assert "What the initial mask costs" in text and "Patterns chosen for the budget" in text
    app = open_page("monitor", tab="Masks")
    for figure in mask_views.FIGURES:
        app.selectbox(key="mask_figure").set_value(figure).run()
        assert not app.exception and not app.error


def test_every_heatmap_of_the_masks_has_its_table(with_done):
    """What a chart shows in colours stands in a table below it, with the same figures."""
    tables = [frame.value for frame in open_page("monitor", tab="Compliance").dataframe]
    layers = {la["layer"]: la for la in with_done.layers()}
    sets = [frame for frame in tables if "1100" in frame]
    for _, row in (pair for frame in sets for pair in frame.iterrows()):
        assert row.drop("layer").tolist() == layers[row["layer"]]["pattern_shares"]
    assert sum(map(len, sets)) == sum(la["pattern"] == "2:4" for la in layers.values() if la["pattern_shares"])
    app = open_page("monitor", tab="Masks")
    masks = [frame.value for frame in app.dataframe]
    shown = app.selectbox(key="mask_layer").value
    (first,) = (layer for layer in snapshots.masked_layers(with_done) if layer["layer"] == shown)
    last, initial = with_done.mask_snapshots()[-1], with_done.mask_snapshots()[0]
    assert (masks[0].to_numpy() == mask_views.kept(last, first).round(3)).all()
    assert (masks[1].to_numpy() == mask_views.changed(last, initial, first).round(3)).all()
    figures, record = masks[2], lab.lines(with_done, store.MASK_LAYERS)[-1]
    at = {layer["layer"]: i for i, layer in enumerate(snapshots.masked_layers(with_done))}
    expected = [record[app.selectbox(key="mask_figure").value][at[name]] for name in figures["layer"]]
    assert figures[f"step {record['step']}"].tolist() == expected, "a row is its layer's, in whatever order they stand"


@pytest.mark.parametrize("tab", ["Curves", "Masks", "Compliance", "Samples", "Log", "Recipe", "System"])
def test_each_tab_of_monitor_shows_a_finished_run(with_done, tab):
    app = open_page("monitor", tab=tab)
    assert not app.error and not app.exception


def test_monitor_duplicates_the_run_that_it_shows(with_done):
    app = open_page("monitor", tab="Recipe")
    next(b for b in app.button if b.label == "Duplicate into Launch").click().run()
    app.switch_page("../pages/launch.py").run()  # AppTest does not follow the link itself
    assert not app.exception
    shown = next(c.value for c in app.code if c.language == "yaml")
    assert recipes.build(recipes.parse(shown)) == with_done.recipe()


def test_every_sheet_of_a_run_carries_its_recipe(with_done, runs):
    drawn = seed_sheets.draw(f"{with_done.id}/nm", 0, runs, recipes.Eval())
    sheets = [drawn, *with_done.samples(), *(with_done.sheet(name) for name in with_done.variants())]
    for path in sheets:
        _, info = pictures.read_sheet(path)
        assert recipes.build(recipes.parse(info["recipe"])) == with_done.recipe(), path.name
    assert len(sheets) >= 6


def test_the_place_in_monitor_is_kept_over_runs_and_pages(with_done, runs):
    other = runs / f"{with_done.id}-2"
    shutil.copytree(with_done.folder, other)
    app = open_page("monitor", run=with_done.id, tab="Masks")
    layer = app.selectbox(key="mask_layer").options[3]
    app.selectbox(key="mask_layer").set_value(layer).run()
    app.selectbox(key="run_pick").set_value(other.name).run()
    assert app.selectbox(key="mask_layer").value == layer, "another run, the same tab and layer"
    app.switch_page("../pages/runs.py").run()
    app.query_params.clear()
    app.switch_page("../pages/monitor.py").run()
    assert app.selectbox(key="mask_layer").value == layer, "and after a look at another page"


def test_curves_are_drawn_over_time_smoothed_and_as_recorded(with_done):
    app = open_page("monitor")
    app.segmented_control(key="curve_axis").set_value("Time").run()
    app.slider(key="curve_smoothing").set_value(0.0).run()
    app.toggle(key="log_loss").set_value(True).run()
    assert not app.exception and not app.error


def test_validation_losses_on_the_way_are_drawn_on_monitor_and_compare(runs):
    run = fake(runs, "validated", steps={"finetune": 10})
    losses = [{"validation_loss": 0.5 / step} if step % 5 == 0 else {} for step in range(1, 21)]
    lines = [{"stage": "mask", "step": i, "time": float(i), "loss": 0.1, **one} for i, one in enumerate(losses, 1)]
    run.append("metrics.jsonl", lines)
    monitor, compare = open_page("monitor", run=run.id), open_page("compare", view="Curves")
    compare.selectbox(key="compare_figure").set_value("validation_loss").run()
    for app in (monitor, compare):
        drawn = [data["content"] for name, data in components(app) if name == "prunedm_live_plot"]
        (found,) = [each for each in drawn if each["alt"].casefold().startswith("validation loss on the way")]
        (trace,) = json.loads(found["figure"])["data"]
        assert trace["x"] == [15, 20, 25, 30] and trace["mode"] == "lines+markers"


def test_a_bad_value_in_the_form_is_said_and_offers_no_start(runs):
    app = open_page("launch")
    app.number_input(key="recipe.mask.n").set_value(4).run()
    assert not app.exception and "must be less than m=4" in said(app)
    assert "Start" not in [b.label for b in app.button]


def test_presets_fill_the_form(runs):
    app = open_page("launch")
    next(b for b in app.button if b.label == "Quality").click().run()
    assert app.number_input(key="recipe.mask.steps").value == recipes.build(recipes.preset("quality")).mask.steps


def test_start_queues_a_run_that_ends_done_and_stop_takes_one_out_of_the_queue(runs, micro):
    jobs = lab.jobs()
    first, second = jobs.submit(micro(name="first")), jobs.submit(micro(name="second"))
    jobs.stop(second)
    assert second.state().status == "stopped" and jobs.position(second.id) is None
    wait(first, "done")
    jobs.resume(second)
    wait(second, "done")
    with pytest.raises(store.StoreError, match="cannot be resumed"):
        jobs.resume(second)


def test_a_running_job_stops_and_resumes_through_the_lab(runs, micro, monkeypatch):
    """The mask stage waits at its third step until the stop has been asked for, as a slow one would."""
    jobs, step, reached, asked = lab.jobs(), learn.GumbelMasks.step, threading.Event(), threading.Event()

    def slow(self, task, batch, number, weights):
        if number == 3:
            reached.set()
            assert asked.wait(120)
        return step(self, task, batch, number, weights)

    monkeypatch.setattr(learn.GumbelMasks, "step", slow)
    run = jobs.submit(micro())
    assert reached.wait(120)
    jobs.stop(run)
    assert run.state().status == "stopping"
    asked.set()
    wait(run, "stopped")
    assert run.state().stage == "mask"
    jobs.resume(run)
    wait(run, "done")
    assert [r["step"] for r in run.metrics() if r["stage"] == "mask"] == list(range(1, 7))


def test_the_queue_goes_on_after_a_run_that_cannot_even_start(runs, micro):
    jobs = lab.jobs()
    bad = store.create(runs, micro(name="bad"))
    (bad.folder / "recipe.yaml").write_text("mask: {n: 9}")
    jobs.put(bad)
    good = jobs.submit(micro(name="good"))
    wait(good, "done")
    state = bad.state()
    assert state.status == "failed" and "must be less than m" in state.error


def test_a_job_that_dies_of_a_full_disk_is_failed_and_resumes(runs, micro, monkeypatch):
    append = store.Run.append

    def full(self, name, records):
        raise OSError(28, "No space left on device")

    jobs = lab.jobs()
    monkeypatch.setattr(store.Run, "append", full)
    run = jobs.submit(micro())
    wait(run, "failed")
    assert "disk is full" in run.state().error
    monkeypatch.setattr(store.Run, "append", append)
    jobs.resume(run)
    wait(run, "done")


def test_the_run_picker_can_be_used_twice(with_done, runs):
    interrupted(runs)
    STATES["stopped"](runs)
    app = open_page("monitor")
    ids = app.selectbox(key="run_pick").options
    for index in (1, 2, 0, 1):
        app.selectbox(key="run_pick").select_index(index).run()
        assert not app.exception
        chosen = app.selectbox(key="run_pick").value
        assert ids[index].startswith(chosen) and chosen in app.query_params["run"]


@pytest.mark.parametrize("remedy", [{"train.lr": "abc"}, {"train.rate": 1}, {"seed": True}, [1], "lower it"])
def test_a_remedy_that_is_none_breaks_nothing(runs, remedy):
    run = store.create(runs, recipes.build(recipes.preset("smoke")))
    run.end(run.state(), "failed", "it went wrong", remedy)
    app = open_page("monitor")
    assert not app.exception and "it went wrong" in said(app) and len(app.error) == 1
    assert not [b.label for b in app.button if b.label.startswith("Try again")] and "Resume" in said_buttons(app)


def said_buttons(app):
    return [b.label for b in app.button]


@pytest.mark.in_turn(4)
@pytest.mark.parametrize(
    "name",
    [
        "evaluation.json",
        "layers.json",
        "recipe.yaml",
        "state.json",
        "metrics.jsonl",
        "events.jsonl",
        "mask-layers.jsonl",
        "allocation.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"[1]", b'{"schema": "x"}', b'{"a": {"b": 1}}'])
def test_a_damaged_file_breaks_no_page(with_done, runs, name, content):
    (with_done.folder / name).write_bytes(content)
    for page in ("home", "monitor", "compare"):
        open_page(page)


@pytest.mark.parametrize("kind", ["masks", "samples"])
def test_damaged_pictures_break_no_page(with_done, kind):
    for path in (with_done.folder / kind).iterdir():
        path.write_bytes(b"torn")
    app = open_page("monitor", tab=kind.capitalize())
    assert app.error, "it is said"


def wait(run, status):
    wait_for(lambda: run.state().status == status)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_reinforce_run_draws_the_tracker_of_each_timestep_bin(runs, micro):
    from prunedm import charts
    from prunedm.diffusion import TIMESTEP_BINS
    from prunedm.steps import Steps

    run = store.create(runs, micro(mask={"method": "reinforce", "steps": 4}, prune={"target": 0}, eval={"images": 2}))
    assert pipeline.execute(run) == "done"
    figure = charts.tracker_by_bin(Steps.of(run.metrics()), 1000, run.id)
    assert len(figure["data"]) == TIMESTEP_BINS
    recorded = [r for r in run.metrics() if r["stage"] == "mask"]
    for b, trace in enumerate(figure["data"]):
        assert trace["x"] == [1, 2, 3, 4] and trace["y"] == [r[f"tracker.{b}"] for r in recorded]
    assert not open_page("monitor", run=run.id, tab="Masks").error


# --- how often live parts are drawn
@pytest.fixture
def tab(monkeypatch):
    """Makes a tab; an update in it gives the seconds to the next."""
    clock = [0.0]
    monkeypatch.setattr(pace, "_watchers", {})
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])

    def update(name, after=0.0):
        clock[0] += after
        return pace.every(1.0, name)

    return update


def test_updates_are_rarer_the_more_tabs_share_few_processors_with_training(tab, monkeypatch):
    monkeypatch.setattr(pace.os, "cpu_count", lambda: 2)
    found = [tab(str(number)) for number in range(20)]
    assert found == sorted(found) and 1 < found[0] < 2 and found[0] < found[1] and found[-1] == pace.SLOWEST
    monkeypatch.setattr(pace.os, "cpu_count", lambda: 128)
    assert tab("0") == 1.0, "as often as UX asks where there is room"


def test_a_tab_that_was_closed_counts_no_longer(tab, monkeypatch):
    monkeypatch.setattr(pace.os, "cpu_count", lambda: 2)
    alone = tab("a")
    assert tab("b", 1) > alone and tab("a", 1) > alone
    assert tab("a", pace.WATCHES) == alone


def test_another_number_of_tabs_changes_the_pace_of_an_open_page(runs, monkeypatch):
    run = store.create(runs, Recipe())
    run.claim(run.state(), "running")
    monkeypatch.setattr(pace.os, "cpu_count", lambda: 2)
    asked = []
    monkeypatch.setattr("streamlit.fragment", noted(asked))
    app = open_page("monitor", run=run.id, tab="Log")
    alone = asked[-1]
    pace._watchers |= dict.fromkeys("xyz", time.monotonic())
    app.run()
    assert not app.exception and asked[-1] > alone


def test_what_polls_while_a_job_works_goes_at_the_tabs_pace():
    """Only what waits for a look at the machine, not training, asks at an interval of its own."""
    asked = {}
    for path in [*(ROOT / "app").glob("*.py"), *(ROOT / "pages").glob("*.py")]:
        for interval in re.findall(r"run_every=(.*)\)\n", path.read_text()):
            if not interval.startswith(("pace.every(", "paced")):
                asked[path.name] = interval
    assert asked == {"system.py": "1.0 if waiting else None"}


def noted(asked):
    """st.fragment that tells what it is asked for."""

    def fragment(run_every=None):
        asked.append(run_every)
        return lambda draw: draw

    return fragment


@pytest.mark.parametrize("status", ["running", "done"])
def test_an_alert_that_is_damaged_is_said_and_leaves_the_rest_of_the_page(runs, status):
    run = store.create(runs, Recipe())
    run.claim(run.state(), status) if status == "running" else run.end(run.state(), status, None)
    run.event("alert", step=3)
    app = open_page("monitor", run=run.id)
    assert any("what" in error.value for error in app.error) and len(app.tabs) == 7
