"""Home: what this is, the demo, the runs, this machine."""

from collections import Counter
from dataclasses import dataclass

import streamlit as st

from app import lab, live, pace, parts, system_views
from prunedm import bundled, recipe
from prunedm.records import RESUMABLE

RECENT, SUGGESTED = 8, 3
EVERY = 2.0  # seconds between two looks at the number of runs and at the machine


def welcome() -> None:
    st.title("Make a diffusion model smaller, and see what it costs")
    st.write(
        "PruneDM removes whole channels from a trained diffusion model, learns which N of every M weights "
        "to keep of the rest, and judges the result against the dense model, seed by seed."
    )
    left, right = st.columns([3, 2], vertical_alignment="center")
    with left:
        settings = recipe.build(recipe.preset("balanced")).eval
        parts.sheet(bundled.sheet(settings), alt="32 garments drawn by the bundled dense model", limit=32)
        st.caption("Samples of the bundled dense model (2.7 M parameters, trained on Fashion-MNIST).")
    with right:
        st.markdown(
            "**The demo** prunes this model to 60 % of its parameters, learns 2:4 masks on what is left, "
            "and compares the three, live, in a minute or two. Nothing to download or to upload."
        )
        if st.button("Run the demo", type="primary", icon="▶️", width="stretch"):
            with parts.said():
                lab.start(recipe.build(recipe.merge(recipe.preset("smoke"), {"name": "demo"})))
        st.page_link(lab.page("launch"), label="Set up a run of your own")
        st.page_link(lab.page("compare"), label="Look at the dense model's figures")


def run_line(card: lab.Card) -> None:
    name, state, figures, action = st.columns([4, 2, 4, 2], vertical_alignment="center")
    name.markdown(f"**{card.run.id}**")
    with state:
        parts.state_chip(card.status)
    if card.problem:
        figures.caption(parts.plain(card.problem))
        action.page_link(lab.page("runs"), label="Runs")
        return
    with figures:
        if card.active:
            parts.progress(card)
        else:
            error = f" · {parts.plain(card.state.error)}" if card.state.error else ""
            st.caption(parts.duration(card.state.seconds) + error)
    page = "compare" if card.status == "done" else "monitor"
    parameter = {"runs": card.run.id} if page == "compare" else {"run": card.run.id}
    action.page_link(lab.page(page), label=page.capitalize(), query_params=parameter)


def shown_cards() -> list[lab.Card]:
    """Every active run, then the most recent of the others."""
    cards = lab.cards()
    return [c for c in cards if c.active] + [c for c in cards if not c.active][:RECENT]


def runs() -> None:
    """The runs; while one is active, each line follows its run and the count above them draws the page anew."""
    st.subheader("Runs")
    cards = shown_cards()
    if any(card.active for card in cards):
        live.line("runs", count(cards), lambda: count(shown_cards()), EVERY)
    if not cards:
        st.caption("No runs yet: the demo is a good first one.")
    for card in cards:
        run_line(card)


def count(cards: list[lab.Card]) -> dict[str, str]:
    """How many runs there are in each active state; the page turns when a run comes, goes or changes its state."""
    found = Counter(card.status for card in cards if card.active)
    words = " · ".join(f"{number} {status}" for status, number in found.items())
    return {"html": f"<small>{words}</small>", "turn": repr([(card.run.id, card.status) for card in cards])}


@dataclass(frozen=True)
class NextStep:
    """One thing worth doing now, and the page where it is done."""

    title: str
    why: str
    page: str
    query: dict[str, str] | None = None


def next_steps(cards: list[lab.Card]) -> list[NextStep]:
    """What the runs so far ask for, the most urgent first; empty before the first run."""
    steps = []
    active = next((c for c in cards if c.active), None)
    broken = next((c for c in cards if c.status in RESUMABLE), None)
    done = next((c for c in cards if c.status == "done" and c.results), None)
    if active:
        steps.append(
            NextStep("Watch it work", f"{active.run.id} is {active.status}.", "monitor", {"run": active.run.id})
        )
    if broken:
        why = {"failed": "failed: see why, and what to change.", "stopped": "was stopped: Resume goes on."}
        said = why.get(broken.status, "was interrupted: Resume goes on from its checkpoint.")
        steps.append(NextStep("Bring it to its end", f"{broken.run.id} {said}", "monitor", {"run": broken.run.id}))
    if done:
        name = done.run.id
        steps += [
            NextStep("See what it cost", f"{name} against the dense model, seed by seed.", "compare", {"runs": name}),
            NextStep("Take it with you", f"Export {name} for diffusers, ONNX or TensorRT.", "models", {"run": name}),
            NextStep("Try many settings", "Sweep over any field and read the Pareto front.", "sweep"),
            NextStep("Bring your own model", "Import a diffusers UNet, then choose it in Launch.", "models"),
        ]
    return steps[:SUGGESTED]


def suggest() -> None:
    steps = next_steps(lab.cards())
    if not steps:
        return
    st.subheader("What next")
    for column, step in zip(st.columns(SUGGESTED), steps):
        with column.container(border=True, height="stretch"):
            st.markdown(f"**{step.title}**")
            st.caption(parts.plain(step.why))
            path = lab.page(step.page)
            st.page_link(path, label=f"Open {step.page.capitalize()}", query_params=step.query)


def machine() -> None:
    """What runs have at their disposal, and how much of it is taken."""
    st.subheader("This machine")
    is_live = any(c.active for c in lab.cards())

    @st.fragment(run_every=pace.every(EVERY, pace.tab()) if is_live else None)
    def show() -> None:
        for column, (label, value, help_) in zip(st.columns(4), system_views.machine_now()):
            column.metric(label, value, help=help_, border=True)

    show()


welcome()
suggest()
runs()
machine()
with parts.said():
    lab.jobs()  # begins to load the engine in the background, after the page is drawn
