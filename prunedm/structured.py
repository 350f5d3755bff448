"""Stage 1: remove whole channels until a target is met.

The target is a share of the parameters, of the MACs or of the latency measured here. Widths move in jumps
(channel_groups.py), so one ratio is bisected for all groups, and then single groups take one jump more,
those losing least first (sizing.py). Two layouts: ``free`` gives each group its own width; ``uniform`` one width a
resolution level, which leaves an ordinary UNet2DModel (uniform.py).

The road not taken: torch-pruning's ``BasePruner`` with a ratio. It averages importance over GroupNorm's
groups, so that the same position goes from each, and its ratio is not the reduction of parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from . import giveway, latency, masked_unet, parallel, pattern, uniform
from .channel_groups import ChannelGroup, channel_groups
from .channel_scores import scoring
from .pruned_unet import attentions, sync_attributes
from .sizing import Widths, choose_widths, layer_positions, plan, removed_macs, removed_parameters, shrunk
from .stage_recipes import Prune
from .training import Task
from .unet import macs, parameters

TOLERANCE = 0.02  # a reduction this far from its target is said to be missed
CPU = torch.device("cpu")
TENSOR_CORE = 16  # channels: the rule of NVIDIA's ASP (arXiv 2104.08378) for sparse tensor cores


@dataclass
class PruneReport:
    """What stage 1 did. Reductions are shares of the dense model's parameters, MACs or latency."""

    method: str
    target: float
    of: str  # what the target is a share of: parameters, macs or latency
    achieved: float  # of that
    layout: str
    reduction: float  # of the parameters
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    groups: list[dict[str, Any]]  # layer, before, after, multiple_of
    eligibility: dict[str, dict[str, int]]  # before and after: layers, those eligible for N:M, tensor-core ready
    reason: str = ""  # why the target was missed, in words; empty when met
    details: dict[str, Any] = field(default_factory=dict)  # time embedding's residual; measured latencies

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Dense:
    """What reductions are shares of. ``unet`` is kept where a latency is to be measured against it."""

    parameters: int
    macs: int
    eligibility: dict[str, int]
    unet: nn.Module | None
    device: torch.device  # where a latency is measured

    @classmethod
    def of(cls, unet: nn.Module, spec: Prune, m: int, device: torch.device = CPU) -> Dense:
        kept = copy.deepcopy(unet).to(device) if spec.of == "latency" else None
        return cls(parameters(unet), macs(unet), eligibility(unet, m), kept, device)

    def times(self, unet: nn.Module) -> dict[str, Any]:
        """Measured times of another UNet against this one; it is moved to the device and stays there."""
        unet.to(self.device)
        return parallel.shared(lambda: latency.compare(self.unet, unet))


def prune(
    unet: nn.Module,
    spec: Prune,
    m: int,
    seed: int,
    task: Task | None = None,
    dense: Dense | None = None,
    train_timesteps: int = 1000,
) -> tuple[nn.Module, PruneReport]:
    """The UNet pruned to the recipe's target, and what was done.

    ``unet`` is cut in place; with ``layout: uniform`` another module with a config of its own comes back.
    m: the group length of stage 2, which widths stay multiples of. task: images, for methods that look at
    them. dense: what the target is a share of, where ``unet`` has been pruned before. ValueError when the
    recipe cannot be met on this model at all.
    """
    dense = dense or Dense.of(unet, spec, m)
    graph, groups = _groups(unet, spec, m, seed, task)
    units = uniform.units(unet, groups, train_timesteps) if spec.layout == "uniform" else None
    measure = _measure(spec, unet, dense, groups, train_timesteps)
    widths = choose_widths(
        groups,
        plan(groups, spec.ranking),
        giveway.before_each(measure),
        spec.target,
        spec.of == "latency",
        units,
        lambda w: uniform.fits(unet, groups, w),
    )
    # What the narrowest widths would reach; groups describe the uncut model, so it is asked before the cut.
    most = 1.0 if spec.of == "latency" else measure(plan(groups, "local")(1.0))
    cut(unet, graph, groups, widths)
    details: dict[str, Any] = {}
    if spec.layout == "uniform":
        unet, details["time_embedding_residual"] = uniform.rebuild(unet, train_timesteps)
        details["block_out_channels"] = list(unet.config.block_out_channels)
    return unet, _report(spec, unet, dense, groups, widths, most, details, m)


def round_of(spec: Prune, number: int) -> Prune:
    """The recipe of one round (from 1): its part of the target, and of each layer's ratio, which is a share of
    what the round before has left."""

    def part(ratio: float) -> float:
        return 1 - (1 - ratio * number / spec.rounds) / (1 - ratio * (number - 1) / spec.rounds)

    layers = [layer.model_copy(update={"ratio": part(layer.ratio)}) for layer in spec.layers]
    return spec.model_copy(update={"target": spec.target * number / spec.rounds, "layers": layers})


