"""A model of the Hugging Face hub, copied to ``runs/models/<name>/``: configs and safetensors, nothing else.

Its configs are fetched first, so that a model that is not supported costs no download of weights.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from .imports import ModelImportError, put

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FOLDERS = ("", "unet", "scheduler")  # what a model folder is made of


def check_id(text: str) -> str:
    """The id as typed; ModelImportError where it is none."""
    if not HUB_ID.fullmatch(text):
        raise ModelImportError(f"{text[:80]!r} is no id of the hub; give owner/name, such as google/ddpm-cifar10-32")
    return text


def from_hub(hub_id: str, into: Path) -> Path:
    """Fetch a model and copy it to ``into`` (``imports.target``), once the engine has loaded it.

    ModelImportError in one line without a network, for an id that the hub does not know, and for a model that is not
    supported.
    """
    from . import unet

    if into.exists():
        raise ModelImportError(f"{into} is already there; use another name")
    configs = _fetched(check_id(hub_id), ["*.json"])
    try:
        unet.require_pixels(configs)
        unet.read_config(unet.unet_folder(configs))
        folder = _fetched(hub_id, unet.FETCHED)
        files = [path for sub in FOLDERS for path in (folder / sub).glob("*.json")]
        files += unet.complete_files(unet.unet_folder(folder))
    except ModelImportError:
        raise
    except unet.ModelError as error:
        raise ModelImportError(re.sub(re.escape(str(configs)) + r"(/unet)?", hub_id, str(error))) from error

    def copy(target: Path) -> None:
        for path in files:
            own = target / path.relative_to(folder)
            own.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, own)  # the hub's cache holds links

    return put(into, sum(path.stat().st_size for path in files), copy, f"of {hub_id}")


def _fetched(hub_id: str, patterns: list[str]) -> Path:
    """The folder of the hub's cache that holds these files."""
    from . import unet

    try:
        return unet.download(hub_id, patterns)
    except unet.ModelError as error:
        raise ModelImportError(
            f"the hub did not give {hub_id} ({type(error.__cause__).__name__}); check the id and the network, or "
            "import a zip or a folder"
        ) from error
