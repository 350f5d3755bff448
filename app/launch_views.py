"""What Launch shows around its form: where a recipe comes from, images, sizes, time, layers, the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from PIL import Image

from app import forms, lab, pace, parts
from app.run_table import size_words
from prunedm import forecast, imports
from prunedm import recipe as recipes
from prunedm.forecast import Past
from prunedm.jobs import load_engine
from prunedm.recipe import Data, Recipe, RecipeError
from prunedm.records import STAGE_LABELS

LARGEST_RECIPE = 100 * 1024
SHOWN, LOADED = 16, 24  # images; some that are loaded may be unreadable
MOST_READ = 24  # finished runs whose step records are read
MOST_OFFERED = 50
EVERY_QUEUE = 2.0  # seconds between two looks at the queue
FROM_FILE, FROM_RUN, NOTE = "launch.file", "launch.from", "launch.note"
MONITOR = lab.page("monitor")


# --- where the form's values come from -------------------------------------------------------------
def origins(cards: list[lab.Card]) -> None:
    """Fill the form from a file or an earlier run."""
    known = {card.run.id: card for card in cards[:MOST_OFFERED] if card.recipe}
    with st.expander("Begin from a recipe file or an earlier run"):
        left, right = st.columns(2)
        with left:
            st.file_uploader(
                "Recipe file (YAML)", ["yaml", "yml"], key=FROM_FILE, on_change=_from_file,
                max_upload_size=1, help="at most 100 KB; fields that it leaves out get their defaults",
            )  # fmt: skip
        with right:
            if known:
                st.selectbox(
                    "Duplicate a run", list(known), index=None, key=FROM_RUN, on_change=_from_run, args=(known,),
                    placeholder="choose a run", help="fills the form with that run's recipe",
                )  # fmt: skip
            else:
                st.caption("No earlier run to duplicate yet.")
    said = st.session_state.pop(NOTE, None)
    if said:
        (st.success if said[0] else st.error)(parts.plain(said[1]))


def _from_file() -> None:
    given = st.session_state.get(FROM_FILE)
    if given is None:
        return
    try:
        forms.fill(recipe_of(given.name, given.getvalue()))
        st.session_state[NOTE] = (True, f"The form holds the recipe of {given.name}.")
    except RecipeError as error:
        st.session_state[NOTE] = (False, str(error))


def recipe_of(name: str, content: bytes) -> Recipe:
    """The recipe of an uploaded file; RecipeError in one line for what is none."""
    if len(content) > LARGEST_RECIPE:
        raise RecipeError(f"{name} has {len(content) // 1024} KB and a recipe at most 100; give a recipe file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{name} is not text in UTF-8; save it as a plain text file") from None
    return recipes.build(recipes.parse(text, name))


def _from_run(known: dict[str, lab.Card]) -> None:
    card = known.get(st.session_state.get(FROM_RUN))
    if card and card.recipe:
        forms.fill(card.recipe)
        st.session_state[NOTE] = (True, f"The form holds the recipe of {card.run.id}.")


def sources(cards: list[lab.Card]) -> dict[str, str]:
    """Models that a recipe can begin from, as it names them, with labels."""
    found = {"bundled": "bundled"}
    try:
        found |= {str(one.path): f"{one.name} (imported)" for one in imports.listing(lab.runs_dir())}
    except imports.ModelImportError as error:
        st.warning(parts.plain(error))
    done = [card for card in cards if card.status == "done"][:MOST_OFFERED]
    return found | {card.run.id: f"{card.run.id} (last variant)" for card in done}


# --- images ------------------------------------------------------------------------------------------
def data_images(recipe: Recipe) -> None:
    """Sixteen images of the chosen data as the model will see them; a data set of the web only when asked for."""
    kind = recipe.data.kind
    near = kind in ("bundled", "folder")
    fold = st.expander("Images of the data", expanded=near, key=f"launch.images.{kind}", on_change="rerun")
    if not fold.open:
        return
    with fold, parts.said():
        shape = tuple(facts(recipe.model.source, str(lab.runs_dir()))["shape"])
        stamp = lab.stamp(Path(recipe.data.source).expanduser()) if kind == "folder" else ()
        name, arrays, skipped = sixteen(recipe.data.model_dump_json(exclude={"batch_size", "flip"}), shape, stamp)
        size = f"{shape[2]}x{shape[1]}"
        drawn = parts.mosaic([Image.fromarray(array) for array in arrays], 8, max(1, 56 // shape[2]))
        st.image(drawn, alt=f"{len(arrays)} images of {name} at {size} pixels, as the model will see them")
        st.caption(parts.plain(f"{len(arrays)} images of {name} at {size}, {channels(shape[0])}"))
        if skipped:
            st.warning(parts.plain(f"{len(skipped)} of the first {LOADED} were skipped, such as {skipped[0]}"))


def channels(count: int) -> str:
    return "grey" if count == 1 else f"{count} channels"


@st.cache_data(show_spinner="Reading images…", max_entries=16)
def sixteen(data_json: str, shape: tuple[int, int, int], stamp: tuple) -> tuple[str, list[np.ndarray], list[str]]:
    """Name of the data, up to 16 images as arrays that Pillow takes, and what was skipped on the way."""
    load_engine()
    from prunedm import data

    spec = Data.model_validate_json(data_json)
    if spec.kind != "bundled":
        spec = spec.model_copy(update={"limit": min(spec.limit or LOADED, LOADED)})
    found = data.load(spec, shape)
    rows = [*found.train[:SHOWN].numpy(), *found.held_out[:SHOWN].numpy()][:SHOWN]
    return found.name, [row[0] if len(row) == 1 else row.transpose(1, 2, 0).copy() for row in rows], found.skipped


@st.cache_data(show_spinner="Reading the model…", max_entries=16)
def facts(source: str, folder: str) -> dict[str, Any]:
    """A model's image shape, and where its layers are used (:func:`prunedm.forecast.look_up`)."""
    load_engine()
    return forecast.look_up(source, Path(folder))


