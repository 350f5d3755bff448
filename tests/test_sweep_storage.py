"""Workers that share a study: on SQLite and on PostgreSQL each trial runs once, and those of killed workers again."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import postgres
import pytest
from test_sweep import Fake, killed, meets, spec, states, work

from prunedm import store, strict_yaml, sweep, sweep_commands, sweep_spec
from prunedm.sweep_spec import SweepError

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = itertools.count(1)
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


@pytest.fixture(scope="module")
def database():
    """A PostgreSQL server; each test uses studies of its own names."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: make cluster")
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request, tmp_path):
    """None (the sweep's own SQLite file), or the URL of a database."""
    return request.getfixturevalue("database") if request.param == "postgresql" else None


@pytest.fixture
def name():
    """Of a study that is not in the database yet."""
    return f"sweep-{next(NUMBERS)}"


def test_two_workers_share_four_trials_and_run_each_once(storage, name, tmp_path):
    one = spec(name=name)
    study, fakes, threads = sweep.start(one, tmp_path, storage), [], []
    both = threading.Barrier(2)
    for _ in range(2):
        fakes.append(Fake(meets(both)))
        given = (sweep.join(one, tmp_path, storage), tmp_path, fakes[-1])
        threads.append(threading.Thread(target=work, args=given, kwargs={"storage": storage}))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    runs = fakes[0].runs + fakes[1].runs
    assert all(fake.runs for fake in fakes) and len(runs) == len(set(runs)) == len(store.all_runs(tmp_path)) == 4
    assert states(study) == ["complete"] * 4
    assert len({json.dumps(row["params"]) for row in sweep.trials(study)}) == 4


def test_the_trial_of_a_killed_worker_is_run_again(storage, name, tmp_path):
    one = spec(name=name)
    study = sweep.start(one, tmp_path, storage)
    run, values = killed(study, tmp_path)
    fake = Fake()
    assert work(study, tmp_path, fake, storage=storage) == "done"
    assert fake.runs[0] == run.id and len(set(fake.runs)) == 4
    assert states(study) == ["complete"] * 4 and sweep.trials(study)[0]["params"] == values


def test_a_worker_elsewhere_counts_as_killed_once_its_heartbeat_ends(storage, name, tmp_path):
    one = spec(name=name)
    study = sweep.start(one, tmp_path, storage, heartbeat=1, grace=1)
    lost = study.ask()
    values = one.suggest(lost)
    lost.set_user_attr("run", "20260101-000000-elsewhere")
    began = time.monotonic()
    study._storage.record_heartbeat(lost._trial_id)
    is_lost = study._storage._get_stale_trial_ids(study._study_id)
    assert not is_lost or time.monotonic() - began > 1, "it lives until then"
    deadline = time.monotonic() + 60
    while not study._storage._get_stale_trial_ids(study._study_id):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert work(study, tmp_path, Fake(), storage=storage) == "done"
    assert states(study) == ["complete"] * 4 and sweep.trials(study)[0]["params"] == values


def test_a_database_that_is_gone_is_said_in_one_line(database, name, tmp_path):
    wrong = database.replace("/postgres", "/nowhere").replace("prunedm@", "prunedm:secret@")
    with pytest.raises(SweepError) as caught:
        sweep.start(spec(name=name), tmp_path, wrong)
    said = str(caught.value)
    assert "cannot be opened" in said and "\n" not in said and "secret" not in said


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql+psycopg://me:geheim@host/name", "postgresql+psycopg://me:***@host/name"),
        ("postgresql+psycopg://host/name?password=geheim", "postgresql+psycopg://host/name?password=hidden"),
        ("postgresql+psycopg://me@host/name?sslmode=require", None),
        ("sqlite:////a b/study.db", None),
    ],
)
@pytest.mark.parametrize("form", ["--storage {}", "--storage={}"])
def test_the_command_to_go_on_with_names_no_password(url, told, form):
    given = ["sweep", "spec.yaml", *form.replace("{}", "|").split(" "), "--json"]
    given = [word.replace("|", url) for word in given]
    command = sweep_commands._same_command(given)
    assert "geheim" not in command and ("$PRUNEDM_STORAGE" in command) == (told is not None)
    words = shlex.split(command.partition(" (its password")[0])
    assert words == ["python", "-m", "prunedm", *(word.replace(url, told or url) for word in given)]


# --- the command line, by processes of their own ---------------------------------------------------
def begin(spec_file, runs_dir, *options):
    command = [sys.executable, "-m", "prunedm", "sweep", str(spec_file), "--runs-dir", str(runs_dir), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_six_trials_by_two_processes_of_which_one_is_killed(storage, name, micro, tmp_path):
    recipe = micro(prune={"finetune_steps": 20}, mask={"steps": 0, "method": "none"}, eval={"noise_floor": False})
    one = {
        "name": name,
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "ranges": {"train.lr": {"low": 1e-4, "high": 1e-3}},
        "trials": 6,
        "objectives": {"cost": "none"},
        "sampler": "random",
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(strict_yaml.dump(one))
    url = [] if storage is None else ["--storage", storage]
    sweep.start(sweep_spec.read(path), tmp_path, storage)
    first, second = begin(path, tmp_path, *url), begin(path, tmp_path, *url, "--worker")
    deadline = time.monotonic() + 240
    while not {first.pid, second.pid} <= {run.state().pid for run in store.all_runs(tmp_path) if run.metrics()}:
        assert time.monotonic() < deadline and second.poll() is None, second.stdout.read()
        time.sleep(0.05)
    os.kill(second.pid, signal.SIGKILL)
    said = first.communicate(timeout=240)[0]
    second.communicate()
    assert first.returncode == 0, said
    study = sweep.load(name, tmp_path, storage)
    rows = sweep.trials(study)
    assert [row["state"] for row in rows] == ["complete"] * 6, said
    runs = store.all_runs(tmp_path)
    assert {row["run"] for row in rows} == {run.id for run in runs} and len(runs) == 6
    for run in runs:
        steps = [(record["stage"], record["step"]) for record in run.metrics()]
        assert len(steps) == len(set(steps)), "no step is recorded twice"
