"""Curves of one run on Monitor and of several on Compare: over steps or time, raw and smoothed, on a logarithmic scale
where asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import streamlit as st

from app import lab, live_plot, parts
from prunedm import charts, model_charts
from prunedm.records import STAGE_LABELS
from prunedm.steps import Steps
from prunedm.store import Run

TRAINING = ("validation_loss", "lr", "grad_norm")  # below the training loss, where they were recorded
SETTLING = (
    *("flips", "entropy", "top_probability", "sample_flips", "tau", "residual", "residual_spread", "tracker"),
    *("advantage", "mask_lr", "mask_grad_norm"),
)
STEPS, TIME = "Steps", "Time"
ALL = "all"  # stages: no value of a list that shows one may be None


def controls() -> tuple[str, charts.Look]:
    """How curves are looked at, alike on Monitor and Compare: over what, and smoothed how, on which scale."""
    over, smoothing, log = st.columns([2, 3, 2], vertical_alignment="center")

    def slider() -> float:
        weight = smoothing.slider(
            "Smoothing",
            0.0,
            0.99,
            help="weight of the past in the moving average; 0 shows the figures as recorded",
            key="curve_smoothing",
            persist_state="session",
        )
        return round(weight, 2)

    axis = parts.linked(
        "over", "curve_axis", {one.lower(): one for one in (STEPS, TIME)}, STEPS,
        lambda: over.segmented_control(
            "Over", (STEPS, TIME), required=True, key="curve_axis", persist_state="session"
        ),
    )  # fmt: skip
    weights = {f"{i / 100:g}": i / 100 for i in range(100)}
    weight = parts.linked("smoothing", "curve_smoothing", weights, charts.SMOOTHING, slider)
    is_log = parts.linked(
        "log", "log_loss", {"yes": True, "no": False}, False,
        lambda: log.toggle("Logarithmic loss", key="log_loss", persist_state="session"),
    )  # fmt: skip
    return axis, charts.Look(is_log, weight)


def training(run: Run, every: float | None) -> None:
    """The losses of every stage, the weights' learning rate and gradient norm, looked at as the controls say.

    every: seconds between two drawings of a chart while the run is active; None: it is not.
    """
    axis, look = controls()
    steps = lab.steps(run)
    if not steps:
        st.caption("Waiting for the first training step…")
        return

    def follow(name: str) -> None:
        live_plot.follow(f"curve-{name}", functools.partial(_figure_now, run, name, axis, look), every)

    follow("loss")
    two_a_row([name for name in TRAINING if name in steps.names], follow)


def _figure_now(run: Run, name: str, axis: str, look: charts.Look) -> tuple[charts.Figure, str]:
    """A figure of a run as it is now, and what it shows in words."""
    steps = lab.steps(run)
    minutes = running_minutes(run, steps) if axis == TIME else None
    figure = charts.curve(
        steps, name, STAGE_LABELS, run.id, replace(look, minutes=minutes, log=look.log and name in charts.LOSSES)
    )
    over = f"the {axis.lower()} of each stage" if name in charts.LOSSES else "the steps"
    label = charts.LABELS[name]
    return figure, f"{label[0].upper()}{label[1:]} over {over}"


def settling(run: Run, every: float | None) -> None:
    """How the masks settle: each figure of stage 2 over the steps, smoothed and followed as the training curves are."""
    names, look = lab.steps(run).names, charts.Look(smoothing=st.session_state.get("curve_smoothing", charts.SMOOTHING))

    def follow(name: str) -> None:
        live_plot.follow(f"curve-{name}", functools.partial(_figure_now, run, name, STEPS, look), every)

    two_a_row([name for name in SETTLING if name in names], follow)
    if "tracker.0" in names:
        live_plot.follow("curve-tracker-bins", functools.partial(_tracker_now, run), every)


def _tracker_now(run: Run) -> tuple[charts.Figure, str]:
    timesteps = next((e["timesteps"] for e in lab.events(run, "baseline")), 1000)
    figure = charts.tracker_by_bin(lab.steps(run), timesteps, run.id)
    return figure, "Loss tracker of each timestep bin over the mask steps"


def two_a_row(names: list[str], draw: Callable[[str], None]) -> None:
    for left in range(0, len(names), 2):
        for column, name in zip(st.columns(2), names[left : left + 2]):
            with column:
                draw(name)


def side_by_side(runs: dict[str, Run]) -> None:
    """One figure of several runs, by the names that they are shown under, in one chart."""
    known = {name: lab.steps(run) for name, run in runs.items()}
    there = [key for key in charts.LABELS if any(key in steps.names for steps in known.values())]
    if not there:
        st.caption("None of these runs has taken a training step yet.")
        return
    key, stage = choose_figure(there, [one.stage for steps in known.values() for one in steps.stretches])
    axis, look = controls()
    look = replace(look, log=look.log and key in charts.LOSSES)
    drawn = []
    for name, steps in known.items():
        own, minutes = part(runs[name], steps, stage, axis == TIME)
        if key in own.names:
            drawn.append((name, own, replace(look, minutes=minutes)))
    if not drawn:
        st.caption(f"No run here recorded this figure in the stage {STAGE_LABELS.get(stage, stage)}.")
        return
    where = STAGE_LABELS.get(stage, stage) if stage else "all stages"
    names = [name for name, *_ in drawn]
    live_plot.live_plot(
        model_charts.run_curves(drawn, key, ",".join(names), where),
        "compare-curves",
        f"{charts.LABELS[key]} over the {axis.lower()} of {where}: {', '.join(names)}",
    )
    missing = [name for name in runs if name not in names]
    if missing:
        st.caption(f"Not recorded there: {parts.plain(', '.join(missing))}.")


def choose_figure(there: list[str], stages: list[str]) -> tuple[str, str | None]:
    """A figure, and one stage or None for all of them."""
    left, right = st.columns(2)
    key = parts.linked(
        "figure", "compare_figure", {one: one for one in there}, there[0],
        lambda: left.selectbox(
            "Figure", there, format_func=charts.LABELS.get, key="compare_figure", persist_state="session"
        ),
    )  # fmt: skip
    known = {one: one for one in (ALL, *stages)}
    stage = parts.linked(
        "stage", "compare_stage", known, ALL,
        lambda: right.selectbox(
            "Stage",
            list(known),
            format_func=lambda one: "all stages" if one == ALL else STAGE_LABELS.get(one, one),
            key="compare_stage",
            persist_state="session",
            help="one stage alone begins at zero in every run, whatever came before it",
        ),
    )  # fmt: skip
    return key, None if stage == ALL else stage


def part(run: Run, steps: Steps, stage: str | None, in_time: bool) -> tuple[Steps, list[float] | None]:
    """A run's records, or those of one stage alone, with their minutes since the first of them where asked."""
    minutes = running_minutes(run, steps) if in_time else None
    if stage is None:
        return steps, minutes
    at, kept, own = 0, [], []
    for stretch in steps.stretches:
        if stretch.stage == stage:
            kept.append(stretch)
            own += minutes[at : at + len(stretch)] if minutes else []
        at += len(stretch)
    return Steps(tuple(kept)), [minute - own[0] for minute in own] if minutes else None


def running_minutes(run: Run, steps: Steps) -> list[float]:
    return charts.running_minutes(steps.times, [event["time"] for event in lab.events(run, "started")])
