"""Monitor: one run as it happens. The page reads the run folder and nothing else."""

from pathlib import Path

import numpy as np
import streamlit as st

from app import charts, lab, parts
from app.live_plot import live_plot
from prunedm import snapshots
from prunedm.records import RESUMABLE, STAGE_LABELS
from prunedm.store import Run, stage_step

EVERY_PROGRESS, EVERY_CURVES, EVERY_MASKS, EVERY_SAMPLES = 1.0, 2.0, 5.0, 2.0
CURVES = ("entropy", "flips", "tau", "residual", "tracker", "lr")


def header(run: Run, live: bool) -> None:
    card = lab.card(run)
    if live and not card.active:
        st.rerun()
    if card.problem:
        st.error(parts.plain(card.problem))
        return
    chip, bar, actions = st.columns([1, 5, 2], vertical_alignment="center")
    with chip:
        parts.state_chip(card.status)
    with bar:
        show_progress(card)
    with actions, parts.said():
        show_actions(card)


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
    if card.active:
        with st.popover("Stop", width="stretch", disabled=card.status == "stopping"):
            st.write("The run stops after the step at hand and keeps a checkpoint; Resume goes on from there.")
            if st.button("Stop this run", type="primary"):
                lab.jobs().stop(card.run)
                st.rerun()
    elif card.status in RESUMABLE:
        if st.button("Resume", type="primary", width="stretch"):
            lab.jobs().resume(card.run)
            st.rerun()
    else:
        st.page_link(lab.ROOT / "pages" / "compare.py", label="Compare", query_params={"runs": card.run.id})


def curves(run: Run) -> None:
    log = st.toggle("Logarithmic loss", key="log_loss")
    records = lab.metrics(run)
    if not records:
        st.caption("Waiting for the first training step…")
        return
    figure = charts.curve(records, "loss", STAGE_LABELS, run.id, log)
    live_plot(figure, "curve-loss", "Training loss over the steps of each stage")
    keys = [k for k in CURVES if any(k in r for r in records)]
    for left in range(0, len(keys), 2):
        for column, name in zip(st.columns(2), keys[left : left + 2]):
            with column:
                figure = charts.curve(records, name, STAGE_LABELS, run.id)
                live_plot(figure, f"curve-{name}", f"{charts.LABELS[name]} over the steps")


def mask_evolution(run: Run) -> None:
    layers, paths = snapshots.masked_layers(run), run.mask_snapshots()
    if not layers or not paths:
        st.caption("Masks appear here when stage 2 begins.")
        return
    steps, names = [stage_step(path)[1] for path in paths], [layer["layer"] for layer in layers]
    folder, stamps = str(run.folder), [path.stat().st_mtime_ns for path in paths]
    flips = np.array([flips_at(folder, paths[0].name, stamps[0], p.name, s) for p, s in zip(paths, stamps)])
    live_plot(
        charts.evolution_heatmap(steps, names, flips, run.id),
        "mask-evolution",
        f"Share of each layer's groups that differ from the initial mask, at {len(steps)} snapshots; "
        f"mean at the last one {flips[-1].mean():.1%}",
    )
    with st.expander("As a table"):
        st.dataframe({"layer": names, **{f"step {s}": flips[i] for i, s in enumerate(steps)}}, hide_index=True)
    chosen = st.selectbox("Layer", names, key="mask_layer")
    at = parts.step_slider("Snapshot at step", steps, f"mask_step {run.id}")
    layer, number = layers[names.index(chosen)], steps.index(at)
    one_layer(run, layer, at, read_mask(str(paths[number]), stamps[number]), read_mask(str(paths[0]), stamps[0]))


def one_layer(run: Run, layer: dict, at: int, mask: np.ndarray, first: np.ndarray) -> None:
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


@st.cache_data(show_spinner=False, max_entries=8)
def read_mask(path: str, stamp: int) -> np.ndarray:
    return snapshots.read(Path(path))


@st.cache_data(show_spinner=False, max_entries=1000)
def flips_at(folder: str, first: str, first_stamp: int, name: str, stamp: int) -> list[float]:
    """Flips by layer of one snapshot: read once, then a few numbers."""
    run, masks = Run(Path(folder)), Path(folder) / "masks"
    layers = snapshots.masked_layers(run)
    return snapshots.flips_by_layer(
        read_mask(str(masks / name), stamp), read_mask(str(masks / first), first_stamp), layers
    )


def compliance(run: Run) -> None:
    layers = run.layers()
    if not layers:
        st.caption("Compliance appears here when stage 2 begins.")
        return
    mask = lab.card(run).recipe.mask
    st.caption(
        f"Pattern {mask.n}:{mask.m}. Compliance is the share of groups with at most {mask.n} non-zero weights; "
        "before the masks are baked in, the weights are still dense."
    )
    live_plot(
        charts.compliance_heatmap(layers, mask.m, run.id),
        "compliance",
        "Compliance, density and position balance of each masked layer",
    )
    skipped = [layer for layer in layers if not layer["eligible"]]
    st.subheader(f"Layers left dense: {len(skipped)}")
    st.dataframe([{"layer": la["layer"], "why": la["reason"]} for la in skipped], hide_index=True)
    with st.expander("All layers as a table"):
        keys = ("layer", "kind", "eligible", "groups", "compliance", "density", "position_balance", "tensor_core_ready")
        st.dataframe([{k: la[k] for k in keys} for la in layers], hide_index=True)


def samples(run: Run) -> None:
    paths = {path.stem: path for path in run.samples()}
    if not paths:
        st.caption("The first samples appear in a few seconds.")
        return
    chosen = parts.step_slider("Time", list(paths), f"samples {run.id}", lambda stem: moment(paths[stem]))
    st.caption("The same 16 seeds every time, 10 DDIM steps: a quick look, not the evaluation.")
    parts.sheet(paths[chosen], alt=f"16 samples at {moment(paths[chosen])}", factor=3)


def moment(path: Path) -> str:
    """A sample sheet's file name in words."""
    stage, step = stage_step(path)
    return f"{STAGE_LABELS.get(stage, 'Dense model')}, step {step}" if step else STAGE_LABELS.get(stage, "Dense model")


def section(draw, run: Run, every: float) -> None:
    """A part of the page that follows the run's folder while there is something to follow."""

    @st.fragment(run_every=every if is_live else None)
    def show() -> None:
        with parts.said():
            draw(run)

    show()


st.title("Monitor")
all_cards = lab.cards()
if not all_cards:
    parts.empty("No runs yet.", "home", "Run the demo")
    st.stop()
card = parts.choose_run(all_cards)
if card.problem:
    st.error(f"This run cannot be read: {parts.plain(card.problem)}")
    st.stop()
is_live = card.active
section(lambda run: header(run, is_live), card.run, EVERY_PROGRESS)
if card.status == "failed":
    parts.failure(card)
tabs = st.tabs(["Curves", "Masks", "Compliance", "Samples", "Log", "Recipe"])
parts_of_tabs = [
    (curves, EVERY_CURVES),
    (mask_evolution, EVERY_MASKS),
    (compliance, EVERY_MASKS),
    (samples, EVERY_SAMPLES),
    (parts.log, EVERY_CURVES),
]
for tab, (draw_tab, seconds) in zip(tabs, parts_of_tabs):
    with tab:
        section(draw_tab, card.run, seconds)
with tabs[-1]:
    st.code(card.recipe.to_yaml(), language="yaml")
