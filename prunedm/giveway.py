"""Where long work gives way: whoever set the work going looks, between its small steps, at what is asked of it.

Work that yields a record a step gives way at each; inside a step that takes long (an image's sampling, calibration,
a search), :func:`look` is called between parts, each about one call of the model. It does nothing unless somebody
listens on this thread, returns late when the work is to wait, and raises when it is to end. What is in the middle of
being changed must not look: a checkpoint may be written, and the work left, at each look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
_LISTENER: ContextVar[Callable[[], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[], None] | None) -> Iterator[None]:
    """Call ``listener`` at each look of this thread while the block runs; None: nobody listens in it."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def look() -> None:
    """Give way, if somebody listens: what is raised here ends the work."""
    listener = _LISTENER.get()
    if listener is not None:
        listener()


def between(items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a look before each."""
    for item in items:
        look()
        yield item


def before_each(do: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """The same function, with a look before each call."""

    def looked(item: Item) -> Result:
        look()
        return do(item)

    return looked
