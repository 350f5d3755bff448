"""Recipe <-> widgets: the form is made from the recipe's own fields, limits and help texts."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import lab, parts
from prunedm import recipe as recipes
from prunedm.recipe import Recipe, RecipeError
from prunedm.stage_recipes import Section

SECTIONS = {
    "model": "Model",
    "data": "Data",
    "prune": "Stage 1: structured pruning",
    "mask": "Stage 2: N:M masks",
    "train": "Training",
    "eval": "Evaluation",
    "resources": "Resources on a cluster",
}
PRESET_HELP = {
    "smoke": "about a minute on two CPU cores: a first look",
    "balanced": "about 15 minutes: a usable result",
    "quality": "about an hour: the best of the three",
}
LABELS = {  # of fields whose names are too short to be read; all others by their names
    "prune.of": "Share of",
    "prune.finetune_steps": "Fine-tune steps",
    "mask.n": "N (kept)",
    "mask.m": "M (of each)",
    "mask.lr": "Learning rate",
    "mask.recover_steps": "Recovery steps",
    "mask.then": "Afterwards",
    "mask.tau_start": "First temperature",
    "mask.tau_end": "Last temperature",
    "mask.sr_decay": "SR-STE decay",
    "train.lr": "Learning rate",
    "train.ema": "EMA decay",
    "train.min_snr": "Min-SNR gamma",
    "train.accumulate": "Batches a step",
    "resources.cpus": "CPUs",
    "resources.gpus": "GPUs",
}
OWN = "the method's own"
STEP = 0.05  # of a number's arrows
EMPTY = {  # what an optional field means that is left empty, where that is not something chosen by itself
    "data.limit": "all",
    "mask.density": "off",
    "mask.lr": OWN,
    "mask.flip_budget": OWN,
    "mask.tau_start": OWN,
    "mask.tau_end": OWN,
    "mask.snapshot_every": "20 in all",
    "train.min_snr": "off",
    "resources.artifacts": "none",
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
    "train": ("schedule", "warmup", "clip", "distill", "timesteps", "min_snr", "accumulate", "compile", "shard"),
}  # fmt: skip


def key(path: str) -> str:
    """Session key of a field's widget."""
    return f"recipe.{path}"


def fill(recipe: Recipe, changes: dict[str, Any] | None = None) -> None:
    """Put a recipe's values into the widgets (before they are drawn), some of them changed."""
    for path, value in (recipes.flatten(recipe.model_dump()) | (changes or {})).items():
        st.session_state[key(path)] = _as_text(value) if _is_text(path) else value


def to_launch(recipe: Recipe, changes: dict[str, Any] | None = None) -> None:
    """Leave for the Launch form with this recipe in it; nothing starts yet."""
    fill(recipe, changes)
    st.switch_page(lab.page("launch"))


def _is_text(path: str) -> bool:
    """Whether a field is typed as YAML: a list, or a value that may be left empty."""
    return _typed_as_yaml(*_kind(field_of(path).annotation))


def field_of(path: str) -> Any:
    """The recipe's field at a dotted path."""
    model: Any = Recipe
    *sections, name = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[name]


def label_of(path: str) -> str:
    """What a field is called in the form."""
    return LABELS.get(path) or path.rpartition(".")[2].replace("_", " ").capitalize()


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    """Presets by name, without what is a run's own."""
    found = {name: recipes.flatten(recipes.build(recipes.preset(name)).model_dump()) for name in recipes.PRESETS}
    return {name: {path: one[path] for path in one if path not in TOP_LEVEL} for name, one in found.items()}


def preset_of(document: dict[str, Any]) -> str | None:
    """The preset that a document is, whatever its name, seed and device."""
    values = recipes.flatten(document)
    return next((name for name, one in _presets().items() if one.items() <= values.items()), None)


def held() -> dict[str, Any]:
    """The document that the widgets hold, known before they are drawn; not yet validated."""
    document: dict[str, Any] = {}
    for path in recipes.flatten(Recipe().model_dump()):
        section, _, name = path.rpartition(".")
        part = document.setdefault(section, {}) if section else document
        part[name] = _value(field_of(path), st.session_state.get(key(path)))
    return document


