"""Model folders and files on disk as pages see them: read once, and again when a file has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from app import lab
from prunedm.imports import Overview
from prunedm.jobs import load_engine

READ_AS = "2:4"  # layers that claim no pattern are looked at under this one
SUBFOLDERS = ("", "unet", "scheduler")  # what a model folder is made of
LARGEST_CONFIG = 64 * 1024  # bytes that are shown


def stamps(path: Path) -> str:
    """What changes when a model does: of its own files only, so that any folder may be asked."""
    if path.is_file():
        return str(lab.stamp(path))
    found = [file for sub in SUBFOLDERS if (path / sub).is_dir() for file in (path / sub).iterdir()]
    own = [file for file in sorted(found) if file.suffix in (".json", ".safetensors")]
    return str([(file.name, lab.stamp(file)) for file in own])  # text: Streamlit hashes a tuple part by part


def look(folder: Path) -> Overview:
    """Image shape and size of a model folder; ValueError in one line for what is gone or is none."""
    return _look(str(folder), stamps(folder))


@st.cache_data(show_spinner=False, max_entries=256)
def _look(folder: str, known: str) -> Overview:
    load_engine()
    from prunedm import imports

    return imports.look(Path(folder))


def fingerprint(folder: Path) -> str:
    """Digest of a model on disk."""
    return _fingerprint(str(folder), stamps(folder))


@st.cache_data(show_spinner="Reading the model…", max_entries=256)
def _fingerprint(folder: str, known: str) -> str:
    load_engine()
    from prunedm import subject

    return subject.fingerprint(Path(folder))


def inspect(path: Path) -> dict[str, Any]:
    """What ``prunedm verify`` finds on disk."""
    return _inspect(str(path), stamps(path))


@st.cache_data(show_spinner="Reading the layers…", max_entries=32)
def _inspect(path: str, known: str) -> dict[str, Any]:
    load_engine()
    from prunedm import verify

    return verify.inspect(Path(path), verify.parse(READ_AS))


def configs(folder: Path) -> dict[str, str]:
    """The texts of a model folder's own configs by their names in it; cut where one is very long."""
    names = ("config.json", "unet/config.json", "scheduler/scheduler_config.json", "scheduler_config.json")
    return {name: _text(folder / name) for name in names if (folder / name).is_file()}


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(LARGEST_CONFIG + 1)
    cut = "\n…" if len(content) > LARGEST_CONFIG else ""
    return content[:LARGEST_CONFIG].decode("utf-8", "replace") + cut


def sides(shape: tuple[int, int, int]) -> str:
    """An image shape in words: ``28x28, grey``."""
    channels, height, width = shape
    words = {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
    return f"{width}x{height}, {words}"
