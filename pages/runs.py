"""Runs: all of them in a table; find, compare, describe, archive, delete and bring back."""

import streamlit as st

from app import lab, parts, run_actions, run_details, run_list, run_table

st.title("Runs")
with parts.said(), st.container():  # holds its place: what comes and goes in it must not have all below drawn anew
    run_actions.undo()
rows = run_table.rows()
if not rows:
    parts.empty("No runs yet.", "home", "Run the demo")
else:
    run_list.filters(rows)
    run_list.listing(rows)
    ticked = run_list.picked(rows)
    run_actions.actions(ticked)
    with parts.said():
        if len(ticked) == 1:
            run_details.details(ticked[0], rows)
        elif ticked:
            run_actions.tag_several(ticked)
with parts.said():
    run_actions.trash()
    lab.jobs()
