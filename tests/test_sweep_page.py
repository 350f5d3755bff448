"""The Sweep page through AppTest: no sweep, the form and its faults, at work, done, stopped and gone on with, damaged.

Trials are executed by a stand-in that writes what a run leaves; the study, its worker and its thread are real.
"""

import dataclasses
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app import lab, sweep_charts, sweeps
from prunedm import charts, store, sweep, sweep_spec, sweep_worker
from prunedm.jobs import Jobs
from prunedm.recipe import Recipe
from prunedm.records import Step

ROOT = Path(__file__).resolve().parent.parent

RANGES = {"prune.target": {"low": 0.3, "high": 0.6}, "mask.method": ["gumbel", "magnitude"]}
STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # trials that are asked for by hand
WORDS = ("markdown", "caption", "error", "warning", "info", "title", "subheader")


class Fake:
    """Executes a run in ``seconds``: five steps of fine-tuning, then figures. ``hold`` keeps it at its first step."""

    def __init__(self, seconds=0.0, fails=False):
        self.seconds, self.fails, self.runs = seconds, fails, []
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, run, on_step=lambda step: None, stop=lambda: False):
        self.runs.append(run.id)
        state, recipe = run.state(), run.recipe()
        state.stage, state.of = "finetune", STEPS
        run.claim(state, "running")
        for i in range(len(run.metrics()) + 1, STEPS + 1):
            time.sleep(self.seconds / STEPS)
            while not (self.hold.is_set() or stop() or run.stop_requested()):
                time.sleep(0.02)
            run.append("metrics.jsonl", [{"stage": "finetune", "step": i, "time": 0.0, "loss": 0.1}])
            on_step(Step("finetune", i, STEPS, {"loss": 0.1}))
            if stop() or run.stop_requested():
                run.end(state, "stopped", None)
                return "stopped"
        if self.fails:
            run.end(state, "failed", "the disk is full; free some space")
            return "failed"
        run.write_evaluation({"nm": figures(recipe)})
        run.end(state, "done", None)
        return "done"


def figures(recipe):
    keep = 1 - recipe.prune.target
    loss = 0.04 + recipe.prune.target**3 * 0.02 + (0.003 if recipe.mask.method == "magnitude" else 0)
    count = {"parameters": 9, "nonzero_parameters": 9, "macs": 9, "bytes": 9, "fid": 10 * loss, "fid_std": 0.1}
    extractor = {"fid_extractor": "FD-fashion", "fid_images": 128, "latency_ms": 7 * keep, "device": "cpu"}
    extractor |= {"latency_ms_p10": 6 * keep, "latency_ms_p90": 8 * keep, "dtype": "float32", "batch": 8}
    return count | extractor | {"validation_loss": loss, "sizes": {"packed_fp16": int(5_480_000 * keep)}}


def spec(**changes):
    base = {"name": "mine", "recipe": "smoke", "ranges": RANGES, "trials": 3, "sampler": "random"}
    return sweep_spec.build(base | changes)


def swept(runs_dir, execute=None, **changes):
    """A finished sweep."""
    study = sweep.start(spec(**changes), runs_dir)
    sweep_worker.Worker(study, runs_dir, execute=execute or Fake(), poll=0.05).run()
    return study


