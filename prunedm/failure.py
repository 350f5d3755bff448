"""Why something failed, in one line, and which fields of the recipe to change before trying again."""

from __future__ import annotations

import errno
from typing import Any

from .recipe import Recipe, flatten
from .untrusted import one_line

SMALLER_STEP = 3  # a rate that diverged is divided by this


class Diverged(ArithmeticError):
    """A loss or gradient is no longer a number; ``rates``, by the recipe's names, are those that led there."""

    def __init__(self, message: str, rates: dict[str, float]) -> None:
        super().__init__(message)
        self.rates = rates


def out_of_memory(error: BaseException) -> bool:
    """Python's own, and torch's on any device (RuntimeError with these words)."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def plain_words(error: BaseException) -> str:
    """A failure in one line."""
    text = one_line(error, 300)
    if out_of_memory(error):
        return f"out of memory; halve data.batch_size (calibrating: prune.calibration_images) ({text[:120]})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space and resume"
    known = isinstance(error, ValueError | ArithmeticError)
    return text if known and text else f"{error.__class__.__name__}: {text or 'no message'}"


def remedy(error: BaseException, recipe: Recipe, stage: str) -> dict[str, Any]:
    """``section.field`` to the value to try next; empty where no field is to blame."""
    if isinstance(error, Diverged):
        return {field: float(f"{rate / SMALLER_STEP:.2g}") for field, rate in error.rates.items()}
    if out_of_memory(error):
        field = "prune.calibration_images" if stage == "prune" else "data.batch_size"
        now = flatten(recipe.model_dump())[field]
        return {field: now // 2} if now > 1 else {}
    return {}
