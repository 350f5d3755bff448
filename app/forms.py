"""Recipe <-> widgets: the form is made from the recipe's own fields, limits and help texts."""

from __future__ import annotations

import json
import shlex
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import streamlit as st

from prunedm import recipe as recipes
from prunedm.recipe import Recipe

SECTIONS = {
    "model": "Model",
    "data": "Data",
    "prune": "Stage 1: structured pruning",
    "mask": "Stage 2: N:M masks",
    "train": "Training",
    "eval": "Evaluation",
}
PRESET_HELP = {
    "smoke": "about a minute on two CPU cores: a first look",
    "balanced": "about 15 minutes: a usable result",
    "quality": "about an hour: the best of the three",
}
TOP_LEVEL = ("name", "seed", "device")
# What most runs leave alone waits behind a fold.
FOLDED = {
    "data": ("flip", "resize", "crop", "held_out", "limit"),
    "prune": (
        "ranking", "round_for", "norm", "reduction", "normalizer", "time", "loss_threshold", "calibration_images",
        "calibration_steps", "layers", "rounds", "round_steps",
    ),
    "mask": (
        "layers", "density", "initial", "lr", "schedule", "warmup", "masks_from", "masks_until", "then",
        "weights_from", "weights_until", "flip_budget", "temperature", "tau_start", "tau_end",
        "normalize_advantage", "tracker_decay", "refresh", "samples", "antithetic", "cached_batches",
        "sr_decay", "snapshot_every",
    ),
    "train": ("schedule", "warmup", "clip", "distill", "timesteps", "min_snr"),
}  # fmt: skip


def key(path: str) -> str:
    """Session key of a field's widget."""
    return f"recipe.{path}"


def fill(recipe: Recipe) -> None:
    """Put a recipe's values into the widgets (before they are drawn)."""
    for path, value in recipes.flatten(recipe.model_dump()).items():
        st.session_state[key(path)] = _as_text(value) if _is_text(path) else value


def _is_text(path: str) -> bool:
    """Whether a field is typed as YAML: a list, or a value that may be left empty."""
    model: Any = Recipe
    *sections, name = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return _typed_as_yaml(*_kind(model.model_fields[name].annotation))


def _typed_as_yaml(kind: Any, optional: bool) -> bool:
    return optional or get_origin(kind) is list


def _as_text(value: Any) -> str:
    if value is None or value == []:
        return ""
    return value if isinstance(value, str) else json.dumps(value)  # JSON is YAML


def fields() -> dict[str, Any]:
    """Draw all widgets; returns the document that they hold, not yet validated."""
    document: dict[str, Any] = {}
    for name, column in zip(TOP_LEVEL, st.columns(3)):
        with column:
            document[name] = _widget(name, Recipe.model_fields[name])
    left, right = st.columns(2)
    for number, (section, title) in enumerate(SECTIONS.items()):
        with (left, right)[number % 2], st.container(border=True):
            st.subheader(title)
            model = Recipe.model_fields[section].annotation
            folded = FOLDED.get(section, ())
            shown = {name: field for name, field in model.model_fields.items() if name not in folded}
            document[section] = _pairs(section, shown)
            if folded:
                with st.expander("More settings"):
                    document[section] |= _pairs(section, {name: model.model_fields[name] for name in folded})
    return document


def _pairs(section: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """Widgets two by two; returns their values."""
    values = {}
    for position, (name, field) in enumerate(chosen.items()):
        if position % 2 == 0:
            pair = st.columns(2, vertical_alignment="bottom")
        with pair[position % 2]:
            values[name] = _widget(f"{section}.{name}", field)
    return values


def command_line(recipe: Recipe, runs_dir: Path) -> str:
    """The same run on the command line, into the same runs folder: only what differs from the defaults."""
    changed = {k: b for k, (_, b) in recipes.differences(Recipe(), recipe).items() if k != "name"}
    parts = [".venv/bin/python", "-m", "prunedm", "run", "--runs-dir", str(runs_dir), "--name", recipe.name]
    for path, value in changed.items():
        # JSON is YAML; a string that YAML would take for something else keeps its quotes.
        bare = isinstance(value, str) and recipes.parse_safely(value) == value
        shown = value if bare else json.dumps(value)
        parts += ["--set", f"{path}={shown}"]
    return shlex.join(parts)


def _widget(path: str, field: Any) -> Any:
    kind, optional = _kind(field.annotation)
    label = path.rpartition(".")[2].replace("_", " ")
    common = {"key": key(path), "help": field.description, "persist_state": "session"}
    if _typed_as_yaml(kind, optional):
        text = st.text_input(label, placeholder="automatic" if optional else "none", **common)
        try:
            return recipes.parse_value(text) if text.strip() else None if optional else []
        except recipes.RecipeError:
            return text  # not even YAML: validation names the field and the rule
    if get_origin(kind) is Literal:
        return st.selectbox(label, get_args(kind), **common)
    if kind is bool:
        return st.toggle(label, **common)
    if kind is int:
        return int(st.number_input(label, step=1, **common))
    if kind is float:
        return st.number_input(label, step=None if path == "train.lr" else 0.05, format="%g", **common)
    return st.text_input(label, **common)


def _kind(annotation: Any) -> tuple[Any, bool]:
    """(type without annotations and None, whether None is allowed)."""
    united = get_origin(annotation) in (Union, types.UnionType)
    options = get_args(annotation) if united else (annotation,)
    kinds = [o for o in options if o is not type(None)]
    kind = kinds[0]
    while hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    return kind, len(kinds) < len(options)
