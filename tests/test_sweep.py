"""Sweeps: ranges that are checked before anything runs, each trial once, and nothing lost with a worker."""

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time

import optuna
import pytest

from prunedm import recipe as recipes
from prunedm import store, strict_yaml, sweep, sweep_sampler, sweep_spec
from prunedm.__main__ import main
from prunedm.cluster_link import Unreachable
from prunedm.jobs import Jobs, through
from prunedm.recipe import RecipeError
from prunedm.records import Step
from prunedm.sweep_spec import SweepError
from prunedm.sweep_watch import Watch
from prunedm.sweep_worker import Worker

RANGES = {
    "prune.target": {"low": 0.1, "high": 0.8},
    "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # trials that are asked for by hand
STEPS = 8
SHORT = {"prune": {"finetune_steps": 2}, "mask": {"steps": 2, "recover_steps": 2}, "eval": {"noise_floor": False}}


def spec(**changes):
    base = {"name": "trial", "recipe": {"prune": {"finetune_steps": STEPS}}, "ranges": RANGES, "trials": 4}
    return sweep_spec.build(base | {"sampler": "random"} | changes)


def loss_of(recipe):
    return recipe.prune.target**2 + recipe.train.lr


class Fake:
    """Executes a run in no time: eight steps of fine-tuning, then figures. ``at``: called with run and step."""

    def __init__(self, at=lambda run, step: None, status="done", loss=loss_of):
        self.at, self.status, self.loss, self.runs, self.steps = at, status, loss, [], []

    def __call__(self, run, on_step=lambda step: None, stop=lambda: False):
        self.runs.append(run.id)
        state, recipe = run.state(), run.recipe()
        run.claim(state, "running")
        for i in range(len(run.metrics()) + 1, STEPS + 1):
            self.at(run, i)
            self.steps.append((run.id, i))
            values = {"loss": self.loss(recipe)}
            run.append("metrics.jsonl", [{"stage": "finetune", "step": i, "time": 0.0} | values])
            on_step(Step("finetune", i, STEPS, values))
            if stop() or run.stop_requested():
                run.end(state, "stopped", None)
                return "stopped"
        figures = {"parameters": 9, "nonzero_parameters": 9, "macs": 9, "bytes": 9}
        figures |= {"validation_loss": self.loss(recipe), "sizes": {"packed_fp16": 1 - recipe.prune.target}}
        run.write_evaluation({"nm": figures})
        run.end(state, self.status, "no luck" if self.status == "failed" else None)
        return self.status


def meets(both):
    """Waits, at a worker's first step, for the other one's: neither works all trials off before the other begins."""
    has_met = []

    def at(run, step):
        if not has_met:
            has_met.append(True)
            both.wait(120)

    return at


def work(study, runs_dir, execute, **options):
    worker = Worker(study, runs_dir, execute=execute, poll=0.05, **options)
    return worker.run()


def swept(runs_dir, execute=None, **changes):
    """A finished sweep."""
    study = sweep.start(spec(**changes), runs_dir)
    assert work(study, runs_dir, execute or Fake()) == "done"
    return study


def states(study):
    return [row["state"] for row in sweep.trials(study)]


# --- specification -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ranges": {}}, "ranges: dictionary should have at least 1 item"),
        ({"ranges": {"prune": [1, 2]}}, "ranges.prune is a section; name one of its fields: method, target"),
        ({"ranges": {"prune.foo": [1, 2]}}, "ranges.prune.foo is not a field of the recipe; known there: method"),
        ({"ranges": {"prune.target.x": [1, 2]}}, "prune.target is the field"),
        ({"ranges": {"prune.target": 5}}, "prune.target holds 5; give a list of values, or low and high"),
        ({"ranges": {"prune.target": {"low": 0.1}}}, "ranges.prune.target: needs low and high"),
        ({"ranges": {"prune.target": {"low": 0.5, "high": 0.2}}}, "low=0.5 must be less than high=0.2"),
        ({"ranges": {"prune.target": {"low": 0.5, "high": 1.2}}}, "1.2 is not accepted: input should be less than"),
        ({"ranges": {"prune.target": {"low": "a", "high": 1}}}, "ranges.prune.target.low='a': must be a number"),
        ({"ranges": {"prune.target": {"low": 0.1, "high": 0.5, "step": 0.3}}}, "try high=0.4"),
        ({"ranges": {"prune.target": {"low": 0.1, "high": 0.5, "bar": 1}}}, "bar is not a field of a sweep"),
        ({"ranges": {"train.lr": {"low": 0, "high": 0.2, "log": True}}}, "log needs low=0 above 0"),
        ({"ranges": {"mask.steps": {"low": 1.5, "high": 20}}}, "low=1.5 must be a whole number"),
        ({"ranges": {"mask.method": {"low": 1, "high": 2}}}, "is not between two numbers; give a list of values"),
        ({"ranges": {"mask.method": ["gumbel", "x"]}}, "ranges.mask.method: 'x' is not accepted"),
        ({"ranges": {"mask.method": ["gumbel"]}}, "at least 2 items"),
        ({"ranges": {"mask.method": ["none", "none"]}}, "'none' stands twice; keep one"),
        ({"ranges": {"mask.layers": [1, 2]}}, "ranges.mask.layers is a list"),
        ({"ranges": {"name": ["a", "b"]}}, "ranges.name would only rename runs"),
        ({"ranges": {"data.source": ["a", "b"]}}, "changes what validation_loss is measured by"),
        ({"ranges": {"eval.images": [8, 9]}, "objectives": {"quality": "fid"}}, "changes what fid is measured by"),
        ({"ranges": {"mask.n": {"low": 4, "high": 8}}}, "none of 64 combinations of the ranges is a recipe: mask: n=4"),
        ({"pruner": "median"}, "pruner=median needs one objective and cost=bytes is a second one; set"),
        ({"sampler": "grid"}, "sampler=grid needs the values of ranges.prune.target; give a step or a list"),
        ({"sampler": "x"}, "sampler='x': input should be 'tpe', 'random', 'grid' or 'nsga2'"),
        ({"objectives": {"quality": "loss"}}, "objectives.quality='loss': input should be"),
        ({"objectives": {"foo": 1}}, "objectives.foo is not a field of a sweep; known there: quality, cost"),
        ({"trials": 0}, "trials=0: input should be greater than or equal to 1"),
        ({"foo": 1}, "foo is not a field of a sweep; known there: name, recipe, ranges"),
        ({"name": "a/b"}, "name='a/b': must be 1 to 32 letters"),
        ({"recipe": "nope"}, "recipe nope cannot be read"),
        ({"recipe": {"mask": {"n": 9, "m": 4}}}, "recipe: mask: n=9 must be less than m=4; try 2:4"),
    ],
)
def test_bad_specifications_are_refused_in_one_line(changes, line):
    with pytest.raises(ValueError) as caught:
        spec(**changes)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_specification_reads_back_and_may_be_a_section_of_a_recipe(tmp_path):
    one = spec(ranges=RANGES | {"mask.method": ["gumbel", "none"], "mask.density": [0.5, None]})
    assert sweep_spec.build(strict_yaml.load(one.to_yaml())) == one
    (tmp_path / "base.yaml").write_text("name: base\nmask: {steps: 7}\n")
    (tmp_path / "a.yaml").write_text("recipe: base.yaml\nranges: {prune.target: {low: 0.1, high: 0.5}}\n")
    (tmp_path / "b.yaml").write_text("name: base\nmask: {steps: 7}\nsweep: {ranges: {prune.target: [0.1, 0.5]}}\n")
    assert sweep_spec.read(tmp_path / "a.yaml").base.mask.steps == 7
    other = sweep_spec.read(tmp_path / "b.yaml")
    assert (other.name, other.base.mask.steps) == ("base", 7)


