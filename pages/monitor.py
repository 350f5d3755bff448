"""Monitor: one run as it happens. The page reads the run folder and nothing else."""

from pathlib import Path

import streamlit as st

from app import lab, mask_views, parts, system_views
from app.live_plot import live_plot
from prunedm import charts
from prunedm.records import RESUMABLE, STAGE_LABELS
from prunedm.store import Run, stage_step

EVERY_PROGRESS, EVERY_CURVES, EVERY_MASKS, EVERY_SAMPLES = 1.0, 2.0, 5.0, 2.0
CURVES = (
    *("flips", "entropy", "top_probability", "sample_flips", "tau", "residual", "residual_spread", "tracker"),
    *("advantage", "mask_lr", "lr", "mask_grad_norm", "grad_norm"),
)


def header(run: Run, live: bool) -> None:
    card = lab.card(run)
    if live and not card.active:
        st.rerun()
    if card.problem:
        st.error(parts.plain(card.problem))
        return
    chip, bar, actions = st.columns([1, 5, 2], vertical_alignment="center")
    with chip:
        parts.state_chip(card.status)
    with bar:
        show_progress(card)
    with actions, parts.said():
        show_actions(card)
    if live:
        system_views.strip(run)
    for alert in lab.events(run, "alert"):
        what, text, remedy = (parts.plain(alert[key]) for key in ("what", "text", "remedy"))
        st.warning(f"**{what.capitalize()}** at step {alert['step']}: {text}. What to do: {remedy}.", icon="⚠️")


def show_progress(card: lab.Card) -> None:
    place = lab.jobs().position(card.run.id)
    if card.status == "done":
        st.progress(1.0, text=f"Done in {parts.duration(card.state.seconds)}")
    elif place is not None:
        st.progress(0.0, text=f"Number {place} in the queue")
    else:
        parts.progress(card.state)
    done = len(card.state.stages_done)
    st.caption(f"{done} of {len(STAGE_LABELS)} stages done · {parts.duration(card.state.seconds)} of running")


def show_actions(card: lab.Card) -> None:
    if card.active:
        with st.container(horizontal=True):
            pause_action(card)
            stop_action(card)
    elif card.status in RESUMABLE:
        if st.button("Resume", type="primary", width="stretch"):
            lab.jobs().resume(card.run)
            st.rerun()
    else:
        st.page_link(lab.ROOT / "pages" / "compare.py", label="Compare", query_params={"runs": card.run.id})


def stop_action(card: lab.Card) -> None:
    with st.popover("Stop", width="stretch", disabled=card.status == "stopping"):
        st.write("The run stops after the step at hand and keeps a checkpoint; Resume goes on from there.")
        if st.button("Stop this run", type="primary"):
            lab.jobs().stop(card.run)
            st.rerun()


def pause_action(card: lab.Card) -> None:
    """Pause, or Continue where the run holds."""
    if card.status == "paused":
        if st.button("Continue", type="primary", width="stretch"):
            card.run.clear_pause()
            st.rerun()
    elif card.status == "running":
        asked = card.run.pause_requested()
        what = "Holds after the step at hand, with a checkpoint. It keeps its memory; runs behind it in the queue wait."
        if st.button("Pausing…" if asked else "Pause", disabled=asked, help=what, width="stretch"):
            card.run.request_pause()
            st.rerun()


def curves(run: Run) -> None:
    log = st.toggle("Logarithmic loss", key="log_loss")
    records = lab.metrics(run)
    if not records:
        st.caption("Waiting for the first training step…")
        return
    figure = charts.curve(records, "loss", STAGE_LABELS, run.id, log)
    live_plot(figure, "curve-loss", "Training loss over the steps of each stage")
    keys = [k for k in CURVES if any(k in r for r in records)]
    for left in range(0, len(keys), 2):
        for column, name in zip(st.columns(2), keys[left : left + 2]):
            with column:
                figure = charts.curve(records, name, STAGE_LABELS, run.id)
                live_plot(figure, f"curve-{name}", f"{charts.LABELS[name]} over the steps")
    if any("tracker.0" in r for r in records):
        steps = next((e["timesteps"] for e in lab.events(run, "baseline")), 1000)
        figure = charts.tracker_by_bin(records, steps, run.id)
        live_plot(figure, "curve-tracker-bins", "Loss tracker of each timestep bin over the mask steps")


def samples(run: Run) -> None:
    paths = {path.stem: path for path in run.samples()}
    if not paths:
        st.caption("The first samples appear in a few seconds.")
        return
    chosen = parts.step_slider("Time", list(paths), f"samples {run.id}", lambda stem: moment(paths[stem]))
    st.caption("The same 16 seeds every time, 10 DDIM steps: a quick look, not the evaluation.")
    parts.sheet(paths[chosen], alt=f"16 samples at {moment(paths[chosen])}", factor=3)


def moment(path: Path) -> str:
    """A sample sheet's file name in words."""
    stage, step = stage_step(path)
    return f"{STAGE_LABELS.get(stage, 'Dense model')}, step {step}" if step else STAGE_LABELS.get(stage, "Dense model")


def section(draw, run: Run, every: float) -> None:
    """A part of the page that follows the run's folder while there is something to follow."""

    @st.fragment(run_every=every if is_live else None)
    def show() -> None:
        with parts.said():
            draw(run)

    show()


st.title("Monitor")
all_cards = lab.cards()
if not all_cards:
    parts.empty("No runs yet.", "home", "Run the demo")
    st.stop()
card = parts.choose_run(all_cards)
if card.problem:
    st.error(f"This run cannot be read: {parts.plain(card.problem)}")
    st.stop()
is_live = card.active
section(lambda run: header(run, is_live), card.run, EVERY_PROGRESS)
if card.status == "failed":
    parts.failure(card)
tabs = st.tabs(["Curves", "Masks", "Compliance", "Samples", "Log", "Recipe", "System"])
parts_of_tabs = [
    (curves, EVERY_CURVES),
    (mask_views.evolution, EVERY_MASKS),
    (mask_views.compliance, EVERY_MASKS),
    (samples, EVERY_SAMPLES),
    (parts.log, EVERY_CURVES),
]
for tab, (draw_tab, seconds) in zip(tabs, parts_of_tabs):
    with tab:
        section(draw_tab, card.run, seconds)
with tabs[-2]:
    st.code(card.recipe.to_yaml(), language="yaml")
with tabs[-1]:
    section(system_views.tab, card.run, EVERY_CURVES)
