"""What ships in ``assets/``: where it is, and the dense model's own figures. Knows no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .recipe import Eval, Recipe

NAME = "bundled"  # the value of model.source, data.source and eval.extractor
ASSETS = Path(__file__).resolve().parent.parent / "assets"
IMAGES = ASSETS / "data" / "fashion-mnist-15k.npz"
IMAGES_NAME = "fashion-mnist-15k"
MODEL = ASSETS / "fashion-ddpm"
FEATURE_NETWORK = ASSETS / "feature-network.safetensors"
REFERENCE = ASSETS / "reference-statistics.npz"
EVALUATIONS = ASSETS / "dense-evaluations.json"


def settings_key(settings: Eval) -> str:
    """What quality figures depend on, as a name for the shipped ones."""
    s = settings
    return f"{s.images}-{s.sampler}-{s.steps}-{s.extractor}-{s.seed}" + (f"-eta{s.eta}" if s.eta else "")


def sheet(settings: Eval) -> Path:
    """The dense model's sample sheet for these settings."""
    eta = f"-eta{settings.eta}" if settings.eta else ""
    return ASSETS / f"dense-samples-{settings.sampler}-{settings.steps}-{settings.seed}{eta}.png"


def evaluation(settings: Eval) -> dict[str, Any] | None:
    """The dense model's shipped figures, or None when these settings are not among them."""
    if not EVALUATIONS.exists() or not sheet(settings).exists():
        return None
    return json.loads(EVALUATIONS.read_text())["evaluations"].get(settings_key(settings))


def quality(recipe: Recipe) -> dict[str, Any] | None:
    """Quality figures that this recipe's dense model need not compute again, or None."""
    if recipe.model.source != NAME or recipe.data.source != NAME:
        return None
    found = evaluation(recipe.eval)
    return figures(found) if found else None


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """A shipped evaluation's figures of quality."""
    return {key: value for key, value in found.items() if key not in ("parameters", "macs")}
