"""Who works on a run: the process recorded in its state, and whether it is still there."""

from __future__ import annotations

import os
import socket
import time

import psutil

from .records import RunState


def sign(state: RunState) -> None:
    """Record this process as the owner."""
    state.pid, state.pid_started = os.getpid(), psutil.Process().create_time()
    state.host = socket.gethostname()


def lives(state: RunState, stale_after: float) -> bool:
    """Whether the owner is there: by pid and start time here, by its heartbeat (seconds old) on another host."""
    if state.host != socket.gethostname():
        return time.time() - state.heartbeat < stale_after
    try:
        created = psutil.Process(state.pid).create_time()
    except (psutil.Error, TypeError, ValueError):
        return False
    return abs(created - (state.pid_started or 0)) < 1.0
