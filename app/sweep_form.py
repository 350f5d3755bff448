"""The form of a new sweep: what all trials share, a row for each range, what is judged; filled in and started."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

import streamlit as st

from app import forms, lab, parts, sweep_charts, sweep_views, sweeps
from prunedm import recipe as recipes
from prunedm import strict_yaml, sweep_ranges, sweep_spec
from prunedm.recipe import Recipe, RecipeError
from prunedm.sweep_spec import Objectives, Sweep
from prunedm.sweep_trials import short

NEXT = "sweep.next"  # the name of one that was just started
BASE, BASE_TEXT, ROWS, FAULT = "sweep.base", "sweep.base_text", "sweep.rows", "sweep.fault"
LAUNCH, TYPED = "the recipe on Launch", "YAML"
BETWEEN, LISTED = "between", "these values"
KEEP = {"persist_state": "session"}
EXAMPLE = {
    "name": "example",
    "recipe": "smoke",
    "ranges": {"prune.target": {"low": 0.3, "high": 0.6}, "mask.method": ["gumbel", "magnitude"]},
    "trials": 6,
}


def key(name: str) -> str:
    """Session key of a widget of the form."""
    return f"sweep.form.{name}"


# --- the form's values -----------------------------------------------------------------------------
def fill(document: dict[str, Any]) -> None:
    """Put a sweep into the widgets (before they are drawn)."""
    given = document["recipe"]
    known = next((name for name in recipes.PRESETS if given in (name, recipes.preset(name))), None)
    st.session_state[BASE] = known or TYPED
    if known is None:
        st.session_state[BASE_TEXT] = strict_yaml.dump(given)
    fresh = sweep_spec.Sweep.model_fields
    for name in ("name", "trials", "sampler", "seed", "pruner"):
        st.session_state[key(name)] = document.get(name, fresh[name].default)
    for name in ("quality", "cost"):
        wanted = document.get("objectives", {}).get(name)
        st.session_state[key(name)] = wanted or Objectives.model_fields[name].default
    st.session_state[ROWS] = []
    for path, wanted in document["ranges"].items():
        fill_row(path, wanted)


def fill_row(path: str, wanted: Any) -> None:
    row = add_row(path)
    if isinstance(wanted, dict):
        for name in ("low", "high", "step"):
            st.session_state[row_key(row, name)] = json.dumps(wanted[name]) if name in wanted else ""
        st.session_state[row_key(row, "log")] = wanted.get("log", False)
        return
    st.session_state[row_key(row, "how")] = LISTED
    if options(path):
        st.session_state[row_key(row, "options")] = wanted
    else:
        st.session_state[row_key(row, "values")] = json.dumps(wanted)[1:-1]  # JSON is YAML


def row_key(row: int, name: str) -> str:
    return key(f"{row}.{name}")


def add_row(path: str = "prune.target") -> int:
    rows = st.session_state.setdefault(ROWS, [])
    row = st.session_state[key("count")] = st.session_state.get(key("count"), 0) + 1
    st.session_state[ROWS] = [*rows, row]
    st.session_state[row_key(row, "field")] = path
    return row


def remove_row(row: int) -> None:
    st.session_state[ROWS] = [other for other in st.session_state[ROWS] if other != row]


def clear_row(row: int) -> None:
    """Another field: what was meant for the one before goes."""
    for name in ("low", "high", "step", "values"):
        st.session_state[row_key(row, name)] = ""
    st.session_state[row_key(row, "options")] = []
    st.session_state[row_key(row, "log")], st.session_state[row_key(row, "how")] = False, BETWEEN


def take_upload() -> None:
    """Fill the form in from a file of a sweep."""
    given = st.session_state.get(key("upload"))
    if given is None:
        return
    st.session_state.pop(FAULT, None)
    try:
        found = sweeps.spec_of_document(recipes.parse(given.getvalue().decode("utf-8"), given.name))
        fill(strict_yaml.load(found.to_yaml()))
    except ValueError as error:
        st.session_state[FAULT] = str(error)


def fields() -> list[str]:
    """All fields of the recipe that hold one value and change a result."""
    found = []
    for path in recipes.flatten(Recipe().model_dump()):
        try:
            sweep_ranges.kind(path)
        except ValueError:
            continue
        found.append(path)
    return found


def options(path: str) -> list[Any]:
    """The values of a field that has a list of them; empty for others."""
    found: list[Any] = []

    def walk(kind: Any) -> None:
        if get_origin(kind) is Literal:
            found.extend(get_args(kind))
        elif kind is bool:
            found.extend([True, False])
        else:
            for inner in get_args(kind):
                if not isinstance(inner, str | int | float):
                    walk(inner)

    walk(forms.field_of(path).annotation)
    return found if sweep_ranges.kind(path) is None else []


# --- the form's widgets ----------------------------------------------------------------------------
def base() -> dict[str, Any]:
    """The recipe that all trials have in common."""
    choices = [*recipes.PRESETS, *([LAUNCH] if forms.key("name") in st.session_state else []), TYPED]
    if st.session_state.get(BASE) not in choices:
        st.session_state[BASE] = choices[0]
    chosen = st.selectbox("Recipe", choices, key=BASE, help="what all trials have in common", **KEEP)
    if chosen == TYPED:
        text = st.text_area("Recipe as YAML", key=BASE_TEXT, height=160, **KEEP)
        return recipes.parse(text, "the recipe")
    return recipes.build(forms.held()).model_dump(exclude_defaults=True) if chosen == LAUNCH else recipes.preset(chosen)


def ranges(common: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows' ranges, and by field a place for what is wrong with it."""
    st.subheader("Ranges")
    wanted: dict[str, Any] = {}
    places: dict[str, Any] = {}
    known, flat = fields(), recipes.flatten(recipes.build(common).model_dump())
    for number, row in enumerate(st.session_state.get(ROWS, []), 1):
        with st.container(border=True):
            path, found = range_row(row, number, known, flat)
            place = st.empty()
            if path in wanted:
                place.error(f"{path} stands twice; remove one of the two")
            else:
                wanted[path], places[path] = found, place
    st.button("Add a range", on_click=add_row)
    return wanted, places


