"""Figures as plain dictionaries: the points are the records', in steps or minutes, smoothed as TensorBoard does."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import mask_views
from prunedm import charts, model_charts, palettes, snapshots
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


@pytest.mark.parametrize("count", [0, 1, 7, 999, 1000, 1001, 1999, 100_000])
def test_a_long_trace_is_thinned_and_keeps_its_ends(count):
    places = charts.thinned(count)
    assert len(places) <= charts.LARGEST_TRACE and len(set(places)) == len(places)
    assert list(places[:1]) == [0][:count] and list(places[-1:]) == [count - 1][:count]
    assert len(places) >= min(count, charts.LARGEST_TRACE // 2)


def test_a_tracker_that_was_never_recorded_has_no_points():
    steps = Steps.of([{"stage": "mask", "step": i, "tracker.0": float("nan")} for i in range(1, 4)])
    (trace,) = charts.tracker_by_bin(steps, 1000, "run")["data"]
    assert trace["x"] == trace["y"] == []


def test_frames_are_spread_evenly_with_the_first_and_the_last(tmp_path):
    paths = [tmp_path / str(i) for i in range(500)]
    chosen = charts.spread(paths, mask_views.MOST_FRAMES)
    assert len(chosen) == len(set(chosen)) == mask_views.MOST_FRAMES
    assert chosen[0] == paths[0] and chosen[-1] == paths[-1] and chosen == sorted(chosen, key=paths.index)
    assert charts.spread(paths[:7], mask_views.MOST_FRAMES) == paths[:7]


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


def masked(pattern, balance, sets=None):
    """A masked layer as layers.json has it."""
    return {
        "layer": "mid_block.resnets.0.conv1", "pattern": pattern, "compliance": 1.0, "density": sum(sets or [1]) / 2,
        "position_balance": balance, "pattern_shares": sets,
    }  # fmt: skip


def cells(trace):
    """The colour of each cell that words stand on, and those words."""
    low, high = trace["zmin"], trace["zmax"]
    for values, words in zip(trace["z"], trace["text"]):
        for value, word in zip(values, words):
            if value is not None:
                yield palettes.at(trace["colorscale"], (value - low) / (high - low)), word


def test_contrast_is_that_of_wcag():
    assert palettes.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palettes.contrast("#777777", "#ffffff") == palettes.contrast("#ffffff", "#777777")
    assert palettes.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("even", [0.02, 1 / 6, 0.5])
def test_words_are_read_on_every_colour_of_a_cell_and_of_a_bar(even):
    scales = (palettes.SHARES, palettes.around(even))
    grounds = [palettes.at(scale, i / 200) for scale in scales for i in range(201)] + [*charts.VARIANT_COLORS.values()]
    assert min(palettes.contrast(palettes.CELL_TEXT, ground) for ground in grounds) >= palettes.LEAST_CONTRAST
    bars = model_charts.bars({"a": 1.0}, ["nm"], "t")["data"][0]
    assert bars["textfont"]["color"] == palettes.CELL_TEXT


def test_an_uneven_position_stands_out_of_even_ones_and_each_cell_says_its_share():
    layers = [masked("2:4", [0.25, 0.29, 0.21, 0.25]), masked("1:2", [0.5, 0.5])]
    drawn = charts.compliance_heatmap(layers, "view")
    (shares, positions), axes = drawn["data"], drawn["layout"]
    assert positions["xaxis"] == "x2" and axes["xaxis"]["domain"][1] == axes["xaxis2"]["domain"][0] == 2 / 6
    assert all(trace["textfont"]["color"] == palettes.CELL_TEXT for trace in (shares, positions))
    assert [word for _, word in cells(shares)][:2] == ["100%", "50%"]
    colors, words = zip(*cells(positions))
    assert words == ("25%", "29%", "21%", "25%", "50%", "50%")
    assert {colors[0], *colors[3:]} == {palettes.EVEN} and len({palettes.EVEN, colors[1], colors[2]}) == 3


def test_an_even_share_of_the_kept_sets_is_the_lightest_colour():
    for shares in ([0.1, 0.2, 0.3, 0.1, 0.2, 0.1], [1.0, 0, 0, 0, 0, 0], [1 / 6] * 6):
        (trace,) = charts.kept_sets_heatmap([masked("2:4", [], shares)], 2, 4, "view")["data"]
        middle = (1 / 6 - trace["zmin"]) / (trace["zmax"] - trace["zmin"])
        assert palettes.at(trace["colorscale"], middle) == palettes.EVEN and trace["zmin"] >= 0
        assert trace["zmin"] <= min(shares) and trace["zmax"] >= max(shares)
    many = [1 / 20] * 20
    assert "text" not in charts.kept_sets_heatmap([masked("3:6", [], many)], 3, 6, "view")["data"][0]


@pytest.mark.parametrize("bins", [1, 10, 14])
def test_each_timestep_bin_has_its_own_colour_darker_the_cleaner(bins):
    records = [{"stage": "mask", "step": i, **{f"tracker.{b}": 0.1 for b in range(bins)}} for i in range(1, 5)]
    drawn = charts.tracker_by_bin(Steps.of(records), 1000, "view")["data"]
    lightness = [palettes.contrast(trace["line"]["color"], "#000000") for trace in drawn]
    assert len(drawn) == bins and lightness == sorted(set(lightness))
