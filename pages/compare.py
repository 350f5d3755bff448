"""Compare: two to eight models side by side from the same seeds, with what they cost and what that means."""

import pandas as pd
import streamlit as st

from app import compare_views, lab, parts
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
    st.page_link(lab.ROOT / "pages" / "home.py", label="Run the demo")


def choose(cards: list[lab.Card], known: dict[str, Judged]) -> list[str]:
    """The models to compare: ``?runs=A,B`` takes all variants of runs, ``?models=A/nm,B/nm`` single ones."""
    key, runs = "compare_pick", st.query_params.get("runs", "")
    if runs:
        del st.query_params["runs"]  # from here on the address names the models
        wanted = [run for run in runs.split(",") if run]
        missing = [run for run in wanted if not compare_views.of_runs(known, [run])]
        if missing:
            st.warning(f"There is no evaluated run {parts.plain(', '.join(missing))} here: it may have been deleted.")
        picked = compare_views.of_runs(known, wanted)
        if picked:
            st.session_state[key] = picked[: compare_views.MOST_MODELS]
    parts.follow_url("models", key, list(known), several=True)
    if key not in st.session_state:
        st.session_state[key] = compare_views.first_choice(cards)
    st.session_state[key] = [k for k in st.session_state[key] if k in known][: compare_views.MOST_MODELS]
    most = compare_views.MOST_MODELS
    chosen = st.multiselect("Models", list(known), key=key, max_selections=most, format_func=compare_views.name)
    parts.write_url("models", key, ",".join(chosen))
    return chosen


def judged(chosen: list[str], known: dict[str, Judged]) -> dict[str, Judged]:
    """The figures to show: as recorded, or judged alike in the background."""
    parts.follow_url("by", "compare_by", list(MODES))
    mode = st.segmented_control(
        "Figures", list(MODES), key="compare_by", default="recorded", format_func=lambda m: f"{m} ({MODES[m]})"
    )
    mode = mode or "recorded"
    parts.write_url("by", "compare_by", mode)
    recorded = {key: known[key] for key in chosen}
    if mode == "recorded":
        if not compare_views.alike(list(recorded.values())):
            st.warning("These models were judged under different settings: choose quick, standard or full above.")
        return recorded
    found, task = compare_views.judged_alike(chosen, mode)
    if found is not None:
        return found
    if task is not None and not task.future.done():
        compare_views.progress(task)
    else:
        if task is not None:
            st.error(parts.plain(task.error))
        if st.button(f"Judge these {len(chosen)} models alike", type="primary"):
            judgements().judge(chosen, mode)
            st.rerun()
    st.caption("Until that is done: the figures that the runs recorded.")
    return recorded


def summary(found: dict[str, Judged]) -> None:
    for name, own in report.groups(list(found.values())):
        if len(found) > 3 or not any(one.run for one in own):
            st.markdown(f"**{parts.plain(name)}**")
        for text in report.sentences(own):
            st.markdown(f"- {parts.plain(text)}")


def table(found: dict[str, Judged]) -> None:
    rows = dict(figures.rows(list(found.values())))
    names = list(compare_views.short_names(list(found)).values())
    st.table(pd.DataFrame.from_dict(rows, orient="index", columns=names))
    floors = figures.floor_rows(list(found.values()))
    if floors:
        head = ["model", "between", "Frechet distance", "kernel distance", "precision", "recall", "images of a set"]
        st.caption("Noise floor: what the same metrics find where there is no difference.")
        st.table(pd.DataFrame(floors, columns=head).set_index("model"))
    with st.expander("What the figures hold for"):
        rows = dict(figures.condition_rows(list(found.values())))
        st.table(pd.DataFrame.from_dict(rows, orient="index", columns=names))


