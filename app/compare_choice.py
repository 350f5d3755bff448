"""What Compare sets side by side: variants of runs, imported models, folders; the picker and its address.

A model's key, in the picker and in the address, is ``RUN/variant``, ``models/NAME`` (imported) or a folder's whole
path. An address may come from anywhere: a folder is only looked at as a model's, and nothing of it is executed.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import streamlit as st

from app import lab, model_files, parts
from prunedm import comparison, imports
from prunedm.comparison import Judged
from prunedm.records import VARIANT_LABELS, VARIANTS
from prunedm.store import Run

MOST_MODELS = 8
IMPORTED = "models/"  # as they lie in the runs folder
PICKED, FOLDERS, PATH = "compare_pick", "compare_folders", "compare_path"
TIME_OF_RUN = re.compile(r"^\d{8}-\d{6}-")
FAULT = "compare_fault"  # why a folder was not added, said once


@dataclass
class Known:
    """All that can be compared, by its key. folders: where the models that are of no run lie."""

    judged: dict[str, Judged] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def source(self, key: str) -> str:
        """The model as the engine finds it."""
        return str(self.folders.get(key, key))

    def add(self, key: str, folder: Path) -> None:
        self.folders[key] = folder
        self.judged[key] = Judged(name(key), {})


# --- what there is -----------------------------------------------------------------------------------
def known(cards: list[lab.Card]) -> Known:
    """Variants of runs, the newest first, then imported models, then the folders that were added here."""
    found = Known(of_cards(cards))
    with parts.said():
        for one in imports.listing(lab.runs_dir()):
            found.add(f"{IMPORTED}{one.name}", one.path)
    for path in st.session_state.get(FOLDERS, []):
        found.add(path, Path(path))
    return found


def of_cards(cards: list[lab.Card]) -> dict[str, Judged]:
    """``RUN/variant`` to its figures; damaged runs are left out and said."""
    found: dict[str, Judged] = {}
    for card in cards:
        try:
            for one in comparison.of_run(card.run, card.results):
                found[f"{card.run.id}/{one.variant}"] = one
        except (ValueError, OSError) as error:
            st.warning(f"{parts.plain(card.run.id)} is left out: {parts.plain(error)}")
    return found


def first_choice(cards: list[lab.Card]) -> list[str]:
    """All variants of the newest run."""
    return [f"{cards[0].run.id}/{variant}" for variant in cards[0].results] if cards else []


def of_runs(found: dict[str, Judged], runs: list[str]) -> list[str]:
    """All variants of these runs; the dense model once where they share it and its evaluation."""
    own = [key for key in found if key.partition("/")[0] in runs]
    kept = comparison.without_repeats([found[key] for key in own])
    return [key for key in own if any(found[key] is one for one in kept)]


# --- names -------------------------------------------------------------------------------------------
def name(key: str) -> str:
    """A model in few letters: ``run · N:M``, ``tiny (imported)``, or a folder's own name."""
    if key.startswith("/"):
        return Path(key).name or key
    if key.startswith(IMPORTED):
        return f"{key.removeprefix(IMPORTED)} (imported)"
    run, _, variant = key.partition("/")
    return f"{run} · {VARIANT_LABELS[variant]}" if variant in VARIANTS else key


def names(keys: list[str]) -> dict[str, str]:
    """A name for each; folders that are called alike by their whole paths."""
    short = {key: name(key) for key in keys}
    times = Counter(short.values())
    return {key: text if times[text] == 1 else key for key, text in short.items()}


def short_names(keys: list[str]) -> dict[str, str]:
    """Names without the time in the run's id where they still tell the models apart."""
    short = {key: TIME_OF_RUN.sub("", name(key)) for key in keys}
    return short if len(set(short.values())) == len(keys) else names(keys)


def without_times(runs: dict[str, Run]) -> dict[str, Run]:
    """Runs by their ids without the time, where that still tells them apart."""
    short = {TIME_OF_RUN.sub("", run_id): run for run_id, run in runs.items()}
    return short if len(short) == len(runs) else runs


# --- the picker --------------------------------------------------------------------------------------
def choose(cards: list[lab.Card], found: Known) -> list[str]:
    """The models to compare: ``?runs=A,B`` takes all variants of runs, ``?models=A/nm,models/B,/C`` single ones."""
    follow_runs(found)
    follow_models(found)
    if PICKED not in st.session_state:
        st.session_state[PICKED] = first_choice(cards)
    st.session_state[PICKED] = readable(st.session_state[PICKED][:MOST_MODELS], found)
    chosen = st.multiselect(
        "Models",
        list(found.judged),
        key=PICKED,
        max_selections=MOST_MODELS,
        format_func=names(list(found.judged)).get,
        help="variants of runs and imported models; folders can be added below",
    )
    add_a_folder()
    parts.write_url("models", PICKED, ",".join(written(key) for key in chosen))
    return chosen


