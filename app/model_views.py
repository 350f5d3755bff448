"""Imported models on the Models page: taken in, looked at, deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from app import lab, parts
from app.run_table import size_words
from prunedm import imports
from prunedm.imports import Imported
from prunedm.jobs import load_engine

PICKED, FILE, NAME, PATH = "models.imported", "models.zip", "models.name", "models.path"
NOTE, NEW = "models.note", "models.new"  # said, and shown, once


def imported(layers: Callable[[Path], None]) -> None:
    """The imported models, and how to bring one in. ``layers`` shows a model on disk."""
    st.header("Imported models")
    said = st.session_state.pop(NOTE, None)
    if said:
        st.success(parts.plain(said))
    with parts.said():
        known = {one.name: one for one in imports.listing(lab.runs_dir())}
        if known:
            look(known, layers)
        else:
            st.caption("None yet. Bring in a diffusers model of your own below; Launch then offers it as the source.")
    bring_in()


def look(known: dict[str, Imported], layers: Callable[[Path], None]) -> None:
    """One imported model: where it lies, its figures and layers."""
    new = st.session_state.pop(NEW, None)
    if new in known:
        st.session_state[PICKED] = new
    elif st.session_state.get(PICKED) not in known:
        st.session_state[PICKED] = next(iter(known))
    picker, remove = st.columns([5, 1], vertical_alignment="bottom")
    one = known[picker.selectbox("Imported model", list(known), key=PICKED)]
    with remove.popover("Delete", width="stretch"):
        name = parts.plain(one.name)
        st.write(f"Delete {name} and its files?" if one.is_copy else f"Take {name} off the list? The folder stays.")
        if st.button("Delete this model", type="primary"):
            with parts.said():
                imports.delete(lab.runs_dir(), one.name)
                st.session_state[NOTE] = f"{one.name} is deleted."
                st.rerun()
    if not one.path.is_dir():
        st.error(parts.plain(f"{one.path} is gone; put it back, or take it off the list"))
        return
    shape = facts(str(one.path), lab.stamp(unet_config(one.path)))
    size = sum(file.stat().st_size for file in one.path.rglob("*.safetensors"))
    count, height, width = shape["shape"]
    sides = f"{width}x{height}, {'grey' if count == 1 else f'{count} channels'}"
    st.caption(parts.plain(f"{shape['parameters']:,} parameters · images {sides} · {size_words(size)} · in {one.path}"))
    layers(one.path)


def unet_config(path: Path) -> Path:
    return (path / "unet" if (path / "unet").is_dir() else path) / "config.json"


@st.cache_data(show_spinner="Reading the model…", max_entries=32)
def facts(path: str, stamp: tuple) -> dict:
    """Image shape and parameters of a model folder."""
    load_engine()
    from prunedm import unet

    model = unet.load(path)
    return {"shape": model.image_shape, "parameters": unet.parameters(model.unet)}


def bring_in() -> None:
    """The two ways in: a zip, or a folder on this machine."""
    with st.expander("Import a model"):
        st.caption(
            "A UNet2DModel that works on pixels, as diffusers' save_pretrained writes it: config.json and safetensors, "
            "with or without its scheduler. Pickled weights are refused: they can run code."
        )
        zipped, folder = st.tabs(["Zip file", "Folder on this machine"])
        with zipped:
            from_zip()
        with folder:
            from_path()


def from_zip() -> None:
    most = imports.LARGEST_ZIP // imports.MIB
    given = st.file_uploader(f"Zip of the model folder, at most {most} MiB", "zip", key=FILE, max_upload_size=most)
    name = st.text_input("Name", key=NAME, placeholder="the file's own name", help="what lists call the model")
    if st.button("Import the zip", disabled=given is None):
        with parts.said(), st.spinner("Checking the model…"):
            load_engine()
            place = lab.runs_dir()
            into = imports.target(place, name.strip() or imports.suggest(place, given.name.removesuffix(".zip")))
            finish(imports.from_zip(given, into).name)


def from_path() -> None:
    path = st.text_input("Path of the model folder", key=PATH, help="the folder stays where it is; nothing is copied")
    if st.button("Add the folder", disabled=not path.strip()):
        with parts.said(), st.spinner("Checking the model…"):
            load_engine()
            finish(imports.from_path(path.strip(), lab.runs_dir()).name)


def finish(name: str) -> None:
    """Show the new model and say so."""
    st.session_state[NOTE] = f"{name} is imported: Launch offers it as the source of a run."
    st.session_state[NEW] = name
    st.rerun()
