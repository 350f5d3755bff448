"""Imported models on the Models page: taken in, chosen, deleted."""

from __future__ import annotations

import streamlit as st

from app import exports, lab, model_files, parts
from app.run_table import size_words
from prunedm import import_hub, import_zip, imports
from prunedm.imports import Imported
from prunedm.jobs import load_engine
from prunedm.untrusted import MIB

PICKED, FILE, NAME, PATH, HUB = "models.imported", "models.zip", "models.name", "models.path", "models.hub"
NOTE, NEW = "models.note", "models.new"  # said, and shown, once


def asked_for() -> bool:
    """Whether an imported model is to be shown: one that was just brought in, or that the address asks for anew."""
    wanted = st.query_params.get("imported", "")
    return NEW in st.session_state or bool(wanted and wanted != st.session_state.get(f"{PICKED}.url"))


def leave_address() -> None:
    """The address names no imported model any more; a link to the last one asks for it anew."""
    st.query_params.pop("imported", None)
    st.session_state.pop(f"{PICKED}.url", None)


def choose(known: dict[str, Imported]) -> Imported | None:
    """The imported model to look at, in step with ``?imported=``; None where there is none, or its folder is gone."""
    new, asked = st.session_state.pop(NEW, None), st.query_params.get("imported", "")
    if new in known:
        st.session_state[PICKED] = new
    elif asked and asked != st.session_state.get(f"{PICKED}.url"):
        if asked in known:
            st.session_state[PICKED] = asked
        else:
            st.warning(f"There is no imported model {parts.plain(asked[:80])} here: it may have been deleted.")
    if not known:
        st.caption("None yet. Bring in a diffusers model of your own below; Launch and Compare then offer it.")
        return None
    if st.session_state.get(PICKED) not in known:
        st.session_state[PICKED] = next(iter(known))
    picker, remove = st.columns([5, 1], vertical_alignment="bottom")
    one = known[picker.selectbox("Imported model", list(known), key=PICKED)]
    parts.write_url("imported", PICKED, one.name)
    with remove.popover("Delete", width="stretch"):
        delete(one)
    return one if facts(one) else None


def delete(one: Imported) -> None:
    """Ask first: the copy, or the folder's place on the list, and what was exported of it."""
    name, made = parts.plain(one.name), len(exports.finished(exports.of_imported(one).folder))
    also = {0: "", 1: " Its export is deleted."}.get(made, f" Its {made} exports are deleted.")
    what = f"Delete {name} and its files?" if one.is_copy else f"Take {name} off the list? The folder stays."
    st.write(what + also)
    if st.button("Delete this model", type="primary"):
        with parts.said():
            if exports.exports().busy(exports.of_imported(one).folder):
                raise ValueError(f"an export of {one.name} is at work; wait for its end")
            imports.delete(lab.runs_dir(), one.name)
            st.session_state[NOTE] = f"{one.name} is deleted."
            st.rerun()


def facts(one: Imported) -> bool:
    """Parameters, images, size and place in one line; False where the model cannot be read, which is said."""
    if not one.path.is_dir():
        st.error(parts.plain(f"{one.path} is gone; put it back, or take it off the list"))
        return False
    with parts.said():
        seen = model_files.look(one.path)
        images = model_files.sides(seen.shape)
        text = f"{seen.parameters:,} parameters · images {images} · {size_words(seen.bytes)} · in {one.path}"
        st.caption(parts.plain(text))
        return True
    return False


def said_before() -> None:
    """What the last action came to."""
    said = st.session_state.pop(NOTE, None)
    if said:
        st.success(parts.plain(said))


def bring_in() -> None:
    """The three ways in: a zip, a folder on this machine, or a hub id."""
    with st.expander("Import a model"):
        st.caption(
            "A UNet2DModel that works on pixels, as diffusers' save_pretrained writes it: config.json and safetensors, "
            "with or without its scheduler. Pickled weights are refused: they can run code."
        )
        zipped, folder, hub = st.tabs(["Zip file", "Folder on this machine", "Hub id"])
        with zipped:
            from_zip()
        with folder:
            from_path()
        with hub:
            from_hub()


def from_zip() -> None:
    most = import_zip.LARGEST_ZIP // MIB
    given = st.file_uploader(f"Zip of the model folder, at most {most} MiB", "zip", key=FILE, max_upload_size=most)
    name = st.text_input("Name", key=NAME, placeholder="the file's own name", help="what lists call the model")
    if st.button("Import the zip", disabled=given is None):
        with parts.said(), st.spinner("Checking the model…"):
            load_engine()
            place = lab.runs_dir()
            into = imports.target(place, name.strip() or imports.suggest(place, given.name.removesuffix(".zip")))
            finish(import_zip.from_zip(given, into).name)


def from_path() -> None:
    path = st.text_input("Path of the model folder", key=PATH, help="the folder stays where it is; nothing is copied")
    if st.button("Add the folder", disabled=not path.strip()):
        with parts.said(), st.spinner("Checking the model…"):
            load_engine()
            finish(imports.from_path(path.strip(), lab.runs_dir()).name)


def from_hub() -> None:
    hub_id = st.text_input(
        "Hub id",
        key=HUB,
        placeholder="google/ddpm-cifar10-32",
        help="owner/name on the Hugging Face hub; this machine needs a network. Configs and safetensors are fetched.",
    ).strip()
    if st.button("Import from the hub", disabled=not hub_id):
        with parts.said(), st.spinner("Fetching and checking the model…"):
            load_engine()
            place = lab.runs_dir()
            into = imports.target(place, imports.suggest(place, import_hub.check_id(hub_id).partition("/")[2]))
            finish(import_hub.from_hub(hub_id, into).name)


def finish(name: str) -> None:
    """Show the new model and say so."""
    st.session_state[NOTE] = f"{name} is imported: Launch offers it as the source of a run, Compare to compare it."
    st.session_state[NEW] = name
    st.rerun()
