"""The charts of a sweep, as plain figures (charts.py), and its objectives in words."""

from __future__ import annotations

import itertools
import math
from typing import Any

from app.sweeps import Seen
from prunedm import charts
from prunedm.charts import GREY, LARGEST_TRACE, Figure
from prunedm.sweep_ranges import Range
from prunedm.sweep_trials import short

LABELS = {
    "validation_loss": "validation loss",
    "fid": "Frechet distance",
    "bytes": "packed bytes (fp16)",
    "macs": "MACs an image",
    "latency": "latency of a UNet call, ms",
    "parameters": "non-zero parameters",
}
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe-Ito
MOST_NAMED = 12  # points of the front that carry their number
UNREAD = "not read"


def label(seen: Seen, objective: str) -> str:
    """An objective in words, with what it was measured by where the trials say it."""
    figures = next((row["figures"] for row in seen.rows if row["figures"]), {})
    if objective == "fid" and figures.get("fid_extractor"):
        return f"{figures['fid_extractor']} ({figures.get('fid_images')} images)"
    if objective == "latency" and figures.get("device"):
        return f"{LABELS[objective]} ({figures['device']})"
    return LABELS[objective]


def layout(x: str, y: str, view: str, height: int = 360) -> dict[str, Any]:
    """The axes of all charts, with few ticks."""
    found = charts.layout(x, y, view) | {"height": height}
    for axis in ("xaxis", "yaxis"):
        found[axis] = found[axis] | {"nticks": 6}
    return found


def told(row: dict[str, Any]) -> str:
    """A trial's values for its point: plotly renders a few tags, and a value is no markup."""
    lines = [f"{key} {short(value)}" for key, value in row["params"].items()]
    return "<br>".join([f"trial {row['number']}", *(charts.plain(line) for line in lines)])


def pareto(seen: Seen, names: list[str]) -> Figure:
    """Cost across, quality up, both better when small; full circles are on the front, which a line joins."""
    quality, cost = names
    on_front = set(seen.front)
    rows = sorted(seen.complete(), key=lambda row: (row["objectives"][cost], row["objectives"][quality]))
    kept = charts.spread([row for row in rows if row["number"] in on_front], LARGEST_TRACE)
    beaten = charts.spread([row for row in rows if row["number"] not in on_front], LARGEST_TRACE)
    groups = (
        ("beaten by another", beaten, "markers", {"color": GREY, "symbol": "circle-open"}),
        ("on the front", kept, "lines+markers+text", {"color": BLUE, "symbol": "circle"}),
    )
    traces = [
        {
            "type": "scatter",
            "mode": mode,
            "name": name,
            "x": [row["objectives"][cost] for row in group],
            "y": [row["objectives"][quality] for row in group],
            "text": [str(row["number"]) if len(kept) <= MOST_NAMED else "" for row in group],
            "textposition": "top right",
            "customdata": [told(row) for row in group],
            "marker": marker | {"size": 10, "line": {"width": 2}},
            "line": {"color": GREY, "width": 1.5, "dash": "dot"},
            "hovertemplate": "%{customdata}<br>%{x:,.5~g}<br>%{y:,.5~g}<extra>" + name + "</extra>",
        }
        for name, group, mode, marker in groups
    ]
    drawn = layout(label(seen, cost), label(seen, quality), seen.name)
    for axis, name in (("xaxis", cost), ("yaxis", quality)):
        values = {row["objectives"][name] for row in rows}
        if len(values) == 1:  # plotly would show one unit to each side
            drawn[axis]["range"] = [0.9 * min(values), 1.1 * max(values)]
    return {"data": traces, "layout": drawn}


