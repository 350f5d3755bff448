"""Requests to stop and to pause are answered within one call of the model, in every stage, and cost nothing."""

import threading
import time

import pytest
import torch
from diffusers import UNet2DModel
from test_pause import until
from test_pipeline import assert_same

from prunedm import pipeline, store

CALLS = 2  # of a model between two looks: one, and a second where a step compares two masks or models
CPU_SECONDS = 2.0


@pytest.fixture(scope="module")
def recipe(micro):
    """Long parts in each stage: calibration, a search by measured latency, sampling, judging."""
    return micro(
        prune={"method": "taylor", "calibration_images": 16, "calibration_steps": 4},
        mask={"initial": "fisher"},
        eval={"images": 24, "steps": 4},
    )


class Watch:
    """Counts the models' calls of a run by stage, and what passes between two looks."""

    def __init__(self, run, monkeypatch):
        self.run, self.calls, self.since, self.most, self.longest = run, {}, 0, {}, {}
        self.at_call = lambda stage, number: None
        self.stage, self.last = "before the first", time.thread_time()
        plain = pipeline.Session.give_way

        def give_way(session):
            self.look(session.writer.state.stage)
            plain(session)
            self.last = time.thread_time()  # what it did itself, a checkpoint say, was the answer

        monkeypatch.setattr(pipeline.Session, "give_way", give_way)
        self.hook = torch.nn.modules.module.register_module_forward_pre_hook(self.called)

    def look(self, stage):
        self.most[self.stage] = max(self.most.get(self.stage, 0), self.since)
        spent = time.thread_time() - self.last
        self.longest[self.stage] = max(self.longest.get(self.stage, 0), spent)
        self.since, self.stage = 0, stage or self.stage

    def called(self, module, given):
        if isinstance(module, UNet2DModel):
            self.since += 1
            self.calls[self.stage] = self.calls.get(self.stage, 0) + 1
            self.at_call(self.stage, self.calls[self.stage])


@pytest.fixture
def watched(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNEDM_CACHE", str(tmp_path / "cache"))
    made = []

    def watch(run):
        made.append(Watch(run, monkeypatch))
        return made[0]

    yield watch
    for watch in made:
        watch.hook.remove()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe):
    """An unhurt run, and how often each stage called a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNEDM_CACHE", str(tmp_path_factory.mktemp("cache")))  # or it calls no model at all
        run = store.create(tmp_path_factory.mktemp("whole"), recipe)
        watch = Watch(run, patch)
        assert pipeline.execute(run) == "done", run.state().error
        watch.look("report")
        watch.hook.remove()
    return run, watch


def test_no_stage_calls_a_model_twice_without_looking(whole):
    _, watch = whole
    assert set(watch.calls) >= {"prune", "finetune", "mask", "recover", "evaluate"}, watch.calls
    assert all(most <= CALLS for most in watch.most.values()), watch.most


def test_what_lies_between_two_looks_is_short(whole):
    _, watch = whole
    assert all(seconds < CPU_SECONDS for seconds in watch.longest.values()), watch.longest


@pytest.mark.in_turn(5)
@pytest.mark.parametrize("stage", ["prune", "finetune", "mask", "recover", "evaluate"])
def test_a_stop_asked_for_in_the_middle_of_anything_is_answered_there(whole, watched, tmp_path, stage):
    unhurt, full = whole
    run = store.create(tmp_path, unhurt.recipe())
    watch, middle = watched(run), full.calls[stage] // 3 + 1
    watch.at_call = lambda where, number: (where, number) == (stage, middle) and run.request_stop()
    assert pipeline.execute(run) == "stopped"
    assert run.state().stage == stage and watch.calls[stage] < middle + CALLS
    watch.at_call = lambda where, number: None
    run.take()
    assert pipeline.execute(run) == "done"
    assert_same(unhurt, run)


@pytest.mark.in_turn(5)
@pytest.mark.parametrize("stage", ["prune", "finetune", "mask", "recover", "evaluate"])
def test_a_pause_asked_for_in_the_middle_of_anything_holds_there(whole, watched, tmp_path, stage):
    unhurt, full = whole
    run = store.create(tmp_path, unhurt.recipe())
    watch, middle, held = watched(run), full.calls[stage] // 3 + 1, []

    def go_on():
        until(run, "paused")
        held.append((run.state().stage, watch.calls[stage]))
        run.clear_pause()

    def ask(where, number):
        if (where, number) == (stage, middle):
            run.request_pause()
            threading.Thread(target=go_on, daemon=True).start()

    watch.at_call = ask
    assert pipeline.execute(run) == "done"
    assert len(held) == 1 and held[0][0] == stage and held[0][1] < middle + CALLS
    assert_same(unhurt, run)
