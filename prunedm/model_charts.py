"""Figures of models side by side, as plain dictionaries like those of charts.py: bars, timestep bins, Pareto fronts."""

from __future__ import annotations

from dataclasses import dataclass

from .charts import GREY, VARIANT_COLORS, Figure, Look, bin_names, curve_layout, layout, lines, plain, series
from .palettes import CELL_TEXT
from .steps import Steps

RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#808495")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star")
SHAPES = ("", "/", "x", ".", "+")
HATCHING = {"fillmode": "overlay", "fgcolor": "#1a1f2b", "fgopacity": 0.6, "solidity": 0.2}


def bars(
    values: dict[str, float], variants: list[str], title: str, spread: list[tuple[float, float]] | None = None
) -> Figure:
    """One bar a variant; ``spread`` gives the 10th and 90th percentile of each."""
    heights = list(values.values())
    trace = {
        "type": "bar",
        "x": list(values),
        "y": heights,
        "marker": {"color": [VARIANT_COLORS.get(v, "#666666") for v in variants]},
        "text": [f"{value:.3g}" for value in heights],
        "textposition": "inside",
        "insidetextanchor": "start",
        "textangle": 0,
        "textfont": {"color": CELL_TEXT},
    }
    if spread:
        above = [high - h for h, (_, high) in zip(heights, spread)]
        below = [h - low for h, (low, _) in zip(heights, spread)]
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": GREY}
    return {
        "data": [trace],
        "layout": layout("", "", title) | {"title": {"text": title}, "height": 340, "showlegend": False},
    }


@dataclass
class Model:
    """How a model is told from others in a chart: colour by its variant; line, symbol and hatching by its run."""

    name: str
    variant: str | None = None
    run: int = 0

    @property
    def color(self) -> str:
        return VARIANT_COLORS.get(self.variant or "", "#CC79A7")

    def of(self, choices: tuple[str, ...]) -> str:
        return choices[self.run % len(choices)]


def model_bins(models: list[Model], bins: list[list[float | None]], timesteps: int, view: str) -> Figure:
    """Noise-prediction error of each timestep bin, a line a model."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(model.name),
            "x": bin_names(len(values), timesteps),
            "y": values,
            "line": {"color": model.color, "width": 2, "dash": model.of(DASHES)},
            "marker": {"symbol": model.of(SYMBOLS), "size": 7},
        }
        for model, values in zip(models, bins)
    ]
    drawn = layout("timesteps (0 is clean)", "noise-prediction error", view)
    drawn["xaxis"]["type"] = "category"
    drawn["yaxis"] |= {"type": "log", "exponentformat": "power"}
    return {"data": traces, "layout": drawn}


def grouped_bars(
    models: list[Model],
    columns: list[str] | list[tuple[str, str]],
    values: list[list[float | None]],
    label: str,
    view: str,
    spread: list[list[tuple[float, float] | None]] | None = None,
) -> Figure:
    """A bar for each column and model; ``spread`` gives each bar's 10th and 90th percentile.

    Columns that are pairs stand in groups named by the first of the two.
    """
    traces, grouped = [], isinstance(columns[0], tuple)
    for i, (model, heights) in enumerate(zip(models, values)):
        trace = {
            "type": "bar",
            "name": plain(model.name),
            "x": plain(list(zip(*columns)) if grouped else columns),
            "y": heights,
            "marker": {"color": model.color, "pattern": HATCHING | {"shape": model.of(SHAPES)}},
        }
        if spread:
            known = [(*(found or (h, h)), h) if h is not None else (0, 0, 0) for found, h in zip(spread[i], heights)]
            above, below = [high - h for _, high, h in known], [h - low for low, _, h in known]
            trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": GREY}
        traces.append(trace)
    gap = {1: 0.6, 2: 0.4}.get(len(columns), 0.2)
    drawn = layout("", label, view) | {"barmode": "group", "bargap": gap, "showlegend": True}
    drawn["xaxis"] |= {"type": "multicategory" if grouped else "category", "dividercolor": GREY}
    drawn["yaxis"]["rangemode"] = "tozero"
    return {"data": traces, "layout": drawn}


def pareto(
    models: list[Model], points: list[tuple[float, float]], on_front: list[bool], labels: tuple[str, str], view: str
) -> Figure:
    """Cost across, quality up (both better when small); full markers are on the front, which a line joins."""
    xs, ys = zip(*sorted(point for point, is_on in zip(points, on_front) if is_on))
    line = {"type": "scatter", "mode": "lines", "x": list(xs), "y": list(ys)}
    traces = [line | {"line": {"color": GREY, "width": 1.5, "dash": "dot"}, "hoverinfo": "skip", "showlegend": False}]
    for i, (model, (x, y)) in enumerate(zip(models, points)):
        symbol = model.of(SYMBOLS) + ("" if on_front[i] else "-open")
        trace = {"type": "scatter", "mode": "markers+text", "x": [x], "y": [y], "text": [plain(model.name)]}
        trace["marker"] = {"color": model.color, "size": 12, "symbol": symbol, "line": {"width": 2}}
        told = "%{text}<br>%{x:,.6~g}<br>%{y:,.6~g}<br>" + ("on the front" if on_front[i] else "beaten by another")
        trace |= {"textposition": _place(points, i), "cliponaxis": False, "hovertemplate": told + "<extra></extra>"}
        traces.append(trace)
    drawn = layout(*labels, view) | {"showlegend": False, "height": 340}
    for name, values in zip(("xaxis", "yaxis"), zip(*points)):
        room = (max(values) - min(values)) * 0.15 or abs(values[0]) * 0.1 or 1
        drawn[name] |= {"range": [min(values) - room, max(values) + room], "nticks": 6}
    return {"data": traces, "layout": drawn}


def _place(points: list[tuple[float, float]], i: int) -> str:
    """Where a point's name stands: off the falling line of the front, or on the side away from a point close by.

    The line goes up to the left and down to the right, so left points have room above and right points beneath.
    """
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*points))
    x, y = points[i]
    is_left = x <= (left + right) / 2

    def in_the_way(j: int) -> bool:
        near = abs(points[j][0] - x) <= 0.3 * (right - left) and abs(points[j][1] - y) <= 0.12 * (high - low)
        return near and ((points[j][1], -j) > (y, -i)) == is_left

    is_above = is_left != any(in_the_way(j) for j in range(len(points)) if j != i)
    return f"{'top' if is_above else 'bottom'} {'right' if is_left else 'left'}"


def run_curves(runs: list[tuple[str, Steps, Look]], key: str, view: str, where: str = "all stages") -> Figure:
    """One figure of several runs, a colour and a dash a run: raw as a shadow, smoothed on top, a break a stage."""
    traces = []
    for number, (name, steps, look) in enumerate(runs):
        named = False
        for stage, x, y in series(steps, key, look.minutes):
            for line in lines(x, y, plain(name), RUN_COLORS[number % len(RUN_COLORS)], look.weight(key)):
                if line.get("showlegend", True):  # not the shadow
                    line |= {"showlegend": not named, "line": line["line"] | {"dash": DASHES[number % len(DASHES)]}}
                    line |= {
                        "hovertemplate": f"{plain(name)}, {plain(stage)}<br>%{{x:,.6~g}}: %{{y:.5g}}<extra></extra>"
                    }
                    named = True
                traces.append(line | {"legendgroup": str(number)})
    return {"data": traces, "layout": curve_layout(key, view, runs[0][2], where)}
