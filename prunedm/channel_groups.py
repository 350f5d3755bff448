"""Channel groups: which channels of which layers go together, by torch-pruning's dependency graph.

A *channel group* is a set of coupled channels (say, one residual stream; DepGraph, arXiv 2301.12900). Its
width may only take multiples of what GroupNorm, the heads of attention and the groups of stage 2 need.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .pruned_unet import attentions, head_size
from .unet import image_shape

TRACED_SIDE = 64  # pixels: enough for six halvings
Score = Callable[[Any], Tensor]  # torch-pruning's group -> a score for each of its channels, [width]
Ratios = Sequence[tuple[str, float]]  # (shell pattern of layers, share of the channels to remove)


@dataclass
class ChannelGroup:
    """Coupled channels. ``scores``: ``[width]``, high is important; ``blocks``: equal contiguous parts
    (GroupNorm groups or heads) that must stay equal; ``whole_blocks``: a part goes whole (a head).
    ``members``: names of the layers that put these channels out; ``kind``: alike for groups of alike
    layers; ``ratio``: the share to remove where the recipe fixes it."""

    layer: str
    root: nn.Module
    prune_fn: Any
    width: int
    step: int
    blocks: int
    whole_blocks: bool
    scores: Tensor
    touched: dict[tuple[nn.Module, bool], int]  # (module, is_output) -> channels of it in the group
    members: list[str]
    kind: tuple[str, ...]
    ratio: float | None = None
    least: int = 0  # the narrowest that it may become

    def __post_init__(self) -> None:
        self.least = max(self.least, self.step)

    def allowed(self, width: float) -> int:
        """The allowed width nearest to this one."""
        return min(self.width, max(self.least, round(width / self.step) * self.step))

    def width_at(self, ratio: float) -> int:
        """The allowed width nearest to ``(1 - ratio) * width``."""
        return self.allowed((1 - ratio) * self.width)

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
        scores = self.scores - self.scores.min().clamp(max=0)  # some normalizers centre scores at zero
        return (scores[self.dropped(width)].sum() / scores.sum().clamp(min=1e-30)).item()


def channel_groups(unet: nn.Module, score: Score, multiple: int, ratios: Ratios = ()) -> tuple[Any, list[ChannelGroup]]:
    """The dependency graph and its prunable groups with their scores.

    ``conv_out`` and the time embedding are left alone. multiple: what every width must be a multiple of,
    for stage 2. ratios: shares of single layers, a group follows the last that names one of its members;
    ValueError when a name matches no group or a score is no number.
    """
    channels, *sides = image_shape(unet)
    # What is coupled does not depend on the size of the image, what the trace keeps in memory does.
    sample = torch.zeros(1, channels, *(min(side, TRACED_SIDE) for side in sides))
    inputs = {"sample": sample, "timestep": torch.zeros(1, dtype=torch.long)}
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(unet, example_inputs=inputs)
    names = {module: name for name, module in unet.named_modules()}
    ignored = [unet.conv_out, unet.time_embedding.linear_1, unet.time_embedding.linear_2]
    heads = {
        layer: attention for attention in attentions(unet) for layer in (attention.to_q, attention.to_k, attention.to_v)
    }
    groups = []
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=[nn.Conv2d, nn.Linear]):
        group = _rooted_at_narrowest(graph, group)
        root, width = group[0].dep.target.module, len(group[0].idxs)
        step, blocks, whole = _constraints(unet, group, width, multiple, heads)
        if width % step == 0 and width > step:
            touched = _touched(graph, group)
            members = [names[m] for (m, out) in touched if out and not isinstance(m, nn.GroupNorm)]
            kind = tuple(sorted(f"{type(m).__name__} {out}" for m, out in touched))
            scores = _checked(score(group), names[root])
            groups.append(
                ChannelGroup(
                    *(names[root], root, group[0].dep.handler, width, step, blocks, whole, scores, touched),
                    *(members, kind, _ratio(members, ratios)),
                )
            )
    for match, _ in ratios:
        if not any(fnmatch.fnmatchcase(name, match) for group in groups for name in group.members):
            example = groups[-1].members[0] if groups else "mid_block.resnets.0.conv1"
            raise ValueError(f"prune.layers: {match!r} matches no prunable layer; names look like {example}")
    return graph, groups


def _ratio(members: list[str], ratios: Ratios) -> float | None:
    return next((r for match, r in reversed(ratios) if any(fnmatch.fnmatchcase(name, match) for name in members)), None)


def _checked(scores: Tensor, layer: str) -> Tensor:
    scores = scores.detach().float().cpu()
    if not scores.isfinite().all():
        raise ValueError(
            f"the channel scores of {layer} are not finite: its weights or gradients are zero or no numbers; "
            "use prune.method=magnitude"
        )
    return scores


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


def _constraints(unet, group, width: int, multiple: int, heads: dict) -> tuple[int, int, bool]:
    """(multiple that the width must keep, number of equal blocks, whether a block goes whole)."""
    norms = {d.target.module.num_groups for d, _ in group if isinstance(d.target.module, nn.GroupNorm)}
    step = math.lcm(multiple, *norms)
    root = group[0].dep.target.module
    attention = heads.get(root)
    if attention is not None and unet.config.attention_head_dim:
        return math.lcm(step, head_size(unet, attention)), attention.heads, True
    # Norms over a concatenation see this group at an offset; equal parts suit all of them best.
    blocks = max(norms, default=1)
    return step, blocks if width % blocks == 0 and step % blocks == 0 else 1, False
