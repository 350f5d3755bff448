"""Ctrl-C, and a launcher's SIGTERM, that stop long work after the step at hand."""

from __future__ import annotations

import signal
import sys
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

    watched = (signal.SIGINT, signal.SIGTERM) if ranks else (signal.SIGINT,)
    previous = [signal.signal(number, on_interrupt) for number in watched]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in zip(watched, previous):
            signal.signal(number, handler)
