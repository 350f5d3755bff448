"""Compare: two to eight models side by side from the same seeds, with what they cost and what that means."""

import pandas as pd
import streamlit as st

from app import compare_choice, compare_samples, compare_views, lab, parts
from app.compare_choice import Known
from app.judgements import MODES, judgements
from prunedm import bundled, figures, recipe, report, report_page
from prunedm.comparison import Judged


def bundled_only() -> None:
    settings = recipe.build(recipe.preset("balanced")).eval
    st.info("No finished run yet: these are the bundled dense model's own figures. The demo adds two variants to them.")
    found = bundled.evaluation(settings)
    a, b, c = st.columns(3)
    a.metric("Parameters", f"{found['parameters']:,}", border=True)
    b.metric("Validation loss", f"{found['validation_loss']:.5f}", border=True)
    c.metric(f"{found['fid_extractor']} ({found['fid_images']} images)", f"{found['fid']:.2f}", border=True)
    parts.sheet(bundled.sheet(settings), alt="64 samples of the bundled dense model", factor=3)
    st.page_link(lab.page("home"), label="Run the demo")


def judged(chosen: list[str], known: Known) -> dict[str, Judged]:
    """The figures to show: as recorded, or judged alike in the background."""
    parts.follow_url("by", "compare_by", list(MODES), what="way to judge")
    mode = st.segmented_control(
        "Figures", list(MODES), key="compare_by", default="recorded", format_func=lambda m: f"{m} ({MODES[m]})"
    )
    mode = mode or "recorded"
    parts.write_url("by", "compare_by", mode)
    with parts.said():
        compare_views.sizes(chosen, known)
    recorded = {key: known.judged[key] for key in chosen}
    if mode == "recorded":
        new = [known.judged[key].label for key in chosen if key in known.folders]
        if new:
            st.info(f"Not judged yet: {parts.plain(', '.join(new))}. Choose quick, standard or full above.")
        if not compare_views.alike([one for key, one in recorded.items() if key not in known.folders]):
            st.warning("These models were judged under different settings: choose quick, standard or full above.")
        return recorded
    found, task = compare_views.judged_alike(chosen, mode, known)
    if found is not None:
        return found
    if task is not None and not task.future.done():
        compare_views.progress(task)
    else:
        if task is not None:
            st.error(parts.plain(task.error))
        if st.button(f"Judge these {len(chosen)} models alike", type="primary"):
            judgements().judge([known.source(key) for key in chosen], mode)
            st.rerun()
    st.caption("Until that is done: the figures that the runs recorded.")
    return recorded


def summary(found: dict[str, Judged]) -> None:
    """What is to be said of each run's models, and then of those that are of no run."""
    own = [one for one in found.values() if one.run is not None]
    rest = [one for one in found.values() if one.run is None]
    for name, models in [*report.groups(own), ("Models of no run", rest)]:
        sentences = report.sentences(models)
        if sentences and len(found) > 3:
            st.markdown(f"**{parts.plain(name)}**")
        for text in sentences:
            st.markdown(f"- {parts.plain(text)}")


def table(found: dict[str, Judged]) -> None:
    plain_table(dict(figures.rows(list(found.values()))), found)
    floors = figures.floor_table(list(found.values()))
    if floors:
        head, rows = floors
        st.caption("Noise floor: what the same metrics find where there is no difference.")
        st.table(pd.DataFrame([[parts.plain(cell) for cell in row] for row in rows], columns=head).set_index(head[0]))
    with st.expander("What the figures hold for"):
        plain_table(dict(figures.condition_rows(list(found.values()))), found)


def plain_table(rows: dict[str, list[str]], found: dict[str, Judged]) -> None:
    """A row a figure, a column a model; st.table takes text for Markdown, and names and sources are anyone's."""
    names = [parts.plain(name) for name in compare_choice.short_names(list(found)).values()]
    cells = {parts.plain(name): [parts.plain(cell) for cell in row] for name, row in rows.items()}
    st.table(pd.DataFrame.from_dict(cells, orient="index", columns=names))


def recipes(chosen: list[str], known: dict[str, Judged]) -> None:
    runs = list({known[key].run.id: known[key].run for key in chosen if known[key].run}.values())
    if len(runs) < 2:
        st.caption("Choose models of two runs or more to see how their recipes differ.")
        return
    st.subheader("Recipe differences")
    values = {run.id: recipe.flatten(run.recipe().model_dump()) for run in runs}
    first = values[runs[0].id]
    differing = [path for path in first if any(own[path] != first[path] for own in values.values())]
    rows = [{"field": path} | {run_id: str(own[path]) for run_id, own in values.items()} for path in differing]
    st.dataframe(rows, hide_index=True)


def download(found: dict[str, Judged]) -> None:
    """The same comparison as files; the page is made when it is asked for."""
    models = list(found.values())
    a, b, c = st.columns(3)
    a.download_button("Report (HTML)", lambda: report_page.render(models), "comparison.html", "text/html")
    b.download_button("Table (CSV)", lambda: report.csv_text(models), "comparison.csv", "text/csv")
    c.download_button("Text (Markdown)", lambda: report.markdown(models), "comparison.md", "text/markdown")


SECTIONS = {
    "Samples": compare_samples.samples,
    "Figures": lambda keys, known, found: table(found),
    "Pareto": lambda keys, known, found: compare_views.pareto(keys, found),
    "Latency": lambda keys, known, found: compare_views.latency(keys, found),
    "Curves": lambda keys, known, found: compare_views.curves(keys, known),
    "Recipes": lambda keys, known, found: recipes(keys, known.judged),
    "Report": lambda keys, known, found: download(found),
}

st.title("Compare")
evaluated = [c for c in lab.cards() if c.results]
if not evaluated:
    bundled_only()
everything = compare_choice.known(evaluated)
picked = compare_choice.choose(evaluated, everything)
if picked:
    shown = judged(picked, everything)
    with parts.said():
        summary(shown)
    for name, tab in zip(SECTIONS, st.tabs(list(SECTIONS), key="view", bind="query-params")):
        if tab.open:  # the others are drawn when they are asked for
            with tab, parts.said():
                SECTIONS[name](picked, everything, shown)
    parts.show_open_tab()
elif everything.judged:
    st.info("Nothing is picked: choose two models or more above, or one for its own figures.")
