"""Compare: variants side by side from the same seeds, with figures and differences from dense."""

import pandas as pd
import streamlit as st

from app import charts, lab, parts
from prunedm import bundled, pictures, recipe, report
from prunedm.records import VARIANT_LABELS

MOST_RUNS = 4


def bundled_only() -> None:
    settings = recipe.build(recipe.preset("balanced")).eval
    st.info("No finished run yet: these are the bundled dense model's own figures. The demo adds two variants to them.")
    figures = bundled.evaluation(settings)
    a, b, c = st.columns(3)
    a.metric("Parameters", f"{figures['parameters']:,}", border=True)
    b.metric("Validation loss", f"{figures['validation_loss']:.5f}", border=True)
    c.metric(f"{figures['fid_extractor']} ({figures['fid_images']} images)", f"{figures['fid']:.2f}", border=True)
    parts.sheet(bundled.sheet(settings), alt="64 samples of the bundled dense model", factor=3)
    st.page_link(lab.ROOT / "pages" / "home.py", label="Run the demo")


def choose(cards: list[lab.Card]) -> list[lab.Card]:
    by_id = {c.run.id: c for c in cards}
    wanted = [i for i in st.query_params.get("runs", "").split(",") if i in by_id]
    chosen = st.multiselect(
        "Runs", list(by_id), default=wanted[:MOST_RUNS] or [cards[0].run.id], max_selections=MOST_RUNS
    )
    st.query_params["runs"] = ",".join(chosen)
    return [by_id[i] for i in chosen]


def columns_of(cards: list[lab.Card]) -> dict[str, tuple[lab.Card, str]]:
    """Column label to (run, variant); the dense model once for runs that share it."""
    found: dict[str, tuple[lab.Card, str]] = {}
    dense: set[tuple] = set()
    for card in cards:
        for variant in card.run.evaluation():
            prefix = f"{card.run.id} " if len(cards) > 1 else ""
            same = (card.recipe.model.source, bundled.settings_key(card.recipe.eval))
            if variant == "dense":
                if same in dense:
                    continue
                dense.add(same)
            found[f"{prefix}{VARIANT_LABELS[variant]}"] = (card, variant)
    return found


def table(cards: list[lab.Card]) -> None:
    for card in cards:
        results = card.run.evaluation()
        if len(cards) > 1:
            st.markdown(f"**{card.run.id}**")
        st.markdown(report.headline(results))
        rows = [
            {"figure": label, **{VARIANT_LABELS[v]: text for v, text in cells.items()}}
            for label, cells in report.figure_rows(results)
        ]
        st.table(pd.DataFrame(rows).set_index("figure"))


def grid(columns: dict[str, tuple[lab.Card, str]]) -> None:
    st.subheader("Same seeds, side by side")
    sheets = {}
    for label, (card, variant) in columns.items():
        path = card.run.sheet(variant)
        if path.exists():
            sheets[label] = pictures.read_sheet(path)
    if not sheets:
        return
    settings = {(i["sampler"], i["steps"], i["seed"]) for _, i in sheets.values()}
    if len(settings) > 1:
        st.warning("These runs were sampled with different samplers, steps or seeds: rows are not the same noise.")
    count = st.slider("Seeds", 4, min(len(images) for images, _ in sheets.values()), 8, step=4)
    for column, (label, (images, info)) in zip(st.columns(len(sheets)), sheets.items()):
        with column:
            st.markdown(f"**{label}**")
            alt = f"{label}: seeds 0 to {count - 1}, {info['sampler']} {info['steps']} steps"
            st.image(parts.mosaic(images[:count], 4, 3), alt=alt)
    sampler, steps, seed = sorted(settings)[0]
    st.caption(f"{sampler.upper()}, {steps} steps, evaluation seed {seed}; rows of four seeds, same place = same noise.")


def bars(columns: dict[str, tuple[lab.Card, str]]) -> None:
    figures = {label: card.run.evaluation()[variant] for label, (card, variant) in columns.items()}
    left, right = st.columns(2)
    timed = {label: f for label, f in figures.items() if f.get("latency_ms") is not None}
    with left:
        if timed:
            first = next(iter(timed.values()))
            title = f"Latency of a UNet call, ms<br><sup>{first['device']}, {first['dtype']}, batch {first['batch']}</sup>"
            spread = {label: (f["latency_ms_p10"], f["latency_ms_p90"]) for label, f in timed.items()}
            values = {label: f["latency_ms"] for label, f in timed.items()}
            figure = charts.bars(values, title, spread)
            st.plotly_chart(figure, key="latency", alt=f"{title}: {values}")
            st.caption("Median; the whiskers are the 10th and 90th percentile. Lower is better.")
    with right:
        judged = {label: f for label, f in figures.items() if f.get("fid") is not None}
        if judged:
            first = next(iter(judged.values()))
            title = f"{first['fid_extractor']}, {first['fid_images']} images"
            values = {label: f["fid"] for label, f in judged.items()}
            st.plotly_chart(charts.bars(values, title), key="fid", alt=f"{title}: {values}")
            st.caption("Frechet distance to the real training images in the bundled network's features. Lower is better.")


def differences(cards: list[lab.Card]) -> None:
    if len(cards) < 2:
        return
    st.subheader("Recipe differences")
    first = cards[0]
    rows: dict[str, dict[str, str]] = {}
    for other in cards[1:]:
        for path, (a, b) in recipe.differences(first.recipe, other.recipe).items():
            rows.setdefault(path, {"field": path, first.run.id: str(a)})[other.run.id] = str(b)
    st.dataframe(list(rows.values()), hide_index=True)


def download(cards: list[lab.Card]) -> None:
    for card in cards:
        if card.run.report_path.exists():
            data = card.run.report_path.read_bytes()
            st.download_button(f"Report of {card.run.id} (HTML)", data, f"{card.run.id}.html", "text/html")


st.title("Compare")
evaluated = [c for c in lab.cards() if not c.problem and c.run.evaluation()]
if not evaluated:
    bundled_only()
    st.stop()
selected = choose(evaluated)
if selected:
    shown = columns_of(selected)
    table(selected)
    grid(shown)
    bars(shown)
    differences(selected)
    download(selected)
