"""The parts of a sweep's page: its state and buttons, its charts (plain figures, as in charts.py) and its trials."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable
from typing import Any

import streamlit as st

from app import lab, live, parts, sweeps
from app.live_plot import live_plot
from app.sweeps import Seen
from prunedm import charts
from prunedm.charts import GREY, Figure
from prunedm.store import Run
from prunedm.sweep_ranges import Range
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
LABELS = {
    "validation_loss": "validation loss",
    "fid": "Frechet distance",
    "bytes": "packed bytes (fp16)",
    "macs": "MACs an image",
    "latency": "latency of a UNet call, ms",
    "parameters": "non-zero parameters",
}
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe-Ito
MOST_COMPARED = 8  # what Compare shows at once
MOST_NAMED = 12  # points of the front that carry their number
UNREAD = "not read"
EVERY = 2.0  # seconds


# --- figures ---------------------------------------------------------------------------------------
def label(seen: Seen, objective: str) -> str:
    """An objective in words, with what it was measured by where the trials say it."""
    figures = next((row["figures"] for row in seen.rows if row["figures"]), {})
    if objective == "fid" and figures.get("fid_extractor"):
        return f"{figures['fid_extractor']} ({figures.get('fid_images')} images)"
    if objective == "latency" and figures.get("device"):
        return f"{LABELS[objective]} ({figures['device']})"
    return LABELS[objective]


def layout(x: str, y: str, view: str, height: int = 360) -> dict[str, Any]:
    """The axes of all charts, with few ticks."""
    found = charts.layout(x, y, view) | {"height": height}
    for axis in ("xaxis", "yaxis"):
        found[axis] = found[axis] | {"nticks": 6}
    return found


def told(row: dict[str, Any]) -> str:
    """A trial's values for its point: plotly renders a few tags, and a value is no markup."""
    lines = [f"{key} {short(value)}" for key, value in row["params"].items()]
    return "<br>".join([f"trial {row['number']}", *(charts.plain(line) for line in lines)])


def pareto(seen: Seen, names: list[str]) -> Figure:
    """Cost across, quality up, both better when small; full circles are on the front, which a line joins."""
    quality, cost = names
    rows = sorted(seen.complete(), key=lambda row: (row["objectives"][cost], row["objectives"][quality]))
    kept = [row for row in rows if row["number"] in seen.front]
    groups = (
        ("beaten by another", [r for r in rows if r not in kept], "markers", {"color": GREY, "symbol": "circle-open"}),
        ("on the front", kept, "lines+markers+text", {"color": BLUE, "symbol": "circle"}),
    )
    traces = [
        {
            "type": "scatter",
            "mode": mode,
            "name": name,
            "x": [row["objectives"][cost] for row in group],
            "y": [row["objectives"][quality] for row in group],
            "text": [str(row["number"]) if len(kept) <= MOST_NAMED else "" for row in group],
            "textposition": "top right",
            "customdata": [told(row) for row in group],
            "marker": marker | {"size": 10, "line": {"width": 2}},
            "line": {"color": GREY, "width": 1.5, "dash": "dot"},
            "hovertemplate": "%{customdata}<br>%{x:,.5~g}<br>%{y:,.5~g}<extra>" + name + "</extra>",
        }
        for name, group, mode, marker in groups
    ]
    drawn = layout(label(seen, cost), label(seen, quality), seen.name)
    for axis, name in (("xaxis", cost), ("yaxis", quality)):
        values = {row["objectives"][name] for row in rows}
        if len(values) == 1:  # plotly would show one unit to each side
            drawn[axis]["range"] = [0.9 * min(values), 1.1 * max(values)]
    return {"data": traces, "layout": drawn}


