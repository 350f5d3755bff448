"""Pure functions from records to plotly figures, as plain dictionaries: building them costs a live page
nothing, where ``go.Figure`` takes some 15 ms each. Colours are safe for colour-blind readers (Okabe-Ito)."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from . import palettes
from .stage_recipes import Pattern
from .steps import Steps

Figure = dict[str, Any]
T = TypeVar("T")

COLORS = {"finetune": "#0072B2", "mask": "#D55E00", "recover": "#009E73"}
VARIANT_COLORS = {"dense": "#56B4E9", "structured": "#E69F00", "nm": "#009E73"}
GREY = "#808495"
FONT = '"Source Sans", "Source Sans Pro", system-ui, sans-serif'  # the lab's own
GRID = "rgba(128,128,128,.2)"
LARGEST_TRACE = 1000
UNEVEN = 0.25  # of an even share: where the colours of position balance end
SMOOTHING = 0.9
NOISY = ("loss", "residual", "advantage", "grad_norm", "mask_grad_norm")
LOSSES = ("loss", "validation_loss")  # drawn on a logarithmic scale where asked
LABELS = {
    "loss": "training loss",
    "validation_loss": "validation loss on the way",
    "entropy": "entropy of the kept set (bits)",
    "flips": "groups that differ from the initial mask",
    "tau": "temperature",
    "top_probability": "mean top probability",
    "sample_flips": "groups in which a sample differs from the choice",
    "residual": "residual against the reference mask",
    "residual_spread": "spread of the advantage",
    "tracker": "tracker (mean over timestep bins)",
    "advantage": "advantage",
    "mask_lr": "learning rate of the masks",
    "lr": "learning rate of the weights",
    "mask_grad_norm": "gradient norm of the masks",
    "grad_norm": "gradient norm of the weights",
}


@dataclass(frozen=True)
class Look:
    """How curves are looked at.

    minutes: of running, one for each record, to draw over time instead of steps. smoothing: weight of the past
    in the moving average, 0 (as recorded) to below 1.
    """

    log: bool = False
    smoothing: float = SMOOTHING
    minutes: list[float] | None = None

    def weight(self, key: str) -> float:
        """The smoothing of one figure: those that are not noisy are drawn as recorded."""
        return self.smoothing if key in NOISY else 0.0


def curve(steps: Steps, key: str, labels: dict[str, str], view: str, look: Look | None = None) -> Figure:
    """One figure over the run, a trace a stage: raw as a shadow, smoothed on top.

    ``view`` names what is looked at: zoom is kept while it and the axes stay the same.
    """
    look, traces = look or Look(), []
    for stage, x, y in series(steps, key, look.minutes):
        traces += lines(x, y, labels.get(stage, stage), COLORS.get(stage, "#666666"), look.weight(key))
    return {"data": traces, "layout": curve_layout(key, view, look)}


def curve_layout(key: str, view: str, look: Look, where: str = "all stages") -> Figure:
    """The axes of a figure over the steps, or the time, of all stages or of one."""
    over = f"minutes of running, {where}" if look.minutes else f"training step, {where}"
    drawn = layout(over, LABELS.get(key, key), f"{view}/{key}/{look.log}/{over}")
    if look.log:
        drawn["yaxis"]["type"] = "log"
    return drawn


def series(steps: Steps, key: str, minutes: list[float] | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Stage, x and y of each stretch that recorded the figure; x goes on from stage to stage."""
    offset, begin = 0.0, 0
    for stretch in steps.stretches:
        x = minutes[begin : begin + len(stretch)] if minutes else offset + stretch.steps
        offset, begin = offset + stretch.steps[-1], begin + len(stretch)
        y = stretch.figures.get(key, np.array([]))
        there = np.flatnonzero(~np.isnan(y))
        if len(there):
            yield stretch.stage, np.asarray(x)[there], y[there]


