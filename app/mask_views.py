"""The Monitor's views of masks: how they evolve, how well they comply, and why each layer has its pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app import curve_views, lab, parts
from app.live_plot import live_plot
from app.mask_player import Frames, player
from prunedm import charts, snapshots
from prunedm.layer_order import flow, in_order
from prunedm.stage_recipes import Pattern, parse_pattern
from prunedm.store import MASK_LAYERS, Run, stage_step

MOST_FRAMES = 60  # snapshots that are drawn; a run has some twenty unless its recipe asks for more
FIGURES = {
    "flips": "groups that differ from the initial mask",
    "moved": "groups that changed since the last snapshot",
    "entropy": "entropy of the kept set (bits)",
    "top_probability": "mean top probability",
    "position_balance": "position balance (1 is even)",
    "compliance": "compliance of the masks",
}


def evolution(run: Run, every: float | None) -> None:
    """One layer's mask played through its snapshots, then all layers over time, then how the masks settle, which is
    drawn again every so many seconds; None: the run is not active."""
    layers, paths = snapshots.masked_layers(run), run.mask_snapshots()
    order = sorted(range(len(layers)), key=lambda i: flow(layers[i]["layer"]))
    if not layers or not paths:
        st.caption("Masks appear here when stage 2 begins.")
        return
    names = [layers[i]["layer"] for i in order]
    chosen = st.selectbox("Layer", names, key="mask_layer", persist_state="session")
    one_layer(run, layers[order[names.index(chosen)]], charts.spread(paths, MOST_FRAMES))
    st.subheader("All layers")
    all_layers(run, names, order, lab.lines(run, MASK_LAYERS))
    st.subheader("How the masks settle")
    curve_views.settling(run, every)


def all_layers(run: Run, names: list[str], order: list[int], records: list[dict[str, Any]]) -> None:
    """One figure of each layer over the snapshots. ``order``: where a layer of ``names`` stands in a record."""
    there = [key for key in FIGURES if any(key in record for record in records)]
    if not there:
        return
    key = st.selectbox(
        "Figure of each layer", there, format_func=FIGURES.get, key="mask_figure", persist_state="session"
    )
    recorded = [record for record in records if key in record]
    shown = charts.spread(recorded, MOST_FRAMES)
    steps = [record["step"] for record in shown]
    values = np.array([record[key] for record in shown])[:, order]
    share = key in ("flips", "moved", "compliance", "top_probability")
    live_plot(
        charts.evolution_heatmap(steps, names, values, FIGURES[key], share, f"{run.id}/{key}"),
        "mask-evolution",
        f"{FIGURES[key]}, by layer, at {len(steps)} snapshots; mean at the last one {values[-1].mean():.3g}",
    )
    if len(shown) < len(recorded):
        st.caption(f"{len(shown)} of {len(recorded)} snapshots, evenly spread.")
    with st.expander("As a table"):
        st.dataframe({"layer": names, **{f"step {s}": values[i] for i, s in enumerate(steps)}}, hide_index=True)


def one_layer(run: Run, layer: dict[str, Any], paths: list[Path]) -> None:
    """The layer's mask at each snapshot, and the one that the reader rests at as a table."""
    frames = Frames(
        [stage_step(path)[1] for path in paths],
        np.stack([kept(path, layer) for path in paths]),
        np.stack([changed(path, paths[0], layer) for path in paths]),
    )
    at = player(frames, layer["layer"], run.id)
    place = frames.steps.index(at)
    with st.expander(f"Step {at} as tables (rows: output channels, columns: input channels)"):
        st.caption("Share kept")
        st.dataframe(frames.kept[place].round(3))
        st.caption("Share changed since the initial mask")
        st.dataframe(frames.changed[place].round(3))


def kept(path: Path, layer: dict[str, Any]) -> np.ndarray:
    return _kept(str(path), lab.stamp(path), layer)


def changed(path: Path, first: Path, layer: dict[str, Any]) -> np.ndarray:
    return _changed(str(path), lab.stamp(path), str(first), lab.stamp(first), layer)


@st.cache_data(show_spinner=False, max_entries=8 * MOST_FRAMES)
def _kept(path: str, stamp: tuple[int, ...], layer: dict[str, Any]) -> np.ndarray:
    return snapshots.kept_share(_read(path, stamp), layer).astype(np.float32)


