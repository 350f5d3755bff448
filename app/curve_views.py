"""The Monitor's curves: over steps or over time, raw and smoothed, with a logarithmic loss where asked."""

from __future__ import annotations

import streamlit as st

from app import lab
from app.live_plot import live_plot
from prunedm import charts
from prunedm.records import STAGE_LABELS
from prunedm.steps import Steps
from prunedm.store import Run

TRAINING = ("lr", "grad_norm")
SETTLING = (
    *("flips", "entropy", "top_probability", "sample_flips", "tau", "residual", "residual_spread", "tracker"),
    *("advantage", "mask_lr", "mask_grad_norm"),
)
STEPS, TIME = "Steps", "Time"


def training(run: Run) -> None:
    """The loss of every stage, the weights' learning rate and gradient norm."""
    over, smoothing, log = st.columns([2, 3, 2], vertical_alignment="center")
    axis = over.segmented_control(
        "Over", (STEPS, TIME), default=STEPS, required=True, key="curve_axis", persist_state="session"
    )
    weight = smoothing.slider(
        "Smoothing",
        0.0,
        0.99,
        charts.SMOOTHING,
        help="weight of the past in the moving average; 0 shows the figures as recorded",
        key="curve_smoothing",
        persist_state="session",
    )
    is_log = log.toggle("Logarithmic loss", key="log_loss", persist_state="session")
    steps = lab.steps(run)
    if not steps:
        st.caption("Waiting for the first training step…")
        return
    minutes = running_minutes(run, steps) if axis == TIME else None
    figure = charts.curve(steps, "loss", STAGE_LABELS, run.id, charts.Look(is_log, weight, minutes))
    live_plot(figure, "curve-loss", f"Training loss over the {axis.lower()} of each stage")
    pairs(run, steps, TRAINING, charts.Look(False, weight, minutes))


def settling(run: Run) -> None:
    """How the masks settle: each figure of stage 2 over the steps."""
    steps = lab.steps(run)
    pairs(run, steps, SETTLING, charts.Look())
    if "tracker.0" in steps.names:
        timesteps = next((e["timesteps"] for e in lab.events(run, "baseline")), 1000)
        figure = charts.tracker_by_bin(steps, timesteps, run.id)
        live_plot(figure, "curve-tracker-bins", "Loss tracker of each timestep bin over the mask steps")


def pairs(run: Run, steps: Steps, names: tuple[str, ...], look: charts.Look) -> None:
    """Two charts a row, of those figures that the run recorded."""
    there = [name for name in names if name in steps.names]
    for left in range(0, len(there), 2):
        for column, name in zip(st.columns(2), there[left : left + 2]):
            with column:
                figure = charts.curve(steps, name, STAGE_LABELS, run.id, look)
                live_plot(figure, f"curve-{name}", f"{charts.LABELS[name]} over the steps")


def running_minutes(run: Run, steps: Steps) -> list[float]:
    return charts.running_minutes(steps.times, [event["time"] for event in lab.events(run, "started")])
