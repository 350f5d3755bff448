"""The recipe: everything that decides a run's result, as one validated YAML document.

Unknown fields are refused, so that no key is silently ignored. Presets are the YAML files beside this
module in ``presets/``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from . import strict_yaml, untrusted
from .stage_recipes import Mask, Prune, Rate, Schedule, Section, Share

PRESETS_FOLDER = Path(__file__).parent / "presets"
PRESETS = ("smoke", "balanced", "quality")
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
DEVICE_PATTERN = r"auto|cpu|mps|cuda(:\d+)?"


class RecipeError(ValueError):
    """Bad input, said in one line: the field, its value, the rule and the remedy."""


class Model(Section):
    source: str = Field(
        "bundled",
        min_length=1,
        description="'bundled', a diffusers folder, a Hugging Face id, or an earlier run",
    )


HUB_PATTERN = r"hf:([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?"  # hf:owner/name[:split]
DATA_READ_BY = {  # fields of data that only some kinds of source read: elsewhere they must keep their default
    **dict.fromkeys(("resize", "crop", "limit"), ("folder", "hub", "cifar10")),
    "held_out": ("folder", "hub"),
}


class Data(Section):
    source: str = Field(
        "bundled",
        min_length=1,
        description="'bundled', a folder of images, a saved Hugging Face dataset, hf:owner/name[:split] or "
        "cifar10[:folder]",
    )
    batch_size: int = Field(64, ge=1, le=4096, description="images in a training step")
    flip: bool = Field(False, description="mirror training images left to right at random")
    resize: Literal["fit", "stretch", "none"] = Field(
        "fit",
        description="fit: keep the proportions and crop; stretch: to the exact size; none: skip images of another size",
    )
    crop: Literal["center", "random"] = Field("center", description="resize=fit: where to crop; random: once, at load")
    held_out: float = Field(0.1, gt=0, le=0.5, description="share of the images kept for validation")
    limit: int | None = Field(None, ge=2, description="most images to take, chosen by a fixed seed; empty: all")

    @property
    def kind(self) -> Literal["bundled", "cifar10", "hub", "folder"]:
        """What the source is, by its name alone; a folder may hold images or a saved data set."""
        if self.source in ("bundled", "cifar10"):
            return self.source  # type: ignore[return-value]
        found = {"cifar10:": "cifar10", "hf:": "hub"}
        return next((kind for start, kind in found.items() if self.source.startswith(start)), "folder")

    @model_validator(mode="after")
    def _agrees(self) -> Data:
        for name, kinds in DATA_READ_BY.items():
            value = getattr(self, name)
            if self.kind not in kinds and value != Data.model_fields[name].default:
                used = "a folder of images" if "cifar10" not in kinds else "a folder of images or cifar10"
                raise ValueError(f"{name}={value} is not read by source={self.source}; remove it or use {used}")
        if self.crop == "random" and self.resize != "fit":
            raise ValueError(f"crop=random is not read by resize={self.resize}; remove it or set resize to fit")
        if self.kind == "hub" and not re.fullmatch(HUB_PATTERN, self.source):
            raise ValueError(
                f"source={self.source} is not hf:owner/name or hf:owner/name:split; try hf:uoft-cs/cifar10"
            )
        return self


TIMESTEPS = ("uniform", "early", "late", "importance")


class Train(Section):
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
    accumulate: int = Field(
        1, ge=1, le=4096, description="parts of a batch that are passed one after another: less memory, the same step"
    )
    validations: int = Field(
        0,
        ge=0,
        le=1000,
        description="losses on held-out images measured in each stage, evenly spaced; sweeps that prune set 4",
    )
    compile: bool = Field(False, description="torch.compile: minutes to begin with, then often quicker on a GPU")
    shard: bool = Field(
        False,
        description="several ranks share stage 1's training state (FSDP) where a copy for each takes too much memory",
    )

    @model_validator(mode="after")
    def _shards_as_written(self) -> Train:
        if self.shard and self.compile:
            raise ValueError("shard=true gathers layers as they run, which compile=true does not see; choose one")
        return self


SAMPLERS = ("ddim", "ddpm", "dpm-solver++", "euler")
EVAL_READ_BY = {"eta": ("ddim",)}  # fields of eval that only some samplers read: elsewhere they keep their default


class Eval(Section):
    images: int = Field(512, ge=2, le=1_000_000, description="generated images for the Frechet distance")
    sampler: Literal[SAMPLERS] = Field("ddim", description="sampler of diffusers")  # type: ignore[valid-type]
    steps: int = Field(25, ge=1, le=1000, description="sampling steps an image")
    eta: float = Field(0.0, ge=0, le=1, description="ddim: share of DDPM's noise drawn in the steps; 0 draws none")
    extractor: Literal["bundled", "inception", "efficientnet-lite0"] = Field(
        "bundled",
        description="feature network of the distances: the bundled one (FD-fashion), Inception-v3 (FID; its weights "
        "from $PRUNEDM_INCEPTION or the network) or ImageNet's EfficientNet-lite0 (an optional package)",
    )
    noise_floor: bool = Field(
        True, description="sample the dense model from other seeds too, to know which differences mean something"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the evaluation's noise")

    @model_validator(mode="after")
    def _agrees(self) -> Eval:
        for name, samplers in EVAL_READ_BY.items():
            value = getattr(self, name)
            if self.sampler not in samplers and value != Eval.model_fields[name].default:
                used = " or ".join(samplers)
                raise ValueError(f"{name}={value} is not read by sampler={self.sampler}; remove it or use {used}")
        return self


class Resources(Section):
    """What a cluster reserves for a run (cluster.py), and where a copy of the run is kept (artifacts.py)."""

    cpus: int = Field(1, ge=1, le=1024, description="processor cores; a run computes on as many threads")
    gpus: float = Field(0, ge=0, le=64, description="GPUs: 0, a share such as 0.5, or a whole number")
    artifacts: str | None = Field(
        None, description="URL under which the run folder is copied while it is worked on: s3://bucket/runs, file:///x"
    )

    @field_validator("artifacts")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^@\s]+", value):
            raise ValueError(
                "is no URL without user and password; give one such as s3://bucket/runs, and keys where its driver "
                "looks for them"
            )
        return value

    @model_validator(mode="after")
    def _whole(self) -> Resources:
        if self.gpus > 1 and self.gpus != round(self.gpus):
            raise ValueError(f"gpus={self.gpus:g} must be a whole number above 1; use {round(self.gpus)}")
        return self


class Recipe(Section):
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
    resources: Resources = Field(default_factory=Resources)

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
        raise RecipeError(f"value {untrusted.shown(text)} is not YAML: {_first_line(error)}") from error


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
        return parse(untrusted.read_text(path), str(path))
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
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
        raise RecipeError(f"--set {untrusted.shown(text)} is not section.field=value; for example mask.n=1")
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
        shown = "" if isinstance(value, dict) else f"={untrusted.shown(value)}"
        line = f"{field}{shown}: {rule[0].lower()}{rule[1:]}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return untrusted.one_line(line, 400) + more


def _fields_at(location: tuple) -> list[str]:
    section: Any = Recipe
    for key in (key for key in location if isinstance(key, str)):
        section = section.model_fields[key].annotation
        section = get_args(section)[0] if get_origin(section) is list else section
    return list(section.model_fields)


def _first_line(error: BaseException) -> str:
    return untrusted.one_line(error)
