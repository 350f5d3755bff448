"""Pure functions from records to plotly figures. Colours are safe for colour-blind readers (Okabe-Ito)."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

COLORS = {"finetune": "#0072B2", "mask": "#D55E00", "recover": "#009E73"}
VARIANT_COLORS = {"dense": "#56B4E9", "structured": "#E69F00", "nm": "#009E73"}
LARGEST_TRACE = 1000
LABELS = {
    "loss": "training loss",
    "entropy": "entropy of a group (bits)",
    "flips": "groups that differ from the initial mask",
    "tau": "temperature",
    "residual": "residual against the initial mask",
    "tracker": "tracker (mean over timestep bins)",
    "lr": "learning rate of the weights",
}


def curve(records: list[dict[str, Any]], key: str, labels: dict[str, str], log: bool = False) -> go.Figure:
    """One figure over the run's steps, a trace a stage: raw as a shadow, smoothed on top."""
    figure, offset = go.Figure(), 0
    for stage in dict.fromkeys(r["stage"] for r in records):
        rows = [r for r in records if r["stage"] == stage]
        points = [(offset + r["step"], r[key]) for r in rows if key in r]
        offset += rows[-1]["step"]
        if not points:
            continue
        x, y = (np.array(v, dtype=float) for v in zip(*points))
        color = COLORS.get(stage, "#666666")
        keep = slice(None, None, max(1, len(x) // LARGEST_TRACE))
        raw = key == "loss" and len(x) > 10
        if raw:
            figure.add_scatter(
                x=x[keep], y=y[keep], line={"color": color, "width": 1}, opacity=0.3, showlegend=False, hoverinfo="skip"
            )
        shown = smoothed(y) if raw else y
        figure.add_scatter(x=x[keep], y=shown[keep], name=labels.get(stage, stage), line={"color": color, "width": 2})
    return _finish(figure, "training step, all stages", LABELS.get(key, key), "log" if log else "linear")


def smoothed(values: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """Exponential moving average with debiasing (TensorBoard's)."""
    total, out = 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        total = weight * total + (1 - weight) * value
        out[i] = total / (1 - weight ** (i + 1))
    return out


def mask_heatmap(values: np.ndarray, title: str, share: str) -> go.Figure:
    """One layer: input channels across, output channels down."""
    figure = go.Figure(
        go.Heatmap(z=values, zmin=0, zmax=1, colorscale="Cividis", colorbar={"title": share, "tickformat": ".0%"})
    )
    figure.update_yaxes(autorange="reversed")
    figure = _finish(figure, "input channel", "output channel")
    return figure.update_layout(title=title, height=420)


def evolution_heatmap(steps: list[int], layers: list[str], flips: np.ndarray) -> go.Figure:
    """All masked layers over the snapshots: share of groups that differ from the initial mask."""
    figure = go.Figure(
        go.Heatmap(
            z=flips.T,
            x=[str(s) for s in steps],
            y=layers,
            colorscale="Viridis",
            colorbar={"title": "flipped", "tickformat": ".0%"},
            hovertemplate="%{y}<br>step %{x}<br>%{z:.1%} flipped<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(autorange="reversed")
    return _finish(figure, "mask step", "").update_layout(height=max(320, 16 * len(layers)), margin={"l": 260})


def compliance_heatmap(layers: list[dict[str, Any]], m: int) -> go.Figure:
    """Layers x figures: compliance, density and the share kept on each of the M positions."""
    shown = [la for la in layers if la["compliance"] is not None]
    columns = ["compliance", "density", *(f"position {i}" for i in range(m))]
    rows = [[la["compliance"], la["density"], *(share * m / 2 for share in la["position_balance"])] for la in shown]
    text = [
        [f"{la['compliance']:.0%}", f"{la['density']:.0%}", *(f"{share:.0%}" for share in la["position_balance"])]
        for la in shown
    ]
    figure = go.Figure(
        go.Heatmap(
            z=rows, x=columns, y=[la["layer"] for la in shown], text=text, texttemplate="%{text}",
            zmin=0, zmax=1, colorscale="Cividis", showscale=False, hovertemplate="%{y}<br>%{x}: %{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return _finish(figure, "", "").update_layout(height=max(320, 20 * len(shown)), margin={"l": 260})


def bars(values: dict[str, float], title: str, spread: dict[str, tuple[float, float]] | None = None) -> go.Figure:
    """One bar a variant; ``spread`` gives the 10th and 90th percentile."""
    names = list(values)
    error = None
    if spread:
        error = {
            "type": "data",
            "symmetric": False,
            "array": [spread[n][1] - values[n] for n in names],
            "arrayminus": [values[n] - spread[n][0] for n in names],
        }
    colors = [VARIANT_COLORS.get(n.split(" ")[-1].replace("N:M", "nm"), "#666666") for n in names]
    text = [f"{values[n]:.3g}" for n in names]
    figure = go.Figure(go.Bar(x=names, y=[values[n] for n in names], marker_color=colors, text=text, error_y=error))
    figure.update_traces(textposition="inside", insidetextanchor="start", textfont={"color": "#111111"})
    return _finish(figure, "", "").update_layout(title=title, height=340, showlegend=False)


def _finish(figure: go.Figure, x: str, y: str, y_type: str | None = None) -> go.Figure:
    figure.update_layout(
        template="none",
        height=320,
        margin={"l": 70, "r": 20, "t": 40, "b": 50},
        legend={"orientation": "h", "y": 1.12},
        uirevision="keep",
        font={"color": "#808495"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(title=x, gridcolor="rgba(128,128,128,.2)", zeroline=False)
    figure.update_yaxes(title=y, gridcolor="rgba(128,128,128,.2)", zeroline=False, automargin=True)
    if y_type:
        figure.update_yaxes(type=y_type)
    return figure
