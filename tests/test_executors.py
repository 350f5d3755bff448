"""The lab's choice between its own queue and a Ray cluster."""

import importlib.util
import json
import threading

import pytest
from test_app import open_page, said

from app import executor_views, lab
from prunedm import executors, store
from prunedm.cluster_link import ClusterError, Unreachable
from prunedm.executors import Choice, Chosen
from prunedm.recipe import Recipe


class Fake:
    """A RayExecutor that does nothing. ``gate``: connecting takes until it is set."""

    gate, fault, trouble, made = None, "", "", []

    def __init__(self, runs_dir, address):
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.fault:
            raise ClusterError(self.fault)
        self.runs_dir, self.address, self.ids, self.asked, self.closed = runs_dir, address, [], [], False
        self.made.append(self)

    def submit(self, recipe):
        run = store.create(self.runs_dir, recipe)
        self.ids.append(run.id)
        return run

    def held(self):
        return list(self.ids)

    def position(self, run_id):
        return self.ids.index(run_id) + 1 if run_id in self.ids else None

    def stop(self, run):
        self.ids.remove(run.id)

    def machines(self):
        return [{"cpus": 8.0, "gpus": 1.0}, {"cpus": 8.0, "gpus": 0.0}]

    def close(self):
        self.closed = True


@pytest.fixture
def fake(monkeypatch):
    one = type("One", (Fake,), {"made": []})
    monkeypatch.setattr(executors, "RayExecutor", one)
    monkeypatch.setattr(executors.cluster_link, "require_ray", lambda: None)
    monkeypatch.delenv("PRUNEDM_EXECUTOR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return one


def test_runs_go_where_the_choice_says_and_stay_there(fake, tmp_path):
    chosen = Chosen(tmp_path, Choice())
    chosen.choose(Choice("ray", "head:6379"))
    run = chosen.submit(Recipe())
    assert chosen.held() == [run.id] and chosen.position(run.id) == 1
    with pytest.raises(ClusterError, match="1 of the runs are on the cluster head:6379; stop them"):
        chosen.choose(Choice("ray", "other:6379"))
    chosen.choose(Choice())
    assert chosen._current() is chosen.local and chosen.position(run.id) == 1 and not fake.made[0].closed
    chosen.stop(run)
    assert chosen.held() == []
    chosen.choose(Choice("ray", "other:6379"))
    chosen._current()
    assert fake.made[0].closed and fake.made[1].address == "other:6379"


def test_the_choice_is_kept_and_the_environment_is_the_first_one(fake, tmp_path):
    assert Choice.read(tmp_path, {}) == Choice()
    assert Choice.read(tmp_path, {"PRUNEDM_EXECUTOR": "ray", "RAY_ADDRESS": "auto"}) == Choice("ray", "auto")
    Chosen(tmp_path, Choice()).choose(Choice("ray", "head:6379"))
    assert Choice.read(tmp_path, {"PRUNEDM_EXECUTOR": "local"}) == Choice("ray", "head:6379")
    for content in ({"executor": "slurm"}, ["ray"], {"executor": "ray", "address": 5}, {"executor": "ray", "x": 1}):
        (tmp_path / executors.FILE).write_text(json.dumps(content))
        with pytest.raises(store.StoreError, match="delete it and choose again"):
            Choice.read(tmp_path, {})


def test_a_cluster_that_does_not_answer_is_said_when_a_run_is_queued(fake, tmp_path):
    fake.fault = "the Ray cluster head:6379 cannot be used (refused)"
    chosen = Chosen(tmp_path, Choice("ray", "head:6379"))
    with pytest.raises(ClusterError, match=r"cannot be used \(refused\); or choose this machine on the System page"):
        chosen.submit(Recipe())
    assert not store.all_runs(tmp_path)
    run = store.create(tmp_path, Recipe())  # a sweep's
    with pytest.raises(Unreachable):
        chosen.put(run)
    assert run.state().status == "interrupted" and "or choose this machine" in run.state().error


def choose(app, name, address="local"):
    app.radio[0].set_value(name)
    next(one for one in app.text_input if one.label.startswith("Address")).set_value(address)
    next(one for one in app.button if one.label == "Use it").click()
    app.run()
    assert not app.exception
    return app


def test_the_system_page_chooses_and_says_what_is_there(fake, runs):
    fake.gate = threading.Event()
    app = choose(open_page("system"), "ray", "head:6379")
    assert "Connecting to the Ray cluster" in "".join(str(one.value) for one in app.info)
    fake.gate.set()
    lab.jobs()._connecting.join(60)
    text = said(open_page("system"))
    assert "2 machines, 16 CPUs, 1 GPUs" in text.replace("\\", "")
    fake.trouble = "the Ray cluster head:6379 does not answer (ConnectionError: gone)"
    assert "does not answer" in "".join(str(one.value) for one in open_page("system").error)
    fake.trouble = ""
    choose(open_page("system"), "local")
    assert "in this lab's queue" in said(open_page("system")) and lab.jobs().choice.executor == "local"


def test_without_ray_the_page_says_how_to_install_it(runs, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *given: None if name == "ray" else real(name, *given))
    app = choose(open_page("system"), "ray")
    assert "make cluster" in "".join(str(one.value) for one in app.error)
    assert lab.jobs().choice.executor == "local" and executor_views.NAMES["local"] == app.radio[0].options[0]
