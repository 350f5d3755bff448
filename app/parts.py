"""Small pieces that several pages show."""

from __future__ import annotations

import html
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image

from app import lab, live
from prunedm import logs, pictures
from prunedm.records import STAGE_LABELS

STATES = {  # icon and colour; the word always stands beside them
    "queued": ("○", "gray"),
    "running": ("▶", "blue"),
    "paused": ("❚❚", "violet"),
    "stopping": ("◼", "orange"),
    "done": ("✔", "green"),
    "stopped": ("◼", "gray"),
    "failed": ("✖", "red"),
    "interrupted": ("⚡", "orange"),
    "unreadable": ("?", "red"),
}
LOG_TAIL = 20_000  # bytes
EVERY_PROGRESS = 1.0  # seconds


def page_style() -> None:
    """The look of all pages."""
    st.html(lab.ROOT / "app" / "style.css")


def plain(text: object) -> str:
    """Foreign text with every character of Markdown's escaped: shown, and never rendered."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-!|$:~&])", r"\\\1", str(text))


@contextmanager
def said() -> Iterator[None]:
    """What an action or a section raises on bad input or a damaged file is said in one line."""
    try:
        yield
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        st.error(plain(error))


def state_chip(status: str) -> None:
    """State as icon and word."""
    icon, color = STATES[status]
    st.badge(f"{icon} {status}", color=color)


def duration(seconds: float | None) -> str:
    """Seconds in words: 45 s, 3 min 20 s, 1 h 5 min."""
    if seconds is None:
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def bar_html(share: float, *lines: str) -> str:
    """A progress bar under its first line, with the others below it; plain text."""
    first, *others = [f"<p>{html.escape(line)}</p>" for line in lines]
    drawn = f'<progress value="{share:.4f}" aria-label="{html.escape(lines[0])}"></progress>'
    return f'<div class="progress">{first}{drawn}{"".join(others)}</div>'


def bar(share: float, *lines: str) -> None:
    """One element of HTML: it costs a browser less than Streamlit's own bar and captions."""
    st.html(bar_html(share, *lines))


def progress_html(card: lab.Card, *more: str) -> str:
    """How far a readable run is: place in the queue, or stage, rate and time left; ``more`` stands below the bar."""
    place, state = lab.position(card.run.id), card.state
    if place is not None:
        return bar_html(0.0, f"Number {place} in the queue", *more)
    if state.status == "done":
        return bar_html(1.0, f"Done in {duration(state.seconds)}", *more)
    label = STAGE_LABELS.get(state.stage, "Starting")
    text = f"{label}: {state.step} of {state.of}" if state.of else label
    if state.status == "running" and state.rate:
        text += f" · {state.rate:.1f} steps/s · {duration(state.eta)} left in this stage"
    return bar_html(min(1.0, state.step / state.of) if state.of else 0.0, text, *more)


def progress(card: lab.Card) -> None:
    """How far an active run is, kept fresh; another state of it draws the page again."""
    live.line(f"progress {card.run.id}", _progress(card), lambda: _progress(lab.card(card.run)), EVERY_PROGRESS)


def _progress(card: lab.Card) -> dict[str, str]:
    if card.problem:
        return {"html": html.escape(card.problem), "turn": card.status}
    return {"html": progress_html(card), "turn": card.status}


def sheet(path: Path, alt: str, limit: int = 64, factor: int = 2, columns: int = 8) -> None:
    """A sheet of samples, enlarged, laid out anew in so many columns."""
    images, _ = pictures.read_sheet(path)
    st.image(mosaic(images[:limit], columns, factor), alt=alt)


