"""How often live parts are drawn: as often as they ask for, unless that would take the processor from the training.

A tab that follows a run costs its browser and the server processor time, which training on the same machine lacks
twice: its other threads wait for the one that was held up.
"""

from __future__ import annotations

import os
import time
import uuid

import streamlit as st

TAB = 0.09  # processor seconds a second that one tab takes at its own pace (benchmarks/app.py tabs)
SHARE = 0.025  # of the machine's processors, for all tabs together
SLOWEST = 5.0  # times as long between two updates, and no more
WATCHES = 20.0  # seconds after an update in which a tab counts

_watchers: dict[str, float] = {}  # tab to its last update


def watchers() -> int:
    """Tabs that follow something now, this one among them."""
    now = time.monotonic()
    _watchers[st.session_state.setdefault("pace.tab", uuid.uuid4().hex)] = now
    for tab, last in list(_watchers.items()):
        if now - last > WATCHES:
            _watchers.pop(tab, None)
    return len(_watchers)


def every(seconds: float) -> float:
    """Seconds between two updates of a part that would like so many, at the number of tabs of this moment."""
    stretch = watchers() * TAB / (SHARE * (os.cpu_count() or 1))
    return seconds * min(SLOWEST, max(1.0, stretch))
