"""The figures of Compare: as recorded or judged alike in the background, Pareto plots, latency."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import streamlit as st

from app import compare_choice, curve_views, lab, model_files, pace, parts
from app.compare_choice import Known, name, short_names
from app.judgements import Task, judgements
from prunedm import charts, comparison, figures, model_charts
from prunedm.comparison import Judged

EVERY_CURVES = 2.0  # seconds
MORE = "compare_more"  # runs whose curves are shown beside those of the models


# --- judging in the background ---------------------------------------------------------------------
def alike(chosen: list[Judged]) -> bool:
    """Whether the figures of quality hold for the same conditions."""
    return len(comparison.grouped(chosen, comparison.QUALITIES[0].conditions)) <= 1


def judged_alike(keys: list[str], mode: str, known: Known) -> tuple[dict[str, Judged] | None, Task | None]:
    """The figures of a finished judgement of these models, or the task that is at it."""
    task = judgements().found([known.source(key) for key in keys], mode)
    if task is None or not task.future.done() or task.error:
        return None, task
    found = dict(zip(keys, task.future.result()))
    for key in (key for key in keys if key in known.folders):
        found[key] = _of_no_run(found[key], known.judged[key].label, known.folders[key])
    return found, task


def _of_no_run(one: Judged, label: str, folder: Path) -> Judged:
    """Under the name that the page calls it by, and with a remedy of the page's where there was nothing to judge by."""
    figures = dict(one.figures)
    if figures.get("quality_absent"):
        images = model_files.sides(model_files.look(folder).shape)
        figures["quality_absent"] = (
            f"no quality figures, as there are no real images of its size ({images}) to judge by; "
            "prunedm compare with --data FOLDER judges by images of your own"
        )
    return replace(one, label=label, figures=figures)


def sizes(keys: list[str], known: Known) -> None:
    """Say so where not all models draw images of one size."""
    if not any(key in known.folders for key in keys):
        return
    groups: dict[str, list[str]] = {}
    names = short_names(keys)
    for key in keys:
        folder = known.folders.get(key) or known.judged[key].run.variant(known.judged[key].variant)
        groups.setdefault(model_files.sides(model_files.look(folder).shape), []).append(names[key])
    if len(groups) > 1:
        told = "; ".join(f"{images} ({', '.join(own)})" for images, own in groups.items())
        rest = "Bytes and times compare; pictures of one seed and figures of quality do not."
        st.warning(f"These models draw images of different sizes: {parts.plain(told)}. {rest}")


def progress(task: Task, doing: str = "Judging") -> None:
    """A bar that follows the task, and the whole page again when it has ended."""

    @st.fragment(run_every=pace.every(parts.EVERY_PROGRESS, pace.tab()))
    def follow() -> None:
        if task.future.done():
            st.rerun()
        share = min(1.0, task.done / task.of) if task.of else 0.0
        parts.bar(share, f"{doing} {task.text}: {task.done} of {task.of or '?'}")

    follow()


# --- training curves -------------------------------------------------------------------------------
def curves(keys: list[str], known: Known) -> None:
    """The curves of the runs that the models are of, and of more that need not be evaluated, or even at their end."""
    own = {run.id: run for key in keys if (run := known.judged[key].run) is not None}
    readable = {card.run.id: card for card in lab.cards() if not card.problem}
    parts.follow_url("curves", MORE, list(readable), several=True)
    others = {run_id: card for run_id, card in readable.items() if run_id not in own}
    more = choose_more(others, compare_choice.MOST_MODELS - len(own))
    runs = own | {run_id: others[run_id].run for run_id in more}
    if not runs:
        st.caption("These models are of no run, so that there is no training to show. Choose runs above.")
        return

    is_live = any(others[run_id].active for run_id in more)

    @st.fragment(run_every=pace.every(EVERY_CURVES, pace.tab()) if is_live else None)
    def show() -> None:
        with parts.said():
            curve_views.side_by_side(compare_choice.without_times(runs))

    show()


def choose_more(others: dict[str, lab.Card], room: int) -> list[str]:
    """Further runs, in step with ``?curves=``, as many as there are colours left."""
    st.session_state[MORE] = [run_id for run_id in st.session_state.get(MORE, []) if run_id in others][:room]
    chosen = st.multiselect(
        "More runs",
        list(others),
        key=MORE,
        max_selections=max(1, room),
        disabled=room < 1,
        persist_state="session",
        placeholder="finished or not",
        help="their curves beside those of the models above",
        format_func=lambda one: f"{one} ({parts.STATES[others[one].status][0]} {others[one].status})",
    )
    parts.write_url("curves", MORE, ",".join(chosen))
    return chosen


