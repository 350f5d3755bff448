"""The Monitor's views of masks: how they evolve, how well they comply, and why each layer has its pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app import lab, parts
from app.live_plot import live_plot
from prunedm import charts, snapshots
from prunedm.store import MASK_LAYERS, Run, stage_step

FIGURES = {
    "flips": "groups that differ from the initial mask",
    "moved": "groups that changed since the last snapshot",
    "entropy": "entropy of the kept set (bits)",
    "top_probability": "mean top probability",
    "position_balance": "position balance (1 is even)",
    "compliance": "compliance of the masks",
}


def evolution(run: Run) -> None:
    """All layers over time, then one layer at one snapshot."""
    layers, paths = snapshots.masked_layers(run), run.mask_snapshots()
    if not layers or not paths:
        st.caption("Masks appear here when stage 2 begins.")
        return
    names = [layer["layer"] for layer in layers]
    records = lab.lines(run, MASK_LAYERS)
    all_layers(run, names, records)
    chosen = st.selectbox("Layer", names, key="mask_layer")
    steps = [stage_step(path)[1] for path in paths]
    at = parts.step_slider("Snapshot at step", steps, f"mask_step {run.id}")
    layer, number = layers[names.index(chosen)], steps.index(at)
    one_layer(run, layer, at, read(paths[number]), read(paths[0]))


def all_layers(run: Run, names: list[str], records: list[dict[str, Any]]) -> None:
    there = [key for key in FIGURES if any(key in record for record in records)]
    if not there:
        return
    key = st.selectbox("Figure of each layer", there, format_func=FIGURES.get, key="mask_figure")
    shown = [record for record in records if key in record]
    steps = [record["step"] for record in shown]
    values = np.array([record[key] for record in shown])
    share = key in ("flips", "moved", "compliance", "top_probability")
    live_plot(
        charts.evolution_heatmap(steps, names, values, FIGURES[key], share, f"{run.id}/{key}"),
        "mask-evolution",
        f"{FIGURES[key]}, by layer, at {len(steps)} snapshots; mean at the last one {values[-1].mean():.3g}",
    )
    with st.expander("As a table"):
        st.dataframe({"layer": names, **{f"step {s}": values[i] for i, s in enumerate(steps)}}, hide_index=True)


def one_layer(run: Run, layer: dict[str, Any], at: int, mask: np.ndarray, first: np.ndarray) -> None:
    """Two heatmaps of one layer: what is kept, and what has changed since the initial mask."""
    name = layer["layer"]
    kept, changed = snapshots.kept_share(mask, layer), snapshots.changed_share(mask, first, layer)
    left, right = st.columns(2)
    with left:
        figure = charts.mask_heatmap(kept, f"Kept at step {at}", "kept", f"{run.id}/{name}/kept")
        live_plot(figure, "mask-kept", f"Share kept in {name} at step {at}, mean {kept.mean():.1%}")
    with right:
        figure = charts.mask_heatmap(changed, "Changed since the initial mask", "changed", f"{run.id}/{name}/changed")
        live_plot(figure, "mask-changed", f"Share of positions of {name} changed, mean {changed.mean():.1%}")
    with st.expander("Kept share as a table (rows: output channels, columns: input channels)"):
        st.dataframe(kept.round(3))


def read(path: Path) -> np.ndarray:
    return _read(str(path), path.stat().st_mtime_ns)


@st.cache_data(show_spinner=False, max_entries=8)
def _read(path: str, stamp: int) -> np.ndarray:
    return snapshots.read(Path(path))


def compliance(run: Run) -> None:
    """Compliance and balance of each layer, the initial mask's cost, patterns by layer, and what is left dense."""
    layers = run.layers()
    if not layers:
        st.caption("Compliance appears here when stage 2 begins.")
        return
    patterns = sorted({layer["pattern"] for layer in layers if layer["eligible"]})
    st.caption(
        f"Pattern {', '.join(patterns)}. Compliance is the share of groups with at most N non-zero weights: while the "
        "masks learn, under the initial masks; after recovery, of the baked weights."
    )
    live_plot(
        charts.compliance_heatmap(layers, run.id),
        "compliance",
        "Compliance, density and position balance of each masked layer",
    )
    baseline(run)
    allocation(run)
    skipped = [layer for layer in layers if not layer["eligible"]]
    st.subheader(f"Layers left dense: {len(skipped)}")
    st.dataframe([{"layer": la["layer"], "why": la["reason"]} for la in skipped], hide_index=True)
    with st.expander("All layers as a table"):
        keys = ("layer", "kind", "pattern", "groups", "compliance", "density", "position_balance", "tensor_core_ready")
        st.dataframe([{k: la[k] for k in keys} for la in layers], hide_index=True)


def baseline(run: Run) -> None:
    """What the initial mask costs, timestep bin by timestep bin."""
    found = lab.events(run, "baseline")
    if not found:
        return
    last = found[-1]
    st.subheader("What the initial mask costs")
    kind = Path(last["initial"]).name
    st.caption(
        f"Noise-prediction error before any learning, {last['images']} held-out images: dense "
        f"{last['dense_mean']:.5f}, under the initial mask ({parts.plain(kind)}) {last['m0_mean']:.5f}."
    )
    names, pairs = charts.bin_names(len(last["dense"]), last["timesteps"]), zip(last["dense"], last["m0"])
    live_plot(charts.loss_by_bin(last, run.id), "baseline", "Loss by timestep bin, dense and under the initial mask")
    with st.expander("As a table"):
        rows = [{"timesteps": name, "dense": dense, "initial mask": m0} for name, (dense, m0) in zip(names, pairs)]
        st.dataframe(rows, hide_index=True)


def allocation(run: Run) -> None:
    """The budgeted choice of patterns and the sensitivities that it rests on."""
    found = run.allocation()
    if not found:
        return
    st.subheader("Patterns chosen for the budget")
    st.caption(
        f"Density asked for {found['density']:.1%}, kept {found['kept']:.1%}. The figures are the loss increase with "
        f"that layer alone masked ({found['images']} held-out images); a dot marks the choice. Their sum predicts "
        f"{found['predicted_increase']:+.5f}; layers are not independent, so the real increase differs."
    )
    live_plot(
        charts.sensitivity_heatmap(found["layers"], run.id),
        "sensitivity",
        "Loss increase of each layer under each pattern, and the pattern chosen",
    )
    with st.expander("As a table"):
        rows = [
            {"layer": la["layer"], "weights": la["weights"], "chosen": la["chosen"], **la["increase"]}
            for la in found["layers"]
        ]
        st.dataframe(rows, hide_index=True)