def test_suggestions_become_recipes_and_a_method_has_only_the_fields_that_it_reads():
    ranges = {"mask.method": ["gumbel", "magnitude"], "mask.lr": {"low": 0.01, "high": 1, "log": True}}
    ranges |= {"prune.finetune_steps": {"low": 10, "high": 30, "step": 10}, "prune.of": ["parameters", "macs"]}
    ranges |= {"prune.method": ["taylor", "magnitude"]}
    one = spec(recipe={"prune": {"method": "taylor", "calibration_steps": 3}}, ranges=ranges)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(30):
        values = one.suggest(study.ask())
        recipe = one.recipe_of(values, "t-001")
        flat = recipes.flatten(recipe.model_dump())
        assert {key: flat[key] for key in values} == values and recipe.name == "t-001"
        assert ("mask.lr" in values) == (recipe.mask.method == "gumbel")
        assert recipe.prune.calibration_steps == (3 if recipe.prune.method == "taylor" else 20)
        assert recipe.prune.finetune_steps in (10, 20, 30)
        seen.add((recipe.mask.method, recipe.prune.method))
    assert len(seen) == 4
    with pytest.raises(RecipeError, match="must be less than"):
        one.recipe_of({"mask.n": 8})


def test_a_grid_has_every_combination_once_whoever_works_on_it(tmp_path):
    ranges = {"prune.target": {"low": 0.1, "high": 0.2, "step": 0.1}, "mask.n": {"low": 1, "high": 2}}
    ranges |= {"mask.method": ["gumbel", "magnitude"], "mask.lr": [0.1, 0.2]}
    one = spec(sampler="grid", ranges=ranges, trials=100)
    points = {json.dumps(values, sort_keys=True) for values in one.grid()}
    assert one.total == len(points) == 2 * 2 * (2 + 1) and one.grid() != spec(ranges=ranges, seed=1).grid()
    study = sweep.start(one, tmp_path)
    assert work(study, tmp_path, Fake()) == "done"
    assert sorted(json.dumps(row["params"], sort_keys=True) for row in sweep.trials(study)) == sorted(points)


