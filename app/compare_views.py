"""The parts of Compare: what can be compared, the same-seed grid, the slider, Pareto plots, latency."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator
from typing import Any

import streamlit as st
from PIL import Image

from app import lab, parts
from app.judgements import Task, judgements
from prunedm import bundled, comparison, figures, model_charts, pictures
from prunedm.comparison import Judged
from prunedm.records import VARIANT_LABELS, VARIANTS
from prunedm.store import Run

MOST_MODELS, SHEET, FIRST_SEEDS, ZOOM = 8, 64, 8, 3

GRID_STYLE = """<style>
.seeds{overflow-x:auto}
.seeds table{border-collapse:collapse}
.seeds img{image-rendering:pixelated;display:block}
.seeds th,.seeds td{padding:3px 6px;text-align:center;font-weight:500;font-size:.8rem}
.seeds thead th{max-width:9rem;overflow-wrap:anywhere;vertical-align:bottom}
.seeds th[scope=row],.seeds th:first-child{white-space:nowrap;overflow-wrap:normal}
</style>"""
SLIDER_HTML = """
<div class="slide"><img class="under"><img class="over"><div class="line"></div></div>
<label><span class="name"></span><input type="range" min="0" max="100" value="50" step="1"></label>
"""
SLIDER_CSS = """
.slide{position:relative;max-width:336px;line-height:0}
.slide img{width:100%;image-rendering:pixelated}
.slide .over{position:absolute;left:0;top:0;clip-path:inset(0 50% 0 0)}
.slide .line{position:absolute;top:0;bottom:0;left:50%;width:2px;background:#D55E00}
label{display:block;max-width:336px;font:14px system-ui,sans-serif;color:var(--st-text-color)}
input{width:100%}
"""
SLIDER_JS = """
export default function ({ data, parentElement }) {
  const find = (name) => parentElement.querySelector(name);
  find(".under").src = data.right; find(".under").alt = data.rightAlt;
  find(".over").src = data.left; find(".over").alt = data.leftAlt;
  find(".name").textContent = data.label;
  const bar = find("input");
  bar.setAttribute("aria-label", data.label);
  bar.oninput = () => {
    find(".over").style.clipPath = `inset(0 ${100 - bar.value}% 0 0)`;
    find(".line").style.left = `${bar.value}%`;
  };
  bar.oninput();
}
"""


# --- what can be compared ------------------------------------------------------------------------
def models(cards: list[lab.Card]) -> dict[str, Judged]:
    """``RUN/variant`` to its figures, the newest run first; damaged runs are left out and said."""
    found: dict[str, Judged] = {}
    for card in cards:
        try:
            for one in comparison.of_run(card.run, card.results):
                found[f"{card.run.id}/{one.variant}"] = one
        except (ValueError, OSError) as error:
            st.warning(f"{parts.plain(card.run.id)} is left out: {parts.plain(error)}")
    return found


def first_choice(cards: list[lab.Card]) -> list[str]:
    """All variants of the newest run."""
    return [f"{cards[0].run.id}/{name}" for name in cards[0].results]


def of_runs(found: dict[str, Judged], runs: list[str]) -> list[str]:
    """All variants of these runs; the dense model once where they share it and its evaluation."""
    own = [key for key in found if key.partition("/")[0] in runs]
    kept = comparison.without_repeats([found[key] for key in own])
    return [key for key in own if any(found[key] is one for one in kept)]


def name(key: str) -> str:
    """A model in few letters: ``run · N:M``."""
    run, _, variant = key.partition("/")
    return f"{run} · {VARIANT_LABELS[variant]}" if variant in VARIANTS else key


def short_names(keys: list[str]) -> dict[str, str]:
    """Names without the time in the run's id where they still tell the models apart."""
    short = {key: re.sub(r"^\d{8}-\d{6}-", "", name(key)) for key in keys}
    return short if len(set(short.values())) == len(keys) else {key: name(key) for key in keys}


# --- judging in the background ---------------------------------------------------------------------
def alike(chosen: list[Judged]) -> bool:
    """Whether the figures of quality hold for the same conditions."""
    return len({axis.conditions(one) for axis in comparison.QUALITIES[:1] for one in chosen}) <= 1


def progress(task: Task) -> None:
    """A bar that follows the task, and the whole page again when it has ended."""

    @st.fragment(run_every=1.0)
    def follow() -> None:
        if task.future.done():
            st.rerun()
        share = min(1.0, task.done / task.of) if task.of else 0.0
        st.progress(share, text=f"Judging {parts.plain(task.text)}: {task.done} of {task.of or '?'}")

    follow()


# --- the grid --------------------------------------------------------------------------------------
def sheets(keys: list[str], found: dict[str, Judged]) -> dict[str, dict[int, Image.Image]]:
    """Model to its samples by the place of their seeds: the evaluation's sheet and those drawn since."""
    drawn: dict[str, dict[int, Image.Image]] = {}
    for key in keys:
        one = found[key]
        own: dict[int, Image.Image] = {}
        if one.sheet is not None:
            own |= dict(enumerate(pictures.read_sheet(one.sheet)[0]))
        for path in more(one.run, one.variant):
            images, info = pictures.read_sheet(path)
            own |= dict(enumerate(images, int(info["start"])))
        drawn[key] = own
    return {key: own for key, own in drawn.items() if own}


def more(run: Run | None, variant: str | None) -> Iterator[Any]:
    """Further sheets of a run's variant under its recipe's settings."""
    if run is not None:
        settings = bundled.settings_key(run.recipe().eval)
        yield from sorted((run.folder / "evaluations").glob(f"seeds-{variant}-{settings}-*.png"))


def grid(drawn: dict[str, dict[int, Image.Image]], seeds: list[int]) -> None:
    """Rows are seeds, columns are models; it scrolls sideways in its own box."""
    names = short_names(list(drawn))
    head = "".join(f"<th scope='col'>{html.escape(names[key])}</th>" for key in drawn)
    rows = []
    for seed in seeds:
        cells = "".join(f"<td>{_picture(own.get(seed), key, seed)}</td>" for key, own in drawn.items())
        rows.append(f"<tr><th scope='row'>{seed}</th>{cells}</tr>")
    table = f"<table><thead><tr><th scope='col'>seed</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    st.html(f"{GRID_STYLE}<div class='seeds' tabindex='0' role='region' aria-label='Same-seed grid'>{table}</div>")


def _picture(image: Image.Image | None, key: str, seed: int) -> str:
    if image is None:
        return "not drawn"
    alt = html.escape(f"{name(key)}, seed {seed}", quote=True)
    width = image.width * ZOOM if image.width < 128 else image.width
    return f"<img alt='{alt}' width='{width}' src='{data_url(image)}'>"


def data_url(image: Image.Image, factor: int = 1) -> str:
    """A picture inside the page itself."""
    buffer = io.BytesIO()
    pictures.enlarged(image, factor).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def slider(left: tuple[str, Image.Image], right: tuple[str, Image.Image], seed: int) -> None:
    """One pair, the left model's picture over the right one's up to a bar that is moved by hand or keys."""
    factor = max(1, 336 // left[1].width)
    component = st.components.v2.component("prunedm_slider", html=SLIDER_HTML, css=SLIDER_CSS, js=SLIDER_JS)
    label = f"{name(left[0])} on the left, {name(right[0])} on the right, seed {seed}"
    data = {"left": data_url(left[1], factor), "right": data_url(right[1], factor), "label": label}
    data |= {"leftAlt": f"{name(left[0])}, seed {seed}", "rightAlt": f"{name(right[0])}, seed {seed}"}
    component(key="slider", data=data)


# --- charts ----------------------------------------------------------------------------------------
def pareto(keys: list[str], found: dict[str, Judged]) -> None:
    """A plot for each pair of quality and cost; a click on a point names the model and leads to it."""
    runs = list(dict.fromkeys(found[key].run.id for key in keys if found[key].run))
    places = {id(found[key]): key for key in keys}
    plots = comparison.pareto([found[key] for key in keys])
    if not plots:
        st.caption("There are no two models here whose figures hold for the same conditions.")
    for left in range(0, len(plots), 2):
        for column, plot in zip(st.columns(2), plots[left : left + 2]):
            with column:
                _pareto_plot(plot, [places[id(one)] for one in plot.judged], found, runs)


def _pareto_plot(plot: comparison.Plot, keys: list[str], found: dict[str, Judged], runs: list[str]) -> None:
    points = [(one.get(plot.cost.key), one.get(plot.quality.key)) for one in plot.judged]
    quality = figures.names_of(plot.judged[0])["fid"] if plot.quality.key == "fid" else plot.quality.label
    labels, names = (plot.cost.label, quality), short_names(keys)
    places = [runs.index(one.run.id) if one.run is not None else 0 for one in plot.judged]
    models = [model_charts.Model(names[key], found[key].variant, place) for key, place in zip(keys, places)]
    drawn = model_charts.pareto(models, points, plot.on_front, labels, str(labels))
    best = ", ".join(names[key] for key, is_on in zip(keys, plot.on_front) if is_on)
    alt = f"{quality} against {plot.cost.label}: {len(points)} models; on the front: {best}"
    key = f"pareto {labels} {plot.conditions}"
    chosen = st.plotly_chart(drawn, key=key, on_select="rerun", selection_mode="points", alt=alt)
    for point in chosen.selection.points if chosen else []:
        place = int(point.get("curve_number", 0)) - 1  # the first trace is the front's line
        if 0 <= place < len(keys):
            to_run(keys[place])


def to_run(key: str) -> None:
    """A link to the run that a model is of."""
    run = key.partition("/")[0]
    st.page_link(lab.ROOT / "pages" / "monitor.py", label=f"Open {name(key)} in Monitor", query_params={"run": run})


def latency(keys: list[str], found: dict[str, Judged]) -> None:
    """A bar for each model that was timed under the same conditions, with its spread."""
    groups: dict[tuple, list[str]] = {}
    for key in keys:
        if found[key].get("latency_ms") is not None:
            groups.setdefault(tuple(found[key].get(c) for c in comparison.TIMED), []).append(key)
    for (device, dtype, batch), own in groups.items():
        names = short_names(own)
        values = {names[key]: found[key].get("latency_ms") for key in own}
        spread = [_spread(found[key]) for key in own]
        title, where = "Latency of a UNet call, ms (measured)", f"{device}, {dtype}, batch {batch}"
        drawn = model_charts.bars(values, [found[key].variant for key in own], f"{title}<br><sup>{where}</sup>", spread)
        said = ", ".join(f"{label} {value:.3g}" for label, value in values.items())
        st.plotly_chart(drawn, key=f"latency {where}", alt=f"{title} ({where}): {said}")
    if len({found[key].get("speed_session") for key in keys}) > 1:
        st.caption("Timed at different times: the machine may have drifted. Judge them alike to time them in turn.")


def _spread(one: Judged) -> tuple[float, float]:
    """The 10th and 90th percentile; the median itself where earlier runs recorded no more."""
    median = one.get("latency_ms")
    return tuple(median if one.get(k) is None else one.get(k) for k in ("latency_ms_p10", "latency_ms_p90"))


def judged_alike(keys: list[str], mode: str) -> tuple[dict[str, Judged] | None, Task | None]:
    """The figures of a finished judgement of these models, or the task that is at it."""
    task = judgements().found(keys, mode)
    if task is None or not task.future.done() or task.error:
        return None, task
    return dict(zip(keys, task.future.result())), task
