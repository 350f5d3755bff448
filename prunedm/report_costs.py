"""Sections of the report's page about what the models cost: speed, sizes, ratios to dense, Pareto fronts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import charts, comparison, figures, model_charts
from .comparison import Judged
from .figures import RATIOS, SIZES
from .report_html import Html, chart, join, missing, paragraph, table, tag
from .report_sections import Page, ends, form

LONG = 16  # rows of a table that scrolls in a box of limited height


# --- speed -----------------------------------------------------------------------------------
def speed(page: Page) -> Html:
    """A row for each model, way and batch size; those that were timed in turn share a chart."""
    found = [(one, row) for one in page.judged for row in _speed_rows(one)]
    if not found:
        return missing("Nothing was timed.")
    sessions: dict[Any, list[Judged]] = {}
    for one, _ in found:
        own = sessions.setdefault(_session(one), [])
        own += [] if any(one is other for other in own) else [one]
    parts = [paragraph("Measured: median of interleaved UNet calls with the 10th and 90th percentile.", "note")]
    if len(sessions) > 1:
        names = "; ".join(", ".join(map(page.name, own)) for own in sessions.values())
        text = f"Timed at different times, in these sets: {names}. The machine may have drifted between them."
        parts.append(paragraph(text, "warn"))
    order = sorted(range(len(found)), key=lambda i: (found[i][1]["batch"] or 0, str(found[i][1]["way"]), i))
    parts.append(_speed_table(page, [found[i] for i in order]))
    for own in sessions.values():
        parts += _speed_chart(page, own)
    return join(*parts)


def _speed_table(page: Page, found: list[tuple[Judged, dict[str, Any]]]) -> Html:
    """Columns that say the same in each row become a line above the table."""
    head = ["model", "way", "batch", "ms a call", "10th to 90th", "ms an image", "of dense", "peak memory, bytes"]
    common = ["memory counted by", "device", "dtype", "threads"]
    rows = [_speed_cells(page, one, row) for one, row in found]
    said, kept = [], []
    for i, name in enumerate(common, len(head)):
        values = {row[i] for row in rows if row[i] is not None}
        if len(values) == 1:
            said.append(f"{name}: {values.pop()}")
        elif values:
            kept.append(i)
    shown, kind = [*range(len(head)), *kept], "tall" if len(rows) > LONG else ""
    data = table(
        [(head + common)[i] for i in shown], [[row[i] for i in shown] for row in rows], "Speed, measured", kind=kind
    )
    note = "; ".join(said)
    return join(paragraph(f"{note[0].upper()}{note[1:]}.", "note"), data) if said else data


def _session(one: Judged) -> Any:
    """What models timed in turn share; runs of earlier versions timed their own variants so."""
    return one.get("speed_session") or (one.run.folder if one.run else id(one))


def _speed_rows(one: Judged) -> list[dict[str, Any]]:
    """The rows of ``speed``; from the plain latency where an earlier version recorded no more."""
    known = {"way": "eager", "batch": None, "call": None, "per_image": None, "absent": ""}
    rows = [known | row for row in one.get("speed") or []]
    if rows or one.get("latency_ms") is None:
        return rows
    call = {"median": one.get("latency_ms"), "p10": one.get("latency_ms_p10"), "p90": one.get("latency_ms_p90")}
    call |= {key: one.get(key) for key in ("device", "dtype")}
    batch = one.get("batch")
    return [known | {"batch": batch, "call": call, "per_image": call["median"] / batch if batch else None}]


def _speed_cells(page: Page, one: Judged, row: dict[str, Any]) -> list[Any]:
    call, name = row["call"], page.name(one)
    if not call:
        why = tag("span", f"absent: {row['absent'] or 'no reason was recorded'}", class_="absent")
        return [name, row["way"], row["batch"], why, *[None] * 8]
    cells = [form(call["median"], "{:.2f}"), ends(call.get("p10"), call.get("p90"), "{:.2f}")]
    cells += [form(row["per_image"], "{:.3f}"), _of_dense(one, row), form(row.get("memory"), "{:,}")]
    conditions = [row.get("memory_of"), call.get("device"), call.get("dtype"), row.get("threads")]
    return [name, row["way"], row["batch"], *cells, *conditions]


def _of_dense(one: Judged, row: dict[str, Any]) -> str:
    """The ratio to the dense model, called the same way in the same session on the same device."""
    base = Judged("", one.dense or {}, run=one.run)
    for other in _speed_rows(base) if _session(base) == _session(one) else []:
        keys = ("device", "dtype")
        call, theirs = row["call"], other["call"] or {}
        same = (row["way"], row["batch"]) == (other["way"], other["batch"])
        if same and theirs.get("median") and all(call.get(key) == theirs.get(key) for key in keys):
            return f"{call['median'] / theirs['median']:.2f}"
    return figures.ABSENT


def _speed_chart(page: Page, own: list[Judged]) -> list[Html]:
    """Milliseconds an image of the models that were timed in turn."""
    timed = {id(one): [row for row in _speed_rows(one) if row["call"] and row["per_image"]] for one in own}
    rows = {place: {(row["way"], row["batch"]): row for row in found} for place, found in timed.items()}
    keys = sorted(dict.fromkeys(key for found in rows.values() for key in found), key=lambda key: (key[1], str(key[0])))
    if not keys:
        return []
    columns = [(f"batch {batch}", str(way)) for way, batch in keys]
    values = [[rows[id(one)].get(key, {}).get("per_image") for key in keys] for one in own]
    spread = [[_per_image(rows[id(one)].get(key)) for key in keys] for one in own]
    models = [page.model(one) for one in own]
    drawn = model_charts.grouped_bars(models, columns, values, "ms an image (measured)", "speed", spread)
    lines = [[", ".join(column), *(form(line[i], "{:.3f}") for line in values)] for i, column in enumerate(columns)]
    data = table(["batch, way", *(model.name for model in models)], lines, "Milliseconds an image")
    places = {(c.get("device"), c.get("dtype")) for r in rows.values() for c in (row["call"] for row in r.values())}
    where = "; ".join(sorted(", ".join(str(p) for p in place if p) for place in places))
    alt = f"Milliseconds an image of {len(own)} models, {len(columns)} ways and batch sizes"
    return [chart(drawn, "Time of a UNet call, for each image", alt, data, f"{where}; lines: 10th to 90th percentile.")]


def _per_image(row: dict[str, Any] | None) -> tuple[float, float] | None:
    """The ends of a bar's spread."""
    call = (row or {}).get("call") or {}
    if not call or call.get("p10") is None or call.get("p90") is None:
        return None
    return call["p10"] / row["batch"], call["p90"] / row["batch"]


