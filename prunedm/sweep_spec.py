"""The specification of a sweep: which fields of a recipe are tried in which ranges, and what is judged.

A YAML file beside the recipe's: ``recipe`` (a preset, a file or its sections) and ``ranges``; or a recipe with
such fields in a section ``sweep``.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from . import recipe as recipes
from . import strict_yaml
from .recipe import Recipe, RecipeError
from .stage_recipes import PRUNE_READ_BY, READ_BY, Section
from .sweep_ranges import Probe, Range, nested, points_of, require_accepted, require_fitting, suggest

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}"  # a trial's recipe is called NAME-012, within a recipe's 40
QUARTERS = 4  # of a stage, after each of which trials are compared
QUALITIES = {"validation_loss": "validation_loss", "fid": "fid"}
COSTS = {
    "bytes": "sizes.packed_fp16",
    "macs": "macs",
    "latency": "latency_ms",
    "parameters": "nonzero_parameters",
}
METHODS_READ = {"prune": PRUNE_READ_BY, "mask": READ_BY}  # fields that only some values of the section's method read
JUDGED_BY = {  # fields that change what models are judged by: figures on both sides of them cannot be compared
    **dict.fromkeys(("data.source", "data.resize", "data.crop", "data.held_out", "data.limit"), (*QUALITIES,)),
    **dict.fromkeys((f"eval.{name}" for name in recipes.Eval.model_fields), ("fid",)),
    "device": ("latency",),
}
LARGEST_GRID = 10_000
PROBES = 64  # combinations tried before a sweep starts


class SweepError(ValueError):
    """A sweep that cannot be done or found, in one line."""


class Objectives(Section):
    quality: Literal["validation_loss", "fid"] = Field("validation_loss", description="what is to be small")
    cost: Literal["bytes", "macs", "latency", "parameters", "none"] = Field(
        "bytes",
        description="and what it is weighed against: bytes (packed, fp16), macs, latency (measured: of one machine "
        "alone), parameters (not zero); none: quality alone",
    )

    @property
    def figures(self) -> dict[str, str]:
        """Name of each objective to the figure of an evaluation that it is; both are to be small."""
        found = {self.quality: QUALITIES[self.quality]}
        return found if self.cost == "none" else found | {self.cost: COSTS[self.cost]}


class Sweep(Section):
    """A sweep. Field names, defaults and limits are those of the YAML file."""

    name: str = Field("sweep", description="letters, digits, '.', '_' and '-', at most 32")
    recipe: dict[str, Any] = Field(description="what all trials have in common: a preset, a recipe file or sections")
    ranges: dict[str, Range] = Field(min_length=1, description="section.field: [values], or {low, high, step, log}")
    objectives: Objectives = Field(default_factory=Objectives)
    trials: int = Field(20, ge=1, le=100_000, description="how many in all, on all machines together")
    sampler: Literal["tpe", "random", "grid", "nsga2"] = Field("tpe", description="how values are chosen")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the sampler; the recipe has its own")
    pruner: Literal["none", "median", "hyperband"] = Field(
        "none", description="which trials end early, judged by their losses so far; one objective only"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(NAME_PATTERN, value):
            raise ValueError("must be 1 to 32 letters, digits, '.', '_' or '-', starting with one of the first two")
        return value

    @field_validator("ranges", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        """A plain list of values is a range too."""
        if not isinstance(value, dict):
            return value
        for key, given in value.items():
            if not isinstance(given, list | dict | Range):
                raise ValueError(f"{key} holds {given!r}; give a list of values, or low and high")
        return {str(key): {"values": v} if isinstance(v, list) else v for key, v in value.items()}

    @model_validator(mode="after")
    def _agrees(self) -> Sweep:
        base = self.base
        if self.pruner != "none" and self.objectives.cost != "none":
            raise ValueError(
                f"pruner={self.pruner} needs one objective and cost={self.objectives.cost} is a second one; "
                "set objectives.cost or pruner to none"
            )
        for key, wanted in self.ranges.items():
            self._require_comparable(key)
            require_fitting(key, wanted)
            ends = wanted.values if wanted.values is not None else [wanted.low, wanted.high]
            for value in ends:
                require_accepted(base, key, value)
        if self.sampler == "grid":
            self.grid()
        self._require_possible()
        return self

    def _require_comparable(self, key: str) -> None:
        """ValueError where trials would be judged by different measures."""
        clash = [name for name in JUDGED_BY.get(key, ()) if name in self.objectives.figures]
        if clash:
            raise ValueError(
                f"ranges.{key} changes what {clash[0]} is measured by, so that trials could not be compared; "
                "set it in the recipe"
            )

    def _require_possible(self) -> None:
        """ValueError when no combination that was tried is a recipe."""
        draws, first = random.Random(0), None
        for probe in range(PROBES):
            try:
                self.recipe_of(self.suggest(Probe(draws, probe)))
                return
            except RecipeError as error:
                first = first or error
        raise ValueError(f"none of {PROBES} combinations of the ranges is a recipe: {first}")

    @cached_property
    def base(self) -> Recipe:
        """The recipe as it is before anything is tried."""
        try:
            return recipes.build(self.recipe)
        except RecipeError as error:
            raise SweepError(f"recipe: {error}") from error

    # --- trials --------------------------------------------------------------------------------
    @property
    def total(self) -> int:
        """How many trials: no more than the grid has points."""
        return min(self.trials, len(self.grid())) if self.sampler == "grid" else self.trials

    def suggest(self, source: Any) -> dict[str, Any]:
        """Values for a trial from an Optuna trial or its like; a field that the chosen method does not read is
        left out."""
        chosen: dict[str, Any] = {}
        for key in sorted(self.ranges, key=lambda k: not k.endswith(".method")):  # methods decide what is read
            if self._is_read(key, chosen):
                chosen[key] = suggest(source, key, self.ranges[key])
        return chosen

    def _is_read(self, key: str, chosen: dict[str, Any]) -> bool:
        section, _, name = key.partition(".")
        methods = METHODS_READ.get(section, {}).get(name)
        if methods is None:
            return True
        return chosen.get(f"{section}.method", getattr(self.base, section).method) in methods

    def recipe_of(self, values: dict[str, Any], name: str | None = None) -> Recipe:
        """The recipe with these values. RecipeError where they do not fit one another.

        Fields that a chosen method does not read go back to their defaults, or the recipe would refuse them.
        """
        document = dict(self.recipe)
        for section, read_by in METHODS_READ.items():
            method = values.get(f"{section}.method")
            if method is not None:
                own = document.get(section, {})
                document[section] = {k: v for k, v in own.items() if method in read_by.get(k, (method,))}
        for key, value in values.items():
            document = recipes.merge(document, nested(key, value))
        if self.pruner != "none" and not document.get("train", {}).get("validations"):
            document = recipes.merge(document, nested("train.validations", QUARTERS))
        return recipes.build(recipes.merge(document, {"name": name or self.name}))

    def grid(self) -> list[dict[str, Any]]:
        """Every combination once, in an order drawn by the seed. ValueError where there is no end of them."""
        points = {key: points_of(key, wanted) for key, wanted in self.ranges.items()}
        size = math.prod(len(values) for values in points.values())
        if size > LARGEST_GRID:
            raise ValueError(f"the grid has {size} points; at most {LARGEST_GRID}: use larger steps or sampler=tpe")
        found: list[dict[str, Any]] = []
        for combination in itertools.product(*points.values()):
            values = dict(zip(points, combination))
            values = {key: value for key, value in values.items() if self._is_read(key, values)}
            found.append(values)
        unique = list({repr(sorted(values.items())): values for values in found}.values())
        random.Random(self.seed).shuffle(unique)
        return unique

    def to_yaml(self) -> str:
        """The document that :func:`build` reads back to an equal sweep."""
        document = self.model_dump(exclude={"ranges"})
        document["ranges"] = {key: wanted.short() for key, wanted in self.ranges.items()}
        return strict_yaml.dump(document)


# --- reading -----------------------------------------------------------------------------------
def read(path: Path) -> Sweep:
    """A sweep file. RecipeError or :class:`SweepError` in one line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"sweep {path} cannot be read ({error}); give a YAML file") from error
    return build(recipes.parse(text, str(path)), path.parent)


