"""Figures as plain dictionaries: the points are the records', in steps or minutes, smoothed as TensorBoard does."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import mask_views
from prunedm import charts, model_charts, snapshots
from prunedm.steps import Steps

RECORDS = [{"stage": "finetune", "step": i, "loss": float(i), "lr": 0.1} for i in range(1, 21)]
RECORDS += [{"stage": "mask", "step": i, "loss": 100.0 + i} for i in range(1, 21)]
LABELS = {"finetune": "Fine-tune", "mask": "Masks"}


def lines(look):
    return charts.curve(Steps.of(RECORDS), "loss", LABELS, "run", look)["data"]


def test_stages_follow_one_another_and_each_has_a_shadow_and_a_smoothed_line():
    raw, smooth, later, _ = lines(charts.Look())
    assert raw["x"] == list(range(1, 21)) and later["x"] == list(range(21, 41))
    assert raw["y"] == [float(i) for i in range(1, 21)] and raw["opacity"] < smooth.get("opacity", 1)
    assert smooth["name"] == "Fine-tune" and later["name"] == "Masks"


def test_without_smoothing_the_line_is_the_record():
    assert [line["y"] for line in lines(charts.Look(smoothing=0.0))] == [
        [float(i) for i in range(1, 21)],
        [100.0 + i for i in range(1, 21)],
    ]


def test_over_time_each_record_lies_at_its_minute():
    minutes = [i / 2 for i in range(40)]
    first, second = lines(charts.Look(smoothing=0.0, minutes=minutes))
    assert first["x"] == minutes[:20] and second["x"] == minutes[20:]


def test_zoom_is_kept_for_a_view_and_not_between_axes():
    def view(look):
        return charts.curve(Steps.of(RECORDS), "loss", LABELS, "run", look)["layout"]["uirevision"]

    assert view(charts.Look()) == view(charts.Look(smoothing=0.5))
    assert len({view(charts.Look()), view(charts.Look(log=True)), view(charts.Look(minutes=[0.0] * 40))}) == 3


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.floats(0, 0.99))
def test_smoothing_is_the_debiased_moving_average(values, weight):
    total = norm = 0.0
    expected = []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        expected.append(total / norm)
    assert charts.smoothed(np.array(values), weight) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_long_run_is_drawn_with_few_points():
    records = [{"stage": "mask", "step": i, "loss": 1.0} for i in range(1, 25_001)]
    for line in charts.curve(Steps.of(records), "loss", LABELS, "run")["data"]:
        assert len(line["x"]) <= charts.LARGEST_TRACE


@pytest.mark.parametrize("narrow", [False, True])
def test_the_pair_of_a_mask_zooms_as_one_and_shares_no_space(narrow):
    drawn = charts.mask_pair(0.2, "run/layer", narrow)["layout"]
    assert drawn["xaxis2"]["matches"] == "x" and drawn["yaxis2"]["matches"] == "y"
    across = drawn["xaxis"]["domain"][1] <= drawn["xaxis2"]["domain"][0]
    down = drawn["yaxis2"]["domain"][1] <= drawn["yaxis"]["domain"][0]
    assert (across, down) == (not narrow, narrow)
    assert json.dumps(drawn)


def test_frames_are_spread_evenly_with_the_first_and_the_last(tmp_path):
    paths = [tmp_path / str(i) for i in range(500)]
    chosen = mask_views.spread(paths)
    assert len(chosen) == len(set(chosen)) == mask_views.MOST_FRAMES
    assert chosen[0] == paths[0] and chosen[-1] == paths[-1] and chosen == sorted(chosen, key=paths.index)
    assert mask_views.spread(paths[:7]) == paths[:7]


def test_a_frames_shares_are_those_of_the_snapshot(tmp_path):
    rng = np.random.default_rng(0)
    masks = [(rng.random((6, 4)) < 0.5).astype(np.uint8) for _ in range(2)]
    paths = [tmp_path / f"mask-{i:07d}.npz" for i in (0, 5)]
    for path, mask in zip(paths, masks):
        snapshots.write(path, [mask])
    layer = {"layer": "a", "offset": 0, "shape": [6, 4]}
    assert np.array_equal(mask_views.kept(paths[1], layer), masks[1])
    assert np.array_equal(mask_views.changed(paths[1], paths[0], layer), masks[0] != masks[1])


def test_runs_lie_over_one_another_in_colours_of_their_own_with_one_name_each():
    stages = [
        {"stage": s, "step": i, "loss": float(i), "entropy": 0.5} for s in ("mask", "recover") for i in range(1, 41)
    ]
    runs = [(f"<b>{n}", Steps.of(stages[: 40 * (n + 1)]), charts.Look()) for n in range(2)]
    drawn = model_charts.run_curves(runs, "loss", "view")
    named = [trace for trace in drawn["data"] if trace["showlegend"]]
    assert [trace["name"] for trace in named] == ["&lt;b&gt;0", "&lt;b&gt;1"]
    colours = {trace["legendgroup"]: set() for trace in drawn["data"]}
    for trace in drawn["data"]:
        colours[trace["legendgroup"]].add(trace["line"]["color"])
    assert all(len(own) == 1 for own in colours.values()) and colours["0"] != colours["1"]
    second = [trace for trace in drawn["data"] if trace["legendgroup"] == "1"]
    assert [(trace["x"][0], trace["x"][-1]) for trace in second] == [(1, 40), (1, 40), (41, 80), (41, 80)]
    assert second[0]["y"] == [float(i) for i in range(1, 41)] and second[1]["y"] != second[0]["y"]
    assert len(model_charts.run_curves(runs, "entropy", "view")["data"]) == 3, "what is not noisy has no shadow"
    assert json.dumps(drawn)