def mosaic(images: list[Image.Image], columns: int, factor: int, gap: int = 2) -> Image.Image:
    """Images side by side with small gaps."""
    width, height = images[0].width * factor + gap, images[0].height * factor + gap
    rows = -(-len(images) // columns)
    mode = images[0].mode
    grey: Any = 128 if mode == "L" else (128,) * len(mode)
    canvas = Image.new(mode, (min(columns, len(images)) * width - gap, rows * height - gap), color=grey)
    for i, image in enumerate(images):
        canvas.paste(pictures.enlarged(image, factor), (i % columns * width, i // columns * height))
    return canvas


def empty(text: str, page: str, label: str) -> None:
    """Nothing here yet: what to do about it."""
    st.info(text)
    st.page_link(lab.page(page), label=label)


def log(run) -> None:
    """The end of a run's log."""
    if found := logs.tail(run.log_path, LOG_TAIL):
        st.code(found, language=None, wrap_lines=True)
    else:
        st.caption("The log is empty so far.")


def follow_url(parameter: str, key: str, options: list[str], several: bool = False, what: str = "run") -> None:
    """Before a picker is drawn: take over what the address asks for, when it is new. ``what``: its options in a word.

    A picker that read its default from the parameter that it also writes would undo every second choice.
    """
    wanted = st.query_params.get(parameter, "")
    if not wanted or wanted == st.session_state.get(f"{key}.url"):
        return
    ids = wanted.split(",") if several else [wanted]
    known = [i for i in ids if i in options]
    missing = [i for i in ids if i not in options]
    if missing:
        st.warning(f"There is no {what} {plain(', '.join(missing)[:200])} here: what the address names may be gone.")
    if known:
        st.session_state[key] = known if several else known[0]


def write_url(parameter: str, key: str, value: str) -> None:
    """After a picker is drawn: the address names what is shown, if anything is."""
    if value:
        st.query_params[parameter] = value
    else:
        st.query_params.pop(parameter, None)
    st.session_state[f"{key}.url"] = value


def linked(parameter: str, key: str, options: dict[str, Any], first: Any, draw: Callable[[], Any]) -> Any:
    """A widget in step with the address, which names its value by a key of ``options``, or not where it is ``first``.

    draw: makes the widget with this key and without a default, which would be one too many beside the address.
    """
    wanted = st.query_params.get(parameter, "")
    if wanted in options and wanted != st.session_state.get(f"{key}.url"):
        st.session_state[key] = options[wanted]
    elif st.session_state.get(key, first) not in options.values() or key not in st.session_state:
        st.session_state[key] = first
    value = draw()
    write_url(parameter, key, "" if value == first else next(name for name, one in options.items() if one == value))
    return value


def choose_run(cards: list[lab.Card]) -> lab.Card:
    """The run to look at, in step with ``?run=`` and remembered between pages."""
    by_id = {c.run.id: c for c in cards}
    key = "run_pick"
    follow_url("run", key, list(by_id))
    if st.session_state.get(key) not in by_id:
        shown = st.session_state.get("run_shown")
        st.session_state[key] = shown if shown in by_id else cards[0].run.id
    chosen = st.selectbox(
        "Run", list(by_id), key=key, format_func=lambda i: f"{i} ({STATES[by_id[i].status][0]} {by_id[i].status})"
    )
    write_url("run", key, chosen)
    st.session_state["run_shown"] = chosen
    return by_id[chosen]


# A tab that the address names may lie outside a narrow list: it is brought in once, so that whoever scrolls on stays.
OPEN_TAB = """
export default function () {
  const look = (tries) => {
    const tabs = document.querySelectorAll("[data-testid=stMain] [role=tab][aria-selected=true]");
    if (!tabs.length && tries) setTimeout(look, 100, tries - 1);
    for (const tab of tabs) {
      const list = tab.closest("[role=tablist]");
      if (list.openTab === tab.textContent) continue;
      list.openTab = tab.textContent;
      const own = tab.getBoundingClientRect(), seen = list.getBoundingClientRect();
      if (own.left < seen.left || own.right > seen.right)
        list.scrollLeft += own.left + own.width / 2 - seen.left - seen.width / 2;
    }
  };
  look(20);
}
"""


def show_open_tab() -> None:
    """Stands below tabs that an address may open: the open one is seen in a narrow window too."""
    st.components.v2.component("prunedm_open_tab", html="<div></div>", js=OPEN_TAB, isolate_styles=False)(
        key="open-tab"
    )


def step_slider(label: str, options: list, key: str, format_func=str):
    """A slider over a growing list that moves with its end, unless the user has gone back."""
    if len(options) == 1:
        return options[0]
    last = f"{key}.last"
    if st.session_state.get(key) not in options or st.session_state.get(key) == st.session_state.get(last):
        st.session_state[key] = options[-1]
    st.session_state[last] = options[-1]
    return st.select_slider(label, options, key=key, format_func=format_func)
