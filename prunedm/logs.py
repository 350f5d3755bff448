"""Logs of bounded size: one of each run, and the server's own.

A log that is full moves on to ``<name>.1``, that one to ``<name>.2`` and so on; the oldest goes. The server's holds
what goes wrong outside runs: uncaught exceptions of threads and pages, and warnings of what it stands on. Nothing
private is written there (redact.py); a run's own log is the user's, and says everything.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

from .redact import Redactor

LIMIT, OLDER = 2**20, 3  # bytes of a file before it moves on, and how many older ones stay
LONGEST = 64 * 1024  # characters of one entry
SERVER = Path(".server", "server.log")  # in the runs folder; no run's id begins with a point
_LOCK = threading.Lock()
LOGGER = logging.getLogger("prunedm")


class _File(RotatingFileHandler):
    """The standard library's, which raises what goes wrong (a full disk) where that one prints it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "a", LIMIT, OLDER, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the library's name)
        raise  # noqa: PLE0704  (it is called while the error is handled)


def append(path: Path, line: str) -> None:
    """Add a line with the time; OSError when the disk is full or the folder is gone.

    The file is opened for this one line, so that no run that is kept in memory holds a file open, and a folder can be
    moved away at any time.
    """
    entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line[:LONGEST]}"
    record = logging.LogRecord("prunedm", logging.INFO, "", 0, entry, None, None)
    with _LOCK:  # two threads must not move one file on
        file = _File(path)
        try:
            file.emit(record)
        finally:
            file.close()


def files(path: Path) -> list[Path]:
    """The log and its older files, the newest first; those that are there."""
    older = (path.with_name(f"{path.name}.{number}") for number in range(1, OLDER + 1))
    return [file for file in (path, *older) if file.is_file()]


def tail(path: Path, size: int) -> str:
    """The last so many bytes of a log across its files, from the start of a line; empty where there is none."""
    found, seen = b"", set()
    for file in files(path):
        with suppress(FileNotFoundError), file.open("rb") as opened:  # moved on meanwhile
            inode = os.fstat(opened.fileno()).st_ino
            if inode in seen:
                continue
            seen.add(inode)
            wanted = size - len(found)
            opened.seek(max(0, opened.seek(0, os.SEEK_END) - wanted))
            found = opened.read(wanted) + found
        if len(found) >= size:
            found = found.partition(b"\n")[2] or found
            break
    return found.decode("utf-8", "replace")


class ServerLog(logging.Handler):
    """Sends what loggers say to the server's log, without what is private."""

    def __init__(self, runs_dir: Path) -> None:
        super().__init__(logging.INFO)
        self.runs_dir, self._redactor = runs_dir, Redactor({"<runs>": runs_dir})
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s [%(threadName)s]: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and not record.name.startswith("prunedm"):
            return
        path = self.runs_dir / SERVER
        try:
            path.parent.mkdir(exist_ok=True)
            append(path, self._redactor.text(self.format(record)))
        except (OSError, ValueError, TypeError):  # ValueError, TypeError: a message that does not fit its arguments
            self.handleError(record)


def keep_server_log(runs_dir: Path) -> None:
    """From now on this process is a server whose log lies in ``runs_dir``; a second call moves it there.

    Covers every logger that is there, with those that pass nothing on (Streamlit's, uvicorn's), and what no one
    catches on any thread.
    """
    known = next((h for h in LOGGER.handlers if isinstance(h, ServerLog)), None)
    if known and known.runs_dir == runs_dir:
        return
    there = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    ends = [LOGGER, logging.root, *(logger for logger in there if not logger.propagate and logger is not LOGGER)]
    LOGGER.propagate, handler = False, ServerLog(runs_dir)
    LOGGER.setLevel(logging.INFO)
    for logger in ends:
        if known:
            logger.removeHandler(known)
        logger.addHandler(handler)
    if known is None:
        _watch_uncaught()


def _watch_uncaught() -> None:
    """What ends a thread, or the program, is logged before Python says it as it always does."""
    of_thread, of_program = threading.excepthook, sys.excepthook

    def thread_ends(given: threading.ExceptHookArgs) -> None:
        if given.exc_type is not SystemExit:
            name = given.thread.name if given.thread else "of no name"
            LOGGER.error("thread %s ended", name, exc_info=(given.exc_type, given.exc_value, given.exc_traceback))
        of_thread(given)

    def program_ends(kind, error, trace) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            LOGGER.error("the server ended", exc_info=(kind, error, trace))
        of_program(kind, error, trace)

    threading.excepthook, sys.excepthook = thread_ends, program_ends
