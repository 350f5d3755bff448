"""Monitor: one run as it happens. The page reads the run folder and nothing else."""

import numpy as np
import streamlit as st

from app import charts, lab, parts
from app.live_plot import live_plot
from prunedm import snapshots
from prunedm.records import ACTIVE, RESUMABLE, STAGE_LABELS

EVERY_PROGRESS, EVERY_CURVES, EVERY_MASKS, EVERY_SAMPLES = 1.0, 2.0, 5.0, 2.0


@st.dialog("Stop this run?")
def confirm_stop(card: lab.Card) -> None:
    st.write("It stops after the step at hand and keeps a checkpoint; Resume goes on from there.")
    if st.button("Stop", type="primary"):
        lab.jobs().stop(card.run)
        st.rerun()


def header(run, live: bool) -> None:
    @st.fragment(run_every=EVERY_PROGRESS if live else None)
    def show() -> None:
        card = lab.card(run)
        if card.problem:
            st.error(card.problem)
            return
        if live and card.status not in ACTIVE:
            st.rerun()
        chip, bar, actions = st.columns([1, 5, 2], vertical_alignment="center")
        with chip:
            parts.state_chip(card.status)
        with bar:
            show_progress(card)
        with actions:
            show_actions(card)

    show()


def show_progress(card: lab.Card) -> None:
    place = lab.jobs().position(card.run.id)
    if card.status == "done":
        st.progress(1.0, text=f"Done in {parts.duration(card.state.seconds)}")
    elif place is not None:
        st.progress(0.0, text=f"Number {place} in the queue")
    else:
        parts.progress(card.state)
    done = len(card.state.stages_done)
    st.caption(f"{done} of {len(STAGE_LABELS)} stages done · {parts.duration(card.state.seconds)} of running")


def show_actions(card: lab.Card) -> None:
    if card.status in ACTIVE:
        if st.button("Stop", width="stretch", disabled=card.status == "stopping"):
            confirm_stop(card)
    elif card.status in RESUMABLE:
        if st.button("Resume", type="primary", width="stretch"):
            lab.jobs().resume(card.run)
            st.rerun()
    else:
        st.page_link(lab.ROOT / "pages" / "compare.py", label="Compare", query_params={"runs": card.run.id})


def curves(run, live: bool) -> None:
    log = st.toggle("Logarithmic loss", key="log_loss")

    @st.fragment(run_every=EVERY_CURVES if live else None)
    def show() -> None:
        records = lab.metrics(run)
        if not records:
            st.caption("Waiting for the first training step…")
            return
        live_plot(charts.curve(records, "loss", STAGE_LABELS, log), "curve-loss", "Training loss over the steps of each stage")
        keys = [k for k in ("entropy", "flips", "tau", "residual", "tracker", "lr") if any(k in r for r in records)]
        for left, right in zip(keys[::2], [*keys[1::2], None]):
            for column, name in zip(st.columns(2), (left, right)):
                if name:
                    with column:
                        live_plot(
                            charts.curve(records, name, STAGE_LABELS), f"curve-{name}", f"{charts.LABELS[name]} over the steps"
                        )

    show()