def check(unet: nn.Module, spec: Prune, m: int, train_timesteps: int) -> None:
    """ValueError, in one line, when the recipe names layers that are not there or a layout that does not fit."""
    groups = _groups(unet, spec, m, 0, None)[1]
    if spec.layout == "uniform":
        uniform.units(unet, groups, train_timesteps)


def _groups(unet: nn.Module, spec: Prune, m: int, seed: int, task: Task | None) -> tuple[Any, list[ChannelGroup]]:
    multiple = math.lcm(m, TENSOR_CORE) if spec.round_for == "tensor-core" else m
    with scoring(unet, spec, task, seed) as score:
        return channel_groups(unet, score, multiple, [(x.match, x.ratio) for x in spec.layers])


def cut(unet: nn.Module, graph: Any, groups: list[ChannelGroup], widths: Widths) -> None:
    """Shrink each group to its width, in place."""
    query_sizes = {a: a.to_q.out_features for a in attentions(unet)}
    for group, width in zip(groups, widths, strict=True):
        if width < group.width:
            graph.get_pruning_group(group.root, group.prune_fn, group.dropped(width)).prune()
    sync_attributes(unet)
    if not unet.config.attention_head_dim:
        for attention, size in query_sizes.items():
            _keep_attention_scale(attention, size)


def eligibility(unet: nn.Module, m: int) -> dict[str, int]:
    """Number of convolution and linear layers, of those eligible for N:M, and of those that 2:4 kernels take."""
    reports = masked_unet.layer_reports(unet, 1, max(m, 2))
    eligible = [r for r in reports if r.eligible]
    ready = [r for r in eligible if pattern.tensor_core_ready(tuple(r.shape))]
    return {"layers": len(reports), "eligible": len(eligible), "tensor_core_ready": len(ready)}


def _measure(
    spec: Prune, unet: nn.Module, dense: Dense, groups: list[ChannelGroup], train_timesteps: int
) -> Callable[[Widths], float]:
    """Widths -> the reduction that the target speaks of, as a share of the dense model's."""
    if spec.of == "latency":
        return lambda widths: 1 - dense.times(shrunk(unet, groups, widths))["ratio"]
    if spec.of == "macs":
        whole, now, positions = dense.macs, macs(unet), layer_positions(unet)
        return lambda widths: 1 - (now - removed_macs(unet, groups, widths, positions)) / whole
    whole, now = dense.parameters, parameters(unet)

    def reduction(widths: Widths) -> float:
        left = now - removed_parameters(groups, widths)
        if spec.layout == "uniform":
            left += uniform.added_parameters(unet, groups, widths, train_timesteps)
        return 1 - left / whole

    return reduction


@torch.no_grad()
def _keep_attention_scale(attention: nn.Module, size_before: int) -> None:
    """diffusers scales by 1/sqrt(head size) of the pruned layer: put the difference into ``to_q``.

    For the one head of a model whose config names no head size; whole heads keep theirs.
    """
    size = attention.to_q.out_features
    if size == size_before:
        return
    factor = math.sqrt(size / size_before)
    attention.to_q.weight.mul_(factor)
    if attention.to_q.bias is not None:
        attention.to_q.bias.mul_(factor)


def _report(
    spec: Prune,
    unet: nn.Module,
    dense: Dense,
    groups: list[ChannelGroup],
    widths: Widths,
    most: float,
    details: dict[str, Any],
    m: int,
) -> PruneReport:
    after, macs_after = parameters(unet), macs(unet)
    reduction = 1 - after / dense.parameters
    if spec.of == "latency":
        times = dense.times(copy.deepcopy(unet))
        details["latency"] = times
        achieved = 1 - times["ratio"]
    else:
        achieved = reduction if spec.of == "parameters" else 1 - macs_after / dense.macs
    rows = [
        {"layer": g.layer, "before": g.width, "after": w, "multiple_of": g.step}
        for g, w in zip(groups, widths, strict=True)
    ]
    reason = _missed(spec, groups, most, achieved)
    eligible = {"before": dense.eligibility, "after": eligibility(unet, m)}
    return PruneReport(
        *(spec.method, spec.target, spec.of, achieved, spec.layout, reduction, dense.parameters, after),
        *(dense.macs, macs_after, rows, eligible, reason, details),
    )


def _missed(spec: Prune, groups: list[ChannelGroup], most: float, achieved: float) -> str:
    if abs(achieved - spec.target) <= TOLERANCE:
        return ""
    if spec.of == "latency":
        return f"measured times spread, and widths move in steps; {achieved:.1%} is what was reached"
    open_groups = [g for g in groups if g.ratio is None]
    if not open_groups:
        return "no channel group may be narrowed: GroupNorm, heads, N:M or prune.layers hold all of them"
    if spec.target > most:
        least = min(g.least for g in open_groups)
        return f"at most {max(0.0, most):.1%} of the {spec.of} can go: each width must keep {least} channels"
    steps = sorted({g.step for g in groups})
    return f"widths move in multiples of {steps} (GroupNorm, heads, N:M); {achieved:.1%} is nearest"
