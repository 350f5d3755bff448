"""Samples on Compare: the same-seed grid, the slider over one pair, and what is drawn in the background."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import streamlit as st
from PIL import Image

from app import compare_views, model_files, parts
from app.compare_choice import Known, name, short_names
from app.judgements import judgements
from prunedm import pictures, seed_sheets
from prunedm.comparison import Judged
from prunedm.recipe import Eval
from prunedm.seed_sheets import SHEET

FIRST_SEEDS = 8
ZOOM, WIDE = 3, 336  # least enlargement; width of a picture under the slider
PICTURE, LARGE, FEW = 84, 112, 3  # widths of a picture in the grid: of many models, and of so few
DRAWING = "compare_drawing"
Drawn = dict[str, dict[int, Image.Image]]

GRID_STYLE = """<style>
.seeds{overflow-x:auto}
.seeds table{border-collapse:collapse}
.seeds img{image-rendering:pixelated;display:block}
.seeds th,.seeds td{padding:3px 6px;text-align:center;font-weight:500;font-size:.8rem}
.seeds thead th{min-width:5rem;max-width:9rem;overflow-wrap:anywhere;vertical-align:bottom}
@media (max-width:640px){.seeds img{width:84px;height:auto}.seeds th,.seeds td{padding:3px}}
.seeds th[scope=row],.seeds th:first-child{min-width:0;white-space:nowrap;overflow-wrap:normal}
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
label{display:block;max-width:336px;margin-top:.5rem;font:14px/1.4 var(--st-font,system-ui),sans-serif;
  color:var(--st-text-color)}
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


