"""Ctrl-C, and the SIGTERM of a launcher or of a machine that goes down, that stop long work after the step at hand."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from . import parallel


@contextmanager
def interruptions(work: str) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed while ``work`` goes on; a second one ends the program at once.

    A launcher that ends its ranks sends them SIGTERM and waits: they stop likewise, all after the same step.
    """
    asked: list[int] = []
    ranks = parallel.size() > 1

    def on_interrupt(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1 and not ranks:
            raise KeyboardInterrupt
        if len(asked) == 1 and parallel.is_writer():
            with suppress(OSError):  # of whoever read it and is gone
                print(f"stopping after this step; the {work} can be resumed", file=sys.stderr, flush=True)

    with answered(on_interrupt, signal.SIGINT, *([signal.SIGTERM] if ranks else [])):
        yield lambda: bool(asked)


@contextmanager
def answered(answer: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """These signals are answered so meanwhile. The main thread alone gets any: in another one nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = [signal.signal(number, answer) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by code that is not Python's