# --- sizes, efficiency, Pareto -----------------------------------------------------------------
def sizes(page: Page) -> Html:
    own = [one for one in page.shown if one.get("sizes")]
    if not own:
        return missing("Sizes in each way of storing were not recorded; the table of figures has the bytes on disk.")
    rows = [
        (words, [form(one.get(f"sizes.{name}"), "{:,}") for one in own])
        for name, words in SIZES.items()
        if any(one.get(f"sizes.{name}") is not None for one in own)
    ]
    rows.append(("Compression (dense fp16 over packed fp16)", [_ratio(one) for one in own]))
    data = page.compared(rows, own, "Bytes in each way of storing")
    columns = [words.removeprefix("Bytes, ") for words in SIZES.values()]
    values = [[one.get(f"sizes.{name}") for name in SIZES] for one in own]
    drawn = model_charts.grouped_bars([page.model(one) for one in own], columns, values, "bytes", "sizes")
    alt = f"Bytes of {len(own)} models stored as {', '.join(columns)}"
    text = "Files that were written and counted, the zeros of N:M layers left out where packed."
    return join(paragraph(text, "note"), data, chart(drawn, "Bytes in each way of storing", alt, data))


def _ratio(one: Judged) -> str:
    return form(comparison.efficiency(one)["compression"], "{:.2f} x")


def efficiency(page: Page) -> Html:
    own = [one for one in page.judged if one.dense is not None]
    if not own:
        return missing("There is no compressed model with a dense one to compare it with.")
    text = (
        "Ratios to the model's own dense one: below 1 is a saving, for the losses above 1 is what it cost. MACs are "
        "arithmetic, on N:M hardware theoretical; only the latency was measured."
    )
    rows = [[page.name(one), *row[1:]] for one, row in zip(own, figures.efficiency_rows(own))]
    return join(paragraph(text), table(["model", *RATIOS.values()], rows, "Ratios to the dense model"))


def pareto(page: Page) -> Html:
    plots = list(_plots(page))
    if not plots:
        return missing("There are no two models whose figures hold for the same conditions.")
    text = "Small is better on both axes. Full marks are on the front: no other model is as good in both and better "
    text += "in one."
    return join(paragraph(text), tag("div", join(*plots), class_="pair"))


def _plots(page: Page) -> Iterator[Html]:
    for plot in comparison.pareto(page.shown):
        points = [(one.get(plot.cost.key), one.get(plot.quality.key)) for one in plot.judged]
        is_distance = plot.quality.key == "fid"
        quality = figures.names_of(plot.judged[0])["fid"] if is_distance else plot.quality.label
        labels = (plot.cost.label, quality)
        title = f"{quality[0].upper()}{quality[1:]} against {plot.cost.label}"
        models = [page.model(one) for one in plot.judged]
        drawn = model_charts.pareto(models, points, plot.on_front, charts.plain(labels), title)
        marks = ["yes" if is_on else "no" for is_on in plot.on_front]
        rows = [[model.name, f"{x:,.6g}", f"{y:,.5g}", mark] for model, (x, y), mark in zip(models, points, marks)]
        data = table(["model", plot.cost.label, quality, "on the front"], rows, title)
        best = ", ".join(model.name for model, is_on in zip(models, plot.on_front) if is_on)
        yield chart(drawn, title, f"{title}: {len(points)} models; on the front: {best}", data, figures.holds_for(plot))
