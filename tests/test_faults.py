"""Damage done on purpose: what a run survives, and with what result."""

import random

import faulty
import pytest
from test_pipeline import assert_same

from prunedm import store
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
