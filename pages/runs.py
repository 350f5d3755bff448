"""Runs: all of them in a table; find, compare, describe, archive, delete and bring back."""

import streamlit as st

from app import exports, forms, lab, parts, run_table
from app.run_table import Row, size_words
from prunedm import report, shelf
from prunedm.records import VARIANT_LABELS
from prunedm.shelf import Lineage, Notes, Trashed

EVERY = 2.0  # seconds
MOST_COMPARED, MOST_MODELS = 8, 8  # runs in the link; what Compare shows at once
MOST_ROWS = 14  # of the table before it scrolls
MOST_TRASHED, MOST_RELATED, DEEPEST = 20, 40, 6  # rows of the trash and of the family tree; its indents
PICKED, SHOWN, TABLE, UNDO = "runs.picked", "runs.shown", "runs.table", "runs.undo"
WANTED, STATE, TAGS, ARCHIVED = "runs.text", "runs.state", "runs.tags", "runs.archived"


def page(name: str):
    """The path of another page."""
    return lab.ROOT / "pages" / f"{name}.py"


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


# --- finding -----------------------------------------------------------------------------------------
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
    live = any(row.card.active for row in first)
    states = {row.id: row.card.status for row in first}
    ticked, fresh = list(st.session_state.get(PICKED, [])), [first]

    @st.fragment(run_every=EVERY if live else None)
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
    empty = [] if any(row.problem for row in rows) else ["problem"]
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


# --- acting ------------------------------------------------------------------------------------------
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
                st.switch_page(page("monitor"), query_params={"run": rows[0].id})
            if st.button("Duplicate into Launch", help="fills the Launch form with this run's recipe"):
                forms.fill(rows[0].card.recipe)
                st.switch_page(page("launch"))
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
        st.switch_page(page("compare"), query_params=comparison_of(able))


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


# --- one run -----------------------------------------------------------------------------------------
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
        st.page_link(page("monitor"), label=f":blue[{parts.plain(run_id)}]", query_params={"run": run_id})
    made = run_table.made_by(tree, run_id, other.card.recipe, above)
    has = " → ".join(VARIANT_LABELS[name] for name in other.card.run.variants())
    words = [run_table.state_words(other), f"from {made}" if made else "", f"has {has}" if has else ""]
    st.caption(parts.plain(" · ".join(word for word in words if word)), width="content")


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


st.title("Runs")
with parts.said():
    undo()
all_rows = run_table.rows()
if not all_rows:
    parts.empty("No runs yet.", "home", "Run the demo")
else:
    filters(all_rows)
    listing(all_rows)
    ticked_rows = picked(all_rows)
    actions(ticked_rows)
    with parts.said():
        if len(ticked_rows) == 1:
            details(ticked_rows[0], all_rows)
        elif ticked_rows:
            tag_several(ticked_rows)
with parts.said():
    trash()
    lab.jobs()