@st.cache_data(show_spinner=False, max_entries=8 * MOST_FRAMES)
def _changed(
    path: str, stamp: tuple[int, ...], first: str, first_stamp: tuple[int, ...], layer: dict[str, Any]
) -> np.ndarray:
    return snapshots.changed_share(_read(path, stamp), _read(first, first_stamp), layer).astype(np.float32)


@st.cache_resource(show_spinner=False, max_entries=4)
def _read(path: str, stamp: tuple[int, ...]) -> np.ndarray:
    """A whole snapshot; treat as read-only."""
    return snapshots.read(Path(path))


def compliance(run: Run) -> None:
    """Compliance and balance of each layer, the initial mask's cost, patterns by layer, and what is left dense."""
    layers = in_order(run.layers())
    if not layers:
        st.caption("Compliance appears here when stage 2 begins.")
        return
    patterns = sorted({layer["pattern"] for layer in layers if layer["eligible"]})
    st.caption(
        f"Pattern {', '.join(patterns)}. Compliance is the share of groups with at most N non-zero weights: while the "
        "masks learn, under the initial masks; after recovery, of the baked weights. Positions: the share of the kept "
        "weights on each of the M: white is an even share, blue less, orange more, in full a quarter off it."
    )
    live_plot(
        charts.compliance_heatmap(layers, run.id),
        "compliance",
        "Compliance, density and position balance of each masked layer",
    )
    with st.expander("All layers as a table"):
        keys = ("layer", "kind", "pattern", "groups", "compliance", "density", "position_balance", "tensor_core_ready")
        st.dataframe([{k: la[k] for k in keys} for la in layers], hide_index=True)
    kept_sets(run, layers)
    baseline(run)
    allocation(run)
    skipped = [layer for layer in layers if not layer["eligible"]]
    st.subheader(f"Layers left dense: {len(skipped)}")
    st.dataframe([{"layer": la["layer"], "why": la["reason"]} for la in skipped], hide_index=True)


def compliance_files(run: Run) -> tuple[Any, ...]:
    """What changes when there is something new to draw of compliance."""
    stamps = [lab.stamp(run.folder / name) for name in ("layers.json", "allocation.json")]
    return (*stamps, len(lab.events(run, "baseline")))


def kept_sets(run: Run, layers: list[dict[str, Any]]) -> None:
    """Which N of M positions the groups keep, by layer: a heatmap and a table for each pattern."""
    counted = [la for la in layers if la.get("pattern_shares")]
    for pattern in dict.fromkeys(la["pattern"] for la in counted):
        own = [la for la in counted if la["pattern"] == pattern]
        n, m = parse_pattern(pattern) or (1, 2)
        columns = Pattern(n, m).kept_sets
        if any(len(la["pattern_shares"]) != len(columns) for la in own):
            raise ValueError(f"layers.json is damaged: the shares of the kept sets do not fit {pattern}")
        st.subheader(f"Which {n} of {m} positions are kept")
        even = f"{1 / len(columns):.1%} of a layer's groups for each of {len(columns)} sets"
        st.caption(f"1 is kept; even is {even}: white. Blue is less, orange more.")
        alt = f"Share of the groups that keep each of {len(columns)} sets of {n} of {m} positions, in {len(own)} layers"
        live_plot(charts.kept_sets_heatmap(own, n, m, f"{run.id}/sets/{pattern}"), f"kept-sets-{pattern}", alt)
        with st.expander("As a table"):
            rows = [{"layer": la["layer"], **dict(zip(columns, la["pattern_shares"]))} for la in own]
            st.dataframe(rows, hide_index=True)


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
    layers = in_order(found["layers"])
    st.subheader("Patterns chosen for the budget")
    st.caption(
        f"Density asked for {found['density']:.1%}, kept {found['kept']:.1%}. The figures are the loss increase with "
        f"that layer alone masked ({found['images']} held-out images); a dot marks the choice. Their sum predicts "
        f"{found['predicted_increase']:+.5f}; layers are not independent, so the real increase differs."
    )
    live_plot(
        charts.sensitivity_heatmap(layers, run.id),
        "sensitivity",
        "Loss increase of each layer under each pattern, and the pattern chosen",
    )
    with st.expander("As a table"):
        rows = [
            {"layer": la["layer"], "weights": la["weights"], "chosen": la["chosen"], **la["increase"]} for la in layers
        ]
        st.dataframe(rows, hide_index=True)
