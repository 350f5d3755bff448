"""Why something failed, in one line, and which fields of the recipe to change before trying again."""

from __future__ import annotations

import errno
from typing import Any

from .recipe import Recipe, flatten
from .stage_recipes import CALIBRATED, HIGHEST_RATE
from .untrusted import one_line

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")  # CUDA and MPS; torch's CPU
DISK_FULL = "the disk is full; free some space and resume"
RATE_STEP = 3  # a rate that led too far is divided by this, one that moved nothing multiplied


class Diverged(ArithmeticError):
    """A loss or gradient is no longer a number; ``rates``, by the recipe's names, are those that led there."""

    def __init__(self, message: str, rates: dict[str, float]) -> None:
        super().__init__(message)
        self.rates = rates


def out_of_memory(error: BaseException) -> bool:
    """Python's own, the system's, and torch's on any device (RuntimeError in one of these wordings)."""
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return no_memory or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def disk_full(error: BaseException | None) -> bool:
    """No space or no quota, also in the words of libraries that raise an error of their own for it."""
    if error is None:
        return False
    found = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return found or "no space left on device" in str(error).lower() or disk_full(error.__cause__)


def plain_words(error: BaseException, field: str | None = None) -> str:
    """A failure in one line; ``field``: what to halve when memory ran out, None where no field would help."""
    text = one_line(error, 300)
    if out_of_memory(error):
        what = f"halve {field}" if field else "free some memory, or use a device with more, and resume"
        return f"out of memory; {what} ({text[:120] or 'Python could not get any'})"
    if disk_full(error):
        return DISK_FULL
    known = isinstance(error, ValueError | ArithmeticError | ConnectionError)
    return text if known and text else f"{error.__class__.__name__}: {text or 'no message'}"


def batch_field(recipe: Recipe, stage: str) -> str | None:
    """The field that decides how much memory a stage takes; None for one that always takes the same."""
    if stage == "prune" and recipe.prune.method in CALIBRATED:
        return "prune.calibration_images"
    trains = stage in ("finetune", "mask", "recover") or (stage == "prune" and recipe.prune.rounds > 1)
    return "data.batch_size" if trains else None


def slower(rates: dict[str, float]) -> dict[str, float]:
    """Rates to try where these led too far, in two digits."""
    return {field: float(f"{rate / RATE_STEP:.2g}") for field, rate in rates.items()}


def faster(rates: dict[str, float]) -> dict[str, float]:
    """Rates to try where these moved nothing, in two digits; none where a recipe allows no higher one."""
    higher = {field: float(f"{min(HIGHEST_RATE, rate * RATE_STEP):.2g}") for field, rate in rates.items()}
    return {field: rate for field, rate in higher.items() if rate > rates[field]}


def remedy(error: BaseException, recipe: Recipe, stage: str) -> dict[str, Any]:
    """``section.field`` to the value to try next; empty where no field is to blame."""
    if isinstance(error, Diverged):
        return slower(error.rates)
    field = batch_field(recipe, stage) if out_of_memory(error) else None
    if field is None:
        return {}
    now = flatten(recipe.model_dump())[field]
    return {field: now // 2} if now > 1 else {}
