"""Stage 1: remove whole channels until a target share of the parameters is gone.

torch-pruning's dependency graph (DepGraph, arXiv 2301.12900) says which channels of which layers go
together and does the removal; this module chooses how many and which. A *channel group* is a set of
coupled channels (say, one residual stream). Its width may only take multiples of what GroupNorm, the
heads of attention and the groups of stage 2 need, so the reduction moves in jumps: one ratio is
bisected for all groups, then single groups take one jump more, those losing least first.

The road not taken: ``BasePruner`` with a ratio. It averages importance over GroupNorm's groups, so
that the same position goes from each, and its ratio is not the reduction of parameters.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .seeds import generator
from .unet import head_size, image_shape, macs, parameters, sync_attributes

TOLERANCE = 0.02  # a reduction this far from its target is said to be missed


@dataclass
class ChannelGroup:
    """Coupled channels. ``scores``: ``[width]``, high is important; ``blocks``: equal contiguous parts
    (GroupNorm groups or heads) that must stay equal; ``whole_blocks``: a part goes whole (a head)."""

    layer: str
    root: nn.Module
    prune_fn: Any
    width: int
    step: int
    blocks: int
    whole_blocks: bool
    scores: Tensor
    touched: dict[tuple[nn.Module, bool], int]  # (module, is_output) -> channels of it in the group

    def width_at(self, ratio: float) -> int:
        """The allowed width nearest to ``(1 - ratio) * width``."""
        return min(self.width, max(self.step, round((1 - ratio) * self.width / self.step) * self.step))

    def dropped(self, width: int) -> list[int]:
        """Indices of the least important channels beyond ``width``, block by block."""
        blocks = self.scores.view(self.blocks, -1)
        if self.whole_blocks:
            keep = width // blocks.shape[1]
            gone = blocks.mean(1).argsort(stable=True)[: self.blocks - keep]
            mask = torch.zeros_like(blocks, dtype=torch.bool)
            mask[gone] = True
        else:
            gone = blocks.argsort(dim=1, stable=True)[:, : blocks.shape[1] - width // self.blocks]
            mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, gone, True)
        return mask.flatten().nonzero().flatten().tolist()

    def cost(self, width: int) -> float:
        """Share of the group's importance that goes when it shrinks to ``width``."""
        return (self.scores[self.dropped(width)].sum() / self.scores.sum()).item()


@dataclass
class PruneReport:
    """What stage 1 did. Reductions are shares of the dense model's parameters or MACs."""

    method: str
    target: float
    reduction: float
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    groups: list[dict[str, Any]]  # layer, before, after, multiple_of
    reason: str = ""  # why the target was missed, in words; empty when met

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def channel_groups(unet: nn.Module, method: str, m: int, seed: int) -> tuple[Any, list[ChannelGroup]]:
    """The dependency graph and its prunable groups with their importance scores.

    ``conv_out`` and the time embedding are left alone. method: ``magnitude`` (torch-pruning's group
    L2 norm) or ``random``. m: stage 2's group length, for which widths are rounded.
    """
    sample = torch.zeros(1, *image_shape(unet))
    inputs = {"sample": sample, "timestep": torch.zeros(1, dtype=torch.long)}
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(unet, example_inputs=inputs)
    names = {module: name for name, module in unet.named_modules()}
    ignored = [unet.conv_out, unet.time_embedding.linear_1, unet.time_embedding.linear_2]
    magnitude = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    heads = {
        layer: attention
        for attention in unet.modules()
        if attention.__class__.__name__ == "Attention"
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    }
    groups = []
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=[nn.Conv2d, nn.Linear]):
        group = _rooted_at_narrowest(graph, group)
        root = group[0].dep.target.module
        layer, width = names[root], len(group[0].idxs)
        if method == "random":
            scores = torch.rand(width, generator=generator(seed, "channels", layer))
        else:
            scores = magnitude(group).detach().float().cpu()
        step, blocks, whole = _constraints(unet, group, width, m, heads)
        if width % step == 0 and width > step:
            prune_fn = group[0].dep.handler
            touched = _touched(graph, group)
            groups.append(ChannelGroup(layer, root, prune_fn, width, step, blocks, whole, scores, touched))
    return graph, groups


def prune(unet: nn.Module, method: str, target: float, m: int, seed: int) -> PruneReport:
    """Prune ``unet`` in place to the target share of parameters; widths stay multiples of M."""
    before, macs_before = parameters(unet), macs(unet)
    graph, groups = channel_groups(unet, method, m, seed)
    widths = choose_widths(groups, before, target)
    query_sizes = {a: a.to_q.out_features for a in unet.modules() if a.__class__.__name__ == "Attention"}
    for group, width in zip(groups, widths, strict=True):
        if width < group.width:
            graph.get_pruning_group(group.root, group.prune_fn, group.dropped(width)).prune()
    sync_attributes(unet)
    for attention, size in query_sizes.items():
        _keep_attention_scale(attention, size)
    after = parameters(unet)
    reduction = 1 - after / before
    return PruneReport(
        method,
        target,
        reduction,
        before,
        after,
        macs_before,
        macs(unet),
        [
            {"layer": g.layer, "before": g.width, "after": w, "multiple_of": g.step}
            for g, w in zip(groups, widths, strict=True)
        ],
        _missed(groups, before, target, reduction),
    )