# --- sweeps ------------------------------------------------------------------------------------
def test_a_sweep_of_micro_recipes_from_the_command_line(micro, tmp_path, capsys):
    base = recipes.merge(micro().model_dump(exclude_defaults=True), SHORT)
    document = {"name": "small", "recipe": base, "ranges": {"prune.target": [0.1, 0.3, 0.5]}, "sampler": "grid"}
    file, runs_dir = tmp_path / "s.yaml", tmp_path / "runs"
    file.write_text(strict_yaml.dump(document))
    command = ["sweep", str(file), "--runs-dir", str(runs_dir)]
    assert main([*command, "--dry-run", "--json"]) == 0
    planned = [one["params"] for one in json.loads(capsys.readouterr().out)["suggestions"]]
    assert not runs_dir.exists()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["params"] for row in found["trials"]] == planned and found["progress"]["complete"] == 3
    assert sorted(row["run"] for row in found["trials"]) == sorted(run.id for run in store.all_runs(runs_dir))
    for row in found["trials"]:
        run = store.find(runs_dir, row["run"])
        figures = run.evaluation()["nm"]
        assert run.state().status == "done" and run.recipe().prune.target == row["params"]["prune.target"]
        assert row["objectives"] == {
            "validation_loss": figures["validation_loss"],
            "bytes": figures["sizes"]["packed_fp16"],
        }
    assert main([*command]) == 0  # nothing left to do
    shown = capsys.readouterr().out
    assert "complete" in shown and len(store.all_runs(runs_dir)) == 3
    assert sweep.names(runs_dir) == ["small"] and "small" not in [run.id for run in store.all_runs(runs_dir)]


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 11), ("random", 5), ("nsga2", 5)])
def test_the_same_seed_suggests_the_same_trials_with_or_without_an_interruption(tmp_path, sampler, trials):
    changes = {"sampler": sampler, "trials": trials, "seed": 3}
    whole = [row["params"] for row in sweep.trials(swept(tmp_path / "a", **changes))]
    calls = itertools.count()
    study = sweep.start(spec(**changes), tmp_path / "b")
    assert work(study, tmp_path / "b", Fake(), stop=lambda: next(calls) > 30) == "stopped"
    assert 0 < len(sweep.trials(study)) < trials
    again = sweep.start(spec(**changes), tmp_path / "b")
    work(again, tmp_path / "b", Fake())
    assert [row["params"] for row in sweep.trials(again)] == whole
    assert len({json.dumps(params) for params in whole}) == trials


