"""The parts of a sweep's page: its state and buttons, its charts and its trials."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from urllib.parse import quote

import streamlit as st

from app import lab, live, parts, sweep_charts, sweeps
from app.live_plot import live_plot
from app.sweep_charts import LABELS, UNREAD
from app.sweeps import Seen
from prunedm.store import Run
from prunedm.sweep_spec import Sweep, SweepError
from prunedm.sweep_trials import short

STATES = {  # of trials: icon; the word always stands beside it
    "waiting": "○",
    "running": "▶",
    "complete": "✔",
    "pruned": "✂",
    "failed": "✖",
    "interrupted": "⚡",
}
MOST_COMPARED = 8  # what Compare shows at once
EVERY = 2.0  # seconds
CHART = "chart"


# --- the state and what can be done ----------------------------------------------------------------
def progress_html(seen: Seen) -> str:
    done = seen.progress
    counts = [f"{done[state]} {state}" for state in ("complete", "pruned", "failed") if done[state]]
    text = f"{done['finished']} of {done['of']} trials" + (f": {', '.join(counts)}" if counts else "")
    if seen.live and done["eta"] is not None:
        text += f" · about {parts.duration(done['eta'])} left"
    return parts.bar_html(min(1.0, done["finished"] / done["of"]), text)


def progress(seen: Seen) -> dict[str, str]:
    """The progress line of a sweep; what is below it is drawn anew when a trial's state or a figure changes."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in seen.rows]
    return {"html": progress_html(seen), "turn": repr((seen.status, len(seen.lines), rows))}


def header(seen: Seen) -> None:
    """State, progress, the run at work, and the buttons that the state allows."""
    chip, bar, actions = st.columns([1, 5, 2], vertical_alignment="center")
    with chip:
        parts.state_chip(seen.status)
    with bar:
        if seen.live:
            live.line("sweep", progress(seen), lambda: progress(sweeps.look(seen.name)), EVERY)
        else:
            st.html(progress_html(seen))
    with actions, parts.said():
        buttons(seen)
    if seen.error and not seen.live:
        st.error(f"**Why it ended:** {parts.plain(seen.error)}")
    at_work(seen)


def at_work(seen: Seen) -> None:
    """The runs that go on now, each with its stage and a link."""
    rows = [row for row in seen.rows if row["state"] == "running"]
    if seen.live and not rows:
        st.caption("Preparing the next trial…")
    for row in rows:
        if row["run"] is None:
            st.caption(f"Trial {row['number']} is being prepared…")
            continue
        card = lab.card(Run(lab.runs_dir() / row["run"]))
        with st.container(horizontal=True, vertical_alignment="center"):
            if card.state is not None:
                parts.progress(card) if card.active else st.html(parts.progress_html(card))
            else:
                st.caption("Its run cannot be read.")
            link(row["run"], f"Trial {row['number']} in Monitor")


def link(run_id: str, words: str) -> None:
    st.page_link(lab.page("monitor"), label=words, query_params={"run": run_id})


def buttons(seen: Seen) -> None:
    """Stop asks first; what was stopped goes on, and what is done may have more trials."""
    if seen.status == "stopping":
        st.caption("Stops after the step at hand…")
    elif seen.live:
        with st.popover("Stop", width="stretch"):
            st.write("The run at hand stops after its step and keeps a checkpoint; so do those of other machines.")
            if st.button("Stop this sweep", type="primary"):
                sweeps.sweeps().stop(seen.name, seen.study)
                st.rerun()
    if seen.status == "running" and not seen.here:
        st.caption("Another process works on it.")
        if st.button("Work on it here too", width="stretch"):
            go_on(seen.spec, None)
    elif seen.status in ("stopped", "failed"):
        if st.button("Go on", type="primary", width="stretch"):
            go_on(seen.spec, None)
    elif seen.status == "done" and seen.progress["of"] == seen.progress["finished"] and not _all_of_grid(seen):
        with st.popover("More trials", width="stretch"):
            count = st.number_input("Trials in all", seen.progress["of"] + 1, 100_000, seen.progress["of"] + 10)
            if st.button("Go on to that many", type="primary"):
                go_on(seen.spec, int(count))


def _all_of_grid(seen: Seen) -> bool:
    return seen.spec.sampler == "grid" and seen.progress["of"] >= len(seen.spec.grid())


def go_on(spec: Sweep, trials: int | None) -> None:
    """Put a worker of this server on it."""
    sweeps.sweeps().start(spec, lab.jobs(), trials)
    st.rerun()


# --- sections --------------------------------------------------------------------------------------
def tabs(seen: Seen) -> None:
    """The charts, and the settings to take along; the open one is named in the address."""
    two = len(seen.spec.objectives.figures) > 1
    names = ["Pareto front" if two else "Best so far", "Parallel coordinates", "Importances", "Settings"]
    draw: list[Callable[[Seen], None]] = [front if two else best, across, importances, lambda one: settings(one.spec)]
    if st.session_state.get(CHART, names[0]) not in names:
        st.session_state[CHART] = names[0]  # the one before had other objectives
    for tab, section in zip(st.tabs(names, key=CHART, bind="query-params"), draw):
        if tab.open:
            with tab, parts.said():
                if section in (front, best, across) and not seen.complete():
                    st.caption("Nothing to draw until a trial is complete.")
                else:
                    section(seen)
    parts.show_open_tab()