def choose_widths(groups: list[ChannelGroup], total: int, target: float) -> list[int]:
    """Widths whose parameter reduction is nearest to ``target`` (a share of ``total``)."""

    def reduction(widths: list[int]) -> float:
        return removed_parameters(groups, widths) / total

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if reduction([g.width_at(middle) for g in groups]) <= target:
            low = middle
        else:
            high = middle
    widths, further = ([g.width_at(r) for g in groups] for r in (low, high))
    changing = [i for i, group in enumerate(groups) if widths[i] != further[i]]
    for i in sorted(changing, key=lambda i: groups[i].cost(further[i])):
        trial = [*widths[:i], further[i], *widths[i + 1 :]]
        if abs(reduction(trial) - target) < abs(reduction(widths) - target):
            widths = trial
    return widths


def removed_parameters(groups: list[ChannelGroup], widths: list[int]) -> int:
    """How many parameters go when each group shrinks to its width; exact, without pruning."""
    lost: dict[nn.Module, list[int]] = {}  # module -> [outputs lost, inputs lost]
    for group, width in zip(groups, widths, strict=True):
        share = (group.width - width) / group.width
        for (module, is_output), count in group.touched.items():
            lost.setdefault(module, [0, 0])[0 if is_output else 1] += round(count * share)
    total = 0
    for module, (out_lost, in_lost) in lost.items():
        if isinstance(module, nn.GroupNorm):
            total += 2 * out_lost
            continue
        out, inputs = module.weight.shape[:2]
        kernel = module.weight[0, 0].numel()
        bias = out_lost if module.bias is not None else 0
        total += (out * inputs - (out - out_lost) * (inputs - in_lost)) * kernel + bias
    return total


def _rooted_at_narrowest(graph, group):
    """The same group seen from its narrowest layer.

    With ``resnet_time_scale_shift`` the time projection has two outputs (scale, shift) for each channel;
    only seen from the convolution does one index stand for one channel.
    """
    outputs = [
        dep for dep, _ in group
        if isinstance(dep.target.module, nn.Conv2d | nn.Linear) and graph.is_out_channel_pruning_fn(dep.handler)
    ]  # fmt: skip
    narrowest = min(outputs, key=lambda dep: graph.get_out_channels(dep.target.module))
    width = graph.get_out_channels(narrowest.target.module)
    if width >= len(group[0].idxs):
        return group
    return graph.get_pruning_group(narrowest.target.module, narrowest.handler, list(range(width)))


def _touched(graph, group) -> dict[tuple[nn.Module, bool], int]:
    indices: dict[tuple[nn.Module, bool], set[int]] = {}
    for dep, idxs in group:
        module = dep.target.module
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            key = (module, graph.is_out_channel_pruning_fn(dep.handler))
            indices.setdefault(key, set()).update(idxs)
    return {key: len(found) for key, found in indices.items()}


def _constraints(unet, group, width: int, m: int, heads: dict) -> tuple[int, int, bool]:
    """(multiple that the width must keep, number of equal blocks, whether a block goes whole)."""
    norms = {d.target.module.num_groups for d, _ in group if isinstance(d.target.module, nn.GroupNorm)}
    step = math.lcm(m, *norms)
    root = group[0].dep.target.module
    attention = heads.get(root)
    if attention is not None and attention.heads > 1:
        return math.lcm(step, head_size(unet, attention)), attention.heads, True
    # Norms over a concatenation see this group at an offset; equal parts suit all of them best.
    blocks = max(norms, default=1)
    return step, blocks if width % blocks == 0 and step % blocks == 0 else 1, False


@torch.no_grad()
def _keep_attention_scale(attention: nn.Module, size_before: int) -> None:
    """diffusers scales by 1/sqrt(head size) of the pruned layer: put the difference into ``to_q``.

    Whole heads keep their size; only single-head attention is narrowed.
    """
    size = attention.to_q.out_features
    if attention.heads > 1 or size == size_before:
        return
    factor = math.sqrt(size / size_before)
    attention.to_q.weight.mul_(factor)
    if attention.to_q.bias is not None:
        attention.to_q.bias.mul_(factor)


def _missed(groups: list[ChannelGroup], total: int, target: float, reduction: float) -> str:
    if abs(reduction - target) <= TOLERANCE:
        return ""
    most = removed_parameters(groups, [g.step for g in groups]) / total
    if target > most:
        return f"at most {most:.1%} can go: each width must keep {min(g.step for g in groups)} channels"
    steps = sorted({g.step for g in groups})
    return f"widths move in multiples of {steps} (GroupNorm, heads, N:M); {reduction:.1%} is nearest"
