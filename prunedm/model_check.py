"""What a model folder of others must be before anything is built from it: bounded configs and headers.

Knows no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .untrusted import one_line, read_header, read_table, shown

CONFIG_LIMITS = {"layers_per_block": 32, "sample_size": 2048, "in_channels": 1024, "num_train_timesteps": 1_000_000}
WIDEST, MOST_BLOCKS = 16_384, 16
# What diffusers raises on configs that make no sense, beside ValueError and TypeError.
UNBUILDABLE = (
    ArithmeticError, LookupError, AttributeError, AssertionError, NameError, RuntimeError, MemoryError,
)  # fmt: skip


class ModelError(ValueError):
    """A model that is missing, unsafe or of an unknown kind, in one line with the remedy."""


def check_config(path: Path) -> dict[str, Any]:
    """A config whose numbers are within reason, so that building the model cannot eat the machine; ModelError."""
    try:
        found = read_table(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} is no JSON of a model ({one_line(error, 160)}); save it again") from error
    for key, most in CONFIG_LIMITS.items():
        for value in _numbers(found.get(key)):
            if not 1 <= value <= most:
                raise ModelError(f"{path.name}: {key}={shown(value)} must be 1 to {most:,}; mend the config")
    widths = _numbers(found.get("block_out_channels"))
    if len(widths) > MOST_BLOCKS or any(not 1 <= width <= WIDEST for width in widths):
        raise ModelError(f"{path.name}: block_out_channels must be at most {MOST_BLOCKS} widths up to {WIDEST:,}")
    return found


def _numbers(value: Any) -> list[float]:
    found = value if isinstance(value, list) else [value]
    return [number for number in found if isinstance(number, int | float)]


def shapes(path: Path) -> dict[str, list[int]]:
    """Tensor name to shape out of a safetensors header; ModelError in one line."""
    try:
        found = {name: entry["shape"] for name, entry in read_header(path).items() if name != "__metadata__"}
        if not all(_is_shape(shape) for shape in found.values()):
            raise ValueError("a tensor of no shape")
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = one_line(error, 160)
        if text.startswith(path.name):
            raise ModelError(text) from error
        raise ModelError(f"{path.name} has no header that can be read ({text}); save the model again") from error
    return found


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
