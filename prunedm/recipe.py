"""The recipe: everything that decides a run's result, as one validated YAML document.

Unknown fields are refused, so that no key is silently ignored. Presets are the YAML files beside this
module in ``presets/``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from . import strict_yaml

PRESETS_FOLDER = Path(__file__).parent / "presets"
PRESETS = ("smoke", "balanced", "quality")
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
LARGEST_M = 16
DEVICE_PATTERN = r"auto|cpu|mps|cuda(:\d+)?"


class RecipeError(ValueError):
    """Bad input, said in one line: the field, its value, the rule and the remedy."""


class Pattern(NamedTuple):
    """N kept of every M weights, 1 <= N < M <= 16."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m


def parse_pattern(text: str) -> Pattern | None:
    """``"2:4"`` to a Pattern, ``"dense"`` to None. ValueError with value, rule and remedy otherwise."""
    if text == "dense":
        return None
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
    n, m = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= n < m <= LARGEST_M:
        raise ValueError(f"pattern {text!r} must be N:M with 1 <= N < M <= {LARGEST_M}, or dense; try 2:4")
    return Pattern(n, m)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


Steps = Annotated[int, Field(ge=0, le=10_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]
Schedule = Literal["constant", "linear", "cosine"]


class Model(_Section):
    source: str = Field(
        "bundled",
        min_length=1,
        description="'bundled', a diffusers folder, a Hugging Face id, or an earlier run",
    )


class Data(_Section):
    source: str = Field("bundled", min_length=1, description="'bundled' or a folder of images")
    batch_size: int = Field(64, ge=1, le=4096, description="images in a training step")


class Prune(_Section):
    method: Literal["magnitude", "random"] = Field(
        "magnitude", description="how channels are ranked: L2 norm of their weights, or at random"
    )
    target: float = Field(0.4, ge=0, le=0.9, description="share of parameters to remove; 0 skips the stage")
    finetune_steps: Steps = Field(200, description="training steps after the channels are gone")


FIXED_METHODS = ("fixed", "random", "magnitude", "wanda", "fisher")  # masks that do not move
METHODS = ("none", *FIXED_METHODS, "sr-ste", "gumbel", "reinforce", "offset")
INITIALS = ("random", "magnitude", "wanda", "fisher")
TIMESTEPS = ("uniform", "early", "late", "importance")
LEARNED = ("gumbel", "reinforce", "offset")
READ_BY = {  # fields of mask that only some methods read: elsewhere they must keep their default
    **dict.fromkeys(("lr", "schedule", "warmup"), LEARNED),
    **dict.fromkeys(("masks_from", "masks_until"), ("sr-ste", *LEARNED)),
    "then": ("gumbel", "reinforce"),
    "initial": ("fixed", "gumbel", "reinforce"),
    "flip_budget": ("gumbel", "reinforce"),
    **dict.fromkeys(("temperature", "tau_start", "tau_end"), ("gumbel", "offset")),
    **dict.fromkeys(("normalize_advantage", "tracker_decay", "refresh"), ("reinforce",)),
    **dict.fromkeys(("samples", "antithetic", "cached_batches"), ("reinforce",)),
    "sr_decay": ("sr-ste", "offset", "gumbel", "reinforce"),
    **dict.fromkeys(("layers", "density"), tuple(m for m in METHODS if m != "none")),
}


class LayerPattern(_Section):
    match: str = Field(min_length=1, description="layers by shell pattern, such as up_blocks.*")
    pattern: str = Field(description="N:M, or dense")

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        parse_pattern(value)
        return value


class Mask(_Section):
    n: int = Field(2, ge=1, le=LARGEST_M - 1, description="weights kept in each group")
    m: int = Field(4, ge=2, le=LARGEST_M, description="weights in a group, along the input channels")
    method: Literal[METHODS] = Field(  # type: ignore[valid-type]
        "gumbel",
        description="learned: gumbel, reinforce, or offset (beside the weights); baselines: random, magnitude, "
        "wanda, fisher, fixed (as 'initial' says), sr-ste; none: no N:M stage",
    )
    layers: list[LayerPattern] = Field(
        default_factory=list, description="patterns of single layers: [{match: up_blocks.*, pattern: '1:4'}]"
    )
    density: float | None = Field(
        None, gt=0, lt=1, description="choose each layer's pattern to keep this share of the eligible weights"
    )
    initial: str | None = Field(
        None, min_length=1, description="m0: random, magnitude, wanda, fisher, an earlier run or a masks file"
    )
    steps: Steps = Field(300, description="mask-learning steps")
    train_weights: bool = Field(False, description="train the weights while the masks learn")
    recover_steps: Steps = Field(200, description="training steps with the masks frozen")
    lr: Rate | None = Field(None, description="rate of the mask logits; empty: the method's own")
    schedule: Schedule = Field("constant", description="how the masks' rate goes")
    warmup: Share = Field(0.0, description="share of the mask steps in which their rate rises")
    masks_from: Share = Field(0.0, description="share of the steps before the masks begin to learn")
    masks_until: Share = Field(1.0, description="share of the steps after which the masks learn no more")
    then: Literal["frozen", "sr-ste"] = Field(
        "frozen", description="what the masks do after masks_until: stay, or follow the training weights as in SR-STE"
    )
    weights_from: Share = Field(0.0, description="share of the steps before the weights begin to train")
    weights_until: Share = Field(1.0, description="share of the steps after which the weights are frozen")
    flip_budget: float | None = Field(
        None, gt=0, lt=1, description="share of groups a first sample changes; empty: the method's own"
    )
    temperature: Literal["constant", "linear", "cosine", "exponential", "adaptive"] = Field(
        "exponential", description="gumbel, offset: how the temperature falls; adaptive: with the entropy"
    )
    tau_start: float | None = Field(None, gt=0, le=100, description="first temperature; empty: the method's own")
    tau_end: float | None = Field(None, gt=0, le=100, description="last temperature; empty: the method's own")
    normalize_advantage: bool = Field(
        True, description="reinforce: divide the advantage by its running spread; off is the paper's update"
    )
    tracker_decay: float = Field(0.99, ge=0, lt=1, description="reinforce: memory of the loss tracker")
    refresh: bool = Field(True, description="reinforce: measure against better masks once they are found")
    samples: int = Field(1, ge=1, le=1024, description="reinforce: masks drawn and averaged in a step")
    antithetic: bool = Field(False, description="reinforce: draw the masks in opposite pairs")
    cached_batches: int = Field(
        0, ge=0, le=100_000, description="reinforce: cycle over so many fixed batches and keep their f(m0); 0: off"
    )
    sr_decay: float = Field(2e-4, ge=0, le=1, description="decay of the pruned weights: sr-ste, offset, then=sr-ste")
    snapshot_every: int | None = Field(None, ge=1, description="steps between mask snapshots; empty: 20 in all")

    @model_validator(mode="after")
    def _agrees(self) -> Mask:
        if self.n >= self.m:
            raise ValueError(f"n={self.n} must be less than m={self.m}; try 2:4")
        self._require_read()
        self._require_windows()
        self._require_choices()
        return self

    def _require_read(self) -> None:
        """No field is set that the method would ignore."""
        for name, methods in READ_BY.items():
            value, kept = getattr(self, name), type(self).model_fields[name].get_default(call_default_factory=True)
            if self.method not in methods and value != kept:
                used = ", ".join(methods) if len(methods) < 6 else "a method other than none"
                raise ValueError(f"{name}={value} is not read by method={self.method}; remove it or use {used}")

    def _require_windows(self) -> None:
        """When masks and weights train, and that something trains the weights where they are needed."""
        for a, b in (("masks_from", "masks_until"), ("weights_from", "weights_until")):
            if getattr(self, a) >= getattr(self, b):
                raise ValueError(f"{a}={getattr(self, a)} must be less than {b}={getattr(self, b)}; try 0 and 1")
        if not self.train_weights and (self.weights_from, self.weights_until) != (0, 1):
            raise ValueError(
                "weights_from and weights_until are read when the weights train; set train_weights to true"
            )
        if self.then == "sr-ste" and (self.masks_until == 1 or not self.train_weights):
            raise ValueError(
                "then=sr-ste follows the weights after masks_until; set train_weights, and masks_until to 0.2"
            )
        if self.method == "sr-ste" and not self.train_weights:
            raise ValueError("method=sr-ste follows the weights; set train_weights to true")
        if self.cached_batches and self.train_weights:
            raise ValueError("cached_batches keeps losses of frozen weights; set train_weights to false")

    def _require_choices(self) -> None:
        """Fields that must fit one another."""
        if self.tau_start and self.tau_end and self.tau_end > self.tau_start:
            raise ValueError(f"tau_end={self.tau_end} must not exceed tau_start={self.tau_start}; try 1 and 0.1")
        most = 1 - 1 / math.comb(self.m, self.n)
        if self.flip_budget is not None and self.flip_budget >= most:
            raise ValueError(f"flip_budget={self.flip_budget} must be below {most:.3f} for {self.n}:{self.m}; try 0.05")
        if self.density is not None and self.initial not in (None, *INITIALS):
            raise ValueError(f"density chooses patterns and initial={self.initial} brings its own; remove one of them")
        if self.antithetic and self.samples % 2:
            raise ValueError(f"antithetic draws masks in pairs and samples={self.samples} is odd; try 2")


class Train(_Section):
    lr: Rate = Field(2e-4, description="peak learning rate of the weights (AdamW)")
    schedule: Schedule = Field("cosine", description="how the rate goes after its warm-up")
    warmup: Share = Field(0.05, description="share of the steps in which the rate rises")
    clip: float = Field(1.0, gt=0, le=1e6, description="largest norm of the weights' gradient")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast where the GPU or CPU multiplies bf16 in hardware, else fp32"
    )
    distill: float = Field(0.0, ge=0, le=1e4, description="weight of the distance to the dense model's prediction")
    timesteps: Literal[TIMESTEPS] = Field(  # type: ignore[valid-type]
        "uniform",
        description="early: more of the noisy steps that sampling begins with; late: more of its last ones; "
        "importance: where the loss is large, reweighted so as to stay unbiased",
    )
    min_snr: float | None = Field(None, gt=0, le=1e4, description="min-SNR loss weighting; 5 is its paper's gamma")


