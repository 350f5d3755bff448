"""Small pieces that several pages show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image

from app import lab
from prunedm import pictures
from prunedm.records import STAGE_LABELS, RunState

STATES = {  # icon and colour; the word always stands beside them
    "queued": ("○", "gray"),
    "running": ("▶", "blue"),
    "stopping": ("◼", "orange"),
    "done": ("✔", "green"),
    "stopped": ("◼", "gray"),
    "failed": ("✖", "red"),
    "interrupted": ("⚡", "orange"),
    "unreadable": ("?", "red"),
}


def page_style() -> None:
    """Small images are the model's own pixels: enlarge them without smoothing."""
    st.html("<style>[data-testid='stImage'] img{image-rendering:pixelated}</style>")


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


def progress(state: RunState) -> None:
    """Stage, bar, rate and ETA."""
    label = STAGE_LABELS.get(state.stage, "Starting")
    share = min(1.0, state.step / state.of) if state.of else 0.0
    text = f"{label}: {state.step} of {state.of}" if state.of else label
    if state.status == "running" and state.rate:
        text += f" · {state.rate:.1f} steps/s · {duration(state.eta)} left in this stage"
    st.progress(share, text=text)


def sheet(path: Path, alt: str, limit: int = 64, factor: int = 2, columns: int = 8) -> None:
    """A sheet of samples, enlarged, laid out anew in so many columns."""
    images, _ = pictures.read_sheet(path)
    st.image(mosaic(images[:limit], columns, factor), alt=alt)


def mosaic(images: list[Image.Image], columns: int, factor: int, gap: int = 2) -> Image.Image:
    """Images side by side with small gaps."""
    width, height = images[0].width * factor + gap, images[0].height * factor + gap
    rows = -(-len(images) // columns)
    canvas = Image.new(images[0].mode, (columns * width - gap, rows * height - gap), color=_grey(images[0].mode))
    for i, image in enumerate(images):
        canvas.paste(pictures.enlarged(image, factor), (i % columns * width, i // columns * height))
    return canvas


def _grey(mode: str) -> Any:
    return 128 if mode == "L" else (128,) * len(mode)


def empty(text: str, page: str, label: str) -> None:
    """Nothing here yet: what to do about it."""
    st.info(text)
    st.page_link(lab.ROOT / "pages" / f"{page}.py", label=label)


def failure(card: lab.Card) -> None:
    """Cause in plain words, what to do, and the log folded."""
    st.error(f"**Why it failed:** {card.state.error}")
    log = card.run.log_path
    if log.exists():
        with st.expander("Log with the traceback"):
            st.code(log.read_text(encoding="utf-8", errors="replace")[-8000:], language=None)


def choose_run(cards: list[lab.Card], parameter: str, label: str = "Run") -> lab.Card | None:
    """A run picker that follows and writes the page's query parameter."""
    ids = [c.run.id for c in cards]
    wanted = st.query_params.get(parameter) or st.session_state.get("monitor_run")
    index = ids.index(wanted) if wanted in ids else 0
    by_id = {c.run.id: c for c in cards}
    chosen = st.selectbox(
        label, ids, index=index, format_func=lambda i: f"{i} ({STATES[by_id[i].status][0]} {by_id[i].status})"
    )
    if wanted is not None and wanted not in ids:
        st.warning(f"There is no run {wanted} in {lab.runs_dir()}; showing {chosen} instead.")
    st.query_params[parameter] = chosen
    st.session_state["monitor_run"] = chosen
    return by_id[chosen]
