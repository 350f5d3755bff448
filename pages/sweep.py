"""Sweep: many runs of one recipe with other values, what became of each, and which are worth keeping."""

import streamlit as st

from app import lab, parts, sweep_form, sweep_views, sweeps
from prunedm import sweep

VIEW, PICK = "sweep.view", "sweep.pick"
WATCH, NEW = "Watch", "New sweep"
ABOUT = (
    "A sweep tries one recipe with many values: you name the fields and their ranges, an Optuna sampler chooses the "
    "values, and each trial is an ordinary run in this lab's queue. It shows which trials no other one beats, and "
    "which fields decide. Stop it at any time: it goes on where it was, after a restart of the server too."
)


def choose(names: list[str]) -> str:
    """The sweep to look at, in step with ``?sweep=``."""
    parts.follow_url("sweep", PICK, names, what="sweep")
    if st.session_state.get(PICK) not in names:
        st.session_state[PICK] = names[0]
    chosen = st.selectbox("Sweep", names, key=PICK)
    parts.write_url("sweep", PICK, chosen)
    return chosen


def watch(name: str) -> None:
    """One sweep; its progress line follows the database while someone works on it, and has the rest drawn anew."""
    with st.spinner("Opening the sweep…"):
        seen = sweeps.look(name)
    live, fresh = seen.live, [seen]

    @st.fragment
    def show() -> None:
        with parts.said():
            now = fresh.pop() if fresh else sweeps.look(name)
            if now.live != live:
                st.rerun()
            sweep_views.header(now)
            sweep_views.compare(now)
            sweep_views.tabs(now)
            sweep_views.trials(now)
            sweep_views.account(now)

    show()


st.title("Sweep")
known = sweep.names(lab.runs_dir())
if sweep_form.NEXT in st.session_state:  # one was just started
    st.session_state[PICK], st.session_state[VIEW] = st.session_state.pop(sweep_form.NEXT), WATCH
    st.query_params.pop("sweep", None)
with parts.said():
    lab.jobs()
if not known:
    st.info(ABOUT)
    sweep_form.form(known)
    st.stop()
if st.query_params.get("sweep") != st.session_state.get(f"{PICK}.url"):  # a link was followed
    st.session_state[VIEW] = WATCH
st.session_state.setdefault(VIEW, WATCH)
view = st.segmented_control("View", [WATCH, NEW], key=VIEW, label_visibility="collapsed", persist_state="session")
if view == NEW:
    st.caption(ABOUT)
    sweep_form.form(known)
else:
    with parts.said():
        watch(choose(known))