# --- sizes -----------------------------------------------------------------------------------------
def sizes(recipe: Recipe, found: dict[str, Any]) -> None:
    """Two rows of figures: parameters and MACs as dense arithmetic, then what the masks add to that."""
    counts, macs = found["parameters"], found["macs"]
    dense, structured, nonzero = counts["dense"], counts["structured"], counts["nm_nonzero"]
    whole, cut = macs["dense"], macs["structured"]
    first = [
        ("Parameters, dense", f"{dense:,}", None, "of the model that the run begins with"),
        ("After stage 1", f"{structured:,}", change(structured, dense), "parameters when whole channels are gone"),
        (
            "Non-zero after stage 2", f"{nonzero:,}", change(nonzero, dense),
            "parameters that the masks keep; the others are stored as zeros, or not at all in a packed file",
        ),
        (
            "MACs after stage 1", f"{cut / 1e6:,.0f} M", change(cut, whole),
            "multiply-accumulates of one call on one image at dense arithmetic: what any hardware computes",
        ),
    ]  # fmt: skip
    boxes(first)
    boxes(second_row(recipe, found))


def second_row(recipe: Recipe, found: dict[str, Any]) -> list[tuple]:
    """Density, MACs of N:M hardware and bytes; what the run itself will choose is not given a figure."""
    counts, macs, layers = found["parameters"], found["macs"], found["layers"]
    masked, later = recipe.mask.method != "none", recipe.mask.density is not None
    held = forecast.stored_bytes(counts["structured"], layers, later)
    whole = forecast.stored_bytes(counts["dense"], [])["dense"]
    absent = "not known yet" if masked else "no masks"
    sparse, packed, moved = absent, absent, None
    if masked and not later:
        used = facts(recipe.model.source, str(lab.runs_dir()))["positions"]
        count = forecast.sparse_macs(macs["structured"], layers, used)
        sparse, moved = f"{count / 1e6:,.0f} M", change(count, macs["dense"])
        packed = size_words(held["packed"])
    why = " A budget is set: the run chooses the patterns." if later else ""
    return [
        (
            "Density after stage 2", f"{counts['nm_nonzero'] / counts['structured']:.1%}", None,
            "share of the remaining parameters that are not zero",
        ),
        (
            "MACs, N:M (theory)", sparse, moved,
            f"theoretical: if the hardware skips what the masks remove; sparse tensor cores may, a CPU does not.{why}",
        ),
        (
            "File, dense fp16", size_words(held["dense"]), change(held["dense"], whole),
            "two bytes a parameter, zeros included; the difference is to the dense model in fp16",
        ),
        (
            "File, packed fp16", packed, change(held["packed"], whole) if masked and not later else None,
            f"two bytes a kept parameter, and the bits that say which ones were kept.{why}",
        ),
    ]  # fmt: skip


