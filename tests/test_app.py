"""Each page through Streamlit's AppTest: empty, done, running, failed, interrupted, unreadable."""

import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app import lab
from prunedm import pipeline, store
from prunedm import recipe as recipes
from prunedm.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("home", "launch", "monitor", "compare")


@pytest.fixture(scope="module")
def done_run(tmp_path_factory, micro):
    run = store.create(tmp_path_factory.mktemp("done"), micro())
    assert pipeline.execute(run) == "done"
    return run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEDM_RUNS", str(tmp_path))
    return tmp_path


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
    store.write_json(run.folder / "state.json", raw | {"pid_started": 1.0})
    return run


def unreadable(runs):
    run = in_state(runs, "done")
    (run.folder / "state.json").write_text("{")
    return run


STATES = {
    "running": lambda runs: in_state(runs, "running", stage="mask", step=3, of=10, rate=2.0, eta=3.5),
    "queued": lambda runs: in_state(runs, "queued"),
    "stopped": lambda runs: in_state(runs, "stopped", stage="mask", step=3, of=10),
    "interrupted": interrupted,
    "unreadable": unreadable,
}


def open_page(page, **query):
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    if page != "home":
        app.switch_page(f"../pages/{page}.py").run()
    assert not app.exception, app.exception
    return app


def said(app):
    kinds = ("markdown", "caption", "error", "warning", "info", "title", "subheader", "metric")
    texts = [str(e.value) + str(getattr(e, "label", "")) for kind in kinds for e in getattr(app, kind)]
    return "\n".join(texts)


@pytest.mark.parametrize("page", PAGES)
def test_each_page_opens_with_no_run_at_all(runs, page):
    assert open_page(page).title[0].value


def test_compare_is_never_empty(runs):
    text = said(open_page("compare"))
    assert "2,734,945" in text and "FD-fashion" in text


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("state", STATES)
def test_each_page_opens_with_a_run_in_each_state(runs, page, state):
    STATES[state](runs)
    open_page(page)


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
    assert [b.label for b in open_page("monitor").button] == ["Stop this run"]


def test_a_failure_is_told_in_plain_words_with_the_traceback_folded(runs):
    run = in_state(runs, "failed")
    state = run.state()
    state.error = "the disk is full; free some space and resume"
    run.write_state(state)
    run.log("Traceback (most recent call last): ...")
    app = open_page("monitor")
    assert "the disk is full; free some space and resume" in said(app)
    assert [e.label for e in app.expander if "traceback" in e.label.lower()]


@pytest.mark.parametrize("page", PAGES)
def test_each_page_opens_with_a_finished_run(with_done, page):
    text = said(open_page(page))
    if page == "compare":
        assert "weights are gone" in text
    if page == "home":
        assert with_done.id in text


def test_deep_links_choose_the_run(with_done, runs):
    STATES["interrupted"](runs)
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60).run()
    app.query_params["run"] = with_done.id
    app.switch_page("../pages/monitor.py").run()
    assert app.selectbox[0].value == with_done.id


def test_markup_in_a_query_is_shown_as_text(with_done):
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60).run()
    app.query_params["run"] = "<script>alert(1)</script>"
    app.switch_page("../pages/monitor.py").run()
    assert not app.exception and app.selectbox[0].value == with_done.id


def test_the_form_holds_each_field_of_the_recipe_and_gives_it_back(runs):
    from app import forms

    app = open_page("launch")
    expected = recipes.build(recipes.preset("smoke"))
    keys = {forms.key(path) for path in recipes.flatten(expected.model_dump())}
    drawn = [*app.text_input, *app.number_input, *app.selectbox, *app.toggle]
    assert {w.key for w in drawn} == keys
    shown = next(c.value for c in app.code if c.language == "yaml")
    assert recipes.build(recipes.parse(shown)) == expected


def test_the_form_predicts_and_prints_the_command(runs):
    app = open_page("launch")
    app.number_input(key="recipe.prune.target").set_value(0.6).run()
    assert not app.exception
    after = next(m for m in app.metric if m.label == "after stage 1")
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
    lab._jobs.clear()
    jobs = lab._jobs(runs)
    first, second = jobs.submit(micro(name="first")), jobs.submit(micro(name="second"))
    jobs.stop(second)
    assert second.state().status == "stopped" and jobs.position(second.id) is None
    wait(first, "done")
    jobs.resume(second)
    wait(second, "done")
    with pytest.raises(store.StoreError, match="cannot be resumed"):
        jobs.resume(second)
    lab._jobs.clear()


def test_a_running_job_stops_and_resumes_through_the_lab(runs, micro):
    lab._jobs.clear()
    jobs = lab._jobs(runs)
    run = jobs.submit(micro(mask={"steps": 60, "train_weights": True}))
    wait_for(lambda: any(r["stage"] == "mask" for r in run.metrics()))
    jobs.stop(run)
    wait(run, "stopped")
    jobs.resume(run)
    wait(run, "done")
    assert [r["step"] for r in run.metrics() if r["stage"] == "mask"] == list(range(1, 61))
    lab._jobs.clear()


def wait(run, status):
    wait_for(lambda: run.state().status == status)


def wait_for(condition, seconds=120):
    import time

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