class Eval(_Section):
    images: int = Field(512, ge=2, le=1_000_000, description="generated images for the Frechet distance")
    sampler: Literal["ddim", "ddpm"] = Field("ddim", description="sampler of diffusers")
    steps: int = Field(25, ge=1, le=1000, description="sampling steps an image")
    extractor: Literal["bundled"] = Field("bundled", description="feature network of the distance")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the evaluation's noise")


class Recipe(_Section):
    """One experiment. Field names, defaults and limits are those of the YAML file."""

    name: str = Field("demo", description="letters, digits, '.', '_' and '-', at most 40")
    seed: int = Field(0, ge=0, lt=2**31, description="data order, timesteps, noise and masks")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps")
    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    prune: Prune = Field(default_factory=Prune)
    mask: Mask = Field(default_factory=Mask)
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(NAME_PATTERN, value):
            raise ValueError("must be 1 to 40 letters, digits, '.', '_' or '-', starting with one of the first two")
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(DEVICE_PATTERN, value):
            raise ValueError("must be auto, cpu, mps, cuda or cuda:N")
        return value

    @model_validator(mode="after")
    def _cycle(self) -> Recipe:
        if self.mask.cached_batches and self.train.timesteps == "importance":
            raise ValueError(
                "mask.cached_batches keeps timesteps that train.timesteps=importance would change; use uniform"
            )
        return self

    def to_yaml(self) -> str:
        """The document that :func:`parse` reads back to an equal recipe."""
        return strict_yaml.dump(self.model_dump())