def mask_evolution(run, live: bool) -> None:
    layers = snapshots.masked_layers(run)
    paths = run.mask_snapshots()
    if not layers or not paths:
        st.caption("Masks appear here when stage 2 begins.")
        return
    masks = [read_mask(str(path), path.stat().st_mtime_ns) for path in paths]
    steps = [int(path.stem.rpartition("-")[2]) for path in paths]
    names = [layer["layer"] for layer in layers]
    flips = np.array([snapshots.flips_by_layer(mask, masks[0], layers) for mask in masks])
    live_plot(
        charts.evolution_heatmap(steps, names, flips),
        "mask-evolution",
        f"Share of each layer's groups that differ from the initial mask, at {len(steps)} snapshots; "
        f"mean at the last one {flips[-1].mean():.1%}",
    )
    chosen = st.selectbox("Layer", names, key="mask_layer")
    layer = layers[names.index(chosen)]
    at = st.select_slider("Snapshot at step", steps, value=steps[-1], key=f"mask_step-{len(steps)}") if len(steps) > 1 else steps[0]
    mask = masks[steps.index(at)]
    left, right = st.columns(2)
    with left:
        kept = snapshots.kept_share(mask, layer)
        live_plot(charts.mask_heatmap(kept, f"Kept at step {at}", "kept"), "mask-kept", f"Share kept in {chosen} at step {at}")
    with right:
        changed = snapshots.changed_share(mask, masks[0], layer)
        live_plot(
            charts.mask_heatmap(changed, "Changed since the initial mask", "changed"),
            "mask-changed",
            f"Share of positions of {chosen} changed since the initial mask, mean {changed.mean():.1%}",
        )
    with st.expander("As a table"):
        st.dataframe({"layer": names, **{f"step {s}": flips[i] for i, s in enumerate(steps)}}, hide_index=True)


@st.cache_data(show_spinner=False, max_entries=128)
def read_mask(path: str, stamp: int) -> np.ndarray:
    from pathlib import Path

    return snapshots.read(Path(path))


def compliance(run) -> None:
    layers = run.layers()
    if not layers:
        st.caption("Compliance appears here when stage 2 begins.")
        return
    recipe = run.recipe()
    st.caption(
        f"Pattern {recipe.mask.n}:{recipe.mask.m}. Compliance is the share of groups with at most "
        f"{recipe.mask.n} non-zero weights; before the masks are baked in, the weights are still dense."
    )
    live_plot(
        charts.compliance_heatmap(layers, recipe.mask.m),
        "compliance",
        "Compliance, density and position balance of each masked layer",
    )
    skipped = [layer for layer in layers if not layer["eligible"]]
    st.subheader(f"Layers left dense: {len(skipped)}")
    st.dataframe([{"layer": la["layer"], "why": la["reason"]} for la in skipped], hide_index=True)
    with st.expander("All layers as a table"):
        keys = ("layer", "kind", "eligible", "groups", "compliance", "density", "tensor_core_ready")
        st.dataframe([{k: la[k] for k in keys} for la in layers], hide_index=True)


def samples(run) -> None:
    paths = run.samples()
    if not paths:
        st.caption("The first samples appear in a few seconds.")
        return
    labels = {p.stem: p for p in paths}
    chosen = st.select_slider("Time", list(labels), value=list(labels)[-1], key=f"samples-{len(paths)}") if len(paths) > 1 else paths[0].stem
    st.caption("The same 16 seeds every time, 10 DDIM steps: a quick look, not the evaluation.")
    parts.sheet(labels[chosen], alt=f"16 samples at {chosen}", factor=3)


st.title("Monitor")
all_cards = lab.cards()
if not all_cards:
    parts.empty("No runs yet.", "home", "Run the demo")
    st.stop()
card = parts.choose_run(all_cards, "run")
if card.problem:
    st.error(f"This run cannot be read: {card.problem}")
    st.stop()
is_live = card.status in ACTIVE
header(card.run, is_live)
if card.status == "failed":
    parts.failure(card)
tabs = st.tabs(["Curves", "Masks", "Compliance", "Samples", "Log", "Recipe"])
with tabs[0]:
    curves(card.run, is_live)
with tabs[1]:
    st.fragment(mask_evolution, run_every=EVERY_MASKS if is_live else None)(card.run, is_live)
with tabs[2]:
    st.fragment(compliance, run_every=EVERY_MASKS if is_live else None)(card.run)
with tabs[3]:
    st.fragment(samples, run_every=EVERY_SAMPLES if is_live else None)(card.run)
with tabs[4]:
    if card.run.log_path.exists():
        st.code(card.run.log_path.read_text(encoding="utf-8", errors="replace")[-20000:], language=None)
with tabs[5]:
    st.code(card.recipe.to_yaml(), language="yaml")