def build(document: dict[str, Any], folder: Path = Path()) -> Sweep:
    """Validate; ``folder``: where a recipe file's relative path starts. :class:`SweepError` names the first fault."""
    if "sweep" in document:  # a recipe with a section of its own for the sweep
        base = {key: value for key, value in document.items() if key != "sweep"}
        own = document["sweep"]
        if not isinstance(own, dict) or "recipe" in own:
            raise SweepError("section sweep must hold ranges and no recipe, since the recipe is around it; mend it")
        document = ({"name": base["name"]} if "name" in base else {}) | own | {"recipe": base}
    given = document.get("recipe")
    if isinstance(given, str):
        found = recipes.preset(given) if given in recipes.PRESETS else recipes.read(folder / Path(given).expanduser())
        document = document | {"recipe": found}
    try:
        return Sweep.model_validate(document)
    except ValidationError as error:
        raise SweepError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    fault = error.errors()[0]
    field = ".".join(str(part) for part in fault["loc"])
    rule = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = Range if "ranges" in fault["loc"] else Objectives if "objectives" in fault["loc"] else Sweep
        line = f"{field} is not a field of a sweep; known there: {', '.join(known.model_fields)}"
    elif fault["type"] == "missing":
        line = f"{field} is missing; {Sweep.model_fields[field].description}"
    else:
        shown = "" if isinstance(fault["input"], dict | Sweep | Range) else f"={fault['input']!r}"
        line = f"{field}{shown}: {rule[:1].lower()}{rule[1:]}" if field else rule
    return " ".join(line.split())[:500]