def lines(x: np.ndarray, y: np.ndarray, name: str, color: str, smoothing: float) -> list[dict[str, Any]]:
    """One stage's trace: as recorded, or that as a shadow and the smoothed one on top."""
    keep = thinned(len(x))
    line = {"type": "scatter", "x": x[keep].tolist(), "mode": "lines", "name": name}
    if not smoothing or len(x) < 10:
        mode = "lines+markers" if len(x) < 30 else "lines"
        return [line | {"y": y[keep].tolist(), "mode": mode, "line": {"color": color, "width": 2}}]
    shadow = {"line": {"color": color, "width": 1}, "opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    smooth = smoothed(y, smoothing)[keep].tolist()
    return [line | {"y": y[keep].tolist()} | shadow, line | {"y": smooth, "line": {"color": color, "width": 2}}]


def thinned(count: int) -> np.ndarray:
    """Places of at most :data:`LARGEST_TRACE` of so many points: every so many-th, which a point more does not move,
    and the last."""
    places = np.arange(0, count, max(1, -(-count // (LARGEST_TRACE - 1))))
    return places if count == 0 or places[-1] == count - 1 else np.append(places, count - 1)


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` (2 or more) of these, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def running_minutes(times: list[float], starts: list[float]) -> list[float]:
    """Minutes since the start at each time: what lies between a session's last record and the next start is cut."""
    at = np.array(times, dtype=float)
    session = np.searchsorted(starts, at, side="right")
    cut, total = np.zeros(len(at)), 0.0
    for i in (0, *(np.flatnonzero(np.diff(session)) + 1)):
        began = starts[session[i] - 1] if session[i] else at[i]
        total += max(0.0, began - at[i - 1]) if i else began
        cut[i:] = total
    return ((at - cut) / 60).round(4).tolist()


def smoothed(values: np.ndarray, smoothing: float) -> np.ndarray:
    """Exponential moving average with debiasing (TensorBoard's)."""
    return pd.Series(values).ewm(alpha=1 - smoothing, adjust=True).mean().to_numpy()


def mask_pair(most_changed: float, view: str, narrow: bool = False) -> Figure:
    """One layer's kept and changed shares (``z`` is for whoever draws), one beside or above the other.

    Input channels across, output channels down; both are zoomed as one. most_changed: upper end of the colours.
    """
    near, far, whole = [0.0, 0.4], [0.57, 0.97], [0.0, 0.88]
    across = (whole, whole) if narrow else (near, far)
    down = ([0.56, 1.0], [0.0, 0.4]) if narrow else ([0.0, 1.0], [0.0, 1.0])
    traces, drawn = [], layout("input channel", "output channel", view) | {"height": 800 if narrow else 440}
    axes, drawn["annotations"] = {letter: drawn.pop(f"{letter}axis") for letter in "xy"}, []
    titles = (("Kept", 1.0, "Cividis"), ("Changed since the initial mask", max(most_changed, 0.01), "Viridis"))
    for number, (title, most, colors) in enumerate(titles, 1):
        index = "" if number == 1 else str(number)
        middle, height = sum(down[number - 1]) / 2, down[number - 1][1] - down[number - 1][0]
        bar = {"tickformat": ".0%", "x": across[number - 1][1] + 0.01, "y": middle, "len": height + 0.05}
        traces.append(
            {"type": "heatmap", "zmin": 0, "zmax": most, "colorscale": colors, "colorbar": bar | {"thickness": 14}}
            | {"xaxis": f"x{index}", "yaxis": f"y{index}", "name": title}
            | {"hovertemplate": f"output %{{y}}, input %{{x}}: %{{z:.1%}} {title.lower()}<extra></extra>"}
        )
        drawn[f"xaxis{index}"] = axes["x"] | {"domain": across[number - 1], "anchor": f"y{index}"}
        drawn[f"yaxis{index}"] = axes["y"] | {
            "domain": down[number - 1],
            "anchor": f"x{index}",
            "autorange": "reversed",
        }
        if index:
            drawn[f"xaxis{index}"] |= {"matches": "x"}
            drawn[f"yaxis{index}"] |= {"matches": "y", "title": {"text": "output channel" if narrow else ""}}
        place = {"xref": f"x{index} domain", "yref": f"y{index} domain", "x": 0, "y": 1, "yanchor": "bottom"}
        drawn["annotations"].append(place | {"text": title, "showarrow": False, "font": {"size": 15}})
    return {"data": traces, "layout": drawn}


def evolution_heatmap(
    steps: list[int], layers: list[str], values: np.ndarray, label: str, share: bool, view: str
) -> Figure:
    """All masked layers over the snapshots: one figure of each; ``share`` shows it in percent."""
    trace = {
        "type": "heatmap",
        "z": values.T.round(5).tolist(),
        "x": [str(s) for s in steps],
        "y": [short(layer) for layer in layers],
        "colorscale": "Viridis",
        "zmin": 0,
        "zmax": max(0.01, float(values.max())),
        "colorbar": {"tickformat": ".1%" if share else ".2f"},
        "hovertemplate": "%{y}<br>step %{x}<br>%{z:.2%}<extra></extra>"
        if share
        else "%{y}<br>step %{x}<br>%{z:.3f}<extra></extra>",
    }
    drawn = layout("mask step", "", view) | {"height": max(320, 15 * len(layers) + 90), "title": {"text": label}}
    drawn["xaxis"]["type"] = "category"
    drawn["yaxis"] |= {"autorange": "reversed", "dtick": 1, "tickfont": {"size": 9}}
    return {"data": [trace], "layout": drawn}


def compliance_heatmap(layers: list[dict[str, Any]], view: str) -> Figure:
    """Layers x figures: compliance, density and the share kept on each of the M positions.

    The colours of a position span :data:`UNEVEN` around an even share: else no imbalance would be seen. Positions have
    an axis of their own: plotly would write the words of two heatmaps on one axis over one another.
    """
    shown = [la for la in layers if la["compliance"] is not None]
    names = [f"{short(la['layer'])}  {la['pattern']}" for la in shown]
    shares = [[la["compliance"], la["density"]] for la in shown]
    balances = [la["position_balance"] for la in shown]
    widest = max(map(len, balances), default=0)
    missing = [[None] * (widest - len(balance)) for balance in balances]
    off = [[share * len(own) - 1 for share in own] + rest for own, rest in zip(balances, missing)]
    traces = [
        _cells(names, ["compliance", "density"], shares, shares)
        | {"zmin": 0, "zmax": 1, "colorscale": palettes.SHARES},
        _cells(names, [f"position {i}" for i in range(widest)], off, [o + r for o, r in zip(balances, missing)])
        | {"zmin": -UNEVEN, "zmax": UNEVEN, "colorscale": palettes.around(0.5), "xaxis": "x2"},
    ]
    drawn = layout("", "", view) | {"height": max(320, 18 * len(shown) + 90)}
    border = 2 / max(3, 2 + widest)
    drawn["xaxis2"] = drawn["xaxis"] | {"domain": [border, 1]}
    drawn["xaxis"] |= {"domain": [0, border]}
    drawn["yaxis"] |= {"autorange": "reversed", "dtick": 1, "tickfont": {"size": 9}}
    return {"data": traces, "layout": drawn}


def _cells(names: list[str], columns: list[str], values: list[list], shares: list[list]) -> dict[str, Any]:
    """A heatmap with a share written in each cell, in a colour that is read on every cell of a light scale."""
    return {
        "type": "heatmap",
        "z": values,
        "x": columns,
        "y": names,
        "text": [["" if share is None else f"{share:.0%}" for share in row] for row in shares],
        "texttemplate": "%{text}",
        "textfont": {"color": palettes.CELL_TEXT},
        "showscale": False,
        "hovertemplate": "%{y}<br>%{x}: %{text}<extra></extra>",
    }


def sensitivity_heatmap(layers: list[dict[str, Any]], view: str) -> Figure:
    """Layers x patterns: loss increase with that layer alone masked; a dot on the pattern chosen."""
    patterns = list(dict.fromkeys(p for la in layers for p in la["increase"]))
    names = [short(la["layer"]) for la in layers]
    rows = [[la["increase"].get(p) for p in patterns] for la in layers]
    # A single tender layer must not take all the colours: the top twentieth shares one.
    most = float(np.quantile([v for row in rows for v in row if v is not None], 0.95))
    heat = {
        "type": "heatmap",
        "z": rows,
        "x": patterns,
        "y": names,
        "zmin": 0,
        "zmax": max(most, 1e-6),
        "colorscale": "Cividis",
        "colorbar": {"title": {"text": "loss increase"}, "tickformat": ".4f"},
        "hovertemplate": "%{y}<br>%{x}: %{z:+.5f}<extra></extra>",
    }
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [la["chosen"] for la in layers],
        "y": names,
        "marker": {"color": "#D55E00", "size": 8, "line": {"color": "#ffffff", "width": 1.5}},
        "hovertemplate": "%{y}: %{x} chosen<extra></extra>",
    }
    drawn = layout("", "", view) | {"height": max(320, 18 * len(names) + 90), "showlegend": False}
    drawn["xaxis"]["type"] = "category"
    drawn["yaxis"] |= {"autorange": "reversed", "dtick": 1, "tickfont": {"size": 9}}
    return {"data": [heat, dots], "layout": drawn}


def bin_names(count: int, timesteps: int) -> list[str]:
    """``0-99``, ``100-199``... for the timestep bins, the cleanest first."""
    width = timesteps // count
    return [f"{b * width}-{(b + 1) * width - 1}" for b in range(count)]


def loss_by_bin(found: dict[str, Any], view: str) -> Figure:
    """Loss of each timestep bin, dense and under the initial mask."""
    names = bin_names(len(found["dense"]), found["timesteps"])
    series = (("dense", found["dense"], VARIANT_COLORS["dense"]), ("initial mask", found["m0"], "#D55E00"))
    traces = [
        {"type": "bar", "name": name, "x": names, "y": values, "marker": {"color": color}}
        for name, values, color in series
    ]
    drawn = layout("timesteps (0 is clean)", "noise-prediction error", view)
    drawn["xaxis"]["type"] = "category"
    drawn["yaxis"]["type"] = "log"
    return {"data": traces, "layout": drawn}


def tracker_by_bin(steps: Steps, timesteps: int, view: str) -> Figure:
    """The reinforce tracker of each timestep bin: below zero, samples beat the reference there."""
    stretch = next(stretch for stretch in steps.stretches if "tracker.0" in stretch.figures)
    bins = sum(name.startswith("tracker.") for name in stretch.figures)
    there = np.flatnonzero(~np.isnan(stretch.figures["tracker.0"]))
    keep = there[thinned(len(there))]
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": stretch.steps[keep].tolist(),
            "y": stretch.figures[f"tracker.{b}"][keep].tolist(),
            "line": {"color": color, "width": 1.5},
        }
        for b, (name, color) in enumerate(zip(bin_names(bins, timesteps), palettes.steps(bins)))
    ]
    return {"data": traces, "layout": layout("mask step", "tracker by timestep bin", f"{view}/tracker")}


def plain(value: Any) -> Any:
    """Foreign text as it is: plotly renders a few tags in labels, and a run's or layer's name is no markup."""
    if isinstance(value, str):
        return html.escape(value, quote=False)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def kept_sets_heatmap(layers: list[dict[str, Any]], n: int, m: int, view: str) -> Figure:
    """Layers x the sets of N kept positions of M (``1100``...): share of the layer's groups that keep each.

    The lightest colour is an even share; the others span :data:`UNEVEN` around it, or as much as there is.
    """
    columns = Pattern(n, m).kept_sets
    shares, even = [la["pattern_shares"] for la in layers], 1 / len(columns)
    span = max([UNEVEN * even, *(abs(share - even) for row in shares for share in row)])
    low, high = max(0.0, even - span), even + span
    trace = _cells([plain(short(la["layer"])) for la in layers], columns, shares, shares) | {
        "zmin": low,
        "zmax": high,
        "colorscale": palettes.around((even - low) / (high - low)),
        "showscale": True,
        "colorbar": {"tickformat": ".0%"},
        "hovertemplate": "%{y}<br>%{x}: %{z:.1%} of the groups<extra></extra>",
    }
    if len(columns) > 8:
        del trace["text"], trace["texttemplate"]  # no room for words
    drawn = layout(f"kept positions of {m}", "", view) | {"height": max(320, 18 * len(layers) + 90)}
    drawn["xaxis"]["type"] = "category"
    drawn["yaxis"] |= {"autorange": "reversed", "dtick": 1, "tickfont": {"size": 9}}
    return {"data": [trace], "layout": drawn}


def short(layer: str) -> str:
    """A layer's name in fewer letters: ``down.0.res.1.conv1``."""
    for long, brief in (("_blocks", ""), ("_block", ""), ("resnets", "res"), ("attentions", "attn"), ("samplers", "")):
        layer = layer.replace(long, brief)
    return layer


def layout(x: str, y: str, view: str) -> dict[str, Any]:
    """Axes without a frame on any background; zoom is kept while ``view`` stays the same."""
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True}
    return {
        "height": 320,
        "margin": {"l": 60, "r": 10, "t": 40, "b": 45},
        "legend": {"orientation": "h", "y": 1.15},
        "uirevision": view,
        "font": {"color": GREY, "family": FONT},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY},  # plotly would lay a grey box behind its buttons
        "xaxis": axis | {"title": {"text": x}},
        "yaxis": axis | {"title": {"text": y, "standoff": 12}},  # else long numbers reach into it
    }
