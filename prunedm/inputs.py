"""What a recipe asks for, looked up: model, images, earlier runs; and a preview of what it would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import bundled, data, masks, store, structured, unet
from .recipe import Recipe


class InputError(ValueError):
    """A recipe that cannot run here, in one line."""


def resolve_source(source: str, runs_dir: Path) -> str:
    """``RUN`` or ``RUN/variant`` to the variant's folder; anything else is returned as it is."""
    run_id, _, variant = source.partition("/")
    if not store.RUN_ID.fullmatch(run_id) or not (runs_dir / run_id / "recipe.yaml").is_file():
        return source
    run = store.find(runs_dir, run_id)
    finished = run.variants()
    if not finished or (variant and variant not in finished):
        raise InputError(
            f"model.source={source}: run {run_id} has the variants {finished or 'none yet'}; name one of them"
        )
    return str(run.variant(variant or finished[-1]))


def load_inputs(recipe: Recipe, runs_dir: Path, dense: Path | None = None) -> tuple[unet.Diffusion, data.Images]:
    """Model and images of a recipe, or a ValueError in one line; nothing is written.

    ``dense``: where a run already keeps its copy of the model, which then is the source.
    """
    unet.resolve_device(recipe.device)
    model = unet.load(str(dense) if dense else resolve_source(recipe.model.source, runs_dir))
    images = data.load(recipe.data.source, model.image_shape)
    if recipe.mask.method != "none":
        masks.require_eligible(model.unet, recipe.mask.n, recipe.mask.m)
    return model, images


def absolute(recipe: Recipe, runs_dir: Path) -> Recipe:
    """Folders by their whole path, so that a run resumes from any working directory."""
    changed = recipe.model_copy(deep=True)
    sources = ((changed.model, resolve_source(recipe.model.source, runs_dir)), (changed.data, recipe.data.source))
    for section, source in sources:
        folder = Path(source).expanduser()
        if source != bundled.NAME and folder.is_dir() and section.source == source:
            section.source = str(folder.absolute())
    return changed


def preview(recipe: Recipe, runs_dir: Path) -> dict[str, Any]:
    """What the recipe would prune and mask, layer by layer, by doing it in memory."""
    model = unet.load(resolve_source(recipe.model.source, runs_dir))
    before, macs = unet.parameters(model.unet), unet.macs(model.unet)
    pruned = None
    if recipe.prune.target > 0:
        p = recipe.prune
        pruned = structured.prune(model.unet, p.method, p.target, rounding(recipe), recipe.seed)
    after = unet.parameters(model.unet)
    layers = [] if recipe.mask.method == "none" else masks.layer_reports(model.unet, recipe.mask.m)
    masked = sum(layer.groups * recipe.mask.m for layer in layers)
    kept = round(masked * recipe.mask.n / recipe.mask.m)
    return {
        "parameters": {"dense": before, "structured": after, "nm_nonzero": after - masked + kept},
        "macs": {"dense": macs, "structured": unet.macs(model.unet)},
        "prune": pruned.as_dict() if pruned else None,
        "layers": [vars(layer) for layer in layers],
    }


def rounding(recipe: Recipe) -> int:
    """The multiple that stage 2 asks of stage 1's widths."""
    return 1 if recipe.mask.method == "none" else recipe.mask.m