def clear():
    for cached in (lab._jobs, sweeps._sweeps, sweeps._study, sweeps._importances):
        cached.clear()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty runs folder, no background import."""
    monkeypatch.setenv("PRUNEDM_RUNS", str(tmp_path))
    monkeypatch.setattr(Jobs, "warm_up", lambda self, *first: None)
    clear()
    yield tmp_path
    clear()


@pytest.fixture
def fake(runs, monkeypatch):
    """What executes the trials that the page starts."""
    one = Fake()
    monkeypatch.setattr(sweeps, "through", lambda jobs: one)
    yield one
    one.hold.set()
    for thread in threading.enumerate():
        if thread.name.startswith("prunedm-sweep-"):
            thread.join(30)


def open_page(page="sweep", **query):
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.run().switch_page(f"../pages/{page}.py").run()
    return sound(app)


def sound(app):
    assert not app.exception, app.exception
    return app


def said(app):
    texts = [str(one.value) for kind in WORDS for one in getattr(app, kind)]
    return "\n".join(texts + [one.label for one in app.button]).replace("\\", "")


def button(app, label):
    return next(one for one in app.button if one.label == label)


def example(app):
    return sound(button(app, "Fill in an example").click().run())


def new_sweep(app):
    app.session_state["sweep.view"] = "New sweep"
    return sound(app.run())


def until(app, condition, seconds=180):
    """Draw the page again until it says so."""
    deadline = time.monotonic() + seconds
    while not condition(app):
        assert time.monotonic() < deadline, said(app)
        time.sleep(0.1)
        sound(app.run())
    return app


def status(app):
    return re.findall(r"[▶◼✔✖] (\w+)\]", said(app))


# --- no sweep ----------------------------------------------------------------------------------
def test_without_a_sweep_the_page_says_what_one_is_and_fills_in_an_example(runs):
    app = open_page()
    assert "A sweep tries one recipe" in said(app) and "Add a range" in said(app)
    assert "Start the sweep" not in said(app)
    app = example(app)
    assert "Start the sweep" in said(app) and not app.error
    assert app.text_input(key="sweep.form.1.low").value == "0.3"
    assert app.multiselect(key="sweep.form.2.options").value == ["gumbel", "magnitude"]
    found = sweep_spec.build(sweep_spec.strict_yaml.load(app.code[0].value))
    assert found.trials == 6 and found.ranges["prune.target"].high == 0.6
    assert "python -m prunedm sweep example.yaml" in app.code[1].value


# --- the form ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("widget", "value", "line"),
    [
        ("1.low", "0.9", "low=0.9 must be less than high=0.6"),
        ("1.low", "", "needs low and high, or a list of values"),
        ("1.high", "1.5", "1.5 is not accepted"),
        ("1.low", "[", "must be a number"),
        ("name", "a/b", "name='a/b': must be 1 to 32 letters"),
        ("2.options", ["gumbel"], "at least 2 items"),
        ("pruner", "median", "pruner=median needs one objective"),
        ("sampler", "grid", "sampler=grid needs the values of ranges.prune.target"),
        ("2.field", "prune.target", "prune.target stands twice; remove one"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_can_be_started(runs, widget, value, line):
    app = example(open_page())
    next(one for one in found_widgets(app) if one.key == f"sweep.form.{widget}").set_value(value)
    app = sound(app.run())
    assert [line in one.value.replace("\\", "") and "\n" not in one.value for one in app.error] == [True]
    assert "Start the sweep" not in said(app)


def found_widgets(app):
    return [*app.text_input, *app.selectbox, *app.multiselect, *app.number_input]


def test_rows_are_added_filled_in_and_removed(runs):
    app = example(open_page())
    app = sound(button(app, "Add a range").click().run())
    app = sound(app.selectbox(key="sweep.form.3.field").set_value("train.lr").run())
    app.text_input(key="sweep.form.3.low").set_value("1e-4")
    app.text_input(key="sweep.form.3.high").set_value("1e-2")
    app.checkbox(key="sweep.form.3.log").set_value(True)
    app = sound(app.run())
    assert not app.error and "The recipe has 0.001" in said(app)
    assert "train.lr:\n    low: 0.0001\n    high: 0.01\n    log: true" in app.code[0].value
    app = sound(app.selectbox(key="sweep.form.1.how").set_value("these values").run())
    app = sound(app.text_input(key="sweep.form.1.values").set_value("0.3, 0.5").run())
    assert "prune.target:\n  - 0.3\n  - 0.5" in app.code[0].value
    app = sound(app.button(key="sweep.form.3.remove").click().run())
    assert not app.error and "train.lr" not in app.code[0].value.partition("ranges:")[2]


def test_every_field_of_the_recipe_can_be_chosen(runs):
    app = example(open_page())
    names = app.selectbox(key="sweep.form.1.field").options
    assert len(names) > 50 and "name" not in names
    for name in names:
        app = sound(app.selectbox(key="sweep.form.1.field").set_value(name).run())


def test_the_recipe_may_be_the_one_on_launch_or_typed(runs):
    app = example(open_page())
    sound(app.switch_page("../pages/launch.py").run(timeout=120))
    app.number_input(key="recipe.mask.steps").set_value(77).run(timeout=120)
    app = sound(app.switch_page("../pages/sweep.py").run())
    assert app.text_input(key="sweep.form.1.low").value == "0.3"  # the form is as it was left
    app = sound(app.selectbox(key="sweep.base").set_value("the recipe on Launch").run())
    assert not app.error and "steps: 77" in app.code[0].value
    app = sound(app.selectbox(key="sweep.base").set_value("YAML").run())
    app = sound(app.text_area(key="sweep.base_text").set_value("mask: {steps: 66}").run())
    assert "steps: 66" in app.code[0].value
    app = sound(app.text_area(key="sweep.base_text").set_value("mask: {n: 9}").run())
    assert [one.value for one in app.error if "n=9" in one.value.replace("\\", "")]


def test_the_first_trials_are_shown_before_anything_runs(runs):
    app = example(open_page())
    app = sound(app.toggle(key="sweep.form.preview").set_value(True).run())
    table = app.dataframe[0].value
    assert len(table) == 5 and set(table["recipe"]) == {"valid"}
    assert not (runs / "sweeps").exists()


def test_a_file_of_a_sweep_fills_the_form_in(runs):
    app = example(open_page())
    text = spec(ranges=RANGES | {"mask.density": [0.4, None]}, recipe={"mask": {"steps": 7}}).to_yaml()
    upload = app.file_uploader(key="sweep.form.upload")
    app = sound(upload.upload("mine.yaml", text.encode(), "application/yaml").run())
    assert app.text_input(key="sweep.form.name").value == "mine"
    assert sweep_spec.build(sweep_spec.strict_yaml.load(app.code[0].value)) == sweep_spec.build(
        sweep_spec.strict_yaml.load(text)
    )
    app = sound(app.file_uploader(key="sweep.form.upload").upload("b.yaml", b"ranges: 5", "text/yaml").run())
    assert len(app.error) == 1 and "\n" not in app.error[0].value


def test_a_file_keeps_every_digit_of_its_ranges(runs):
    exact = {
        "prune.target": {"low": 0.1234567, "high": 0.6},
        "mask.steps": {"low": 65536, "high": 1048576, "step": 65536},
        "train.lr": {"low": 1.2345678e-05, "high": 0.01, "log": True},
    }
    text = spec(ranges=exact).to_yaml()
    app = open_page()
    upload = app.file_uploader(key="sweep.form.upload")
    app = sound(upload.upload("mine.yaml", text.encode(), "application/yaml").run())
    assert not app.error
    found = sweep_spec.build(sweep_spec.strict_yaml.load(app.code[0].value))
    assert found == sweep_spec.build(sweep_spec.strict_yaml.load(text))


def test_another_field_forgets_what_was_meant_for_the_one_before(runs):
    app = example(open_page())
    app.checkbox(key="sweep.form.1.log").set_value(True).run()
    app = sound(app.selectbox(key="sweep.form.1.field").set_value("train.lr").run())
    assert not app.checkbox(key="sweep.form.1.log").value and app.text_input(key="sweep.form.1.low").value == ""


# --- at work, done, stopped --------------------------------------------------------------------
def test_a_sweep_is_started_watched_stopped_and_gone_on_with(runs, fake):
    fake.hold.clear()
    app = example(open_page())
    app = sound(button(app, "Start the sweep").click().run())
    assert status(app) == ["running"] and app.query_params["sweep"] == "example"
    app = until(app, lambda a: any("in Monitor" in str(one.proto) for one in a.get("page_link")))
    assert "Nothing to draw until a trial is complete" in said(app)
    assert [task.error for task in sweeps.sweeps()._tasks.values()] == [""]
    with pytest.raises(ValueError, match="is at work"):
        sweeps.sweeps().start(spec(name="example"), lab.jobs())
    app = sound(button(app, "Stop this sweep").click().run())
    app = until(app, lambda a: status(a) == ["stopped"])
    assert app.dataframe[0].value["state"].tolist() == ["⚡ interrupted"]
    fake.hold.set()
    app = sound(button(app, "Go on").click().run())
    app = until(app, lambda a: status(a) == ["done"])
    assert len(app.dataframe[0].value) == 6 and len(set(fake.runs)) == 6 and len(fake.runs) == 7
    assert "Go on to that many" in said(app)


def test_a_new_server_goes_on_with_what_was_left(runs, fake):
    fake.hold.clear()
    app = example(open_page())
    button(app, "Start the sweep").click().run()
    until(app, lambda a: fake.runs)
    sweeps.sweeps().found("example").stopping.set()
    until(app, lambda a: status(a) == ["stopped"])
    clear()  # as after a restart
    fake.hold.set()
    app = open_page()
    assert status(app) == ["stopped"]
    button(app, "Go on").click().run()
    until(app, lambda a: status(a) == ["done"])


def test_a_trial_of_a_killed_server_is_shown_as_interrupted(runs):
    study = sweep.start(spec(), runs)
    trial = study.ask()
    run = store.create(runs, Recipe(name="t"))
    run.claim(run.state(), "running")
    store.write_json(run.folder / "state.json", store.read_json(run.folder / "state.json") | {"began": 1.0})
    trial.set_user_attr("run", run.id)
    app = open_page()
    assert status(app) == ["stopped"] and app.dataframe[0].value["state"].tolist() == ["⚡ interrupted"]
    assert "Go on" in said(app)


def test_a_sweep_of_another_process_is_said_to_run(runs):
    study = sweep.start(spec(), runs)
    trial = study.ask()
    run = store.create(runs, Recipe(name="t"))
    run.claim(run.state(), "running")
    trial.set_user_attr("run", run.id)
    app = open_page()
    assert status(app) == ["running"] and "Another process works on it" in said(app)
    assert "Work on it here too" in said(app)


def test_a_finished_sweep_has_its_charts_trials_and_the_way_to_compare(runs):
    study = swept(runs, trials=12)
    app = open_page(sweep="mine")
    rows = app.dataframe[0].value
    front = sweep.front(study)
    assert rows.loc[rows["front"] == "★", "trial"].tolist() == front
    assert set(rows["state"]) == {"✔ complete"} and rows["run"][0].startswith("monitor?run=")
    assert "Lower left is better" in said(app)
    for chart, words in (("Parallel coordinates", "Darker is a larger"), ("Settings", "The same on the command line")):
        assert words in said(open_page(sweep="mine", chart=chart))
    app = open_page(sweep="mine", chart="Importances")
    assert "12 trials" in said(app)
    links = [one.proto for one in app.get("page_link")]
    models = [f"{sweep.trials(study)[number]['run']}/nm" for number in front]
    query = next(one.query_string for one in links if one.page == "compare")
    assert "models=" in query and all(model.replace("/", "%2F") in query for model in models[:2])
    assert app.segmented_control(key="sweep.importance").value == "validation_loss"


def test_one_objective_has_a_best_and_few_trials_no_importances(runs):
    swept(runs, objectives={"cost": "none"})
    assert "Best: trial" in said(open_page())
    assert "Importances need 10 complete trials and 3 are there" in said(open_page(chart="Importances"))
    assert "Best: trial" in said(open_page(chart="Pareto front")), "a chart that another sweep has"


def test_importances_of_a_sweep_are_not_those_of_the_one_before_of_its_name(runs):
    swept(runs, trials=12)
    first = sweeps.importances(sweeps.look("mine"), "validation_loss")
    shutil.rmtree(sweep.folder(runs, "mine"))
    swept(runs, trials=12, ranges={"mask.method": ["gumbel", "magnitude"], "mask.n": [1, 2]})
    second = sweeps.importances(sweeps.look("mine"), "validation_loss")
    assert second.keys() == {"mask.method", "mask.n"} != first.keys()


def test_charts_of_very_many_trials_draw_a_thousand(runs):
    swept(runs, trials=2)
    seen = sweeps.look("mine")
    (row, _), count = seen.rows, 3000
    rng = random.Random(0)
    rows = [
        row | {"number": i, "objectives": {"validation_loss": rng.random(), "bytes": rng.random()}}
        for i in range(count)
    ]
    seen = dataclasses.replace(seen, rows=rows, front=list(range(0, count, 2)))
    beaten, kept = sweep_charts.pareto(seen, ["validation_loss", "bytes"])["data"]
    assert len(beaten["x"]) == len(kept["x"]) == charts.LARGEST_TRACE
    points, line = sweep_charts.best_so_far(seen, "validation_loss")["data"]
    losses = [one["objectives"]["validation_loss"] for one in rows]
    assert len(points["x"]) == len(line["y"]) == charts.LARGEST_TRACE
    assert all(low == min(losses[: i + 1]) for i, low in zip(line["x"], line["y"]))
    (across,) = sweep_charts.parallel(seen)["data"]
    assert min(across["line"]["color"]) == min(losses) and len(across["line"]["color"]) == charts.LARGEST_TRACE


def test_what_ended_a_sweep_is_said(runs, fake):
    fake.fails = True
    app = example(open_page())
    app = sound(button(app, "Start the sweep").click().run())
    app = until(app, lambda a: status(a) == ["failed"])
    assert "the first 3 trials failed" in said(app) and "the disk is full" in said(app)
    assert "Go on" in said(app)


def test_another_sweep_of_a_name_that_is_taken_is_refused_in_one_line(runs, fake):
    swept(runs, name="example")
    app = example(new_sweep(open_page()))
    assert "There is a sweep example" in said(app)
    app = sound(button(app, "Start the sweep").click().run())
    assert "sweep example was started with other" in said(app)


def test_an_unknown_name_in_the_address_is_said(runs):
    swept(runs)
    assert "There is no sweep gone here" in said(open_page(sweep="gone"))


# --- damage ------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [b"", b"not a database at all, " * 100, "cut"])
def test_a_damaged_study_is_said_in_one_line_and_breaks_no_other_page(runs, content):
    swept(runs, name="good")
    path = sweep.folder(runs, "bad") / sweep.DATABASE
    path.parent.mkdir()
    whole = (sweep.folder(runs, "good") / sweep.DATABASE).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    app = open_page(sweep="bad")
    assert len(app.error) == 1 and "\n" not in app.error[0].value
    app = sound(app.selectbox(key="sweep.pick").set_value("good").run())
    assert not app.error and status(app) == ["done"]
    for page in ("runs", "compare", "home"):
        assert not open_page(page).error


def test_a_deleted_run_leaves_its_trial_in_the_table(runs):
    study = swept(runs)
    for row in sweep.trials(study):
        shutil.rmtree(runs / row["run"])
    app = open_page()
    assert len(app.dataframe[0].value) == 3 and "Compare the front" not in str(app.get("page_link"))


# --- figures -----------------------------------------------------------------------------------
def test_figures_hold_the_trials(runs):
    ranges = RANGES | {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "mask.lr": {"low": 0.1, "high": 1}}
    swept(runs, ranges=ranges, trials=14, name="wide")
    seen = sweeps.look("wide")
    drawn = sweep_charts.pareto(seen, ["validation_loss", "bytes"])
    assert sum(len(trace["x"]) for trace in drawn["data"]) == 14
    assert drawn["data"][1]["x"] == sorted(drawn["data"][1]["x"]) and len(drawn["data"][1]["x"]) == len(seen.front)
    axes = {axis["label"]: axis for axis in sweep_charts.parallel(seen)["data"][0]["dimensions"]}
    assert set(axes) == {"target", "method", "train.lr", "mask.lr", "validation loss", "bytes"}
    assert all(len(axis["values"]) == 14 for axis in axes.values())
    assert set(axes["method"]["ticktext"]) == {"gumbel", "magnitude"}
    assert axes["mask.lr"]["ticktext"][0] == "not read"  # by magnitude
    assert all(-4 <= value <= -2 for value in axes["train.lr"]["values"])
    shares = sweeps.importances(seen, "bytes")
    assert next(iter(shares)) == "prune.target" and sum(shares.values()) == pytest.approx(1)


def test_the_page_does_not_wait_for_torch_or_optuna():
    check = (
        "import sys; from app import sweeps, sweep_form, sweep_views; assert not {'optuna', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