def parse_value(text: str) -> Any:
    """One YAML value, as in ``--set train.lr=1e-4``."""
    try:
        return strict_yaml.load(text)
    except strict_yaml.FAULTS as error:
        raise RecipeError(f"value {text!r} is not YAML: {_first_line(error)}") from error


def parse_safely(text: str) -> Any:
    """:func:`parse_value`, or None for what is not YAML."""
    try:
        return parse_value(text)
    except RecipeError:
        return None


def parse(text: str, origin: str = "recipe") -> dict[str, Any]:
    """YAML text to a nested dict, not yet validated."""
    try:
        document = strict_yaml.load(text)
    except strict_yaml.FAULTS as error:
        raise RecipeError(f"{origin} is not YAML: {_first_line(error)}; mend that line") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise RecipeError(f"{origin} holds a {type(document).__name__}; it must be sections of fields")
    return document


def read(path: Path) -> dict[str, Any]:
    """A recipe file to a nested dict."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {_first_line(error)}; give a YAML file") from error


def preset(name: str) -> dict[str, Any]:
    """A bundled preset as a nested dict."""
    if name not in PRESETS:
        raise RecipeError(f"preset {name!r} is not known; use one of {', '.join(PRESETS)}")
    return read(PRESETS_FOLDER / f"{name}.yaml")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def assignment(text: str) -> dict[str, Any]:
    """``section.field=value`` as a nested dict."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {text!r} is not section.field=value; for example mask.n=1")
    document: Any = parse_value(value)
    for key in reversed(keys):
        document = {key: document}
    return document


def build(document: dict[str, Any]) -> Recipe:
    """Validate; raises :class:`RecipeError` with one line for the first fault."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error


def resolve(
    path: Path | None = None,
    preset_name: str | None = None,
    assignments: list[str] | None = None,
    name: str | None = None,
) -> Recipe:
    """Preset, then file, then ``--set``, then ``--name``: the later wins."""
    document: dict[str, Any] = preset(preset_name) if preset_name else {}
    if path is not None:
        document = merge(document, read(path))
    for text in assignments or []:
        document = merge(document, assignment(text))
    if name is not None:
        document["name"] = name
    return build(document)


def differences(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """Fields in which two recipes differ, as ``section.field -> (a, b)``."""
    flat_a, flat_b = flatten(a.model_dump()), flatten(b.model_dump())
    return {key: (flat_a[key], flat_b[key]) for key in flat_a if flat_a[key] != flat_b[key]}


def flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to ``section.field`` keys."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _explain(error: ValidationError) -> str:
    faults = error.errors()
    fault = faults[0]
    field = ".".join(str(part) for part in fault["loc"]) or "recipe"
    if fault["type"] == "extra_forbidden":
        known = _fields_at(fault["loc"][:-1])
        line = f"{field} is not a field of the recipe; known there: {', '.join(known)}"
    else:
        rule = fault["msg"].removeprefix("Value error, ")
        value = fault["input"]
        shown = "" if isinstance(value, dict) else f"={value!r}"
        line = f"{field}{shown}: {rule[0].lower()}{rule[1:]}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return " ".join(line.split())[:400] + more


def _fields_at(location: tuple) -> list[str]:
    section: Any = Recipe
    for key in (key for key in location if isinstance(key, str)):
        section = section.model_fields[key].annotation
        section = get_args(section)[0] if get_origin(section) is list else section
    return list(section.model_fields)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