def best_so_far(seen: Seen, name: str) -> Figure:
    """One objective over the trials, and the smallest of those up to each."""
    every = seen.complete()
    lowest = list(itertools.accumulate((row["objectives"][name] for row in every), min))
    rows, lowest = charts.spread(every, LARGEST_TRACE), charts.spread(lowest, LARGEST_TRACE)
    numbers, values = [row["number"] for row in rows], [row["objectives"][name] for row in rows]
    points = {"type": "scatter", "mode": "markers", "name": "trial", "x": numbers, "y": values}
    points |= {"marker": {"color": GREY, "symbol": "circle-open", "size": 9, "line": {"width": 2}}}
    points |= {"customdata": [told(row) for row in rows], "hovertemplate": "%{customdata}<br>%{y:.5g}<extra></extra>"}
    line = {"type": "scatter", "mode": "lines", "name": "best so far", "x": numbers, "y": lowest}
    line |= {"line": {"color": BLUE, "width": 2, "shape": "hv"}}
    return {"data": [points, line], "layout": layout("trial", label(seen, name), seen.name)}


def parallel(seen: Seen) -> Figure:
    """A line a trial across its values and its objectives; coloured by the first objective."""
    names = list(seen.spec.objectives.figures)
    rows = charts.spread(sorted(seen.complete(), key=lambda row: row["objectives"][names[0]]), LARGEST_TRACE)
    heads = _heads(list(seen.spec.ranges))
    axes = [
        {"label": charts.plain(heads[key])} | _axis([row["params"].get(key, UNREAD) for row in rows], wanted)
        for key, wanted in seen.spec.ranges.items()
    ]
    axes += [
        {"label": name.replace("_", " ")} | _numbers([row["objectives"][name] for row in rows], False) for name in names
    ]
    trace = {
        "type": "parcoords",
        "dimensions": axes,
        "line": {"color": axes[-len(names)]["values"], "colorscale": "Cividis", "reversescale": True},
        "labelangle": -18,
        "labelfont": {"size": 11},
        "tickfont": {"size": 10},
        "rangefont": {"size": 1, "color": "rgba(0,0,0,0)"},  # the ends are ticks
    }
    drawn = layout("", "", f"{seen.name}/parallel", 380) | {"margin": {"l": 50, "r": 30, "t": 70, "b": 20}}
    return {"data": [trace], "layout": drawn}


def _heads(keys: list[str]) -> dict[str, str]:
    """Fields by their last word where that is enough."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: word if list(last.values()).count(word) == 1 else key for key, word in last.items()}


def _axis(values: list[Any], wanted: Range) -> dict[str, Any]:
    """One field: numbers as they are or by their logarithm, all else by its place in a list."""
    if wanted.values is None:
        return _numbers(values, wanted.log)
    words = sorted(set(map(short, values)), key=_by_size)
    return {
        "values": [words.index(short(value)) for value in values],
        "range": [0, max(1, len(words) - 1)],
        "tickvals": list(range(len(words))),
        "ticktext": charts.plain(words),
    }


def _numbers(values: list[Any], log: bool) -> dict[str, Any]:
    """An axis of numbers, with a place beneath for the trials that did not read the field."""
    known = [math.log10(v) if log else v for v in values if v != UNREAD] or [0]
    low, high = min(known), max(known)
    size = (high - low) or abs(high) or 1
    ticks = [low + size * i / 4 for i in range(5)] if high > low else [low]
    words = [short(float(f"{10**tick if log else tick:.4g}")) for tick in ticks]
    beneath = low - size / 4
    if UNREAD in values:
        ticks, words = [beneath, *ticks], [UNREAD, *words]
    places = [beneath if v == UNREAD else math.log10(v) if log else v for v in values]
    return {"values": places, "range": [ticks[0], max(high, ticks[0] + size)], "tickvals": ticks, "ticktext": words}


def _by_size(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def bars(shares: dict[str, float], view: str) -> Figure:
    """How much each field decides, the largest on top."""
    names = list(shares)[::-1]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [shares[name] for name in names],
        "y": charts.plain(names),
        "text": [f"{shares[name]:.0%}" for name in names],
        "textposition": "auto",
        "marker": {"color": ORANGE},
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }
    drawn = layout("share", "", view, max(180, 34 * len(names) + 100)) | {"showlegend": False}
    drawn["xaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    return {"data": [trace], "layout": drawn}
