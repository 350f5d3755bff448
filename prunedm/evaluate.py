"""The judge of a run: the same figures, by the same seeds, for each variant.

The bundled dense model's quality figures ship with the assets, so no run computes them again; its
latency is always measured here, interleaved with that of the other variants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import bundled, data, diffusion, extractors, latency, metrics, pattern, pictures, unet
from .recipe import Eval, Recipe
from .records import Evaluation, Step
from .seeds import derive
from .stage_recipes import parse_pattern
from .store import VARIANT_RECORD, Run, read_json, write_atomic

VALIDATION_IMAGES, VALIDATION_BATCH, SAMPLE_BATCH, SHEET = 512, 128, 64, 64


def image_seeds(seed: int, count: int) -> list[int]:
    """The noise seeds of the evaluation's images, the same for every variant."""
    return [derive(seed, "evaluation", i) for i in range(count)]


def counts(model: torch.nn.Module, folder: Path) -> Evaluation:
    """Sizes of a saved variant."""
    return Evaluation(
        parameters=unet.parameters(model),
        nonzero_parameters=unet.nonzero_parameters(model),
        macs=unet.macs(model),
        bytes=unet.weight_bytes(folder),
    )


def quality(
    model: torch.nn.Module, scheduler, settings: Eval, images: data.Images, sheet: Path, info: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Validation loss and Frechet distance; yields once a batch, the figures in the last yield."""
    device = next(model.parameters()).device
    held_out = data.to_float(images.held_out[:VALIDATION_IMAGES], device)
    batches = diffusion.validation_batches(scheduler, held_out, VALIDATION_IMAGES, VALIDATION_BATCH, settings.seed)
    loss = diffusion.validation_loss(lambda x, t: model(x, t).sample, batches)
    yield {}
    seeds = image_seeds(settings.seed, settings.images)
    how = (settings.sampler, settings.steps, SAMPLE_BATCH, settings.eta)
    stream = diffusion.sample_stream(model, scheduler, seeds, *how)
    features, shown = [], []
    for batch in stream:
        features.append(metrics.extract([batch], str(device)))
        if sum(map(len, shown)) < SHEET:
            shown.append(batch)
        yield {}
    info = info | {"sampler": settings.sampler, "steps": settings.steps, "seed": settings.seed}
    if settings.eta:
        info["eta"] = settings.eta
    write_atomic(sheet, pictures.sheet_png(torch.cat(shown)[:SHEET], info))
    reference = metrics.reference_statistics(images.train, images.is_bundled, str(device))
    yield {
        "validation_loss": loss,
        "fid": metrics.frechet_distance(metrics.statistics(torch.cat(features)), reference),
        "fid_extractor": extractors.EXTRACTOR_LABELS[settings.extractor],
        "fid_images": settings.images,
    }


def quality_steps(settings: Eval) -> int:
    """How many times :func:`quality` yields."""
    return 2 + -(-settings.images // SAMPLE_BATCH)


def sparsity(run: Run) -> dict[str, Any]:
    """Compliance of the N:M variant, read from its saved file and not from memory."""
    from safetensors.torch import load_file

    tensors = load_file(run.variant("nm") / "unet" / unet.WEIGHTS)
    layers = run.layers()
    masked = [layer for layer in layers if layer["eligible"]]
    good = sum(
        layer["groups"] * pattern.compliance(tensors[f"{layer['layer']}.weight"], *parse_pattern(layer["pattern"]))
        for layer in masked
    )
    total = sum(layer["groups"] for layer in masked)
    return {
        "pattern": read_json(run.variant("nm") / VARIANT_RECORD)["pattern"],
        "compliance": round(good) / total,
        "masked_layers": len(masked),
        "skipped_layers": [
            {"layer": layer["layer"], "reason": layer["reason"]} for layer in layers if not layer["eligible"]
        ],
    }


def evaluate(run: Run, recipe: Recipe, images: data.Images, device: torch.device) -> Iterator[Step]:
    """Evaluate each variant that is not yet in ``evaluation.json``, then time all together."""
    names, results = run.variants(), run.evaluation()
    each = quality_steps(recipe.eval)
    total, done = each * len(names) + latency.ROUNDS, 0
    models = {name: unet.load(str(run.variant(name))) for name in names}
    for name in names:
        model = models[name].unet.to(device)
        if name not in results:
            figures = counts(model, run.variant(name))
            shipped = bundled.quality(recipe) if name == "dense" else None
            if shipped is not None:
                write_atomic(run.sheet(name), bundled.sheet(recipe.eval).read_bytes())
                found = shipped
            else:
                sheet = run.sheet(name)
                scheduler = models[name].scheduler
                for i, found in enumerate(
                    quality(model, scheduler, recipe.eval, images, sheet, {"run": run.id, "variant": name})
                ):
                    yield Step("evaluate", done + i + 1, total)
            if name == "nm":
                found = found | sparsity(run)
            results[name] = dataclasses.replace(figures, **found).as_dict()
            run.write_evaluation(results)
        done += each
        yield Step("evaluate", done, total)
    for timed in latency.measure({name: models[name].unet for name in names}):
        done += 1
        yield Step("evaluate", done, total)
    for name, figure in timed.items():
        results[name] |= {
            "latency_ms": figure.median,
            "latency_ms_p10": figure.p10,
            "latency_ms_p90": figure.p90,
            "device": figure.device,
            "dtype": figure.dtype,
            "batch": figure.batch,
        }
    if "nm" in results:
        results["nm"]["macs_sparse"] = sparse_macs(models["nm"].unet, run.layers())
    run.write_evaluation(results)


def sparse_macs(model: torch.nn.Module, layers: list[dict[str, Any]]) -> int:
    """Theoretical MACs of one image where hardware skips the pruned weights of the masked layers."""
    patterns = {layer["layer"]: parse_pattern(layer["pattern"]) for layer in layers if layer["eligible"]}
    skipped, hooks = [], []

    def counter(share: float):
        def count(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            weight = module.weight
            uses = output[0].numel() // weight.shape[0]  # of each weight, for one image
            skipped.append(weight.numel() * uses * share)

        return count

    for name, module in model.named_modules():
        if name in patterns:
            hooks.append(module.register_forward_hook(counter(1 - patterns[name].density)))
    dense = unet.macs(model)
    for hook in hooks:
        hook.remove()
    return round(dense - sum(skipped))
