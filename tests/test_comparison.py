"""Pareto fronts against brute force, and figures that are compared only where they may be."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunedm import comparison, figures
from prunedm.comparison import Judged

SAMPLING = {"sampler": "ddim", "steps": 25, "eta": 0.0, "seed": 0, "extractor": "bundled", "data": "images"}
DENSE = {
    "parameters": 100, "nonzero_parameters": 100, "macs": 1000, "validation_loss": 0.04, "validation_images": 512,
    "fid": 1.0, "fid_std": 0.03, "fid_extractor": "FD-fashion", "fid_images": 512, "sampling": SAMPLING,
    "latency_ms": 10.0, "device": "cpu", "dtype": "float32", "batch": 8,
    "sizes": {"dense_fp16": 200, "packed_fp16": 200}, "noise_floor": {"samples": {"fid": 0.2}},
}  # fmt: skip
SMALL = DENSE | {"macs": 600, "macs_sparse": 300, "fid": 1.04, "latency_ms": 7.0, "validation_loss": 0.042}
SMALL |= {"nonzero_parameters": 50, "sizes": {"dense_fp16": 120, "packed_fp16": 50}}

points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points)
def test_the_front_is_that_of_brute_force(found):
    on = comparison.front(found)
    for i, (x, y) in enumerate(found):
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in found)
        assert on[i] == (not beaten)
    assert any(on), "some point is never beaten"


@given(points)
def test_equals_stand_on_the_front_together(found):
    on = comparison.front([*found, *found])
    assert on[: len(found)] == on[len(found) :]


def judged(figures, label="model", dense=None):
    return Judged(label, figures, dense=dense)


def test_pareto_compares_only_what_holds_for_the_same_conditions():
    other = SMALL | {"fid_images": 128, "device": "gpu"}
    plots = comparison.pareto([judged(DENSE, "a"), judged(SMALL, "b"), judged(other, "c")])
    by_axes = {(p.quality.key, p.cost.key): [j.label for j in p.judged] for p in plots}
    assert by_axes["fid", "macs"] == ["a", "b"] and by_axes["validation_loss", "macs"] == ["a", "b", "c"]
    assert by_axes["validation_loss", "latency_ms"] == ["a", "b"]
    assert by_axes["fid", "nonzero_parameters"] == ["a", "b"], "latency, parameters, MACs and bytes are all costs"
    assert comparison.pareto([judged(DENSE)]) == [], "one model has nothing to be compared with"


def fronts_of(*given):
    """Axes of each plot, and the models on it."""
    plots = comparison.pareto([judged(one, str(i)) for i, one in enumerate(given)])
    return {(plot.quality.key, plot.cost.key): "".join(one.label for one in plot.judged) for plot in plots}


def by_images(**changes):
    return SMALL | {"sampling": SAMPLING | changes}


def test_folders_of_one_name_are_other_images():
    a, b = (by_images(data="train", digest=digest) for digest in ("aa", "bb"))
    assert fronts_of(a, b) == {}, "neither distance nor loss is over the same images"
    assert comparison.efficiency(judged(a, dense=b))["fid"] is None
    assert comparison.efficiency(judged(a, dense=b))["validation_loss"] is None
    labels = [label for label, _ in figures.rows([judged(a, "a"), judged(b, "b")]) if label.startswith(("FD", "Valid"))]
    assert len(labels) == 4 and sum("real images train (aa)" in label for label in labels) == 2
    assert fronts_of(a, by_images(data="copy", digest="aa"))["fid", "macs"] == "01", "the same images elsewhere"
    old = by_images(data="train")
    assert fronts_of(old, a)["fid", "macs"] == fronts_of(b, old)["fid", "macs"] == "01", "older records have names only"
    assert fronts_of(old, a, b)["fid", "macs"] == "01", "one that may be either joins no two that differ"


def test_two_machines_share_no_front_of_latency():
    here, there = (SMALL | {"host": host, "processor": "same"} for host in ("one", "two"))
    assert ("fid", "latency_ms") not in fronts_of(here, there) and fronts_of(here, there)["fid", "macs"] == "01"
    assert ("fid", "latency_ms") not in fronts_of(here, here | {"processor": "another"})
    assert fronts_of(here, SMALL)["fid", "latency_ms"] == "01", "older records name no machine"
    assert comparison.efficiency(judged(here, dense=there))["latency"] is None
    rows = [label for label, _ in figures.rows([judged(here), judged(there)]) if label.startswith("Latency")]
    assert len(rows) == 2 and "on one (same)" in rows[0] and "on two (same)" in rows[1]
    assert not [label for label, _ in figures.rows([judged(here)]) if "on one" in label]


def test_absent_figures_keep_a_model_off_the_plot():
    plots = comparison.pareto([judged(DENSE), judged(SMALL), judged({**SMALL, "fid": None, "latency_ms": None})])
    assert {len(p.judged) for p in plots if p.quality.key == "fid" or p.cost.key == "latency_ms"} == {2}


def test_efficiency_is_a_ratio_to_the_models_own_dense_one():
    found = comparison.efficiency(judged(SMALL, dense=DENSE))
    assert found == pytest.approx(
        {"compression": 4.0, "macs": 0.6, "macs_sparse": 0.3, "latency": 0.7, "validation_loss": 1.05, "fid": 1.04}
    )
    assert set(comparison.efficiency(judged(DENSE)).values()) == {None}
    elsewhere = comparison.efficiency(judged(SMALL | {"device": "gpu", "fid_images": 64}, dense=DENSE))
    assert elsewhere["latency"] is None and elsewhere["fid"] is None and elsewhere["macs"] == 0.6


@pytest.mark.parametrize(
    ("sessions", "ratio"), [((None, None), 0.7), (("a", "a"), 0.7), (("a", "b"), None), ((None, "a"), None)]
)
def test_latencies_of_two_sessions_have_no_ratio(sessions, ratio):
    own, dense = ({"speed_session": session} for session in sessions)
    one = judged(SMALL | own, dense=DENSE | dense)
    assert comparison.efficiency(one)["latency"] == pytest.approx(ratio)
    assert comparison.timed_apart(one) == ("" if ratio else "timed in another session than the dense model")
    untimed = judged(SMALL | own | {"latency_ms": None}, dense=DENSE | dense)
    assert comparison.timed_apart(untimed) == "" and comparison.efficiency(untimed)["latency"] is None


@pytest.mark.parametrize(
    ("fid", "parts"),
    [
        (
            1.04,
            [
                "+0.040 (+4.0%)",
                "no more than other seeds could",
                f"{2 * math.hypot(0.03, 0.03):.3f}",
                "below the noise",
            ],
        ),
        (1.15, ["+0.150", "more than other seeds would", "below the noise floor"]),
        (1.5, ["+0.500 (+50.0%)", "more than other seeds would", "above the noise floor, the 0.200"]),
        (0.5, ["-0.500", "more than other seeds would", "below the noise floor"]),
    ],
)
def test_the_verdict_says_whether_seeds_explain_the_difference(fid, parts):
    text = comparison.verdict(judged(SMALL | {"fid": fid}, dense=DENSE))
    assert all(part in text for part in parts), text


def test_there_is_no_verdict_across_conditions_and_none_without_noise():
    assert comparison.verdict(judged(SMALL | {"fid_images": 64}, dense=DENSE)) == ""
    assert comparison.verdict(judged(DENSE)) == ""
    bare = {k: v for k, v in DENSE.items() if k not in ("fid_std", "noise_floor")}
    assert "no noise was measured" in comparison.verdict(judged(SMALL, dense=bare))


def test_runs_that_share_their_dense_model_show_it_once():
    one, two = (Judged(f"run {i} dense", dict(DENSE), "dense") for i in (1, 2))
    other = Judged("run 3 dense", DENSE | {"fid": 2.0}, "dense")
    assert comparison.without_repeats([one, judged(SMALL), two, other]) == [one, judged(SMALL), other]


def test_the_loss_changes_in_pairs_far_more_surely_than_the_loss_itself_is_known():
    rng = np.random.default_rng(0)
    dense = rng.exponential(0.04, 512)
    errors = dense * 1.05 + rng.normal(0, 0.0005, 512)
    pair = [{"validation_errors": list(e), "validation_images": 512, "sampling": SAMPLING} for e in (errors, dense)]
    mean, low, high = comparison.loss_change(judged(pair[0], dense=pair[1]))
    assert mean == pytest.approx(errors.mean() / dense.mean() - 1)
    assert low < 0.05 < high and high - low < 0.01
    alone = np.quantile(errors[rng.integers(512, size=(500, 512))].mean(1), [0.025, 0.975]) / errors.mean()
    assert alone[1] - alone[0] > 10 * (high - low)
    text = comparison.verdict(judged(pair[0], dense=pair[1]))
    assert "validation loss changed by +4.9% (95 % interval over pairs: +4." in text
    assert comparison.loss_change(judged(pair[0] | {"validation_images": 100}, dense=pair[1])) is None
    assert comparison.loss_change(judged(pair[0])) is None


def test_the_interval_of_pairs_covers_the_true_change():
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        dense = rng.exponential(0.04, 200)
        errors = dense * rng.normal(1.03, 0.1, 200)
        figures = [{"validation_errors": list(e), "validation_images": 200} for e in (errors, dense)]
        _, low, high = comparison.loss_change(judged(figures[0], dense=figures[1]), 300)
        hits += low <= 0.03 <= high
    assert 85 <= hits <= 100  # of 100; 95 promised
