"""Monitor: one run as it happens. The page reads the run folder and nothing else."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from app import curve_views, forms, lab, live, mask_views, pace, parts, system_views
from prunedm.failure import DISK_FULL
from prunedm.recipe import Recipe, flatten
from prunedm.records import RESUMABLE, STAGE_LABELS
from prunedm.store import SYSTEM, Run, stage_step

EVERY = 2.0  # seconds between two looks at curves, the machine and the log
EVERY_FILES = 5.0  # seconds at least between two turns of the page for new files of the open tab


def header(card: lab.Card) -> None:
    """State, progress and buttons. Only the progress is live: another state, or an alert, draws the page again."""
    chip, bar, actions = st.columns([1, 5, 2], vertical_alignment="center")
    alerts = lab.events(card.run, "alert")
    with chip:
        parts.state_chip(card.status)
    with bar:
        if is_live:
            files = functools.partial(TABS[open_tab()].files, card.run)
            drawn = files()
            later = pace.held(drawn, files, EVERY_FILES)
            look = lambda: progress(lab.card(card.run), later())  # noqa: E731
            live.line("progress", progress(card, drawn), look, parts.EVERY_PROGRESS)
        else:
            st.html(progress(card)["html"])
    with actions, parts.said():
        show_actions(card)
    for alert in alerts:
        what, text, remedy = (parts.plain(alert[key]) for key in ("what", "text", "remedy"))
        st.warning(f"**{what.capitalize()}** at step {alert['step']}: {text}. What to do: {remedy}.", icon="⚠️")
        if changes := numbers(alert.get("changes")):
            try_again(card, changes, f"try again {alert.get('stage')} {what}")


def progress(card: lab.Card, files: Any = None) -> dict[str, str]:
    """The line under the state. The page turns with the state, with what was asked of the run, and with what there is
    to draw: alerts, figures that are recorded for the first time, and ``files``, those of the open tab."""
    if card.problem:
        return {"html": "", "turn": card.problem}
    run = card.run
    running = "" if card.status == "done" else f" · {parts.duration(card.state.seconds)} of running"
    stages = f"{len(card.state.stages_done)} of {len(STAGE_LABELS)} stages done{running}"
    records = (len(lab.events(run, "alert")), bool(lab.lines(run, SYSTEM)), lab.steps(run).names)
    return {
        "html": parts.progress_html(card, stages, *([system_views.strip(run)] if card.active else [])),
        "turn": repr((card.status, run.pause_requested(), files, records)),
    }


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
        with st.container(horizontal=True):
            st.page_link(lab.page("compare"), label="Compare", query_params={"runs": card.run.id})
            st.page_link(lab.page("models"), label="Export", query_params={"run": card.run.id})


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


def failure(card: lab.Card) -> None:
    """Cause in plain words, what to do in one press, and the log folded. Resume stands above, beside the state."""
    st.error(f"**Why it failed:** {parts.plain(card.state.error)}")
    with st.container(horizontal=True):
        if changes := numbers(card.state.remedy):
            try_again(card, changes, "try again")
        if str(card.state.error).endswith(DISK_FULL) and st.button(
            "Free some space in Runs", type="primary", help="Delete runs there and empty the trash, then resume."
        ):
            st.switch_page(lab.page("runs"))
        if st.button("Change the recipe in Launch", help="fills the Launch form with this run's recipe"):
            forms.to_launch(card.recipe)
    with st.expander("Log with the traceback"):
        parts.log(card.run)


def numbers(changes: Any) -> dict[str, float]:
    """Fields of a recipe and their values, as far as a file says such."""
    found, known = changes.items() if isinstance(changes, dict) else (), flatten(Recipe().model_dump())
    return {field: value for field, value in found if field in known and type(value) in (int, float)}


def try_again(card: lab.Card, changes: dict[str, Any], key: str) -> None:
    """One press to the Launch form with this run's recipe and other values."""
    said = ", ".join(f"{field} = {value:g}" for field, value in changes.items())
    help_ = "Fills the Launch form with this run's recipe and that change; nothing starts yet."
    if st.button(f"Try again with {said}", type="primary", help=help_, key=key):
        forms.to_launch(card.recipe, changes)


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


def section(draw: Callable[[], None], every: float | None) -> None:
    """A part of the page that is drawn by itself, and again every so many seconds while the run is active."""
    paced = pace.every(every, pace.tab()) if is_live and every else None

    @st.fragment(run_every=paced)
    def show() -> None:
        if paced and pace.every(every, pace.tab()) != paced:
            st.rerun()
        with parts.said():
            draw()

    show()


def recipe(run: Run) -> None:
    """The recipe as it ran, and the ways to a run like it."""
    found = run.recipe()
    with st.container(horizontal=True):
        if st.button("Duplicate into Launch", help="fills the Launch form with this run's recipe; nothing starts yet"):
            forms.to_launch(found)
        st.download_button("Download", found.to_yaml(), f"{run.id}.yaml", "application/yaml", on_click="ignore")
    st.code(found.to_yaml(), language="yaml", wrap_lines=True)


@dataclass(frozen=True)
class Tab:
    """What a tab draws of a run; ``every``: seconds after which it is drawn anew, None where the page turns when there
    is something new among the ``files`` that it draws."""

    draw: Callable[..., None]
    every: float | None = None
    follows: bool = False  # whether it has charts that follow the run by themselves: told after how many seconds
    files: Callable[[Run], Any] = lambda run: None


TABS = {
    "Curves": Tab(curve_views.training, follows=True),
    "Masks": Tab(mask_views.evolution, follows=True, files=lambda run: len(run.mask_snapshots())),
    "Compliance": Tab(mask_views.compliance, files=mask_views.compliance_files),
    "Samples": Tab(samples, files=lambda run: len(run.samples())),
    "Log": Tab(parts.log, EVERY),
    "Recipe": Tab(recipe),
    "System": Tab(system_views.tab, follows=True),
}


def open_tab() -> str:
    """The tab that :func:`tabs` is about to draw."""
    places = (st.session_state.get("tab"), st.query_params.get("tab"), st.session_state.get("monitor_tab"))
    return next((place for place in places if place in TABS), next(iter(TABS)))


def tabs(run: Run) -> None:
    """Only the open one is drawn; which one is remembered over runs and pages, and named in the address."""
    if "tab" not in st.session_state and "tab" not in st.query_params:
        st.session_state["tab"] = st.session_state.get("monitor_tab", next(iter(TABS)))
    for place, tab in zip(st.tabs(list(TABS), key="tab", bind="query-params"), TABS.values()):
        if place.open:
            with place:
                following = [EVERY if is_live else None] if tab.follows else []
                section(functools.partial(tab.draw, run, *following), tab.every)
    parts.show_open_tab()
    st.session_state["monitor_tab"] = st.session_state["tab"]


st.title("Monitor")
all_cards = lab.cards()
if not all_cards:
    parts.empty("No runs yet.", "home", "Run the demo")
    st.stop()
card = parts.choose_run(all_cards)
if card.problem:
    st.error(f"This run cannot be read: {parts.plain(card.problem)}")
    st.page_link(lab.page("runs"), label="Open Runs, where it can be deleted")
    st.stop()
is_live = card.active
with parts.said():
    header(card)
if card.status == "failed":
    with parts.said():
        failure(card)
elif card.status == "interrupted":
    st.info(
        "The process that worked on this run is gone: it crashed, or was ended. Resume goes on from its checkpoint."
    )
tabs(card.run)