def faults(document: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a document, by the field (or section) that it is wrong of; empty when nothing is."""
    try:
        recipes.build(document)
    except RecipeError as error:
        found: dict[str, str] = {}
        for fault in error.__cause__.errors():  # type: ignore[union-attr]
            rule = " ".join(fault["msg"].removeprefix("Value error, ").split())
            found.setdefault(_place(fault["loc"], rule), rule)
        return found
    return {}


def _place(location: tuple, rule: str) -> str:
    """The field that a fault is shown beside: where it was found, else the one that its text begins with."""
    parts_, model = [], Recipe
    for step in location:
        if not isinstance(step, str) or step not in model.model_fields:
            break
        parts_.append(step)
        model = model.model_fields[step].annotation
        if not (isinstance(model, type) and issubclass(model, Section)):
            return ".".join(parts_)
    named = re.match(r"[\w.]*", rule)[0].rstrip(".")
    path = ".".join([*parts_, named])
    return path if path in recipes.flatten(Recipe().model_dump()) else ".".join(parts_)


def _typed_as_yaml(kind: Any, optional: bool) -> bool:
    return optional or get_origin(kind) is list


def _as_text(value: Any) -> str:
    if value is None or value == []:
        return ""
    return value if isinstance(value, str) else json.dumps(value)  # JSON is YAML


def fields(
    wrong: dict[str, str] | None = None, sources: dict[str, str] | None = None
) -> tuple[dict[str, Any], DeltaGenerator]:
    """Draw all widgets; returns the document that they hold, not yet validated, and a place at the end of Data: what is
    seen of it is drawn last, so that the form does not wait for images.

    ``wrong``: faults by field, shown below their widgets. ``sources``: models to choose from, with their labels.
    """
    wrong, sources = wrong or {}, sources or {}
    document: dict[str, Any] = {}
    for name, column in zip(TOP_LEVEL, st.columns(3)):
        with column:
            document[name] = _widget(name, Recipe.model_fields[name])
            _say(wrong.get(name))
    for number, (section, title) in enumerate(SECTIONS.items()):
        if number % 2 == 0:  # row by row, so that one below the other they keep their order
            sides = st.columns(2)
        with sides[number % 2], st.container(border=True, height="stretch"):
            st.subheader(title)
            _say(wrong.get(section))
            model = Recipe.model_fields[section].annotation
            folded = FOLDED.get(section, ())
            shown = {name: field for name, field in model.model_fields.items() if name not in folded}
            document[section] = _pairs(section, shown, wrong, sources)
            if folded:
                document[section] |= _fold(section, {name: model.model_fields[name] for name in folded}, wrong)
            if section == "data":
                place = st.container(key="beside-data")
    return document, place


def _fold(section: str, hidden: dict[str, Any], wrong: dict[str, str]) -> dict[str, Any]:
    """What most runs leave alone, drawn only while its fold is open: the whole form would take twice the time."""
    fold_key = f"launch.fold.{section}"
    if any(f"{section}.{name}" in wrong for name in hidden):
        st.session_state[fold_key] = True
    fold = st.expander("More settings", key=fold_key, on_change="rerun")
    if fold.open:
        with fold:
            return _pairs(section, hidden, wrong, {})
    return {name: _value(field, st.session_state.get(key(f"{section}.{name}"))) for name, field in hidden.items()}


def _say(fault: str | None) -> None:
    if fault:
        st.error(parts.plain(fault))


def _pairs(section: str, chosen: dict[str, Any], wrong: dict[str, str], sources: dict[str, str]) -> dict[str, Any]:
    """Widgets two by two, each with its fault; returns their values."""
    values = {}
    for position, (name, field) in enumerate(chosen.items()):
        if position % 2 == 0:
            # level with each other, unless a fault below one of them would push it out of line
            faulty = any(f"{section}.{name}" in wrong for name in [*chosen][position : position + 2])
            pair = st.columns(2, vertical_alignment="top" if faulty else "bottom")
        with pair[position % 2]:
            path = f"{section}.{name}"
            is_source = path == "model.source"
            values[name] = _source(path, field, sources) if is_source else _widget(path, field)
            _say(wrong.get(path))
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


def _common(path: str, field: Any) -> dict[str, Any]:
    return {"key": key(path), "help": field.description, "persist_state": "session"}


def _source(path: str, field: Any, sources: dict[str, str]) -> str:
    """The model: one of those that are here, or what is typed."""
    options = list(dict.fromkeys([*sources, st.session_state.get(key(path)) or "bundled"]))
    return st.selectbox(
        label_of(path),
        options,
        format_func=lambda o: sources.get(o, o),
        accept_new_options=True,
        **_common(path, field),
    )


def _widget(path: str, field: Any) -> Any:
    kind, optional = _kind(field.annotation)
    label = label_of(path)
    common = _common(path, field)
    if _typed_as_yaml(kind, optional):
        given: Any = st.text_input(label, placeholder=EMPTY.get(path, "automatic") if optional else "none", **common)
    elif get_origin(kind) is Literal:
        given = st.selectbox(label, get_args(kind), **common)
    elif kind is bool:
        given = st.toggle(label, **common)
    elif kind is int:
        given = st.number_input(label, step=1, **common)
    elif kind is float:
        given = st.number_input(label, step=_step(field), format="%.12g", **common)
    else:
        given = st.text_input(label, **common)
    return _value(field, given)


def _step(field: Any) -> float:
    """What an arrow adds: less to a field whose default lies nearer to 0 or 1 than that."""
    near_an_end = min(field.default, 1 - field.default) if 0 < field.default < 1 else 1.0
    return STEP if near_an_end >= STEP else 10.0 ** math.floor(math.log10(near_an_end / 2))


def _value(field: Any, given: Any) -> Any:
    """What a widget's value stands for in the document."""
    kind, optional = _kind(field.annotation)
    if _typed_as_yaml(kind, optional):
        if not (given or "").strip():
            return None if optional else []
        try:
            return recipes.parse_value(given)
        except RecipeError:
            return given  # not even YAML: validation names the field and the rule
    return int(given) if kind is int and given is not None else given


def _kind(annotation: Any) -> tuple[Any, bool]:
    """(type without annotations and None, whether None is allowed)."""
    united = get_origin(annotation) in (Union, types.UnionType)
    options = get_args(annotation) if united else (annotation,)
    kinds = [o for o in options if o is not type(None)]
    kind = kinds[0]
    while hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    return kind, len(kinds) < len(options)
