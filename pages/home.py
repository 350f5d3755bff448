"""Home: what this is, the demo, the runs, this machine."""

import os

import psutil
import streamlit as st

from app import lab, parts
from prunedm import bundled, recipe
from prunedm.records import ACTIVE

RECENT = 8


def welcome() -> None:
    st.title("Make a diffusion model smaller, and see what it costs")
    st.write(
        "PruneDM removes whole channels from a trained diffusion model, learns which N of every M weights "
        "to keep of the rest, and judges the result against the dense model, seed by seed."
    )
    left, right = st.columns([3, 2], vertical_alignment="center")
    with left:
        parts.sheet(
            bundled.sheet(recipe.build(recipe.preset("balanced")).eval),
            alt="32 garments drawn by the bundled dense model",
            limit=32,
            columns=8,
        )
        st.caption("Samples of the bundled dense model (2.7 M parameters, trained on Fashion-MNIST).")
    with right:
        st.markdown(
            "**The demo** prunes this model to 60 % of its parameters, learns 2:4 masks on what is left, "
            "and compares the three, live, in about a minute. Nothing to download or to upload."
        )
        if st.button("Run the demo", type="primary", icon="▶️", width="stretch"):
            lab.start(recipe.build(recipe.merge(recipe.preset("smoke"), {"name": "demo"})))
        st.page_link(lab.ROOT / "pages" / "launch.py", label="Set up a run of your own")
        st.page_link(lab.ROOT / "pages" / "compare.py", label="Look at the dense model's figures")


def run_line(card: lab.Card) -> None:
    name, state, figures, action = st.columns([4, 2, 4, 2], vertical_alignment="center")
    name.markdown(f"**{card.run.id}**")
    with state:
        parts.state_chip(card.status)
    if card.problem:
        figures.caption(card.problem)
        return
    with figures:
        if card.state.status in ACTIVE:
            parts.progress(card.state)
        else:
            st.caption(f"{parts.duration(card.state.seconds)}{' · ' + card.state.error if card.state.error else ''}")
    page = "compare" if card.status == "done" else "monitor"
    parameter = {"runs": card.run.id} if page == "compare" else {"run": card.run.id}
    action.page_link(lab.ROOT / "pages" / f"{page}.py", label=page.capitalize(), query_params=parameter)


def runs() -> None:
    st.subheader("Runs")
    active = any(c.status in ACTIVE for c in lab.cards()[:RECENT])

    @st.fragment(run_every=1.0 if active else None)
    def listing() -> None:
        cards = lab.cards()[:RECENT]
        if active and not any(c.status in ACTIVE for c in cards):
            st.rerun()
        if not cards:
            st.caption("No runs yet: the demo is a good first one.")
        for card in cards:
            run_line(card)

    listing()


def machine() -> None:
    with st.expander("This machine"):
        memory = psutil.virtual_memory()
        st.write(
            f"{os.cpu_count()} CPU cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free. "
            f"Runs are kept in `{lab.runs_dir()}`. For the rest: `python -m prunedm doctor`."
        )


welcome()
runs()
machine()
lab.jobs()  # begins to load the engine in the background, after the page is drawn
