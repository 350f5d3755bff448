"""How often live parts are drawn: as often as they ask for, unless that would take the processor from the training.

A tab that follows a run costs its browser and the server processor time, which training on the same machine lacks
twice: its other threads wait for the one that was held up.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import streamlit as st

TAB = 0.08  # processor seconds a second that training loses to one tab at its own pace (benchmarks/app.py tabs)
SHARE = 0.025  # of the machine's processors, for all tabs together
SLOWEST = 5.0  # times as long between two updates, and no more
WATCHES = 20.0  # seconds after an update in which a tab counts

T = TypeVar("T")
_watchers: dict[str, float] = {}  # tab to its last update


def tab() -> str:
    """The name of the browser tab whose page is drawn."""
    return st.session_state.setdefault("pace.tab", uuid.uuid4().hex)


def watchers(name: str) -> int:
    """Tabs that follow something now, the one of this name among them."""
    now = time.monotonic()
    _watchers[name] = now
    for other, last in list(_watchers.items()):
        if now - last > WATCHES:
            _watchers.pop(other, None)
    return len(_watchers)


def every(seconds: float, name: str) -> float:
    """Seconds between two updates of a part of this tab that would like so many, at this moment's number of tabs."""
    stretch = watchers(name) * TAB / (SHARE * (os.cpu_count() or 1))
    return seconds * min(SLOWEST, max(1.0, stretch))


def held(now: T, look: Callable[[], T], seconds: float) -> Callable[[], T]:
    """``look`` that finds nothing but what there is ``now`` until so many seconds have passed."""
    until = time.monotonic() + seconds
    return lambda: look() if time.monotonic() >= until else now
