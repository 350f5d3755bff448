"""The Runs page's list: filters, the table with its ticks, and the line that sums it up."""

from __future__ import annotations

import streamlit as st

from app import lab, pace, parts, run_table
from app.run_table import Row, size_words
from prunedm import shelf

EVERY = 2.0  # seconds
MOST_ROWS = 14  # of the table before it scrolls
SOMETIMES = {  # columns that are shown where a run has something to say in them
    "tags": lambda row: row.notes.tags,
    "note": lambda row: row.notes.note,
    "problem": lambda row: row.problem,
}
PICKED, SHOWN, TABLE = "runs.picked", "runs.shown", "runs.table"
WANTED, STATE, TAGS, ARCHIVED = "runs.text", "runs.state", "runs.tags", "runs.archived"


def filters(rows: list[Row]) -> None:
    """The widgets; what they hold is read by :func:`chosen`, so that the table can follow on its own."""
    tags = sorted({tag for row in rows for tag in row.notes.tags})
    st.session_state[TAGS] = [tag for tag in st.session_state.get(TAGS, ()) if tag in tags]
    with st.container(horizontal=True, vertical_alignment="bottom", key="run-filters"):
        st.text_input(
            "Search", key=WANTED, placeholder="name, tag or note", type="search", persist_state="session", width=300
        )
        st.multiselect(
            "State", list(parts.STATES), key=STATE, placeholder="any", persist_state="session", width=168,
            format_func=lambda word: f"{parts.STATES[word][0]} {word}",
        )  # fmt: skip
        st.multiselect(
            "Tags", tags, key=TAGS, placeholder="any" if tags else "none yet", persist_state="session", width=168
        )
        count = sum(row.notes.archived for row in rows)
        st.toggle(f"Archived ({count})", key=ARCHIVED, persist_state="session")


def chosen(rows: list[Row]) -> list[Row]:
    get = st.session_state.get
    return [
        row
        for row in rows
        if run_table.matches(row, get(WANTED, ""), get(STATE, []), get(TAGS, []), get(ARCHIVED, False))
    ]


def picked(rows: list[Row]) -> list[Row]:
    """The ticked runs that are still there, in the order of the list."""
    ids = st.session_state.get(PICKED, [])
    return [row for row in rows if row.id in ids]


def take() -> None:
    """Positions to ids, at once: the next drawing may hold other rows. Ticks that the filter hides stay."""
    shown = st.session_state[SHOWN]
    places = st.session_state[TABLE]["selection"]["rows"]
    hidden = [run_id for run_id in st.session_state.get(PICKED, []) if run_id not in shown]
    st.session_state[PICKED] = hidden + [shown[place] for place in places if place < len(shown)]


def listing(first: list[Row]) -> None:
    """The table. It follows the runs' folders while one is active; a tick, a new run or another state draws the whole
    page again."""
    is_live = any(row.card.active for row in first)
    states = {row.id: row.card.status for row in first}
    ticked, fresh = list(st.session_state.get(PICKED, [])), [first]

    @st.fragment(run_every=pace.every(EVERY, pace.tab()) if is_live else None)
    def show() -> None:
        rows = fresh.pop() if fresh else run_table.rows()
        if st.session_state.get(PICKED, []) != ticked or {row.id: row.card.status for row in rows} != states:
            st.rerun()
        summary(rows)
        table(chosen(rows))

    show()


def table(rows: list[Row]) -> None:
    if not rows:
        st.info("No run passes the filters.")
        return
    ids = [row.id for row in rows]
    places = [place for place, run_id in enumerate(ids) if run_id in st.session_state.get(PICKED, ())]
    drawn = st.session_state.get(TABLE)
    if drawn is None or list(drawn["selection"]["rows"]) != places:
        st.session_state[TABLE] = {"selection": {"rows": places, "columns": [], "cells": []}}
    st.session_state[SHOWN] = ids
    columns = run_table.columns()
    empty = [name for name in SOMETIMES if not any(map(SOMETIMES[name], rows))]
    st.dataframe(
        run_table.frame(rows),
        key=TABLE,
        on_select=take,
        selection_mode="multi-row",
        hide_index=True,
        placeholder="",
        column_config=columns,
        column_order=[name for name in columns if name not in empty],
        height=35 * min(len(rows), MOST_ROWS) + 38,
        alt="Runs with state, figures, tags and notes",
    )


def summary(rows: list[Row]) -> None:
    size, free = sum(row.bytes for row in rows), shelf.free_bytes(lab.runs_dir())
    st.caption(f"{len(chosen(rows))} of {len(rows)} runs · {size_words(size)} in all, {size_words(free)} free")