def front(seen: Seen) -> None:
    names = list(seen.spec.objectives.figures)
    numbers = ", ".join(map(str, seen.front))
    alt = f"{LABELS[names[0]]} against {LABELS[names[1]]} of {len(seen.complete())} trials; on the front: {numbers}"
    live_plot(sweep_charts.pareto(seen, names), "sweep-front", alt)
    st.caption(f"Lower left is better. Full circles are trials that no other one beats: {numbers}.")


def best(seen: Seen) -> None:
    name = next(iter(seen.spec.objectives.figures))
    row = sweeps.best(seen, 1)[0]
    words = f"best: trial {row['number']} with {short(row['objectives'][name])}"
    live_plot(
        sweep_charts.best_so_far(seen, name), "sweep-best", f"{LABELS[name]} of {len(seen.complete())} trials; {words}"
    )
    st.caption(f"{words.capitalize()}. Lower is better.")


def across(seen: Seen) -> None:
    name = LABELS[next(iter(seen.spec.objectives.figures))]
    fields = ", ".join(seen.spec.ranges)
    live_plot(
        sweep_charts.parallel(seen),
        "sweep-parallel",
        f"A line for each of {len(seen.complete())} trials across {fields}",
    )
    st.caption(f"Darker is a larger {name}. Drag along an axis to keep only some trials. All values: the table below.")


def importances(seen: Seen) -> None:
    names = list(seen.spec.objectives.figures)
    name = names[0]
    if len(names) > 1:
        name = st.segmented_control("For", names, key="sweep.importance", default=name, format_func=LABELS.get) or name
    try:
        shares = sweeps.importances(seen, name)
    except SweepError as error:
        st.caption(parts.plain(str(error).capitalize()) + ".")
        return
    if not shares:
        st.caption("No field is part of every trial, so that none can be weighed against the others.")
        return
    said = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
    live_plot(
        sweep_charts.bars(shares, f"{seen.name}/{name}"),
        "sweep-importances",
        f"Importance of fields for {LABELS[name]}: {said}",
    )
    st.caption(
        f"How much each field decides whether a trial is among the best quarter in {LABELS[name]} (PED-ANOVA, over "
        f"{len(seen.complete())} trials)."
    )


def settings(spec: Sweep) -> None:
    """The sweep as a file, and as a command."""
    text, file = spec.to_yaml(), f"{spec.name}.yaml"
    st.code(text, language="yaml", wrap_lines=True)
    st.download_button("Download the sweep (YAML)", text, file, "application/yaml", on_click="ignore")
    command = shlex.join([".venv/bin/python", "-m", "prunedm", "sweep", file, "--runs-dir", str(lab.runs_dir())])
    st.markdown("The same on the command line, with the file above; on more machines add `--worker` and `--storage`:")
    st.code(command, language="bash", wrap_lines=True)


def compare(seen: Seen) -> None:
    """The best trials, side by side in Compare."""
    models = [model for row in sweeps.best(seen, MOST_COMPARED) if (model := sweeps.model_of(row["run"]))]
    if models:
        what = "the front" if len(seen.spec.objectives.figures) > 1 else "the best"
        words = f"Compare {what} ({len(models)} {'model' if len(models) == 1 else 'models'})"
        query = {"models": ",".join(models)}
        st.page_link(lab.page("compare"), label=words, icon="⚖️", query_params=query)


def trials(seen: Seen) -> None:
    """All trials, each with a link to its run."""
    st.subheader("Trials")
    if not seen.rows:
        st.caption("The first trial begins in a moment." if seen.live else "None has begun.")
        return
    names = list(seen.spec.objectives.figures)
    table = []
    for row in seen.rows:
        marks = {"trial": row["number"], "state": f"{STATES[row['state']]} {row['state']}"}
        marks["front" if len(names) > 1 else "best"] = "★" if row["number"] in seen.front else ""
        values = {LABELS[name]: row["objectives"][name] for name in names}
        params = {key: short(row["params"][key]) if key in row["params"] else UNREAD for key in seen.spec.ranges}
        run = {"run": f"monitor?run={quote(row['run'])}" if row["run"] else None}
        seconds = None if row["seconds"] is None else round(row["seconds"], 1)
        table.append(marks | values | params | run | {"seconds": seconds, "cause": row["cause"]})
    if not any(row["cause"] for row in table):
        table = [{key: value for key, value in row.items() if key != "cause"} for row in table]
    run = st.column_config.LinkColumn("run", display_text=r"run=(.*)$", help="opens it in Monitor", width=190)
    formats = {LABELS[name]: st.column_config.NumberColumn(format=_format(name)) for name in names}
    numbers = {
        "trial": st.column_config.NumberColumn(width=50),
        "seconds": st.column_config.NumberColumn(format="%.0f"),
    }
    st.dataframe(table, hide_index=True, column_config=formats | numbers | {"run": run})


def _format(name: str) -> str:
    return {"validation_loss": "%.5f", "fid": "%.3f", "latency": "%.3f"}.get(name, "localized")


def account(seen: Seen) -> None:
    """What the worker of this server said, folded."""
    if seen.lines:
        with st.expander("What happened"):
            st.code("\n".join(seen.lines), language=None, wrap_lines=True)