def range_row(row: int, number: int, known: list[str], flat: dict[str, Any]) -> tuple[str, Any]:
    """One field and what it may be."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        path = st.selectbox(
            f"Field {number}", known, key=row_key(row, "field"), on_change=clear_row, args=(row,), **KEEP
        )
        remove = f"Remove the range of {path}"
        st.button("✕", key=row_key(row, "remove"), on_click=remove_row, args=(row,), help=remove)
    found = values_of(row, path)
    st.caption(parts.plain(f"{forms.field_of(path).description}. The recipe has {short(flat[path])}."))
    return path, found


def values_of(row: int, path: str) -> Any:
    """The widgets that fit the field: options to tick, numbers from and to, or a typed list."""
    choices = options(path)
    if choices:
        return st.multiselect("Values", choices, key=row_key(row, "options"), format_func=short, **KEEP)
    if sweep_ranges.kind(path) is None:
        return typed_list(row)
    how, *boxes = st.columns([3, 2, 2, 2, 1.4], vertical_alignment="bottom")
    with how:
        is_list = st.selectbox("Values", [BETWEEN, LISTED], key=row_key(row, "how"), **KEEP) == LISTED
    if is_list:
        return typed_list(row)
    found: dict[str, Any] = {}
    for name, box in zip(("low", "high", "step"), boxes):
        text = box.text_input(
            name, key=row_key(row, name), placeholder="any between" if name == "step" else "number", **KEEP
        )
        if text.strip():
            found[name] = recipes.parse_safely(text) if recipes.parse_safely(text) is not None else text
    log = sweep_ranges.Range.model_fields["log"].description
    if boxes[3].checkbox("log", key=row_key(row, "log"), help=log, **KEEP):
        found["log"] = True
    return found


def typed_list(row: int) -> list[Any]:
    text = st.text_input("List", key=row_key(row, "values"), placeholder="0.3, 0.4, null", **KEEP)
    found = recipes.parse_safely(f"[{text}]")
    return found if isinstance(found, list) else [text]


def rest() -> dict[str, Any]:
    """Objectives, sampler, pruner, budget."""
    known = sweep_spec.Sweep.model_fields
    for name in ("name", "trials", "sampler", "seed", "pruner"):
        st.session_state.setdefault(key(name), known[name].default)
    a, b, c = st.columns(3)
    objectives = {}
    for name, label, column in (("quality", "Minimise", a), ("cost", "Against", b)):
        field = Objectives.model_fields[name]
        choices = get_args(field.annotation)
        st.session_state.setdefault(key(name), field.default)
        objectives[name] = column.selectbox(
            label, choices, key=key(name), help=field.description, format_func=cost_words, **KEEP
        )
    found: dict[str, Any] = {"objectives": objectives}
    found["trials"] = c.number_input("Trials", 1, 100_000, key=key("trials"), help=known["trials"].description, **KEEP)
    d, e, f, g = st.columns(4)
    for name, column in (("sampler", d), ("pruner", e)):
        found[name] = column.selectbox(
            name.capitalize(), get_args(known[name].annotation), key=key(name), help=known[name].description, **KEEP
        )
    found["seed"] = f.number_input("Seed", 0, 2**31 - 1, key=key("seed"), help=known["seed"].description, **KEEP)
    found["name"] = g.text_input("Name", key=key("name"), help=known["name"].description, **KEEP)
    return found


def cost_words(name: str) -> str:
    return sweep_charts.LABELS.get(name, "nothing else" if name == "none" else name)


def built(document: dict[str, Any], places: dict[str, Any]) -> Sweep | None:
    """The sweep, or None with the fault said beside the range that it is about."""
    try:
        return sweeps.spec_of_document(document)
    except ValueError as error:
        text = str(error)
        about = [path for path in places if f"ranges.{path}" in text]
        place = places[max(about, key=len)] if about else st
        place.error(parts.plain(text))
        return None


def form(names: list[str]) -> None:
    """All of a new sweep; nothing is started before it is one."""
    fill_buttons()
    try:
        common = base()
        wanted, places = ranges(common)
    except RecipeError as error:
        st.error(parts.plain(error))
        return
    st.subheader("What is judged, and how long")
    document = {"recipe": common, "ranges": wanted} | rest()
    if not wanted:
        st.caption("Add a range, or fill in the example: a sweep needs a field to try.")
        return
    if len(wanted) < len(st.session_state[ROWS]):  # one stands twice, as is said there
        return
    spec = built(document, places)
    if spec is not None:
        begin(spec, names)


def fill_buttons() -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Fill in an example", on_click=fill, args=(EXAMPLE,))
        with st.popover("Fill in from a file"):
            st.file_uploader("A sweep (YAML)", ["yaml", "yml"], key=key("upload"), on_change=take_upload)
    if FAULT in st.session_state:
        st.error(parts.plain(st.session_state[FAULT]))


def begin(spec: Sweep, names: list[str]) -> None:
    """Start it; before that, what it will do."""
    if spec.name in names:
        st.caption(
            f"There is a sweep {parts.plain(spec.name)}: with the same settings it goes on; else change the name."
        )
    if spec.total < spec.trials:
        st.caption(f"The grid has {spec.total} points: that many trials.")
    if st.button("Start the sweep", type="primary", icon="▶️", shortcut="Ctrl+Enter"):
        with parts.said():
            with st.spinner("Preparing the sweep…"):
                sweeps.sweeps().start(spec, lab.jobs())
            st.session_state[NEXT] = spec.name
            st.rerun()
    if st.toggle("Show the first trials", key=key("preview")):
        first(spec)
    with st.expander("The sweep as YAML, and on the command line"):
        sweep_views.settings(spec)


def first(spec: Sweep) -> None:
    rows = [
        {"trial": number}
        | {path: short(one["params"].get(path, sweep_charts.UNREAD)) for path in spec.ranges}
        | {"recipe": one["cause"] or "valid"}
        for number, one in enumerate(sweeps.first_trials(spec.to_yaml(), spec))
    ]
    st.dataframe(rows, hide_index=True)
    st.caption("As long as no result is known; a trial that is no recipe is left out as pruned.")
