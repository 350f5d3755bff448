"""The order of a UNet's layers as data flows through them; modules and files keep attentions before resnets."""

from __future__ import annotations

from typing import Any

BLOCKS = ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out")
TURNS = ("resnets", "attentions")  # of one index in a block; samplers come after all of them
WITHIN = ("conv1", "time_emb_proj", "conv2", "conv_shortcut", "to_q", "to_k", "to_v", "to_out")


def flow(layer: str) -> tuple[Any, ...]:
    """A key that sorts layers' names as data flows, and numbers by their value; unknown names come last, by name."""
    first, *rest = layer.split(".")
    place = BLOCKS.index(first) if first in BLOCKS else len(BLOCKS)
    block = int(rest.pop(0)) if rest and rest[0].isdecimal() else -1
    if len(rest) > 1 and rest[0] in TURNS and rest[1].isdecimal():
        turn, rest = (int(rest[1]), TURNS.index(rest[0])), rest[2:]
        return place, first, block, 0, turn, [_part(part) for part in rest]
    return place, first, block, 1, (0, 0), [_part(part) for part in rest]


def _part(part: str) -> tuple[int, int, str]:
    if part in WITHIN:
        return WITHIN.index(part), -1, ""
    return len(WITHIN), int(part) if part.isdecimal() else -1, part


def in_order(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of layers, each with its name in ``layer``, as data flows through them."""
    return sorted(layers, key=lambda record: flow(record["layer"]))
