"""What can be done to the ticked runs on the Runs page, and undone: compare, tag, archive, delete, bring back."""

from __future__ import annotations

import streamlit as st

from app import exports, forms, lab, parts, run_table
from app.run_list import ARCHIVED, PICKED
from app.run_table import Row, size_words
from prunedm import shelf
from prunedm.shelf import Trashed

MOST_COMPARED, MOST_MODELS = 8, 8  # runs in the link; what Compare shows at once
MOST_TRASHED = 20  # rows of the trash
UNDO = "runs.undo"


def actions(rows: list[Row]) -> None:
    if not rows:
        st.caption(
            "Tick runs to compare, describe, archive or delete them. By keyboard: arrow keys, then Shift and Space."
        )
        return
    names = ", ".join(row.id for row in rows)
    st.subheader(parts.plain(names) if len(rows) == 1 else f"{len(rows)} runs ticked")
    if len(rows) > 1:
        st.caption(parts.plain(names))
    with st.container(horizontal=True, key="run-actions"):
        compare(rows)
        if len(rows) == 1 and not rows[0].card.problem:
            if st.button("Open in Monitor"):
                st.switch_page(lab.page("monitor"), query_params={"run": rows[0].id})
            if st.button("Duplicate into Launch", help="fills the Launch form with this run's recipe"):
                forms.to_launch(rows[0].card.recipe)
        put_away(rows)
        delete(rows)
        if st.button("Untick", type="tertiary"):
            st.session_state[PICKED] = []
            st.rerun()


def compare(rows: list[Row]) -> None:
    """The link of Compare: all variants where they fit, else the last of each run beside one dense model."""
    able = [row for row in rows if row.card.results]
    missing = len(rows) - len(able)
    why = "none of them is evaluated yet" if not able else f"{missing} of them are not evaluated yet" * (missing > 0)
    if len(able) > MOST_COMPARED:
        why = f"Compare takes {MOST_COMPARED} runs at once"
    off = not able or len(able) > MOST_COMPARED
    if st.button("Compare", type="primary", disabled=off, help=why or None):
        st.switch_page(lab.page("compare"), query_params=comparison_of(able))


def comparison_of(rows: list[Row]) -> dict[str, str]:
    if sum(len(row.card.results) for row in rows) <= MOST_MODELS:
        return {"runs": ",".join(row.id for row in rows)}
    dense = [f"{rows[0].id}/dense"] if len(rows) < MOST_MODELS and "dense" in rows[0].card.results else []
    last = [f"{row.id}/{row.last.variant}" for row in rows if row.last]
    return {"models": ",".join(dict.fromkeys(dense + last))}


def put_away(rows: list[Row]) -> None:
    back = all(row.notes.archived for row in rows)
    if st.button("Unarchive" if back else "Archive", help="the list leaves archived runs out until asked"):
        with parts.said():
            for row in rows:
                shelf.archive(row.card.run, not back)
            if not back and not st.session_state.get(ARCHIVED):
                st.session_state[PICKED] = []
            st.rerun()


def delete(rows: list[Row]) -> None:
    with st.popover("Delete"):
        size = size_words(sum(row.bytes for row in rows))
        st.markdown(
            f"Move {'this run' if len(rows) == 1 else f'these {len(rows)} runs'} ({size}) to the trash? "
            "It can be undone until the trash is emptied."
        )
        if len(rows) > 1:
            st.caption(parts.plain(", ".join(row.id for row in rows)))
        if st.button("Move to the trash", type="primary"):
            to_trash(rows)


def to_trash(rows: list[Row]) -> None:
    """Move what can be moved; what cannot is said and stays ticked."""
    gone: list[Trashed] = []
    refused = []
    for row in rows:
        try:
            if exports.exports().busy(row.card.run.exports):
                raise ValueError(f"run {row.id} is being exported; wait for the export, then delete it")
            gone.append(shelf.delete(row.card.run))
        except (ValueError, OSError) as error:
            refused.append((row.id, str(error)))
    st.session_state[PICKED] = [run_id for run_id, _ in refused]
    if gone:
        st.session_state[UNDO] = [one.name for one in gone]
    for _, reason in refused:
        st.error(parts.plain(reason))
    if gone and not refused:
        st.rerun()


def tag_several(rows: list[Row]) -> None:
    """One tag more, or one less, for all ticked runs."""
    known = sorted({tag for row in rows for tag in row.notes.tags})
    with st.form("tag-several", border=False):
        tags = st.multiselect("Tags for all of them", known, accept_new_options=True, placeholder="type a tag")
        with st.container(horizontal=True):
            more, less = st.form_submit_button("Add to all"), st.form_submit_button("Remove from all")
    if tags and (more or less):
        with parts.said():
            for row in rows:
                less_here = [tag for tag in tags if tag in row.notes.tags]
                shelf.retag(row.card.run, tags if more else [], less_here if less else [])
            st.rerun()


# --- what was just deleted -------------------------------------------------------------------------
def undo() -> None:
    """The way back from a deletion, until the next one or until it is put away."""
    there = {one.name: one for one in shelf.trashed(lab.runs_dir())}
    names = [name for name in st.session_state.get(UNDO, ()) if name in there]
    if not names:
        return
    with st.container(border=True, horizontal=True, vertical_alignment="center", key="undo"):
        what = there[names[0]].run_id if len(names) == 1 else f"{len(names)} runs"
        st.markdown(f"{parts.plain(what)} moved to the trash.", width="stretch")
        back = st.button("Undo", type="primary", key="runs.undo.button")
        if st.button("Dismiss", type="tertiary"):
            del st.session_state[UNDO]
            st.rerun()
    if back:
        bring_back(names)


def bring_back(names: list[str]) -> None:
    with parts.said():
        for name in names:
            shelf.restore(lab.runs_dir(), name)
        st.toast(f"{len(names)} {'run is' if len(names) == 1 else 'runs are'} back", icon="↩️")
        st.session_state.pop(UNDO, None)
        st.rerun()


# --- the trash ---------------------------------------------------------------------------------------
def trash() -> None:
    found = shelf.trashed(lab.runs_dir())
    if not found:
        return
    size = sum(run_table.trash_bytes(str(one.folder), lab.stamp(one.folder)) for one in found)
    with st.expander(f"Trash ({len(found)} {'run' if len(found) == 1 else 'runs'}, {size_words(size)})"):
        for one in found[:MOST_TRASHED]:
            trashed_line(one)
        if len(found) > MOST_TRASHED:
            st.caption(f"and {len(found) - MOST_TRASHED} deleted earlier: `python -m prunedm trash` lists them.")
        with st.popover("Empty the trash"):
            st.markdown(f"Remove {len(found)} deleted runs ({size_words(size)}) for good? This cannot be undone.")
            if st.button("Remove them for good", type="primary"):
                with parts.said():
                    shelf.empty_trash(lab.runs_dir())
                    st.rerun()


def trashed_line(one: Trashed) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        size = run_table.trash_bytes(str(one.folder), lab.stamp(one.folder))
        when = f"{one.deleted.astimezone():%Y-%m-%d %H:%M}"
        st.markdown(f"{parts.plain(one.run_id)} · deleted {when} · {size_words(size)}", width="stretch")
        if st.button("Restore", key=f"restore {one.name}", help=f"bring {one.run_id} back"):
            bring_back([one.name])
