"""One run on the Runs page: its tags and note, what it takes of the disk, and its family tree."""

from __future__ import annotations

import streamlit as st

from app import lab, parts, run_table
from app.run_table import Row, size_words
from prunedm import report, shelf
from prunedm.records import VARIANT_LABELS
from prunedm.shelf import Lineage, Notes

MOST_RELATED, DEEPEST = 40, 6  # rows of the family tree; its indents


def details(row: Row, everything: list[Row]) -> None:
    parts.state_chip(row.card.status)
    if row.problem:
        st.error(parts.plain(row.problem))
    left, right = st.columns(2, gap="large")
    with left:
        describe(row)
    with right:
        if row.card.results:
            st.markdown(parts.plain(report.headline(row.card.results)))
        st.markdown(f"**Disk:** {disk_words(row.disk)}")
    family(row, everything)


def describe(row: Row) -> None:
    """Tags and note of one run."""
    if row.notes_problem:
        if st.button("Start with new notes", help="replaces the damaged notes.json"):
            with parts.said():
                shelf.write_notes(row.card.run, Notes())
                st.rerun()
        return
    own = list(row.notes.tags)
    with st.form(f"notes {row.id}"):
        tags = st.multiselect(
            "Tags", own, own, accept_new_options=True, max_selections=shelf.MOST_TAGS, placeholder="type a tag",
            key=f"tags {row.id} {own}",
        )  # fmt: skip
        note = st.text_area(
            "Note", row.notes.note, max_chars=shelf.LONGEST_NOTE, height=140, key=f"note {row.id} {row.notes.note}"
        )
        if st.form_submit_button("Save"):
            with parts.said():
                shelf.write_notes(row.card.run, Notes(tuple(tags), shelf.tidy(note), row.notes.archived))
                st.toast("Saved", icon="✔️")
                st.rerun()


def disk_words(disk: dict[str, int]) -> str:
    own = [f"{name} {size_words(size)}" for name, size in disk.items() if size]
    return size_words(sum(disk.values())) + (f" ({', '.join(own)})" if own else "")


def family(row: Row, everything: list[Row]) -> None:
    """From what a run was made, and what was made from it: an indented list, a link a run."""
    st.markdown("**Lineage**")
    tree, by_id = run_table.lineage(everything), {other.id: other for other in everything}
    placed = tree.around(row.id)
    for place, (depth, run_id) in enumerate(placed[:MOST_RELATED]):
        above = placed[place - 1][1] if place else ""
        with st.container(horizontal=True, wrap=False, gap="small"):
            if depth:
                st.markdown("&emsp;" * (2 * min(depth, DEEPEST) - 2) + "└", width="content")
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                relative(tree, by_id.get(run_id), run_id, run_id == row.id, above)
    if len(placed) > MOST_RELATED:
        st.caption(f"and {len(placed) - MOST_RELATED} more")


def relative(tree: Lineage, other: Row | None, run_id: str, itself: bool, above: str) -> None:
    """One run of the list, as a link unless it is the one looked at, with how it was made."""
    if other is None:
        st.markdown(f"{parts.plain(run_id)} (missing: deleted or never here)")
        return
    if itself:
        st.markdown(f"**{parts.plain(run_id)}**", width="content")
    else:
        st.page_link(lab.page("monitor"), label=f":blue[{parts.plain(run_id)}]", query_params={"run": run_id})
    made = run_table.made_by(tree, run_id, other.card.recipe, above)
    has = " → ".join(VARIANT_LABELS[name] for name in other.card.run.variants())
    words = [run_table.state_words(other), f"from {made}" if made else "", f"has {has}" if has else ""]
    st.caption(parts.plain(" · ".join(word for word in words if word)), width="content")
