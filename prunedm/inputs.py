"""What a recipe asks for, looked up: model, images, earlier runs; and a preview of what it would do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from . import allocate, bundled, data, masked_unet, maskfile, store, structured, subject, unet
from .recipe import Recipe
from .records import LayerReport
from .stage_recipes import CALIBRATED, INITIALS, Prune, parse_pattern


class InputError(ValueError):
    """A recipe that cannot run here, in one line."""


def resolve_source(source: str, runs_dir: Path) -> str:
    """``RUN`` or ``RUN/variant`` to the variant's folder; anything else is returned as it is."""
    run_id, _, variant = source.partition("/")
    if not store.is_run(runs_dir, run_id):
        return source
    run = subject.run_of(runs_dir, run_id)
    finished = run.variants()
    if not finished or (variant and variant not in finished):
        raise InputError(
            f"model.source={source}: run {run_id} has the variants {finished or 'none yet'}; name one of them"
        )
    return str(run.variant(variant or finished[-1]))


def load_inputs(
    recipe: Recipe, runs_dir: Path, dense: Path | None = None, masks_known: bool = False
) -> tuple[unet.Diffusion, data.Images]:
    """Model and images of a recipe, or a ValueError in one line; nothing is written.

    ``dense``: where a run already keeps its copy of the model, which then is the source. ``masks_known``: it
    keeps its initial masks too, and where they came from does not matter any more.
    """
    unet.resolve_device(recipe.device)
    model = unet.load(str(dense) if dense else resolve_source(recipe.model.source, runs_dir))
    images = data.load(recipe.data, model.image_shape)
    given = None if masks_known else masks_source(recipe, runs_dir)
    if given:
        maskfile.read(given)
    require_maskable(model.unet, recipe)
    if dense is None:
        require_prunable(model, recipe)
    return model, images


def require_maskable(model: nn.Module, recipe: Recipe) -> None:
    """ValueError in one line when stage 2 has nothing to work on."""
    spec = recipe.mask
    if spec.method == "none":
        return
    if spec.density is None:
        masked_unet.require_eligible(model, spec.n, spec.m, overrides(recipe))
    else:
        allocate.require_reachable(model, spec.density, overrides(recipe))


def overrides(recipe: Recipe) -> masked_unet.Overrides:
    """The recipe's patterns of single layers."""
    return [(layer.match, layer.pattern) for layer in recipe.mask.layers]


def masks_source(recipe: Recipe, runs_dir: Path) -> Path | None:
    """The masks file that ``mask.initial`` names, as a run, a folder or a file; None where masks are computed."""
    given = recipe.mask.initial
    if given is None or given in INITIALS:
        return None
    if store.is_run(runs_dir, given):
        subject.run_of(runs_dir, given)
    folder = runs_dir / given if store.RUN_ID.fullmatch(given) and (runs_dir / given).is_dir() else Path(given)
    try:
        return maskfile.locate(folder.expanduser())
    except maskfile.MaskFileError:
        known = ", ".join(INITIALS)
        raise InputError(
            f"mask.initial={given} is none of {known} and no masks are there; give one of them, a run with an N:M "
            "variant or a masks file"
        ) from None


def absolute(recipe: Recipe, runs_dir: Path) -> Recipe:
    """Folders by their whole path, so that a run resumes from any working directory."""
    changed = recipe.model_copy(deep=True)
    source = resolve_source(recipe.model.source, runs_dir)
    folder = Path(source).expanduser()
    if source != bundled.NAME and folder.exists() and changed.model.source == source:
        changed.model.source = str(folder.absolute())
    changed.data.source = data.absolute(recipe.data)
    given = masks_source(recipe, runs_dir)
    if given:
        changed.mask.initial = str(given.absolute())
    return changed


def preview(recipe: Recipe, runs_dir: Path) -> dict[str, Any]:
    """What the recipe would prune and mask, layer by layer, by doing it in memory."""
    model = unet.load(resolve_source(recipe.model.source, runs_dir))
    before, macs = unet.parameters(model.unet), unet.macs(model.unet)
    pruned = None
    if recipe.prune.target > 0:
        steps = model.scheduler.config.num_train_timesteps
        spec = predictable(recipe.prune)
        model.unet, pruned = structured.prune(model.unet, spec, rounding(recipe), recipe.seed, train_timesteps=steps)
    after = unet.parameters(model.unet)
    spec = recipe.mask
    layers = []
    if spec.method != "none":
        require_maskable(model.unet, recipe)
        layers = masked_unet.layer_reports(model.unet, spec.n, spec.m, overrides(recipe))
    return {
        "parameters": {
            "dense": before,
            "structured": after,
            "nm_nonzero": after - pruned_weights(layers, recipe),
        },
        "macs": {"dense": macs, "structured": unet.macs(model.unet)},
        "prune": pruned.as_dict() if pruned else None,
        "layers": [vars(layer) for layer in layers],
    }


def predictable(spec: Prune) -> Prune:
    """The stage as a preview can do it at once: ranked by magnitude where the method looks at images, and MACs
    in place of a latency that has to be measured."""
    changed: dict[str, Any] = {}
    if spec.method in CALIBRATED:
        changed["method"] = "magnitude"
    if spec.of == "latency":
        changed["of"] = "macs"
    return spec.model_copy(update=changed)


def require_prunable(model: unet.Diffusion, recipe: Recipe) -> None:
    """ValueError in one line when stage 1 cannot do what is asked of this model."""
    spec = recipe.prune
    if spec.target > 0 and spec.layout == "uniform" and recipe.eval.sampler == "euler":
        raise InputError("eval.sampler=euler asks for times between those of a uniform layout's table; use ddim")
    if spec.target > 0 and (spec.layers or spec.layout == "uniform"):
        structured.check(model.unet, predictable(spec), rounding(recipe), model.scheduler.config.num_train_timesteps)


def pruned_weights(layers: list[LayerReport], recipe: Recipe) -> int:
    """How many weights the masks take away: by each layer's pattern, or by the budget where one is set."""
    density, pruned = recipe.mask.density, 0
    for layer in (layer for layer in layers if layer.eligible):
        found = parse_pattern(layer.pattern)
        is_open = density is not None and masked_unet.override(layer.layer, overrides(recipe)) is None
        pruned += round(math.prod(layer.shape) * (1 - (density if is_open else found.density)))
    return pruned


def rounding(recipe: Recipe) -> int:
    """The multiple that stage 2 asks of stage 1's widths: what every group size in use divides."""
    spec = recipe.mask
    if spec.method == "none":
        return 1
    sizes = [spec.m] + [found.m for layer in spec.layers if (found := parse_pattern(layer.pattern))]
    return math.lcm(*sizes, allocate.LARGEST_M if spec.density is not None else 1)