def follow_runs(found: Known) -> None:
    """Take over ``?runs=``; from then on the address names the models."""
    wanted = [run for run in st.query_params.pop("runs", "").split(",") if run]
    missing = [run for run in wanted if not of_runs(found.judged, [run])]
    if missing:
        st.warning(f"There is no evaluated run {parts.plain(', '.join(missing))} here: it may have been deleted.")
    picked = of_runs(found.judged, wanted)
    if picked:
        st.session_state[PICKED] = picked[:MOST_MODELS]


def follow_models(found: Known) -> None:
    """Take over ``?models=`` when it is new; what is not there is said, and loses nothing else."""
    given = st.query_params.get("models", "")
    if not given or given == st.session_state.get(f"{PICKED}.url"):
        return
    keys = list(dict.fromkeys(unquote(part) for part in given.split(",") if part))
    if len(keys) > MOST_MODELS:
        st.warning(f"The address names {len(keys)} models: the first {MOST_MODELS} are shown.")
    picked = []
    for key in keys[:MOST_MODELS]:
        try:
            picked.append(taken(key, found))
        except (ValueError, OSError) as error:
            st.warning(parts.plain(error))
    if picked:
        st.session_state[PICKED] = picked


def taken(key: str, found: Known) -> str:
    """The key of a model that an address names; a folder is added. ValueError in one line where there is none."""
    if key.startswith("/"):
        folder = imports.folder_of(key)
        model_files.look(folder)
        offer(str(folder))
        found.add(str(folder), folder)
        return str(folder)
    if key.startswith(IMPORTED):
        imports.find(lab.runs_dir(), key.removeprefix(IMPORTED))
    elif key not in found.judged:
        raise ValueError(f"There is no run {key[:80]} here: it may have been deleted.")
    return key


def written(key: str) -> str:
    """A key as the address has it, where commas stand between models."""
    return key.replace("%", "%25").replace(",", "%2C")


def readable(keys: list[str], found: Known) -> list[str]:
    """Those that can be shown, with what is known of a folder before it is judged; of the others it is said why not."""
    kept, labels = [], names(keys)
    for key in (key for key in keys if key in found.judged):
        if key in found.folders:
            try:
                seen = model_files.look(found.folders[key])
            except (ValueError, OSError) as error:
                st.error(f"{parts.plain(labels[key])} is left out: {parts.plain(error)}")
                continue
            found.judged[key] = Judged(labels[key], {"parameters": seen.parameters, "bytes": seen.bytes})
        kept.append(key)
    return kept


# --- folders -----------------------------------------------------------------------------------------
def add_a_folder() -> None:
    """A model folder by its path; what was typed stays where it is not one."""
    fault = st.session_state.pop(FAULT, None)
    if fault:
        st.error(parts.plain(fault))
    with st.expander("Add a model folder of this machine"), st.form("compare_add", border=False):
        path, button = st.columns([5, 1], vertical_alignment="bottom")
        path.text_input(
            "Path",
            key=PATH,
            placeholder="/data/my-model",
            help="as diffusers' save_pretrained writes it: config.json and safetensors; it stays where it is",
        )
        button.form_submit_button("Add", on_click=_add, width="stretch")


def _add() -> None:
    """Before the page is drawn again: take the typed folder among the models, or keep why not."""
    text, chosen = st.session_state[PATH].strip(), st.session_state.get(PICKED, [])
    if not text:
        return
    key = str(imports.folder_of(text))
    try:
        if key in chosen:
            raise ValueError(f"{key} is among the models already")
        if len(chosen) >= MOST_MODELS:
            raise ValueError(f"{MOST_MODELS} models are compared at most; take one off, then add {key}")
        model_files.look(Path(key))
    except (ValueError, OSError) as error:
        st.session_state[FAULT] = str(error)
        return
    offer(key)
    st.session_state[PICKED], st.session_state[PATH] = [*chosen, key], ""


def offer(key: str) -> None:
    """Let the picker offer a folder from now on."""
    st.session_state[FOLDERS] = list(dict.fromkeys([*st.session_state.get(FOLDERS, []), key]))