def samples(chosen: list[str], known: dict[str, Judged]) -> None:
    st.subheader("Same seeds, side by side")
    drawn = compare_views.sheets(chosen, known)
    if not drawn:
        st.caption("These models have no samples yet.")
        return
    places = sorted(set.union(*(set(own) for own in drawn.values())))
    seeds = choose_seeds(places)
    if not compare_views.alike([known[key] for key in drawn]):
        st.warning("Different samplers, steps or seeds: the same row is not the same noise.")
    left, right = st.columns([3, 2])
    with left:
        compare_views.grid(drawn, seeds)
        draw_more(chosen, known, places)
    with right:
        pair(drawn, seeds)


def choose_seeds(places: list[int]) -> list[int]:
    key = "compare_seeds"
    wanted = [int(text) for text in st.query_params.get("seeds", "").split(",") if text.isdigit()]
    if key not in st.session_state:
        st.session_state[key] = wanted or places[: compare_views.FIRST_SEEDS]
    st.session_state[key] = [seed for seed in st.session_state[key] if seed in places]
    seeds = st.multiselect("Seeds", places, key=key) or places[:1]
    st.query_params["seeds"] = ",".join(map(str, seeds))
    return seeds


def draw_more(chosen: list[str], known: dict[str, Judged], places: list[int]) -> None:
    """Another 64 seeds of each model, in the background."""
    own = [key for key in chosen if known[key].run is not None]
    start = len(places)
    if own and st.button(f"Draw {compare_views.SHEET} more seeds"):
        st.session_state["compare_drawing"] = judgements().draw(own, start)
    task = st.session_state.get("compare_drawing")
    if task is not None and not task.future.done():
        compare_views.progress(task)
    elif task is not None and task.error:
        st.error(parts.plain(task.error))


def pair(drawn: dict, seeds: list[int]) -> None:
    """The slider over one pair."""
    if len(drawn) < 2:
        return
    keys = list(drawn)
    st.markdown("**Before and after**")
    left = st.selectbox("Left", keys, index=0, format_func=compare_views.name)
    right = st.selectbox("Right", keys, index=len(keys) - 1, format_func=compare_views.name)
    seed = st.selectbox("Seed", seeds)
    if seed in drawn[left] and seed in drawn[right]:
        compare_views.slider((left, drawn[left][seed]), (right, drawn[right][seed]), seed)


def recipes(chosen: list[str], known: dict[str, Judged]) -> None:
    runs = list({known[key].run.id: known[key].run for key in chosen if known[key].run}.values())
    if len(runs) < 2:
        st.caption("Choose models of two runs or more to see how their recipes differ.")
        return
    st.subheader("Recipe differences")
    first, rows = runs[0], {}
    for other in runs[1:]:
        for path, (a, b) in recipe.differences(first.recipe(), other.recipe()).items():
            rows.setdefault(path, {"field": path, first.id: str(a)})[other.id] = str(b)
    st.dataframe(list(rows.values()), hide_index=True)


def download(found: dict[str, Judged]) -> None:
    """The same comparison as files; the page is made when it is asked for."""
    models = list(found.values())
    a, b, c = st.columns(3)
    a.download_button("Report (HTML)", lambda: report_page.render(models), "comparison.html", "text/html")
    b.download_button("Table (CSV)", lambda: report.csv_text(models), "comparison.csv", "text/csv")
    c.download_button("Text (Markdown)", lambda: report.markdown(models), "comparison.md", "text/markdown")


st.title("Compare")
evaluated = [c for c in lab.cards() if c.results]
if not evaluated:
    bundled_only()
    st.stop()
models = compare_views.models(evaluated)
picked = choose(evaluated, models) if models else []
if picked:
    shown = judged(picked, models)
    with parts.said():
        summary(shown)
    tabs = st.tabs(["Samples", "Figures", "Pareto", "Latency", "Recipes", "Report"])
    sections = [
        lambda: samples(picked, models),
        lambda: table(shown),
        lambda: compare_views.pareto(picked, shown),
        lambda: compare_views.latency(picked, shown),
        lambda: recipes(picked, models),
        lambda: download(shown),
    ]
    for tab, draw in zip(tabs, sections):
        with tab, parts.said():
            draw()
