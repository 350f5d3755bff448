"""What figures were made from and by: a model's files, the device, the versions and the machine; kept with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import environment, subject


def of(place: Path, device: torch.device) -> dict[str, Any]:
    """The record (``Evaluation.made_by``) of figures that are made here and now of the model at this place."""
    found = {"fingerprint": subject.fingerprint(place), "device": device.type, "torch": torch.__version__}
    return found | {"machine": environment.machine(), "versions": environment.versions()}


def is_of(figures: dict[str, Any], fingerprint: str) -> bool:
    """Whether figures are of a model of this fingerprint. Those from before it was kept are taken on trust."""
    return (figures.get("made_by") or {}).get("fingerprint") in (None, fingerprint)


def holds(figures: dict[str, Any], fingerprint: str, device: torch.device) -> bool:
    """Whether figures are of this model, by this torch and on such a device; on trust as :func:`is_of`."""
    made = figures.get("made_by") or {}
    by = made.get("device") in (None, device.type) and made.get("torch") in (None, torch.__version__)
    return by and is_of(figures, fingerprint)