def test_a_resumed_sweep_goes_on_with_the_interrupted_run_and_repeats_nothing(tmp_path):
    study, fake, asked = sweep.start(spec(), tmp_path), Fake(), []

    def interrupt(run, step):
        if len(fake.runs) == 2 and step == 4:
            asked.append(run.id)

    fake.at = interrupt
    assert work(study, tmp_path, fake, stop=lambda: bool(asked)) == "stopped"
    assert states(study) == ["complete", "interrupted"]
    assert sweep.progress(study) | {"eta": 0} == {
        "of": 4, "finished": 1, "running": 0, "complete": 1, "pruned": 0, "failed": 0, "eta": 0
    }  # fmt: skip
    again = sweep.start(spec(), tmp_path)
    assert work(again, tmp_path, fake, stop=lambda: False) == "done"
    assert states(again) == ["complete"] * 4 and fake.runs.count(asked[0]) == 2
    assert len(store.all_runs(tmp_path)) == 4
    assert [step for run, step in fake.steps if run == asked[0]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_run_that_a_worker_without_its_trial_is_still_at_is_waited_for(tmp_path, monkeypatch, is_stopped):
    """Its database had no sign of life of it: no trial runs twice for that."""
    study, fake, asked, told, tries = sweep.start(spec(), tmp_path), Fake(), [], [], []
    fake.at = lambda run, step: asked.append(run.id) if len(fake.runs) == 2 and step == 4 else None
    assert work(study, tmp_path, fake, stop=lambda: bool(asked)) == "stopped"
    take = store.Run.take

    def busy_at_first(run):
        tries.append(run.id)
        if len(tries) < 3:
            raise store.Busy(f"run {run.id} is running by another worker")
        take(run)

    monkeypatch.setattr(store.Run, "take", busy_at_first)
    again = sweep.start(spec(), tmp_path)
    status = work(again, tmp_path, fake, stop=lambda: is_stopped and bool(tries), tell=told.append)
    (said,) = [line for line in told if "waits: run" in line]
    assert "is running by another worker" in said and set(tries) == {asked[0]}
    if is_stopped:
        assert status == "stopped" and states(again) == ["complete", "interrupted"]
        return
    assert status == "done" and states(again) == ["complete"] * 4
    assert len(store.all_runs(tmp_path)) == 4 and len(tries) == 3


def test_more_trials_can_be_asked_for_later_and_another_specification_cannot(tmp_path):
    study = swept(tmp_path, trials=2)
    more = sweep.start(spec(trials=2), tmp_path, trials=5)
    assert sweep.total(study) == 5 and work(more, tmp_path, Fake()) == "done"
    assert len(sweep.trials(study)) == 5
    with pytest.raises(SweepError, match="was started with other seed; go on with what"):
        sweep.start(spec(seed=1), tmp_path)
    assert sweep.total(sweep.join(spec(trials=2), tmp_path)) == 5


def test_a_sweep_stops_when_another_process_asks(tmp_path):
    study = sweep.start(spec(trials=50), tmp_path)
    fake = Fake(lambda run, step: sweep.request_stop(study, tmp_path) if len(fake.runs) == 3 and step == 2 else None)
    assert work(study, tmp_path, fake) == "stopped" and states(study) == ["complete", "complete", "interrupted"]
    assert work(sweep.start(spec(trials=4), tmp_path), tmp_path, Fake()) == "done"
    assert states(study) == ["complete"] * 4


def test_the_lab_s_queue_executes_trials(tmp_path, monkeypatch):
    from prunedm import pipeline

    fake = Fake(lambda run, step: time.sleep(0.01))
    monkeypatch.setattr(pipeline, "execute", fake)
    study = sweep.start(spec(trials=3, objectives={"cost": "none"}), tmp_path)
    assert work(study, tmp_path, through(Jobs(tmp_path), poll=0.02)) == "done"
    assert states(study) == ["complete"] * 3 and len(fake.runs) == 3
    assert [len(trial.intermediate_values) for trial in study.trials] == [4] * 3


# --- pruning -----------------------------------------------------------------------------------
@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_bad_trials_end_early_and_say_why(tmp_path, pruner):
    fake = Fake()
    study = swept(tmp_path, fake, trials=14, pruner=pruner, objectives={"cost": "none"}, seed=1)
    rows = sweep.trials(study)
    pruned = [row for row in rows if row["state"] == "pruned"]
    complete = [row for row in rows if row["state"] == "complete"]
    assert pruned and len(pruned) + len(complete) == 14
    best = min(row["objectives"]["validation_loss"] for row in complete)
    for row in pruned:
        run = store.find(tmp_path, row["run"])
        assert run.state().status == "stopped" and len(run.metrics()) < STEPS
        assert f"pruned ({pruner}) at Fine-tune" in row["cause"] and row["cause"] in run.log_path.read_text()
        assert loss_of(run.recipe()) > best
    assert [row["number"] for row in rows if row["number"] in sweep.front(study)] == [
        row["number"] for row in complete if row["objectives"]["validation_loss"] == best
    ]
    assert study.trials[0].user_attrs["intermediate"] == "mean training loss of a quarter of a stage"
    if pruner == "median":  # as anyone would prune: the first five go on, and a later one needs the median
        values = [t.intermediate_values for t in study.trials]
        for number, one in enumerate(study.trials):
            ended = one.state.name == "PRUNED"
            others = sorted(v[2] for v, t in zip(values[:number], study.trials) if t.state.name == "COMPLETE")
            middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2 if others else 0
            assert ended == (number >= 5 and values[number][2] > middle)


def test_a_sweep_that_prunes_has_its_runs_measure_validation_losses():
    one = spec(objectives={"cost": "none"})
    pruning = spec(objectives={"cost": "none"}, pruner="median")
    own = spec(objectives={"cost": "none"}, pruner="median", recipe={"train": {"validations": 8}})
    assert [each.recipe_of({}).train.validations for each in (one, pruning, own)] == [0, 4, 8]


def test_intermediate_values_are_quarters_and_validation_losses_where_there_are_some(tmp_path):
    run = store.create(tmp_path, recipes.build({"prune": {"finetune_steps": 8}, "mask": {"steps": 2}}))
    run.append("metrics.jsonl", [{"stage": "finetune", "step": i, "loss": float(i)} for i in (1, 2, 3)])
    study = optuna.create_study()
    watch = Watch(study.ask(), run, spec(objectives={"cost": "none"}), lambda: False)
    assert study.trials[0].intermediate_values == {1: 1.5}
    for i in range(4, 9):
        watch.on_step(Step("finetune", i, 8, {"loss": float(i)} | ({"validation_loss": 0.5} if i == 5 else {})))
    watch.on_step(Step("mask", 1, 9, {"other": 1.0}))  # a measurement is no training step
    watch.on_step(Step("mask", 1, 2, {"loss": 2.0}))
    watch.on_step(Step("mask", 2, 2, {"loss": 4.0}))
    assert study.trials[0].intermediate_values == {1: 1.5, 2: 3.5, 3: 0.5, 4: 7.5, 6: 2.0, 8: 4.0}
    assert not watch.stop() and not watch.pruned


# --- several workers ---------------------------------------------------------------------------
@pytest.mark.parametrize("is_locked", [True, False])
def test_two_workers_run_each_trial_once(tmp_path, is_locked, monkeypatch):
    if not is_locked:  # as with a database that has no file to lock
        monkeypatch.setattr(sweep, "locked", lambda url: contextlib.nullcontext())
    study, runs, threads, both = sweep.start(spec(trials=11), tmp_path), [], [], threading.Barrier(2)
    for _ in range(2):
        fake = Fake(meets(both))
        threads.append(threading.Thread(target=work, args=(sweep.join(spec(trials=11), tmp_path), tmp_path, fake)))
        runs.append(fake.runs)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states(study) == ["complete"] * 11 and all(runs)
    assert len({*runs[0], *runs[1]}) == len(runs[0] + runs[1]) == len(store.all_runs(tmp_path)) == 11
    assert len({json.dumps(row["params"]) for row in sweep.trials(study)}) == 11
    if is_locked:
        assert len(study.trials) == 11


def killed(study, runs_dir, **notes):
    """A trial whose worker is gone: its run belongs to a process that ended."""
    trial = study.ask()
    values = spec().suggest(trial)
    run = store.create(runs_dir, spec().recipe_of(values))
    for key, value in ({"run": run.id} | notes).items():
        trial.set_user_attr(key, value)
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    raw = json.loads((run.folder / "state.json").read_text())
    store.write_json(run.folder / "state.json", raw | {"status": "running", "pid": process.pid})
    return run, values


def test_a_killed_worker_s_trial_is_taken_over_at_once_on_the_same_machine(tmp_path):
    study = sweep.start(spec(), tmp_path)
    run, values = killed(study, tmp_path)
    fake = Fake()
    assert work(study, tmp_path, fake) == "done"
    assert fake.runs[0] == run.id and len(set(fake.runs)) == 4 == len(store.all_runs(tmp_path))
    assert states(study) == ["complete"] * 4 and sweep.trials(study)[0]["params"] == values


def test_a_trial_that_was_taken_over_is_not_taken_again(tmp_path):
    study = sweep.start(spec(trials=1), tmp_path)
    killed(study, tmp_path)
    other, seen = Worker(sweep.join(spec(trials=1), tmp_path), tmp_path), []

    def tell(line):  # before the run begins: its last owner is the dead process, as far as its steps tell
        if line.startswith("trial 1: "):
            other._recover_lost()
            seen.append(study.trials[1].state.name)

    assert work(study, tmp_path, Fake(), tell=tell) == "done"
    assert seen == ["RUNNING"] and states(study) == ["complete"] and len(study.trials) == 2


def test_a_killed_worker_s_trial_is_taken_over_when_its_signs_of_life_end(tmp_path):
    study = sweep.start(spec(), tmp_path, heartbeat=1, grace=1)
    lost = study.ask()
    values = spec().suggest(lost)
    study._storage.record_heartbeat(lost._trial_id)  # the last one; its run is on another machine
    lost.set_user_attr("run", "20260101-000000-elsewhere")
    time.sleep(2.1)
    assert work(study, tmp_path, Fake()) == "done"
    assert states(study) == ["complete"] * 4 and sweep.trials(study)[0]["params"] == values


def test_a_worker_that_was_given_up_by_mistake_leaves_the_trial_to_the_other(tmp_path):
    study = sweep.start(spec(trials=2, objectives={"cost": "none"}), tmp_path)

    def give_up(run, step):  # what a worker does that thinks this one is dead
        if len(fake.runs) == 1 and step == 3:
            study.tell(0, state=optuna.trial.TrialState.FAIL)

    fake = Fake(give_up)
    assert work(study, tmp_path, fake) == "done"
    assert states(study) == ["complete"] * 2 and len(store.all_runs(tmp_path)) == 2


def test_a_trial_that_kills_its_workers_is_not_retried_for_ever(tmp_path):
    study = sweep.start(spec(), tmp_path)
    killed(study, tmp_path, kills=3)
    assert work(study, tmp_path, Fake()) == "done"
    assert states(study) == ["failed", "complete", "complete", "complete"]
    assert sweep.trials(study)[0]["cause"] == "its worker was killed, 4 times in all"


# --- failures ----------------------------------------------------------------------------------
def test_recipes_that_contradict_themselves_are_pruned_with_their_reason(tmp_path):
    study = swept(tmp_path, sampler="grid", trials=9, ranges={"mask.n": [1, 2, 4], "prune.target": [0.1, 0.2]})
    pruned = [row for row in sweep.trials(study) if row["state"] == "pruned"]
    assert [row["params"]["mask.n"] for row in pruned] == [4, 4] and states(study).count("complete") == 4
    assert all(row["cause"] == "mask: n=4 must be less than m=4; try 2:4" and row["run"] is None for row in pruned)


def test_a_failed_run_fails_its_trial_alone(tmp_path):
    def trouble(run, step):
        fake.status = "failed" if len(fake.runs) == 2 else "done"
        if len(fake.runs) == 3:
            raise ZeroDivisionError("by nothing")

    fake = Fake(trouble)
    study = swept(tmp_path, fake, trials=5)
    assert states(study) == ["complete", "failed", "failed", "complete", "complete"]
    assert [row["cause"] for row in sweep.trials(study)][1:3] == ["no luck", "ZeroDivisionError: by nothing"]


def test_a_run_that_was_stopped_by_hand_fails_its_trial(tmp_path):
    fake = Fake(lambda run, step: run.request_stop() if len(fake.runs) == 1 and step == 2 else None)
    study = swept(tmp_path, fake)
    assert states(study) == ["failed", "complete", "complete", "complete"]
    assert "was stopped by hand" in sweep.trials(study)[0]["cause"]


def test_a_trial_whose_workers_die_again_and_again_on_a_cluster_fails_alone(tmp_path):
    fake, cause = Fake(), "its workers died 4 times (out of memory); mend that and resume"

    def dies(run, on_step, stop):
        if not fake.runs:
            fake.runs.append(run.id)
            for _ in range(3):
                run.event("worker_lost")
            run.end(run.state(), "interrupted", cause)
            return "interrupted"
        return fake(run, on_step, stop)

    study = swept(tmp_path, dies)
    rows = sweep.trials(study)
    assert [row["state"] for row in rows] == ["failed", *["complete"] * 3] and rows[0]["cause"] == cause


def test_a_cluster_that_loses_a_trials_task_ends_the_sweep_and_costs_no_trial(tmp_path):
    study, fake = sweep.start(spec(), tmp_path), Fake()

    def gone(run, on_step, stop):
        if fake.runs:
            run.end(run.state(), "interrupted", "the cluster lost its task (its head died); mend that and resume")
            return "interrupted"
        return fake(run, on_step, stop)

    with pytest.raises(SweepError, match=r"the cluster lost its task .* after that, start the sweep again"):
        work(study, tmp_path, gone)
    assert states(study) == ["complete", "interrupted"]
    left = sweep.trials(study)[1]
    again = sweep.start(spec(), tmp_path)
    assert work(again, tmp_path, fake) == "done" and states(again) == ["complete"] * 4
    assert fake.runs[1] == left["run"] and len(store.all_runs(tmp_path)) == 4


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_cluster_that_does_not_answer_is_waited_for(tmp_path, is_stopped):
    study, fake, asked, told = sweep.start(spec(), tmp_path), Fake(), [], []

    def away(run, on_step, stop):
        if run.state().status == "interrupted":
            run.take()  # as an executor does
        asked.append(run.id)
        if len(asked) in (2, 3):
            run.end(run.state(), "interrupted", "the Ray cluster does not answer; resume once it does")
            raise Unreachable("the Ray cluster local does not answer (gone)")
        return fake(run, on_step, stop)

    status = work(study, tmp_path, away, stop=lambda: is_stopped and len(asked) == 3, tell=told.append)
    assert len([line for line in told if "trial 1 waits: the Ray cluster local does not answer (gone)" in line]) == 1
    if is_stopped:
        assert status == "stopped" and states(study) == ["complete", "interrupted"]
        assert work(sweep.start(spec(), tmp_path), tmp_path, fake) == "done"
    assert states(study) == ["complete"] * 4 and len(store.all_runs(tmp_path)) == 4


def test_a_sweep_in_which_everything_fails_asks_for_help(tmp_path):
    study, fake = sweep.start(spec(trials=9), tmp_path), Fake(status="failed")
    with pytest.raises(SweepError, match="the first 3 trials failed, the last with: no luck; mend that"):
        work(study, tmp_path, fake)
    assert states(study) == ["failed"] * 3
    assert work(study, tmp_path, Fake()) == "done" and states(study)[3:] == ["complete"] * 6


def test_figures_that_are_not_there_fail_the_trial(tmp_path):
    study = sweep.start(spec(objectives={"quality": "fid"}, trials=1), tmp_path)
    assert work(study, tmp_path, Fake()) == "done"
    assert "has no fid; see its log" in sweep.trials(study)[0]["cause"]


def test_storages_that_cannot_be_opened_are_refused_in_one_line(tmp_path):
    for url in ("sqlite://", "nothing", f"sqlite:///{tmp_path}/none/x.db", "foo://me:secret@host/x"):
        with pytest.raises(SweepError) as caught:
            sweep.start(spec(), tmp_path, url)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(SweepError, match="cannot be opened"):
        sweep.start(spec(), tmp_path, f"sqlite:///{tmp_path}/text.db")
    for name in ("other", "../x"):
        with pytest.raises(SweepError, match="no sweep"):
            sweep.load(name, tmp_path)
    with pytest.raises(SweepError, match="no sweep 'trial'"):
        sweep.join(spec(), tmp_path, patience=0.1)
    assert not (tmp_path / "sweeps" / "other").exists()
    assert "secret" not in sweep.shown("postgresql://me:secret@host/x")


def test_command_line_answers_bad_input_in_one_line(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    for text, line in (
        ("{recipe: smoke, ranges: 3}", "ranges=3"),
        ("a: [", "is not YAML"),
        ("recipe: smoke", "ranges is missing"),
    ):
        file.write_text(text)
        assert main(["sweep", str(file), "--runs-dir", str(tmp_path)]) == 2
        shown = capsys.readouterr().err
        assert line in shown and shown.count("\n") == 1
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    file.write_text(spec().to_yaml())
    assert main(["sweep", str(file), "--worker", "--trials", "3"]) == 2


# --- what pages show ---------------------------------------------------------------------------
def test_front_and_importances_against_brute_force(tmp_path):
    def loss(recipe):  # the rate decides the loss, and the target nothing but the bytes
        return recipe.train.lr * 100 + 1e-3 * recipe.prune.target + (recipe.prune.target - 0.4) ** 2

    study = swept(tmp_path, Fake(loss=loss), trials=30, sampler="random")
    rows = sweep.trials(study)
    points = {row["number"]: tuple(row["objectives"].values()) for row in rows}
    best = [
        number
        for number, (a, b) in points.items()
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points.values())
    ]
    assert sweep.front(study) == best == sorted(trial.number for trial in study.best_trials)
    assert 1 < len(best) < 30
    for objective, winner in (("validation_loss", "train.lr"), ("bytes", "prune.target")):
        found = sweep.importances(study, objective)
        assert sum(found.values()) == pytest.approx(1)
        by_quarter = {}  # how far the best quarter lies from all, in each field
        good = sorted(rows, key=lambda row: row["objectives"][objective])[:8]
        for key in RANGES:
            order = sorted(row["params"][key] for row in rows)
            places = [order.index(row["params"][key]) / 29 for row in good]
            by_quarter[key] = abs(sum(places) / 8 - 0.5)
        assert next(iter(found)) == winner == max(by_quarter, key=by_quarter.get)
    with pytest.raises(SweepError, match="objective 'x' is none of this sweep; use validation_loss or bytes"):
        sweep.importances(study, "x")


def test_importances_of_few_trials_are_not_invented(tmp_path):
    with pytest.raises(SweepError, match="importances need 10 complete trials and 2 are there"):
        sweep.importances(swept(tmp_path, trials=2))


def test_equal_trials_are_all_on_the_front_and_one_objective_has_a_best(tmp_path):
    study = swept(tmp_path, Fake(loss=lambda recipe: 1.0), objectives={"cost": "none"})
    assert sweep.front(study) == [0, 1, 2, 3]


def test_every_page_function_answers_before_the_first_trial(tmp_path):
    study = sweep.start(spec(), tmp_path)
    assert sweep.trials(study) == [] == sweep.front(study)
    assert sweep.progress(study)["of"] == 4 and sweep.progress(study)["eta"] is None
    assert sweep.spec_of(sweep.load("trial", tmp_path)) == spec()


def test_pages_that_show_no_sweep_do_not_wait_for_optuna():
    check = "import prunedm.sweep, prunedm.sweep_worker, prunedm.__main__, sys; "
    check += "assert not {'optuna', 'sqlalchemy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_samplers_and_pruners_are_those_asked_for(tmp_path):
    one = spec(pruner="hyperband", objectives={"cost": "none"})
    study = sweep.start(one, tmp_path)
    assert isinstance(study.sampler, sweep_sampler.Slots)
    assert isinstance(study.pruner, optuna.pruners.HyperbandPruner)
