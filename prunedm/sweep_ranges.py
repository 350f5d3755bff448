"""What a field of a recipe may be in a sweep: a list of values or all between two numbers, checked against the recipe.

Knows no Optuna: :func:`suggest` asks whatever offers ``suggest_float`` and its kind.
"""

from __future__ import annotations

import math
import random
from typing import Annotated, Any, get_args

from pydantic import Field, PlainValidator, ValidationError, model_validator

from . import recipe as recipes
from .recipe import Recipe
from .stage_recipes import Section


def _number(value: Any) -> int | float | None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise ValueError("must be a number")
    return value


Number = Annotated[int | float | None, PlainValidator(_number)]


class Range(Section):
    """What one field may be: a list of values, or all from ``low`` to ``high``."""

    values: list[Any] | None = Field(None, min_length=2, description="the values to choose from")
    low: Number = Field(None, description="smallest value")
    high: Number = Field(None, description="largest value")
    step: Number = Field(None, description="distance of two values; empty: any between")
    log: bool = Field(False, description="as many values from 0.001 to 0.01 as from 0.01 to 0.1")

    @model_validator(mode="after")
    def _agrees(self) -> Range:
        if self.values is not None:
            self._require_choices(self.values)
            return self
        if self.low is None or self.high is None:
            raise ValueError("needs low and high, or a list of values")
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be less than high={self.high}; exchange them")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log needs low={self.low} above 0 and no step; change them or leave log out")
        if self.step is not None:
            self._require_whole_steps(self.step)
        return self

    def _require_choices(self, values: list[Any]) -> None:
        if (self.low, self.high, self.step, self.log) != (None, None, None, False):
            raise ValueError("a list of values takes no low, high, step or log; keep one or the other")
        bad = [value for value in values if not (value is None or isinstance(value, bool | int | float | str))]
        if bad:
            raise ValueError(
                f"{bad[0]!r} must be a number, a word, true, false or null; write a recipe for each instead"
            )
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise ValueError(f"{twice[0]!r} stands twice; keep one")

    def _require_whole_steps(self, step: float) -> None:
        if step <= 0:
            raise ValueError(f"step={step} must be above 0; leave it out for any value between")
        steps = (self.high - self.low) / step
        if steps < 0.5 or abs(steps - round(steps)) > 1e-6:
            best = _rounded(self.low + max(1, round(steps)) * step)
            raise ValueError(f"step={step} does not lead from low={self.low} to high={self.high}; try high={best}")

    def points(self) -> list[Any] | None:
        """All values, or None where there is no end of them."""
        if self.values is not None:
            return self.values
        if self.step is None:
            return None
        count = round((self.high - self.low) / self.step) + 1
        return [_rounded(self.low + i * self.step) for i in range(count)]

    def words(self) -> str:
        """For people: ``0.2 to 0.6, log``."""
        if self.values is not None:
            return ", ".join("null" if value is None else str(value) for value in self.values)
        more = ", log" if self.log else "" if self.step is None else f", step {self.step:g}"
        return f"{self.low:g} to {self.high:g}{more}"

    def short(self) -> Any:
        """As it is written in YAML."""
        return self.values if self.values is not None else self.model_dump(exclude_defaults=True)


def kind(key: str) -> type | None:
    """float or int for a field that a range of numbers fits, None for others. ValueError for what is no field."""
    model: Any = Recipe
    done: list[str] = []
    for part in key.split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            where = f"; known there: {', '.join(fields)}" if fields else f"; {'.'.join(done)} is the field"
            raise ValueError(f"ranges.{key} is not a field of the recipe{where}")
        done.append(part)
        model = fields[part].annotation
    if hasattr(model, "model_fields"):
        raise ValueError(f"ranges.{key} is a section; name one of its fields: {', '.join(model.model_fields)}")
    if key == "name":
        raise ValueError("ranges.name would only rename runs; sweep a field that changes the result")
    if key.startswith("resources."):
        raise ValueError(f"ranges.{key} changes no result; set it in the recipe")
    types = _types(model)
    if list in types:
        raise ValueError(f"ranges.{key} is a list; sweep fields that hold one value, or write a recipe for each")
    return float if float in types else int if int in types else None


def _types(annotation: Any) -> set[Any]:
    """The plain types that an annotation consists of."""
    if getattr(annotation, "__origin__", None) is list:
        return {list}
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*(_types(one) for one in inner if not isinstance(one, int | str)))


def require_fitting(key: str, wanted: Range) -> None:
    """ValueError where a field is none of the recipe, or cannot be between two numbers."""
    found = kind(key)
    if wanted.values is not None:
        return
    if found is None:
        raise ValueError(f"ranges.{key} is not between two numbers; give a list of values")
    parts = {"low": wanted.low, "high": wanted.high, "step": wanted.step}
    broken = [f"{name}={value}" for name, value in parts.items() if isinstance(value, float) and value % 1]
    if found is int and broken:
        raise ValueError(f"ranges.{key}.{broken[0]} must be a whole number; the field counts")


def require_accepted(base: Recipe, key: str, value: Any) -> None:
    """ValueError where the recipe takes no such value, whatever the other fields are."""
    path = tuple(key.split("."))
    try:
        Recipe.model_validate(recipes.merge(base.model_dump(), nested(key, value)))
    except ValidationError as error:
        for fault in error.errors():
            if fault["loc"][: len(path)] == path:
                rule = fault["msg"].removeprefix("Value error, ")
                raise ValueError(f"ranges.{key}: {value!r} is not accepted: {rule[:1].lower()}{rule[1:]}") from None


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _rounded(value: int | float) -> int | float:
    return value if isinstance(value, int) else round(value, 12)


def points_of(key: str, wanted: Range) -> list[Any]:
    if wanted.points() is None and kind(key) is int and not wanted.log:
        return list(range(int(wanted.low), int(wanted.high) + 1))
    points = wanted.points()
    if points is None:
        raise ValueError(f"sampler=grid needs the values of ranges.{key}; give a step or a list, or use sampler=tpe")
    return [kind(key)(value) for value in points] if wanted.values is None else points


def suggest(source: Any, key: str, wanted: Range) -> Any:
    """One value of one range."""
    if wanted.values is not None:
        return source.suggest_categorical(key, wanted.values)
    if kind(key) is int:
        step = 1 if wanted.step is None else int(wanted.step)
        return source.suggest_int(key, int(wanted.low), int(wanted.high), step=step, log=wanted.log)
    step = None if wanted.step is None else float(wanted.step)
    return source.suggest_float(key, float(wanted.low), float(wanted.high), step=step, log=wanted.log)


class Probe:
    """Stands in for an Optuna trial: the low ends, then the high ends, then anything."""

    def __init__(self, draws: random.Random, number: int) -> None:
        self.draws, self.number = draws, number

    def suggest_categorical(self, key: str, values: list[Any]) -> Any:
        return values[0] if self.number == 0 else values[-1] if self.number == 1 else self.draws.choice(values)

    def suggest_int(self, key: str, low: int, high: int, step: int, log: bool) -> int:
        return low if self.number == 0 else high if self.number == 1 else self.draws.randrange(low, high + 1, step)

    def suggest_float(self, key: str, low: float, high: float, step: float | None, log: bool) -> float:
        return low if self.number == 0 else high if self.number == 1 else self.draws.uniform(low, high)
