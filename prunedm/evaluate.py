"""All figures of a model, and the last stage of a run: its variants judged by the same seeds and timed in turn.

The bundled dense model's quality figures ship with the assets, so no run computes them again; its latency is
always measured here, interleaved with that of the other variants.
"""

from __future__ import annotations

import dataclasses
import socket
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import bundled, data, environment, latency, parallel, pattern, provenance, sizes, subject, unet
from .masked_unet import EXCLUDED
from .quality import Judge, Target
from .recipe import Recipe
from .records import NOT_MASKED, Evaluation, LayerReport, Step
from .stage_recipes import parse_pattern
from .store import Run, write_atomic


# --- sizes and sparsity ------------------------------------------------------------------------
def counts(target: Target) -> Evaluation:
    """Sizes of a model on disk, and MACs."""
    net = target.model.unet
    found = Evaluation(
        parameters=unet.parameters(net),
        nonzero_parameters=unet.nonzero_parameters(net),
        macs=unet.macs(net),
        bytes=unet.weight_bytes(target.place),
    )
    weights = subject.layer_weights(net)
    kept = {n: text for n, text in target.patterns.items() if subject.keeps(weights[n], parse_pattern(text))}
    found.sizes = sizes.stored(net, kept)
    if target.patterns:
        found.macs_sparse = sparse_macs(net, target.patterns)
    return found


def sparsity(net: nn.Module, patterns: dict[str, str]) -> dict[str, Any]:
    """Compliance of a model with the patterns of its layers; nothing where there are none."""
    if not patterns:
        return {}
    rows = layer_rows(net, patterns)
    masked = [row for row in rows if row.eligible]
    good = sum(row.groups * row.compliance for row in masked)
    found = sorted(set(patterns.values()))
    return {
        "pattern": found[0] if len(found) == 1 else f"mixed ({', '.join(found)})",
        "compliance": round(good) / sum(row.groups for row in masked),
        "masked_layers": len(masked),
        "skipped_layers": [{"layer": row.layer, "reason": row.reason} for row in rows if not row.eligible],
    }


def layer_rows(net: nn.Module, patterns: dict[str, str]) -> list[LayerReport]:
    """Every conv and linear layer, from the weights themselves: masked under which pattern, or dense and why."""
    return [_layer_row(name, weight, patterns.get(name)) for name, weight in subject.layer_weights(net).items()]


def _layer_row(name: str, weight: Tensor, text: str | None) -> LayerReport:
    kind, shape = ("conv" if weight.ndim == 4 else "linear"), list(weight.shape)
    density = pattern.density(weight)
    if text is None:
        excluded = next((why for prefix, why in EXCLUDED.items() if name.startswith(prefix)), None)
        reason = excluded or pattern.ineligible(weight.shape, 4) or NOT_MASKED
        return LayerReport(name, kind, shape, False, reason, density=density)
    n, m = parse_pattern(text)
    groups = pattern.group(weight, m)
    shares = pattern.set_shares(groups, n)
    return LayerReport(
        name,
        kind,
        shape,
        True,
        "",
        groups=len(groups),
        tensor_core_ready=pattern.tensor_core_ready(weight.shape),
        compliance=pattern.compliance(weight, n, m),
        density=density,
        position_balance=[round(share, 4) for share in pattern.position_balance(groups).tolist()],
        pattern=text,
        pattern_shares=None if shares is None else [round(share, 4) for share in shares.tolist()],
    )


def sparse_macs(net: nn.Module, patterns: dict[str, str]) -> int:
    """Theoretical MACs of one image where hardware skips the pruned weights of the masked layers."""
    skipped, hooks = [], []

    def counter(share: float):
        def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            weight = module.weight
            uses = output[0].numel() // weight.shape[0]  # of each weight, for one image
            skipped.append(weight.numel() * uses * share)

        return count

    for name, module in net.named_modules():
        if name in patterns:
            hooks.append(module.register_forward_hook(counter(1 - parse_pattern(patterns[name]).density)))
    dense = unet.macs(net)
    for hook in hooks:
        hook.remove()
    return round(dense - sum(skipped))


