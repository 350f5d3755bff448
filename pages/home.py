"""Home: what this is, the demo, the runs, this machine."""

import os

import psutil
import streamlit as st

from app import lab, parts
from prunedm import bundled, recipe

RECENT = 8


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
        st.page_link(lab.ROOT / "pages" / "launch.py", label="Set up a run of your own")
        st.page_link(lab.ROOT / "pages" / "compare.py", label="Look at the dense model's figures")


def run_line(card: lab.Card) -> None:
    name, state, figures, action = st.columns([4, 2, 4, 2], vertical_alignment="center")
    name.markdown(f"**{card.run.id}**")
    with state:
        parts.state_chip(card.status)
    if card.problem:
        figures.caption(parts.plain(card.problem))
        return
    with figures:
        if card.active:
            parts.progress(card.state)
        else:
            error = f" · {parts.plain(card.state.error)}" if card.state.error else ""
            st.caption(parts.duration(card.state.seconds) + error)
    page = "compare" if card.status == "done" else "monitor"
    parameter = {"runs": card.run.id} if page == "compare" else {"run": card.run.id}
    action.page_link(lab.ROOT / "pages" / f"{page}.py", label=page.capitalize(), query_params=parameter)


def shown_cards() -> list[lab.Card]:
    """Every active run, then the most recent of the others."""
    cards = lab.cards()
    return [c for c in cards if c.active] + [c for c in cards if not c.active][:RECENT]


def runs() -> None:
    st.subheader("Runs")
    live = any(c.active for c in shown_cards())

    @st.fragment(run_every=1.0 if live else None)
    def listing() -> None:
        cards = shown_cards()
        if live and not any(c.active for c in cards):
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
            f"{os.cpu_count()} CPU cores, {memory.available / 2**30:.1f} GiB of memory free. "
            f"Runs are kept in {parts.plain(lab.runs_dir())}. For the rest: `python -m prunedm doctor`."
        )


welcome()
runs()
machine()
with parts.said():
    lab.jobs()  # begins to load the engine in the background, after the page is drawn
