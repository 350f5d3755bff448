"""Colour scales safe for colour-blind readers, and how well words can be read on them (WCAG's contrast)."""

from __future__ import annotations

from itertools import pairwise

Scale = list[tuple[float, str]]  # stops as plotly takes them: share of the range, colour

LEAST_CONTRAST = 4.5  # of words, WCAG AA
CELL_TEXT = "#111111"  # on the light scales below, in either theme
EVEN = "#f7f7f7"
SHARES: Scale = [(0.0, EVEN), (1.0, "#3fbd97")]
VIRIDIS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
SEEN = (0.1, 0.8)  # the part of Viridis whose lines are seen on a dark and on a light page


def around(middle: float) -> Scale:
    """Blue below, orange above, lightest at this share of the range, where the ideal lies."""
    return [(0.0, "#56B4E9"), (middle, EVEN), (1.0, "#E69F00")]


def steps(count: int) -> list[str]:
    """So many colours of Viridis, evenly spaced, the darkest first."""
    scale = [(number / (len(VIRIDIS) - 1), color) for number, color in enumerate(VIRIDIS)]
    low, high = SEEN
    return [at(scale, low + (high - low) * number / max(1, count - 1)) for number in range(count)]


def at(scale: Scale, share: float) -> str:
    """The colour at a share of the range, mixed linearly between stops as plotly does; beyond an end, the end's."""
    for (start, first), (end, second) in pairwise(scale):
        if share <= end:
            weight = max(0.0, share - start) / (end - start)
            mixed = (a + (b - a) * weight for a, b in zip(_channels(first), _channels(second)))
            return "#" + "".join(f"{round(value):02x}" for value in mixed)
    return scale[-1][1]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    shares = (value / 255 for value in _channels(color))
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _channels(color: str) -> tuple[int, ...]:
    return tuple(int(color[place : place + 2], 16) for place in (1, 3, 5))