# --- charts ----------------------------------------------------------------------------------------
def pareto(keys: list[str], found: dict[str, Judged]) -> None:
    """A plot for each pair of quality and cost; a click on a point names the model and leads to it."""
    groups = list(dict.fromkeys(_group(key, found) for key in keys))
    places = {id(found[key]): key for key in keys}
    plots = comparison.pareto([found[key] for key in keys])
    if not plots:
        st.caption("There are no two models here whose figures hold for the same conditions.")
        return
    st.caption(
        "Small is better on both axes. Full marks are on the front: no other model is as good in both and better in "
        "one. A click on a mark names its model and leads to its run."
    )
    for left in range(0, len(plots), 2):
        for column, plot in zip(st.columns(2), plots[left : left + 2]):
            with column:
                _pareto_plot(plot, [places[id(one)] for one in plot.judged], found, groups)
    front_links([places[id(one)] for plot in plots for one, on in zip(plot.judged, plot.on_front) if on], found)


def front_links(keys: list[str], found: dict[str, Judged]) -> None:
    """The runs of models that are on a front, to be reached without a mouse."""
    runs = dict.fromkeys(found[key].run.id for key in keys if found[key].run is not None)
    if runs:
        st.markdown("**Runs with a model on a front**")
    for run in runs:
        st.page_link(lab.page("monitor"), label=f"Open {parts.plain(run)} in Monitor", query_params={"run": run})


def _group(key: str, found: dict[str, Judged]) -> str:
    """What models share a symbol: those of one run."""
    run = found[key].run
    return run.id if run is not None else key


def _pareto_plot(plot: comparison.Plot, keys: list[str], found: dict[str, Judged], groups: list[str]) -> None:
    points = [(one.get(plot.cost.key), one.get(plot.quality.key)) for one in plot.judged]
    quality = figures.names_of(plot.judged[0])["fid"] if plot.quality.key == "fid" else plot.quality.label
    labels, names = (plot.cost.label, quality), short_names(keys)
    places = [groups.index(_group(key, found)) for key in keys]
    models = [model_charts.Model(names[key], found[key].variant, place) for key, place in zip(keys, places)]
    drawn = model_charts.pareto(models, points, plot.on_front, labels, str(labels))
    best = ", ".join(names[key] for key, is_on in zip(keys, plot.on_front) if is_on)
    alt = f"{quality} against {plot.cost.label}: {len(points)} models; on the front: {best}"
    key = f"pareto {labels} {plot.conditions}"
    chosen = st.plotly_chart(drawn, key=key, on_select="rerun", selection_mode="points", alt=alt)
    st.caption(parts.plain(f"{quality[0].upper()}{quality[1:]}: {figures.holds_for(plot)}"))
    for point in chosen.selection.points if chosen else []:
        place = int(point.get("curve_number", 0)) - 1  # the first trace is the front's line
        if 0 <= place < len(keys) and found[keys[place]].run is not None:
            to_run(keys[place])


def to_run(key: str) -> None:
    """A link to the run that a model is of."""
    run = key.partition("/")[0]
    st.page_link(lab.page("monitor"), label=f"Open {parts.plain(name(key))} in Monitor", query_params={"run": run})


def latency(keys: list[str], found: dict[str, Judged]) -> None:
    """A bar for each model that was timed under the same conditions, with its spread."""
    timed = [key for key in keys if found[key].get("latency_ms") is not None]
    by_model = {id(found[key]): key for key in timed}
    groups = comparison.grouped([found[key] for key in timed], figures.ALIKE["latency_ms"])
    for members in groups:
        own = [by_model[id(one)] for one in members]
        names = short_names(own)
        values = {charts.plain(names[key]): found[key].get("latency_ms") for key in own}
        spread = [_spread(found[key]) for key in own]
        title, where = "Latency of a UNet call, ms (measured)", figures.timed_on(members)
        drawn = model_charts.bars(values, [found[key].variant for key in own], f"{title}<br><sup>{where}</sup>", spread)
        said = ", ".join(_in_words(names[key], found[key]) for key in own)
        st.plotly_chart(drawn, key=f"latency {where}", alt=f"{title} ({where}): {said}")
    if timed:
        st.caption("Bars are medians; the lines on them reach from the 10th to the 90th percentile of the calls.")
    if len({found[key].get("speed_session") for key in timed}) > 1:
        st.caption("Timed at different times: the machine may have drifted. Judge them alike to time them in turn.")


def _in_words(name: str, one: Judged) -> str:
    """A model's median and, where it was recorded, how the calls spread."""
    low, high = one.get("latency_ms_p10"), one.get("latency_ms_p90")
    spread = "" if low is None or high is None else f" (10th to 90th percentile {low:.3g} to {high:.3g})"
    return f"{name} {one.get('latency_ms'):.3g}{spread}"


def _spread(one: Judged) -> tuple[float, float]:
    """The 10th and 90th percentile; the median itself where earlier runs recorded no more."""
    median = one.get("latency_ms")
    return tuple(median if one.get(k) is None else one.get(k) for k in ("latency_ms_p10", "latency_ms_p90"))
