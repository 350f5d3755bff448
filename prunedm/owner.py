"""Who works on a run: the process that its state names, whether it is still there, and the lock that one alone holds.

A process is known by its machine, its pid and the tick since that machine's boot at which it began, so that no clock
that can be set decides whether it is the same one, and a pid that is used again is another process. (psutil's time of
creation moves when the clock does: on Linux it is that tick added to the time of boot, which follows the clock.)
A process of another machine is known by its heartbeat: that it *changes* is what counts, seen from here, and not
whether the two clocks agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil
from filelock import FileLock, Timeout

from .records import RunState

STAT_STATE, STAT_BEGAN = 0, 19  # fields of /proc/PID/stat after the name in brackets: proc(5)'s 3 and 22
DEAD = ("Z", "X")  # a child that nobody has asked after, and one that is going
_AS = {"program": ""}  # what this process calls itself


def call_this_process(name: str) -> None:
    """What others are told of this process: "the lab", say, instead of the name of its script."""
    _AS["program"] = name


def program() -> str:
    """What this process is: ``python -m prunedm resume``, or the name of its script."""
    script = Path(sys.argv[0] or "python")
    command = f"python -m {script.parent.name} {' '.join(sys.argv[1:2])}".strip()
    return _AS["program"] or (command if script.name == "__main__.py" else script.name)


def machine() -> str:
    """This boot of this machine and its set of pids, which a container has for itself; empty where none is told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def began(pid: int) -> float | None:
    """When a process of this machine began: ticks since boot on Linux, else seconds; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[STAT_STATE].decode() in DEAD else float(fields[STAT_BEGAN])
    except (OSError, IndexError, ValueError):
        return None if machine() else _created(pid)


def _created(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return None


def sign(state: RunState) -> None:
    """Record this process as the owner."""
    state.host, state.machine, state.program = socket.gethostname(), machine(), program()
    state.pid, state.began, state.pid_started = os.getpid(), began(os.getpid()), psutil.Process().create_time()


def is_this_process(state: RunState) -> bool:
    """Whether the owner is this very process."""
    return (state.host, state.machine, state.pid) == (socket.gethostname(), machine(), os.getpid()) and (
        state.began == began(os.getpid())
    )


def lives(state: RunState, stale_after: float) -> bool:
    """Whether the owner is there. Of another machine: whether it gave a sign of life in the last seconds."""
    if state.host != socket.gethostname():
        return _BEATS.live(state, stale_after)
    if state.machine is None:  # written by a version that knew no machines
        created = _created(state.pid)
        return created is not None and abs(created - (state.pid_started or 0)) < 1.0
    boot, pids = state.machine.split(" ", 1) if " " in state.machine else (state.machine, "")
    here = machine()
    if not here.startswith(boot):
        return False  # the machine was started again since
    if here != f"{boot} {pids}".strip():
        return _BEATS.live(state, stale_after)  # a container beside this one: its pids are none of ours
    found = began(state.pid) if isinstance(state.pid, int) else None
    return found is not None and abs(found - (state.began or 0)) < 1.0


def words(state: RunState | Holder) -> str:
    """The owner in words."""
    return f"{state.program or 'a process'} (pid {state.pid} on {state.host})"


def beat(path: Path) -> None:
    """Leave a sign of life in a file's time."""
    path.touch()
    now = time.time()
    os.utime(path, (now, now))  # by the clock that state.json is written by, and not by a file server's


def last_beat(path: Path) -> float:
    """When :func:`beat` was called last, seconds since the epoch; 0 for never."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class Beats:
    """Heartbeats of owners on other machines, as this process saw them change by its own clock that cannot be set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[tuple, tuple[float, float]] = {}  # owner -> its last beat, and until when that is enough

    def live(self, state: RunState, stale_after: float) -> bool:
        """Whether the last beat came less than ``stale_after`` seconds ago.

        The first look can only compare the two clocks; a beat of the future is taken for one of now. From then on a
        beat that changes is a sign of life, however wrong its clock is, and one that does not change is none.
        """
        owner, now = (state.host, state.pid, state.created), time.monotonic()
        with self._lock:
            beat, until = self._seen.get(owner, (None, 0.0))
            if beat is None:
                until = now + stale_after - max(0.0, time.time() - state.heartbeat)
            elif beat != state.heartbeat:
                until = now + stale_after
            self._seen[owner] = (state.heartbeat, until)
        return now < until


_BEATS = Beats()


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    program: str
    pid: int
    host: str
    since: str

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """What the holder wrote into the lock's file; None where it could not."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{key: " ".join(str(found[key]).split())[:80] for key in cls.__annotations__})
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Lock:
    """A file that one process holds at a time, and that tells the others who it is."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, FileLock(path, thread_local=False)
        self._words: BinaryIO | None = None  # the file itself, wherever its folder is moved to meanwhile

    def acquire(self, patience: float = 0.0) -> str:
        """Empty when it is held from here on; else, after ``patience`` seconds, who holds it, in words."""
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            holder = Holder.read(self.path)
            return f"{words(holder)[:-1]}, since {holder.since})" if holder else "another process"
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            self._words = self.path.open("r+b", buffering=0)
        self._write(json.dumps(vars(Holder(program(), os.getpid(), socket.gethostname(), since))))
        return ""

    def release(self) -> None:
        self._write("")
        if self._words is not None:
            self._words.close()
            self._words = None
        self._lock.release()

    def _write(self, text: str) -> None:
        if self._words is None:
            return
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, only nameless
            self._words.seek(0)
            self._words.truncate()
            self._words.write(text.encode())
