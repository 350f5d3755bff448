"""How wide each channel group shall become: widths for a ratio, what they cost, and the widths nearest to a target.

Costs are exact and found without pruning: parameters and MACs from the channels that each layer loses.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .channel_groups import ChannelGroup
from .pruned_unet import attentions, sync_attributes
from .unet import image_shape

CLOSE = 0.005  # nearer than this to the target, equal ratios of the levels count more
BISECTIONS, TIMED_BISECTIONS = 30, 7
Widths = list[int]


def plan(groups: list[ChannelGroup], ranking: str) -> Callable[[float], Widths]:
    """Ratio -> widths. local: the same ratio everywhere. global: the weakest channels of all groups go.
    isomorphic: the weakest of alike groups do (Isomorphic Pruning, arXiv 2407.04616)."""
    if ranking == "local":
        return lambda ratio: [g.width_at(ratio if g.ratio is None else g.ratio) for g in groups]
    classes: dict[Any, list[ChannelGroup]] = {}
    for group in groups:
        if group.ratio is None:
            classes.setdefault(group.kind if ranking == "isomorphic" else "all", []).append(group)
    ranked = {kind: torch.cat([g.scores for g in alike]).sort().values for kind, alike in classes.items()}

    def widths(ratio: float) -> Widths:
        found = []
        for group in groups:
            if group.ratio is not None:
                found.append(group.width_at(group.ratio))
                continue
            scores = ranked[group.kind if ranking == "isomorphic" else "all"]
            gone = round(ratio * len(scores))
            threshold = scores[gone - 1] if gone else -math.inf
            found.append(group.allowed((group.scores > threshold).sum().item()))
        return found

    return widths


def choose_widths(
    groups: list[ChannelGroup],
    widths_at: Callable[[float], Widths],
    measure: Callable[[Widths], float],
    target: float,
    timed: bool = False,
    units: list[int] | None = None,
    fits: Callable[[Widths], bool] = lambda widths: True,
) -> Widths:
    """Widths whose measured reduction is nearest to ``target``.

    timed: measuring takes time and is noisy, so the bisected ratio stands. units: groups of one unit have
    one width (the uniform layout), and ``fits`` says which widths a config can describe.
    """
    low, high = 0.0, 1.0
    for _ in range(TIMED_BISECTIONS if timed else BISECTIONS):
        middle = (low + high) / 2
        if measure(widths_at(middle)) <= target:
            low = middle
        else:
            high = middle
    if units is not None:
        jumps = (lambda trial: math.dist(trial, widths_at(low))) if timed else measure
        return _nearest_levels(groups, widths_at(low), jumps, 0.0 if timed else target, units, fits)
    if timed:
        return widths_at(low)
    widths, further = widths_at(low), widths_at(high)
    changing = [i for i in range(len(groups)) if widths[i] != further[i]]
    for i in sorted(changing, key=lambda i: groups[i].cost(further[i])):
        trial = [*widths[:i], further[i], *widths[i + 1 :]]
        if abs(measure(trial) - target) < abs(measure(widths) - target):
            widths = trial
    return widths


def _nearest_levels(
    groups: list[ChannelGroup],
    widths: Widths,
    measure: Callable[[Widths], float],
    target: float,
    units: list[int],
    fits: Callable[[Widths], bool],
) -> Widths:
    """The best of the widths a few jumps around: near the target, and then with the most equal ratios.

    ValueError when none of them is a UNet that a config can describe.
    """
    first = {unit: units.index(unit) for unit in units}
    jumps = (-2, -1, 0, 1, 2) if len(first) <= 4 else (-1, 0, 1)
    around = [sorted({groups[i].allowed(widths[i] + jump * groups[i].step) for jump in jumps}) for i in first.values()]

    def rank(trial: Widths) -> tuple[float, float]:
        ratios = [width / group.width for width, group in zip(trial, groups)]
        return max(abs(measure(trial) - target), CLOSE), max(ratios) - min(ratios)

    trials = []
    for choice in itertools.product(*around):
        of = dict(zip(first, choice))
        trials.append([of[unit] for unit in units])
    found = next((trial for trial in sorted(trials, key=rank) if fits(trial)), None)
    if found is None:
        raise ValueError(f"layout=uniform finds no widths near target={target:.3g} for this model; use layout=free")
    return found


def lost_channels(groups: list[ChannelGroup], widths: Widths) -> dict[nn.Module, tuple[int, int]]:
    """Module to (outputs lost, inputs lost) when each group shrinks to its width."""
    lost: dict[nn.Module, list[int]] = {}
    for group, width in zip(groups, widths, strict=True):
        share = (group.width - width) / group.width
        for (module, is_output), count in group.touched.items():
            lost.setdefault(module, [0, 0])[0 if is_output else 1] += round(count * share)
    return {module: (out, inside) for module, (out, inside) in lost.items()}


def removed_parameters(groups: list[ChannelGroup], widths: Widths) -> int:
    """How many parameters go when each group shrinks to its width; exact, without pruning."""
    total = 0
    for module, (out_lost, in_lost) in lost_channels(groups, widths).items():
        if isinstance(module, nn.GroupNorm):
            total += 2 * out_lost
            continue
        out, inputs = module.weight.shape[:2]
        kernel = module.weight[0, 0].numel()
        bias = out_lost if module.bias is not None else 0
        total += (out * inputs - (out - out_lost) * (inputs - in_lost)) * kernel + bias
    return total


@torch.no_grad()
def layer_positions(unet: nn.Module) -> dict[nn.Module, int]:
    """At how many places (pixels, tokens) of one image each convolution or linear layer works."""
    found: dict[nn.Module, int] = {}

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        found[module] = output.numel() // module.weight.shape[0]

    hooks = [m.register_forward_hook(hook) for m in unet.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        unet(torch.zeros(1, *image_shape(unet)), torch.zeros(1, dtype=torch.long))
    finally:
        for handle in hooks:
            handle.remove()
    return found


def removed_macs(unet: nn.Module, groups: list[ChannelGroup], widths: Widths, positions: dict[nn.Module, int]) -> int:
    """How many MACs of one image go, like :func:`removed_parameters`: layers and attention's two products."""
    attending = {layer for a in attentions(unet) for layer in (a.to_q, a.to_v)}
    total = 0
    for module, (out_lost, in_lost) in lost_channels(groups, widths).items():
        if isinstance(module, nn.GroupNorm):
            continue
        out, inputs = module.weight.shape[:2]
        at = positions[module]
        total += (out * inputs - (out - out_lost) * (inputs - in_lost)) * module.weight[0, 0].numel() * at
        if module in attending:
            total += out_lost * at * at
    return total


def shrunk(unet: nn.Module, groups: list[ChannelGroup], widths: Widths) -> nn.Module:
    """A copy with these widths and its first channels kept: good for timing, for nothing else."""
    lost = {id(module): found for module, found in lost_channels(groups, widths).items()}
    trial = copy.deepcopy(unet)
    for before, module in zip(unet.modules(), trial.modules(), strict=True):
        out_lost, in_lost = lost.get(id(before), (0, 0))
        if out_lost or in_lost:
            weight = module.weight.detach()
            keep = weight[: len(weight) - out_lost]
            keep = keep[:, : keep.shape[1] - in_lost] if weight.dim() > 1 else keep
            module.weight = nn.Parameter(keep.contiguous())
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach()[: len(keep)].clone())
    sync_attributes(trial)
    return trial
