"""The uniform layout: one width a resolution level, so that the pruned UNet is an ordinary UNet2DModel.

``block_out_channels`` of the config then says the whole truth and plain diffusers loads the folder. The
obstacle is the time embedding, whose sinusoids have ``block_out_channels[0]`` columns. Its first layer
sees one of T timesteps only, and the table ``Y[t] = linear_1(sinusoid(t))`` is smooth: its singular value
decomposition, cut to the new width, reproduces it. So the result carries ``time_embedding_type="learned"``
with the table's left factor as ``time_proj`` and the right one as ``linear_1``. (A least-squares refit to
narrower sinusoids leaves half of Y: not done.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .channel_groups import ChannelGroup
from .pruned_unet import public
from .unet import image_shape

RESIDUAL = 1e-5  # relative residual that the cut table may leave
SAME_OUTPUT = 1e-3  # largest difference that rebuilding may make to a unit output


def units(unet: nn.Module, groups: list[ChannelGroup], train_timesteps: int) -> list[int]:
    """The unit of each group: groups of one unit get one width. Sets what level 0 must keep.

    Levels that share a residual stream (equal widths, no shortcut between them) are one unit. ValueError
    when the model's layers do not have the widths that its config says, or its embeddings are of another kind.
    """
    _require_plain(unet, train_timesteps)
    widths = list(unet.config.block_out_channels)
    joined = list(range(len(widths)))
    for group in groups:
        levels = sorted({level_of(name, len(widths)) for name in group.members})
        wrong = [level for level in levels if widths[level] != group.width]
        if wrong:
            raise ValueError(
                f"layout=uniform needs widths as in config.json and {group.layer} has {group.width} channels, "
                f"not {widths[wrong[0]]}; use layout=free"
            )
        for level in levels[1:]:
            joined = [joined[levels[0]] if j == joined[level] else j for j in joined]
    found = [joined[level_of(group.members[0], len(widths))] for group in groups]
    least, held_units = least_width(unet, train_timesteps), {joined[level] for level in _held_levels(unet, groups)}
    for unit in set(found):
        members = [group for group, of in zip(groups, found) if of == unit]
        step = math.lcm(*(group.step for group in members))
        needed = least if unit == joined[0] else 0
        for group in members:
            group.step = step
            narrowest = max(step, math.ceil(needed / step) * step)
            group.least = group.width if unit in held_units else min(group.width, narrowest)
    return found


def _held_levels(unet: nn.Module, groups: list[ChannelGroup]) -> set[int]:
    """Levels with a layer whose outputs are in no group, because their width allows no step: they stay."""
    moving = {name for group in groups for name in group.members}
    fixed = ("conv_out", "time_embedding.")
    return {
        level_of(name, len(unet.config.block_out_channels))
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in moving and not name.startswith(fixed)
    }


def level_of(name: str, levels: int) -> int:
    """The resolution level of a layer, 0 the finest."""
    block, _, rest = name.partition(".")
    if block in ("down_blocks", "up_blocks"):
        at = int(rest.partition(".")[0])
        return at if block == "down_blocks" else levels - 1 - at
    return levels - 1 if block == "mid_block" else 0


def fits(unet: nn.Module, groups: list[ChannelGroup], widths: list[int]) -> bool:
    """Whether a config with these widths builds the layers that the model has.

    diffusers puts a shortcut convolution only where a block's channels change: two levels whose widths become
    equal would lose theirs.
    """
    from diffusers import UNet2DModel

    levels = list(unet.config.block_out_channels)
    for group, width in zip(groups, widths):
        for name in group.members:
            levels[level_of(name, len(levels))] = width
    config = public(unet.config) | {"block_out_channels": levels}
    with torch.device("meta"):
        built = UNet2DModel.from_config(config)
    return set(built.state_dict()) == set(unet.state_dict())


@torch.no_grad()
def time_table(unet: nn.Module, train_timesteps: int) -> Tensor:
    """``linear_1(time_proj(t))`` without its bias for each t, ``[T, D]``, float64."""
    t = torch.arange(train_timesteps)
    return unet.time_proj(t).double() @ unet.time_embedding.linear_1.weight.double().T


def least_width(unet: nn.Module, train_timesteps: int) -> int:
    """The smallest width at which the cut table leaves no more than RESIDUAL."""
    s = torch.linalg.svdvals(time_table(unet, train_timesteps))
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm()  # tails[k]: what is left after k values
    return int((tails > RESIDUAL).sum())


def added_parameters(unet: nn.Module, groups: list[ChannelGroup], widths: list[int], train_timesteps: int) -> int:
    """What the table costs, less what linear_1 loses, at these widths."""
    levels = unet.config.block_out_channels
    width = next((w for g, w in zip(groups, widths) if level_of(g.members[0], len(levels)) == 0), levels[0])
    linear = unet.time_embedding.linear_1
    table = unet.time_proj.weight.numel() if isinstance(unet.time_proj, nn.Embedding) else 0
    return train_timesteps * width - table - linear.out_features * (linear.in_features - width)


@torch.no_grad()
def rebuild(unet: nn.Module, train_timesteps: int) -> tuple[nn.Module, float]:
    """An ordinary UNet2DModel with the pruned weights, and the relative residual of its time table.

    ValueError when the rebuilt model's output differs.
    """
    from diffusers import UNet2DModel

    widths = [_level_width(block) for block in unet.down_blocks]
    table = time_table(unet, train_timesteps)
    u, s, v = torch.linalg.svd(table, full_matrices=False)
    keep = widths[0]
    root = s[:keep].sqrt()
    linear = unet.time_embedding.linear_1
    config = public(unet.config) | {
        "block_out_channels": widths,
        "time_embedding_type": "learned",
        "time_embedding_dim": linear.out_features,
        "num_train_timesteps": train_timesteps,
    }
    found = UNet2DModel.from_config(config).eval()
    tensors = unet.state_dict()
    tensors.pop("time_proj.weight", None)
    tensors["time_embedding.linear_1.weight"] = (v[:keep].T * root).to(linear.weight)
    tensors["time_proj.weight"] = (u[:, :keep] * root).to(linear.weight)
    try:
        found.load_state_dict(tensors)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:160]
        raise ValueError(f"layout=uniform does not fit this model ({line}); use layout=free") from error
    _require_same(unet, found)
    return found, (s[keep:].norm() / s.norm()).item()


def _level_width(block: nn.Module) -> int:
    return block.resnets[0].conv2.out_channels


def _require_plain(unet: nn.Module, train_timesteps: int) -> None:
    kind = unet.config.time_embedding_type
    if kind not in ("positional", "learned") or unet.class_embedding is not None:
        what = "class embeddings" if unet.class_embedding is not None else f"a {kind} time embedding"
        raise ValueError(f"layout=uniform rebuilds a table over timesteps and this model has {what}; use layout=free")
    if kind == "learned" and unet.time_proj.num_embeddings < train_timesteps:
        raise ValueError(
            f"layout=uniform: the model's table has {unet.time_proj.num_embeddings} timesteps and its scheduler "
            f"{train_timesteps}; save it with the scheduler it was trained with"
        )


def _require_same(before: nn.Module, after: nn.Module) -> None:
    x = torch.randn(2, *image_shape(before), generator=torch.Generator().manual_seed(0))
    last = after.config.num_train_timesteps - 1
    t = torch.tensor([min(1, last), int(0.7 * last)])
    a, b = before(x, t).sample, after(x, t).sample
    difference = ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item()
    if difference > SAME_OUTPUT:
        raise ValueError(f"layout=uniform changes this model's output by {difference:.2g}; use layout=free")