# --- speed -------------------------------------------------------------------------------------
CALL = ("latency_ms", "latency_ms_p10", "latency_ms_p90", "device", "dtype", "batch")  # of a plain call


def speed_figures(rows: list[latency.Speed], session: str) -> dict[str, dict[str, Any]]:
    """Variant to its rows, and to the plain figures of an eager call at the batch size nearest to latency.BATCH.

    Where no such call could be timed the plain figures are None: those of another session must not stay beside it.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == name]
        found[name] = {"speed": [row.as_dict() for row in own], "speed_session": session} | dict.fromkeys(CALL)
        calls = [row.call for row in own if row.way == "eager" and row.call is not None]
        if calls:
            call = min(calls, key=lambda c: abs(c.batch - latency.BATCH))
            found[name] |= {"latency_ms": call.median, "latency_ms_p10": call.p10, "latency_ms_p90": call.p90}
            found[name] |= {"device": call.device, "dtype": call.dtype, "batch": call.batch}
            found[name] |= {"host": socket.gethostname(), "processor": environment.processor()}
    return found


def new_session() -> str:
    """A name for a set of models that are timed in turn."""
    return uuid.uuid4().hex[:12]


# --- a run's own evaluation ----------------------------------------------------------------------
def evaluate(run: Run, recipe: Recipe, images: data.Images, device: torch.device) -> Iterator[Step]:
    """Evaluate each variant that is not yet in ``evaluation.json``, then time all together. Ranks share the work."""
    results = parallel.shared(run.evaluation)
    judge = Judge.of(recipe.eval, images, device)
    targets = {name: target_of(run, name, device) for name in run.variants()}
    batches = (latency.BATCH,)
    each = {name: judge.steps(target) for name, target in targets.items()}
    total, done = sum(each.values()) + latency.benchmark_steps(batches), 0
    for name, target in targets.items():
        if name not in results:
            figures = counts(target)
            found = bundled.quality(recipe) if name == "dense" else None
            if found is not None and parallel.is_writer():
                write_atomic(run.sheet(name), bundled.sheet(recipe.eval).read_bytes())
            if found is None:
                for i, found in enumerate(judge.quality(target)):
                    yield Step("evaluate", done + i + 1, total)
            found = found | sparsity(target.model.unet, target.patterns)
            found |= {"made_by": provenance.of(target.place, device)}
            results[name] = dataclasses.replace(figures, **found).as_dict()
            if name != "nm":  # whose layers stage 2 reported
                run.write_layers([dataclasses.asdict(row) for row in layer_rows(target.model.unet, {})], name)
            run.write_evaluation(results)
        done += each[name]
        yield Step("evaluate", done, total)
    if not parallel.is_writer():  # a machine is timed while its other ranks wait
        yield from (Step("evaluate", done + i + 1, total) for i in range(total - done))
        return
    for rows in latency.benchmark({n: t.model.unet for n, t in targets.items()}, batches=batches):
        done += 1
        yield Step("evaluate", done, total)
    for name, found in speed_figures(rows, new_session()).items():
        results[name] |= found
    run.write_evaluation(results)


def target_of(run: Run, name: str, device: torch.device) -> Target:
    """A finished variant of a run, read from its saved files and not from memory."""
    place = run.variant(name)
    model = unet.load(str(place))
    model.unet.to(device)
    info = {"run": run.id, "variant": name, "recipe": run.recipe().to_yaml()}
    found = Target(model, place, run.sheet(name), is_dense=name == "dense", info=info)
    if name == "nm":
        found.patterns = {layer["layer"]: layer["pattern"] for layer in run.layers() if layer["eligible"]}
    if name != "dense":
        found.dense_sheet = run.sheet("dense")
    return found