def best_so_far(seen: Seen, name: str) -> Figure:
    """One objective over the trials, and the smallest of those up to each."""
    rows = seen.complete()
    numbers, values = [row["number"] for row in rows], [row["objectives"][name] for row in rows]
    lowest = [min(values[: i + 1]) for i in range(len(values))]
    points = {"type": "scatter", "mode": "markers", "name": "trial", "x": numbers, "y": values}
    points |= {"marker": {"color": GREY, "symbol": "circle-open", "size": 9, "line": {"width": 2}}}
    points |= {"customdata": [told(row) for row in rows], "hovertemplate": "%{customdata}<br>%{y:.5g}<extra></extra>"}
    line = {"type": "scatter", "mode": "lines", "name": "best so far", "x": numbers, "y": lowest}
    line |= {"line": {"color": BLUE, "width": 2, "shape": "hv"}}
    return {"data": [points, line], "layout": layout("trial", label(seen, name), seen.name)}


def parallel(seen: Seen) -> Figure:
    """A line a trial across its values and its objectives; coloured by the first objective."""
    rows, names = seen.complete(), list(seen.spec.objectives.figures)
    heads = _heads(list(seen.spec.ranges))
    axes = [
        {"label": charts.plain(heads[key])} | _axis([row["params"].get(key, UNREAD) for row in rows], wanted)
        for key, wanted in seen.spec.ranges.items()
    ]
    axes += [
        {"label": name.replace("_", " ")} | _numbers([row["objectives"][name] for row in rows], False) for name in names
    ]
    trace = {
        "type": "parcoords",
        "dimensions": axes,
        "line": {"color": axes[-len(names)]["values"], "colorscale": "Cividis", "reversescale": True},
        "labelangle": -18,
        "labelfont": {"size": 11},
        "tickfont": {"size": 10},
        "rangefont": {"size": 1, "color": "rgba(0,0,0,0)"},  # the ends are ticks
    }
    drawn = layout("", "", f"{seen.name}/parallel", 380) | {"margin": {"l": 50, "r": 30, "t": 70, "b": 20}}
    return {"data": [trace], "layout": drawn}


def _heads(keys: list[str]) -> dict[str, str]:
    """Fields by their last word where that is enough."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: word if list(last.values()).count(word) == 1 else key for key, word in last.items()}


def _axis(values: list[Any], wanted: Range) -> dict[str, Any]:
    """One field: numbers as they are or by their logarithm, all else by its place in a list."""
    if wanted.values is None:
        return _numbers(values, wanted.log)
    words = sorted(set(map(short, values)), key=_by_size)
    return {
        "values": [words.index(short(value)) for value in values],
        "range": [0, max(1, len(words) - 1)],
        "tickvals": list(range(len(words))),
        "ticktext": charts.plain(words),
    }


def _numbers(values: list[Any], log: bool) -> dict[str, Any]:
    """An axis of numbers, with a place beneath for the trials that did not read the field."""
    known = [math.log10(v) if log else v for v in values if v != UNREAD] or [0]
    low, high = min(known), max(known)
    size = (high - low) or abs(high) or 1
    ticks = [low + size * i / 4 for i in range(5)] if high > low else [low]
    words = [short(float(f"{10**tick if log else tick:.4g}")) for tick in ticks]
    beneath = low - size / 4
    if UNREAD in values:
        ticks, words = [beneath, *ticks], [UNREAD, *words]
    places = [beneath if v == UNREAD else math.log10(v) if log else v for v in values]
    return {"values": places, "range": [ticks[0], max(high, ticks[0] + size)], "tickvals": ticks, "ticktext": words}


def _by_size(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def bars(shares: dict[str, float], view: str) -> Figure:
    """How much each field decides, the largest on top."""
    names = list(shares)[::-1]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [shares[name] for name in names],
        "y": charts.plain(names),
        "text": [f"{shares[name]:.0%}" for name in names],
        "textposition": "auto",
        "marker": {"color": ORANGE},
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }
    drawn = layout("share", "", view, max(180, 34 * len(names) + 100)) | {"showlegend": False}
    drawn["xaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    return {"data": [trace], "layout": drawn}


# --- the state and what can be done ----------------------------------------------------------------
def progress_html(seen: Seen) -> str:
    done = seen.progress
    counts = [f"{done[state]} {state}" for state in ("complete", "pruned", "failed") if done[state]]
    text = f"{done['finished']} of {done['of']} trials" + (f": {', '.join(counts)}" if counts else "")
    if seen.live and done["eta"] is not None:
        text += f" · about {parts.duration(done['eta'])} left"
    return parts.bar_html(min(1.0, done["finished"] / done["of"]), text)


def progress_now(name: str) -> dict[str, str]:
    """The progress line of a sweep; what is below it is drawn anew when a trial's state or a figure changes."""
    seen = sweeps.look(name)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in seen.rows]
    return {"html": progress_html(seen), "turn": repr((seen.status, len(seen.lines), rows))}


