"""Compare: variants side by side from the same seeds, with figures and differences from dense."""

from dataclasses import dataclass

import pandas as pd
import streamlit as st

from app import charts, lab, parts
from prunedm import bundled, pictures, recipe, report
from prunedm.records import VARIANT_LABELS

MOST_RUNS, FEWEST_SEEDS, FIRST_SEEDS, SEEDS_IN_ROW = 4, 4, 8, 4


@dataclass
class Column:
    """One variant of one run in the comparison."""

    card: lab.Card
    variant: str

    @property
    def figures(self) -> dict:
        return self.card.results[self.variant]


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
    key = "compare_pick"
    parts.follow_url("runs", key, list(by_id), several=True)
    if key not in st.session_state:
        st.session_state[key] = [cards[0].run.id]
    st.session_state[key] = [i for i in st.session_state[key] if i in by_id][:MOST_RUNS]
    chosen = st.multiselect("Runs", list(by_id), key=key, max_selections=MOST_RUNS)
    parts.write_url("runs", key, ",".join(chosen))
    return [by_id[i] for i in chosen]


def columns_of(cards: list[lab.Card]) -> dict[str, Column]:
    """Column label to variant; the dense model once for runs that share it and its evaluation."""
    found: dict[str, Column] = {}
    dense: set[tuple] = set()
    for card in cards:
        for variant in card.results:
            if variant == "dense":
                r = card.recipe
                held_out = r.data.model_dump_json(exclude={"batch_size", "flip"})
                same = (r.model.source, held_out, bundled.settings_key(r.eval))
                if same in dense:
                    continue
                dense.add(same)
            prefix = f"{card.run.id} " if len(cards) > 1 else ""
            found[f"{prefix}{VARIANT_LABELS[variant]}"] = Column(card, variant)
    return found


def table(cards: list[lab.Card]) -> None:
    for card in cards:
        if len(cards) > 1:
            st.markdown(f"**{card.run.id}**")
        st.markdown(report.headline(card.results))
        rows = [
            {"figure": label, **{VARIANT_LABELS[v]: text for v, text in cells.items()}}
            for label, cells in report.figure_rows(card.results)
        ]
        st.table(pd.DataFrame(rows).set_index("figure"))


def grid(columns: dict[str, Column]) -> None:
    st.subheader("Same seeds, side by side")
    paths = {label: c.card.run.sheet(c.variant) for label, c in columns.items()}
    sheets = {label: pictures.read_sheet(path) for label, path in paths.items() if path.exists()}
    if not sheets:
        st.caption("These runs have no samples yet.")
        return
    settings = sorted({(i["sampler"], i["steps"], i["seed"]) for _, i in sheets.values()})
    if len(settings) > 1:
        st.warning(
            "These runs were sampled with different samplers, steps or seeds: the same place is not the same noise."
        )
    most = min(len(images) for images, _ in sheets.values())
    count = most
    if most > FEWEST_SEEDS:
        count = st.slider("Seeds", FEWEST_SEEDS, most, min(FIRST_SEEDS, most), step=SEEDS_IN_ROW)
    for column, (label, (images, info)) in zip(st.columns(len(sheets)), sheets.items()):
        with column:
            st.markdown(f"**{label}**")
            alt = f"{label}: seeds 0 to {count - 1}, {info['sampler']} {info['steps']} steps"
            st.image(parts.mosaic(images[:count], SEEDS_IN_ROW, 3), alt=alt)
    sampler, steps, seed = settings[0]
    st.caption(
        f"{sampler.upper()}, {steps} steps, evaluation seed {seed}. The same place in each picture is the same noise."
    )


def bars(columns: dict[str, Column]) -> None:
    left, right = st.columns(2)
    with left:
        for (device, dtype, batch), group in grouped(columns, "latency_ms", ("device", "dtype", "batch")).items():
            spread = [(c.figures["latency_ms_p10"], c.figures["latency_ms_p90"]) for c in group.values()]
            show_bars(group, "latency_ms", "Latency of a UNet call, ms", f"{device}, {dtype}, batch {batch}", spread)
        st.caption("Median; the whiskers are the 10th and 90th percentile. Lower is better.")
    with right:
        for (extractor, images), group in grouped(columns, "fid", ("fid_extractor", "fid_images")).items():
            show_bars(group, "fid", extractor, f"{images} images")
        st.caption("Frechet distance to the real training images in the bundled network's features. Lower is better.")


def grouped(columns: dict[str, Column], key: str, conditions: tuple[str, ...]) -> dict[tuple, dict[str, Column]]:
    """Columns that have the figure, by the conditions under which it may be compared."""
    found: dict[tuple, dict[str, Column]] = {}
    for label, column in columns.items():
        if column.figures.get(key) is not None:
            found.setdefault(tuple(column.figures[c] for c in conditions), {})[label] = column
    return found


def show_bars(group: dict[str, Column], key: str, title: str, conditions: str, spread: list | None = None) -> None:
    values = {label: c.figures[key] for label, c in group.items()}
    figure = charts.bars(values, [c.variant for c in group.values()], f"{title}<br><sup>{conditions}</sup>", spread)
    said = ", ".join(f"{label} {value:.3g}" for label, value in values.items())
    st.plotly_chart(figure, key=f"{key} {conditions}", alt=f"{title} ({conditions}): {said}")


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
            content = card.run.report_path.read_bytes()
            st.download_button(f"Report of {card.run.id} (HTML)", content, f"{card.run.id}.html", "text/html")


st.title("Compare")
evaluated = [c for c in lab.cards() if c.results]
if not evaluated:
    bundled_only()
    st.stop()
selected = choose(evaluated)
if selected:
    shown = columns_of(selected)
    for part, argument in (
        (table, selected),
        (grid, shown),
        (bars, shown),
        (differences, selected),
        (download, selected),
    ):
        with parts.said():
            part(argument)
