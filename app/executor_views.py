"""Where runs are worked on: the choice on the System page, and what became of it."""

from __future__ import annotations

import streamlit as st

from app import lab, pace, parts
from prunedm import cluster_link
from prunedm.executors import Choice, Chosen

NAMES = {"local": "This machine", "ray": "A Ray cluster"}
EVERY_CLUSTER = 5.0  # seconds between two looks at a cluster
ADDRESS_HELP = (
    "`local`: a cluster of this machine alone, which ends with the lab. `auto`: the one that `ray start` began here. "
    "`host:6379`: one whose head is elsewhere. Its machines need this project, and the runs folder at the same place."
)


def choice() -> None:
    """Choose where runs are worked on, and see what is there."""
    st.subheader("Where runs are worked on")
    jobs = lab.jobs()
    with st.form("executor", border=False):
        left, right = st.columns(2, vertical_alignment="bottom")
        names = list(NAMES)
        with left:
            name = st.radio("Executor", names, names.index(jobs.choice.executor), NAMES.get, horizontal=True)
        with right:
            address = st.text_input("Address of the Ray cluster", jobs.choice.address, help=ADDRESS_HELP)
        if st.form_submit_button("Use it"):
            with parts.said():
                jobs.choose(Choice(name, address.strip() or cluster_link.LOCAL))
                st.rerun()
    state(jobs)


def state(jobs: Chosen) -> None:
    """What the choice came to; looked at again while a cluster is being connected to, and while it is in use."""
    waiting = jobs.is_connecting()
    is_used = jobs.choice.executor == "ray" or bool(jobs.trouble())
    paced = 1.0 if waiting else pace.every(EVERY_CLUSTER, pace.tab()) if is_used else None

    @st.fragment(run_every=paced)
    def show() -> None:
        if waiting and not jobs.is_connecting():
            st.rerun()
        if jobs.is_connecting():
            st.info(f"Connecting to the Ray cluster {parts.plain(jobs.choice.address)}…")
            return
        for fault in filter(None, (jobs.fault, jobs.trouble())):
            st.error(parts.plain(fault))
        if not jobs.fault and (jobs.choice.executor == "local" or not jobs.trouble()):
            with parts.said():  # a cluster may be gone since
                st.caption(words(jobs))

    show()


def words(jobs: Chosen) -> str:
    """The executor in use, in words."""
    kept = "Runs queued before a change stay where they are."
    if jobs.choice.executor == "local":
        return f"New runs wait in this lab's queue, one at a time. {kept}"
    machines = jobs.machines()
    cpus, gpus = (sum(one[key] for one in machines) for key in ("cpus", "gpus"))
    return (
        f"New runs are tasks of the Ray cluster {parts.plain(jobs.choice.address)}: {len(machines)} "
        f"machine{'s' if len(machines) != 1 else ''}, {cpus:g} CPUs, {gpus:g} GPUs. Each reserves what its recipe says "
        f"under Resources on a cluster. {kept}"
    )
