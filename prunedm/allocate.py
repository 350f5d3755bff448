"""Which pattern for which layer: a budget of weights spent where it hurts least.

For every layer and every candidate pattern the loss is measured with that layer alone masked; then a
multiple-choice knapsack, solved exactly by dynamic programming, chooses one pattern a layer so that the
summed increase is smallest and the kept weights stay within the budget. The sum is a model: layers are
not independent, which is why the run judges the whole afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from . import importance, masked_unet, pattern
from .data import to_float
from .diffusion import NoisedBatch, validation_batches, validation_loss
from .masked_unet import MaskedUNet, Overrides
from .stage_recipes import parse_pattern
from .training import Task

CANDIDATES = ("4:8", "2:4", "1:4", "2:8", "1:8")
LARGEST_M = 8
UNITS = 20_000  # budgets with more distinct sums than this are rounded to so many units


@dataclass
class LayerChoice:
    """One layer: its weights, the loss increase of each pattern, and the pattern chosen."""

    layer: str
    weights: int
    increase: dict[str, float]  # pattern ("dense" is 0) -> loss increase with this layer alone masked
    chosen: str = "dense"


def sensitivity(
    unet: nn.Module, kind: str, overrides: Overrides, task: Task, batches: list[NoisedBatch]
) -> Iterator[tuple[int, int, list[LayerChoice]]]:
    """Measure every layer that ``overrides`` leave open; yields (measured, of, choices so far).

    ``kind`` ranks the weights, as in ``importance.weight_scores``. The UNet is as before at the end.
    """
    masked = MaskedUNet(unet, 1, 2, overrides)
    fixed = {name for name in _names(masked) if masked_unet.override(name, overrides)}
    scores = {
        layer.name.removesuffix(".weight"): pattern.ungroup(values[layer.start : layer.stop], layer.shape)
        for bank, values in zip(masked.banks, importance.weight_scores(masked, kind, task))
        for layer in bank.layers
    }
    masked.undress()
    open_layers = [name for name in scores if name not in fixed]
    dense = validation_loss(lambda x, t: unet(x, t).sample, batches)
    fits = {name: fitting(scores[name].shape) for name in open_layers}
    total, done, choices = sum(map(len, fits.values())), 0, []
    for name in open_layers:
        choices.append(LayerChoice(name, scores[name].numel(), {"dense": 0.0}))
        weight = unet.get_parameter(f"{name}.weight").detach()
        kept = weight.clone()
        for candidate in fits[name]:
            n, m = parse_pattern(candidate)
            mask = pattern.ungroup(pattern.top_n(pattern.group(scores[name], m), n), weight.shape)
            weight.copy_(kept * mask)
            loss = validation_loss(lambda x, t: unet(x, t).sample, batches)
            weight.copy_(kept)
            choices[-1].increase[candidate] = loss - dense
            done += 1
            yield done, total, choices


def require_reachable(unet: nn.Module, density: float, overrides: Overrides) -> None:
    """ValueError when no layer is left to choose for, or when the sparsest patterns keep more than the budget.

    By shapes alone, so that a recipe is refused before anything is trained.
    """
    reports = [r for r in masked_unet.layer_reports(unet, 1, 2, overrides) if r.eligible]
    sizes = {
        r.layer: (math.prod(r.shape), fitting(r.shape))
        for r in reports
        if masked_unet.override(r.layer, overrides) is None
    }
    if not any(fits for _, fits in sizes.values()):
        raise ValueError(f"mask.density={density}: no layer is left to choose a pattern for; remove it or mask.layers")
    least = sum(min([_kept(size, name) for name in fits] or [size]) for size, fits in sizes.values())
    _require_budget(density, least, sum(size for size, _ in sizes.values()))


def _require_budget(density: float, least: int, total: int) -> None:
    if least > density * total:
        raise ValueError(
            f"mask.density={density} cannot be reached: the sparsest patterns that fit keep {least / total:.3f}; "
            f"set mask.density to {math.ceil(least / total * 1000) / 1000} or more"
        )


def fitting(shape: list[int] | tuple[int, ...]) -> list[str]:
    """The candidates whose groups a weight of this shape can carry."""
    return [name for name in CANDIDATES if pattern.ineligible(tuple(shape), parse_pattern(name).m) is None]


def choose(choices: list[LayerChoice], density: float) -> dict[str, Any]:
    """Set ``chosen`` of each layer; ValueError when the budget is below what the patterns can reach.

    Returns the record of the allocation: budget, what is kept, the predicted increase and all layers.
    """
    total = sum(choice.weights for choice in choices)
    options = [list(choice.increase) for choice in choices]
    costs = [[_kept(choice.weights, name) for name in names] for choice, names in zip(choices, options)]
    _require_budget(density, sum(map(min, costs)), total)
    # A layer that measures better when masked is noise: it counts as no loss, not as a gain.
    values = [[max(0.0, choice.increase[name]) for name in names] for choice, names in zip(choices, options)]
    picked = knapsack(costs, values, int(density * total))
    for choice, names, index in zip(choices, options, picked):
        choice.chosen = names[index]
    kept = sum(cost[index] for cost, index in zip(costs, picked))
    return {
        "density": density,
        "kept": kept / total,
        "predicted_increase": sum(choice.increase[choice.chosen] for choice in choices),
        "layers": [vars(choice) for choice in choices],
    }


def knapsack(costs: list[list[int]], values: list[list[float]], budget: int) -> list[int]:
    """One option a row so that the sum of ``values`` is smallest and that of ``costs`` at most ``budget``.

    Exact by dynamic programming when the costs have at most UNITS distinct sums; otherwise costs are
    rounded up to a unit, so that the budget is never exceeded and the result is the best for slightly
    larger costs. Of equal values the cheaper option wins. ValueError when even the cheapest do not fit.
    """
    if sum(map(min, costs)) > budget:
        raise ValueError(f"the cheapest options cost {sum(map(min, costs))}, more than the budget of {budget}")
    # What every choice must pay at least is paid first: rounding then touches only the rest.
    floors = [min(row) for row in costs]
    room = budget - sum(floors)
    extras = [[cost - floor for cost in row] for row, floor in zip(costs, floors)]
    unit = math.gcd(*(extra for row in extras for extra in row)) or 1
    unit *= max(1, -(-room // (unit * UNITS)))
    slots = room // unit
    best = np.zeros(slots + 1)
    picks = np.zeros((len(costs), slots + 1), dtype=np.int16)
    for row, (cost, value) in enumerate(zip(extras, values)):
        found = np.full(slots + 1, np.inf)
        for index in sorted(range(len(cost)), key=lambda i: (cost[i], value[i])):
            steps = -(-cost[index] // unit)
            if steps > slots:
                continue
            reached = np.full(slots + 1, np.inf)
            reached[steps:] = best[: slots + 1 - steps] + value[index]
            better = reached < found
            found[better], picks[row, better] = reached[better], index
        best = found
    chosen, left = [], slots
    for row in range(len(costs) - 1, -1, -1):
        index = int(picks[row, left])
        chosen.append(index)
        left -= -(-extras[row][index] // unit)
    return chosen[::-1]


def overrides(record: dict[str, Any]) -> list[tuple[str, str]]:
    """An allocation as overrides of single layers."""
    return [(layer["layer"], layer["chosen"]) for layer in record["layers"]]


def _kept(weights: int, name: str) -> int:
    found = parse_pattern(name)
    return weights if found is None else weights * found.n // found.m


def _names(masked: MaskedUNet) -> list[str]:
    return [layer.name.removesuffix(".weight") for bank in masked.banks for layer in bank.layers]


def held_out_batches(task: Task, images: Tensor, count: int, seed: int) -> list[NoisedBatch]:
    """Fixed batches of the last held-out images, which the evaluation does not look at when there are enough."""
    last = to_float(images[-count:], task.device)
    return validation_batches(task.scheduler, last, count, count, seed)