def samples(picked: list[str], found: Known, shown: dict[str, Judged]) -> None:
    """The grid and the slider, with what there is to draw."""
    st.subheader("Same seeds, side by side")
    settings = settings_of(picked, found)
    drawn = sheets(picked, found, shown, settings)
    places = sorted(set().union(*(set(own) for own in drawn.values())))
    if not any(drawn.values()):
        st.caption("These models have no samples yet.")
        fill(drawn, list(range(SHEET)), settings, found)
        return
    seeds = choose_seeds(places)
    if not compare_views.alike([found.judged[key] for key in drawn if key not in found.folders]):
        st.warning("Different samplers, steps or seeds: the same row is not the same noise.")
    is_whole = fill(drawn, places, settings, found)
    left, right = st.columns([3, 2])
    with left:
        grid(drawn, seeds)
        if is_whole and st.button(f"Draw {SHEET} more seeds"):
            _start(drawn, [(key, (places[-1] // SHEET + 1) * SHEET) for key in drawn], settings, found)
            st.rerun()
    with right:
        pair({key: own for key, own in drawn.items() if own}, seeds)


# --- what is drawn -----------------------------------------------------------------------------------
def settings_of(picked: list[str], found: Known) -> Eval:
    """How models that are of no run are sampled: as the first run's recipe says, so that a row is the same noise."""
    runs = [found.judged[key].run for key in picked if key not in found.folders]
    return runs[0].recipe().eval if runs else Eval()


def sheets(picked: list[str], found: Known, shown: dict[str, Judged], settings: Eval) -> Drawn:
    """Model to its samples by the place of their seeds: the evaluation's sheet and those drawn since."""
    drawn: Drawn = {}
    for key in picked:
        one, own = found.judged[key], drawn.setdefault(key, {})
        if key in found.folders:
            more = seed_sheets.of_folder(model_files.fingerprint(found.folders[key]), settings)
            judged = shown[key].sheet
            own |= of_sheet(judged, settings) if judged is not None else {}
        else:
            more = seed_sheets.of_variant(one.run, one.variant)
            own |= of_sheet(one.sheet) if one.sheet is not None else {}
        for path in more.drawn():
            own |= of_sheet(path)
    return drawn


def of_sheet(path: Path, settings: Eval | None = None) -> dict[int, Image.Image]:
    """The images of a sheet by the place of their seeds; none where they were made otherwise than ``settings``."""
    images, info = pictures.read_sheet(path)
    if settings is not None:
        wanted = {"sampler": settings.sampler, "steps": settings.steps, "seed": settings.seed, "eta": settings.eta}
        if any(info.get(key, 0) != value for key, value in wanted.items()):
            return {}
    return dict(enumerate(images, int(info.get("start", 0))))


def missing(drawn: Drawn, places: list[int]) -> list[tuple[str, int]]:
    """Sheets, as model and first place, that would fill the gaps of the grid.

    They begin at multiples of SHEET: those of one model would else end where those of another go on, for ever.
    """
    return [
        (key, start)
        for key, own in drawn.items()
        for start in sorted({place - place % SHEET for place in places if place not in own})
    ]


def fill(drawn: Drawn, places: list[int], settings: Eval, found: Known) -> bool:
    """What is being drawn, or the offer to draw what the grid lacks; whether it lacks nothing."""
    models, task = st.session_state.get(DRAWING, ([], None))
    if task is not None and models == list(drawn):
        if not task.future.done():
            compare_views.progress(task, "Drawing")
            return False
        if task.error:
            st.error(parts.plain(task.error))
    gaps, labels = missing(drawn, places), short_names(list(drawn))
    if gaps:
        lacking = ", ".join(labels[key] for key in dict.fromkeys(key for key, _ in gaps))
        how = f"{settings.steps} steps of {settings.sampler}, in the background"
        st.caption(parts.plain(f"Not drawn from all seeds yet: {lacking}."))
        if st.button("Draw what is missing", type="primary", help=how):
            _start(drawn, gaps, settings, found)
            st.rerun()
    return not gaps


def _start(drawn: Drawn, wanted: list[tuple[str, int]], settings: Eval, found: Known) -> None:
    sources = [(found.source(key), start) for key, start in wanted]
    st.session_state[DRAWING] = (list(drawn), judgements().draw(sources, settings))


# --- the grid ----------------------------------------------------------------------------------------
def choose_seeds(places: list[int]) -> list[int]:
    """The rows of the grid, in step with ``?seeds=``."""
    key, asked = "compare_seeds", "compare_seeds.asked"
    parts.follow_url("seeds", asked, list(map(str, places)), several=True, what="seed")
    if wanted := st.session_state.pop(asked, None):
        st.session_state[key] = list(map(int, wanted))
    st.session_state[key] = [seed for seed in st.session_state.get(key, places[:FIRST_SEEDS]) if seed in places]
    seeds = st.multiselect("Seeds", places, key=key, persist_state="session") or places[:1]
    parts.write_url("seeds", asked, ",".join(map(str, seeds)))
    return seeds


def grid(drawn: Drawn, seeds: list[int]) -> None:
    """Rows are seeds, columns are models; it scrolls sideways in its own box."""
    labels, width = short_names(list(drawn)), LARGE if len(drawn) <= FEW else PICTURE
    head = "".join(f"<th scope='col'>{html.escape(labels[key])}</th>" for key in drawn)
    rows = []
    for seed in seeds:
        cells = "".join(f"<td>{_picture(own.get(seed), key, seed, width)}</td>" for key, own in drawn.items())
        rows.append(f"<tr><th scope='row'>{seed}</th>{cells}</tr>")
    table = f"<table><thead><tr><th scope='col'>seed</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    st.html(f"{GRID_STYLE}<div class='seeds' tabindex='0' role='region' aria-label='Same-seed grid'>{table}</div>")


def _picture(image: Image.Image | None, key: str, seed: int, wanted: int) -> str:
    if image is None:
        return "not drawn"
    alt = html.escape(f"{name(key)}, seed {seed}", quote=True)
    width = image.width * max(ZOOM, wanted // image.width) if image.width < 128 else image.width
    return f"<img alt='{alt}' width='{width}' src='{data_url(image)}'>"


def data_url(image: Image.Image, factor: int = 1) -> str:
    """A picture inside the page itself."""
    buffer = io.BytesIO()
    pictures.enlarged(image, factor).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- the slider --------------------------------------------------------------------------------------
def pair(drawn: Drawn, seeds: list[int]) -> None:
    """The slider over one pair."""
    if len(drawn) < 2:
        return
    keys, labels = list(drawn), short_names(list(drawn))
    st.markdown("**Before and after**")
    left = one_of("Left", "left", keys, keys[0], labels.get)
    right = one_of("Right", "right", keys, keys[-1], labels.get)
    seed = one_of("Seed", "seed", seeds, seeds[0], str)
    if seed not in drawn[left] or seed not in drawn[right]:
        st.caption("One of the two is not drawn from this seed yet.")
        return
    a, b = drawn[left][seed], drawn[right][seed]
    if a.size != b.size:
        sizes = f"{a.width}x{a.height} and {b.width}x{b.height}"
        st.info(f"These two draw images of different sizes ({sizes}), which cannot lie over each other.")
        return
    slider((labels[left], a), (labels[right], b), seed)


def one_of(label: str, parameter: str, options: list, first, words):
    """A choice that the address names where it is not the first one offered."""
    key, by_name = f"compare_{parameter}", {str(option): option for option in options}
    if parameter in st.query_params:
        parts.follow_url(parameter, f"{key}.wanted", list(by_name), what="seed" if parameter == "seed" else "model")
        if (wanted := st.session_state.pop(f"{key}.wanted", None)) is not None:
            st.session_state[key] = by_name[wanted]
    if st.session_state.get(key) not in options:
        st.session_state[key] = first
    chosen = st.selectbox(label, options, key=key, format_func=words, persist_state="session")
    parts.write_url(parameter, f"{key}.wanted", "" if chosen == first else str(chosen))
    return chosen


def slider(left: tuple[str, Image.Image], right: tuple[str, Image.Image], seed: int) -> None:
    """One pair, the left model's picture over the right one's up to a bar that is moved by hand or keys."""
    factor = max(1, WIDE // left[1].width)
    component = st.components.v2.component("prunedm_slider", html=SLIDER_HTML, css=SLIDER_CSS, js=SLIDER_JS)
    label = f"{left[0]} on the left, {right[0]} on the right, seed {seed}"
    data = {"left": data_url(left[1], factor), "right": data_url(right[1], factor), "label": label}
    data |= {"leftAlt": f"{left[0]}, seed {seed}", "rightAlt": f"{right[0]}, seed {seed}"}
    component(key="slider", data=data)