def header(seen: Seen) -> None:
    """State, progress, the run at work, and the buttons that the state allows."""
    chip, bar, actions = st.columns([1, 5, 2], vertical_alignment="center")
    with chip:
        parts.state_chip(seen.status)
    with bar:
        if seen.live:
            live.line("sweep", functools.partial(progress_now, seen.name), EVERY)
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
                parts.progress(card.run) if card.active else st.html(parts.progress_html(card))
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
    """The charts, and the settings to take along."""
    two = len(seen.spec.objectives.figures) > 1
    names = ["Pareto front" if two else "Best so far", "Parallel coordinates", "Importances", "Settings"]
    draw: list[Callable[[Seen], None]] = [front if two else best, across, importances, lambda one: settings(one.spec)]
    for tab, section in zip(st.tabs(names), draw):
        with tab, parts.said():
            if section in (front, best, across) and not seen.complete():
                st.caption("Nothing to draw until a trial is complete.")
            else:
                section(seen)


def front(seen: Seen) -> None:
    names = list(seen.spec.objectives.figures)
    numbers = ", ".join(map(str, seen.front))
    alt = f"{LABELS[names[0]]} against {LABELS[names[1]]} of {len(seen.complete())} trials; on the front: {numbers}"
    live_plot(pareto(seen, names), "sweep-front", alt)
    st.caption(f"Lower left is better. Full circles are trials that no other one beats: {numbers}.")


def best(seen: Seen) -> None:
    name = next(iter(seen.spec.objectives.figures))
    row = sweeps.best(seen, 1)[0]
    words = f"best: trial {row['number']} with {short(row['objectives'][name])}"
    live_plot(best_so_far(seen, name), "sweep-best", f"{LABELS[name]} of {len(seen.complete())} trials; {words}")
    st.caption(f"{words.capitalize()}. Lower is better.")


def across(seen: Seen) -> None:
    name = LABELS[next(iter(seen.spec.objectives.figures))]
    fields = ", ".join(seen.spec.ranges)
    live_plot(parallel(seen), "sweep-parallel", f"A line for each of {len(seen.complete())} trials across {fields}")
    st.caption(f"Darker is a larger {name}. Drag along an axis to keep only some trials. All values: the table below.")


def importances(seen: Seen) -> None:
    names = list(seen.spec.objectives.figures)
    name = names[0]
    if len(names) > 1:
        name = st.segmented_control("For", names, key="sweep.importance", default=name, format_func=LABELS.get) or name
    try:
        shares = sweeps.importances(seen, seen.name, str(lab.runs_dir()), name, len(seen.complete()))
    except SweepError as error:
        st.caption(parts.plain(str(error).capitalize()) + ".")
        return
    if not shares:
        st.caption("No field is part of every trial, so that none can be weighed against the others.")
        return
    said = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
    live_plot(
        bars(shares, f"{seen.name}/{name}"), "sweep-importances", f"Importance of fields for {LABELS[name]}: {said}"
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
        run = {"run": f"/monitor?run={row['run']}" if row["run"] else None}
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
