"""The Monitor's curves: over steps or over time, raw and smoothed, with a logarithmic loss where asked."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import lab
from app.live_plot import live_plot
from prunedm import charts
from prunedm.records import STAGE_LABELS
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
    records = lab.metrics(run)
    if not records:
        st.caption("Waiting for the first training step…")
        return
    minutes = running_minutes(run, records) if axis == TIME else None
    figure = charts.curve(records, "loss", STAGE_LABELS, run.id, charts.Look(is_log, weight, minutes))
    live_plot(figure, "curve-loss", f"Training loss over the {axis.lower()} of each stage")
    pairs(run, records, TRAINING, charts.Look(False, weight, minutes))


def settling(run: Run) -> None:
    """How the masks settle: each figure of stage 2 over the steps."""
    records = lab.metrics(run)
    pairs(run, records, SETTLING, charts.Look())
    if any("tracker.0" in r for r in records):
        steps = next((e["timesteps"] for e in lab.events(run, "baseline")), 1000)
        figure = charts.tracker_by_bin(records, steps, run.id)
        live_plot(figure, "curve-tracker-bins", "Loss tracker of each timestep bin over the mask steps")


def pairs(run: Run, records: list[dict[str, Any]], names: tuple[str, ...], look: charts.Look) -> None:
    """Two charts a row, of those figures that the run recorded."""
    recorded = set().union(*records)
    there = [name for name in names if name in recorded]
    for left in range(0, len(there), 2):
        for column, name in zip(st.columns(2), there[left : left + 2]):
            with column:
                figure = charts.curve(records, name, STAGE_LABELS, run.id, look)
                live_plot(figure, f"curve-{name}", f"{charts.LABELS[name]} over the steps")


def running_minutes(run: Run, records: list[dict[str, Any]]) -> list[float]:
    starts = [event["time"] for event in lab.events(run, "started")]
    return charts.running_minutes([record["time"] for record in records], starts)
