"""Models: what a run has made and what was imported, layer by layer; exports, downloads, checks of files."""

import streamlit as st

from app import export_views, exports, lab, layer_views, model_views, parts
from prunedm import imports
from prunedm.imports import Imported
from prunedm.records import VARIANT_LABELS

RUNS, IMPORTED = "Models of runs", "Imported models"
VIEW = "models.view"


def of_runs(cards: list[lab.Card]) -> None:
    """A variant of a run."""
    if not cards:
        parts.empty("No run has made a model yet: the demo makes two.", "home", "Run the demo")
        return
    card = parts.choose_run(cards)
    names = card.run.variants()
    variant = st.segmented_control(
        "Variant", names, default=names[-1], format_func=VARIANT_LABELS.get, required=True, key=f"variant.{card.run.id}"
    )
    layer_views.layers(card.run.variant(variant))
    export_views.export(exports.of_variant(card.run, variant))


def imported(known: dict[str, Imported]) -> None:
    """An imported model."""
    one = model_views.choose(known)
    if one is not None:
        layer_views.layers(one.path)
        export_views.export(exports.of_imported(one))


def choose_view(has_runs: bool, known: dict[str, Imported]) -> str:
    """Runs or imported models: as the address asks, as was chosen, or where there is something."""
    if model_views.asked_for():
        st.session_state[VIEW] = IMPORTED
    elif VIEW not in st.session_state or asked_for_a_run():
        st.session_state[VIEW] = RUNS if has_runs or not known or asked_for_a_run() else IMPORTED
    return st.segmented_control("Show", [RUNS, IMPORTED], required=True, key=VIEW, label_visibility="collapsed")


def asked_for_a_run() -> bool:
    wanted = st.query_params.get("run", "")
    return bool(wanted and wanted != st.session_state.get("run_pick.url"))


st.title("Models")
model_views.said_before()
models: dict[str, Imported] = {}
with parts.said():
    models = {one.name: one for one in imports.listing(lab.runs_dir())}
cards = [card for card in lab.cards() if not card.problem and card.run.variants()]
if choose_view(bool(cards), models) == RUNS:
    model_views.leave_address()
    of_runs(cards)
else:
    st.query_params.pop("run", None)
    st.session_state.pop("run_pick.url", None)  # a link to the run that was shown last asks for it anew
    imported(models)
model_views.bring_in()
with parts.said():
    lab.jobs()