def change(now: float, before: float) -> str:
    return f"{now / before - 1:.1%}"


def boxes(rows: list[tuple]) -> None:
    for column, (label, value, delta, why) in zip(st.columns(len(rows)), rows):
        column.metric(label, value, delta, "inverse", border=True, height="stretch", help=why)


# --- time --------------------------------------------------------------------------------------------
def time_needed(recipe: Recipe, macs: dict[str, int], cards: list[lab.Card]) -> None:
    """How long the run will take here, by finished runs; without one, that there is none."""
    like = [c for c in cards if c.status == "done" and c.recipe and forecast.comparable(c.recipe, recipe)]
    known = [one for one in map(past, like[:MOST_READ]) if one]
    found = forecast.forecast(recipe, macs["dense"], macs["structured"], known)
    if found is None:
        st.markdown(
            "**Time on this machine:** not known yet. No finished run here trained this model in such a way at this "
            "batch size, precision and device; the first one will tell."
        )
        return
    each = ", ".join(f"{in_text(stage)} {parts.duration(s)}" for stage, s in found.stages.items() if s >= 0.5)
    count = f"{len(found.runs)} finished run{'s' * (len(found.runs) > 1)}"
    st.markdown(f"**Time on this machine:** about {parts.duration(found.seconds)} ({each})")
    rests = parts.plain(", ".join(found.runs[:3])) + (" and others" if len(found.runs) > 3 else "")
    st.caption(f"By {count} of this model at this batch size, scaled by MACs: {rests}.")
    if found.unknown:
        names = ", ".join(map(in_text, found.unknown))
        st.caption(f"Not counted, as no finished run tells of it with these settings: {names}.")


def in_text(stage: str) -> str:
    """A stage's label inside a sentence."""
    return STAGE_LABELS[stage][0].lower() + STAGE_LABELS[stage][1:]


def past(card: lab.Card) -> Past | None:
    """What a finished run tells of time; nothing where its files are damaged."""
    files = ("metrics.jsonl", "events.jsonl", "evaluation.json", "recipe.yaml", "state.json")
    return _past(str(card.run.folder), tuple(lab.stamp(card.run.folder / name) for name in files))


@st.cache_data(show_spinner=False, max_entries=256)
def _past(folder: str, stamps: tuple) -> Past | None:
    try:
        return forecast.past(lab.Run(Path(folder)))
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        return None


# --- layers ------------------------------------------------------------------------------------------
def layers(recipe: Recipe, found: dict[str, Any]) -> None:
    """Which layers carry masks, and why the others do not."""
    masked = [layer for layer in found["layers"] if layer["eligible"]]
    patterns = ", ".join(sorted({layer["pattern"] for layer in masked}))
    if recipe.mask.density is not None:
        patterns = "N:M (each layer's pattern is chosen by its measured sensitivity when the run begins)"
    with st.expander(f"Layers: {len(masked)} of {len(found['layers'])} will carry {patterns} masks"):
        st.dataframe([_row(recipe, layer) for layer in found["layers"]], hide_index=True)


def _row(recipe: Recipe, layer: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": layer["layer"],
        "kind": layer["kind"],
        "shape after stage 1": " x ".join(map(str, layer["shape"])),
        "pattern": layer["pattern"] if recipe.mask.density is None else "",
        "groups": layer["groups"],
        "masked": "yes" if layer["eligible"] else "no",
        "why not": layer["reason"],
    }


# --- the queue ---------------------------------------------------------------------------------------
def queue(cards: list[lab.Card]) -> None:
    """Runs that wait or run, with their places; polled only while there are some."""
    if not any(card.active for card in cards):
        return
    st.subheader("Queue")

    @st.fragment(run_every=pace.every(EVERY_QUEUE, pace.tab()))
    def listing() -> None:
        active = [card for card in lab.cards() if card.active]
        if not active:
            st.rerun()
        for card in sorted(active, key=lambda c: (lab.position(c.run.id) or 0, c.run.id)):
            queued(card)

    listing()


def queued(card: lab.Card) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        parts.state_chip(card.status)
        st.page_link(MONITOR, label=parts.plain(card.run.id), query_params={"run": card.run.id})
        number, state = lab.position(card.run.id), card.state
        if number:
            st.caption("next" if number == 1 else f"place {number}")
        elif state and state.stage:
            st.caption(f"{STAGE_LABELS.get(state.stage, 'Starting')}: {state.step} of {state.of}")
