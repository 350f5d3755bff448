"""Sections of the report's page about what the models can do: what happened, figures, samples, loss by timestep."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import charts, comparison, figures, model_charts, pictures, report
from .comparison import Judged
from .records import VARIANT_LABELS
from .report_html import Html, bullets, chart, figure_cell, join, missing, paragraph, picture, table, tag
from .store import Run

BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError)  # of files and records
SHOWN, PIXELS = 8, 96  # samples of a model, and how wide each is at most
STAMP = re.compile(r"^\d{8}-\d{6}-(?=.)")


@dataclass
class Page:
    """What the sections share. ``shown``: without dense models that repeat an earlier one."""

    judged: list[Judged]
    shown: list[Judged]
    command: str | None

    @classmethod
    def of(cls, judged: Sequence[Judged], command: str | None) -> Page:
        return cls(list(judged), comparison.without_repeats(judged), command)

    @property
    def runs(self) -> list[Run]:
        """Each run once, in the order given."""
        return list({one.run.folder: one.run for one in self.judged if one.run}.values())

    def name(self, one: Judged) -> str:
        """A short name: the variant in a page of one run, else with its run's name, its time only where needed."""
        if one.run is None or one.variant is None:
            return one.label
        variant = VARIANT_LABELS.get(one.variant, one.variant)
        if len(report.groups(self.judged)) == 1:
            return variant
        short = STAMP.sub("", one.run.id)
        alike = sum(STAMP.sub("", run.id) == short for run in self.runs)
        return f"{short if alike == 1 else one.run.id} {variant}"

    def model(self, one: Judged) -> model_charts.Model:
        """How charts tell the model from others."""
        places = {run.folder: i for i, run in enumerate(self.runs)}
        return model_charts.Model(self.name(one), one.variant, places[one.run.folder] if one.run else len(places))

    def compared(
        self, rows: Sequence[tuple[str, Sequence[str]]], judged: Sequence[Judged], name: str, head: str = ""
    ) -> Html:
        """A column a model, under the runs' names where there are several."""
        own = report.groups(judged)
        if len(own) == 1:
            return table([head, *map(self.name, judged)], [[label, *cells] for label, cells in rows], name)
        names = [VARIANT_LABELS.get(one.variant or "", "model") for one in judged]
        order = {id(one): i for i, one in enumerate(judged)}
        places = [order[id(one)] for _, members in own for one in members]
        over = [("", 1), *((run, len(members)) for run, members in own)]
        lines = [[label, *(cells[i] for i in places)] for label, cells in rows]
        return table([head, *(names[i] for i in places)], lines, name, over)

    def each_run(self, make: Callable[[Run], Html | None]) -> Html:
        """The same for each run, under its name where there are several; a broken file costs that part only."""
        parts = []
        for run in self.runs:
            try:
                found = make(run)
            except BROKEN as error:
                found = missing(f"This part of {run.id} cannot be shown: {said(error)}")
            if found:
                parts += [tag("h3", run.id)] if len(self.runs) > 1 else []
                parts.append(found)
        return join(*parts)


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{' '.join(str(error).split())[:300] or 'unknown'} ({type(error).__name__})"


# --- what happened ---------------------------------------------------------------------------
def summary(page: Page) -> Html:
    parts: list[Html] = []
    own = report.groups(page.judged)
    for name, members in own:
        parts += [tag("h3", name)] if len(own) > 1 else []
        lines = report.sentences(members)
        parts.append(bullets(lines) if lines else missing("Nothing has been evaluated yet."))
        parts += _stages(members[0].run) if members[0].run else []
    return join(*parts)


def _stages(run: Run) -> list[Html]:
    """Stage 1 in a sentence, with the reason where its target was missed; alerts; how the run ended."""
    parts: list[Html] = []
    events = run.events()
    pruned = next((event["report"] for event in reversed(events) if event.get("kind") == "pruned"), None)
    if pruned is not None:
        parts.append(paragraph(f"{report.stage_one(pruned)} {pruned.get('reason') or ''}".strip()))
    alerts = [event for event in events if event.get("kind") == "alert"]
    if alerts:
        lines = [f"{a.get('stage')}, step {a.get('step')}: {a.get('text')}; {a.get('remedy')}" for a in alerts]
        parts.append(tag("div", join(tag("strong", "Alerts while it trained"), bullets(lines)), class_="warn"))
    return parts


def figure_table(page: Page) -> Html:
    if not page.shown:
        return missing("Nothing has been evaluated yet.")
    note = "In parentheses: the difference from the model's own dense one. Absent figures are n/a. "
    note += "Theoretical and measured figures stand in rows of their own."
    rows = [(label, [figure_cell(cell) for cell in cells]) for label, cells in figures.rows(page.shown)]
    return join(paragraph(note, "note"), page.compared(rows, page.shown, "Figures of the models"))


def conditions(page: Page) -> Html:
    rows = figures.condition_rows(page.shown)
    content = page.compared(rows, page.shown, "What the figures hold for")
    quality = rows[: next(i for i, (name, _) in enumerate(rows) if name == "device")]
    if any(len({cell for cell in cells if cell != figures.ABSENT}) > 1 for _, cells in quality):
        text = "Not all models were judged alike: figures compare only between models whose conditions agree."
        content = join(paragraph(text, "warn"), content)
    return content


def noise_floor(page: Page) -> Html:
    found = figures.floor_table(page.shown, page.name)
    if found is None:
        return missing("No noise floor was measured, so nobody can say which small differences mean something.")
    text = (
        "Two sets of images that do not differ, compared as a compressed model's images are with the real ones. A "
        "difference from dense that is no larger than this may be chance; only a larger one says something."
    )
    return join(paragraph(text), table(*found, "Noise floor"))


# --- samples ---------------------------------------------------------------------------------
def samples(page: Page) -> Html:
    """A row a model, the same noise in each column."""
    rows, absent, settings = [], [], set()
    for one in page.shown:
        try:
            cells, info = _sheet(one, page.name(one))
        except BROKEN as error:
            absent.append(missing(f"{page.name(one)}: no samples, {said(error)}"))
            continue
        settings.add(tuple((key, info.get(key, 0)) for key in ("sampler", "steps", "eta", "seed")))
        rows.append([page.name(one), *cells])
    if not rows:
        return join(*absent) if absent else missing("There are no samples.")
    if len(settings) > 1:
        text = "These models were sampled with different samplers, steps or seeds: the same column is not the same "
        note = paragraph(text + "noise.", "warn")
    else:
        how = dict(next(iter(settings)))
        text = f"{str(how['sampler']).upper()}, {how['steps']} steps, eta {how['eta']}, evaluation seed {how['seed']}: "
        note = paragraph(text + "the same column is the same noise.", "note")
    head = ["", *(str(i + 1) for i in range(max(len(row) for row in rows) - 1))]
    return join(*absent, note, table(head, rows, "Samples from the same seeds", kind="samples"))


def _sheet(one: Judged, name: str) -> tuple[list[Html], dict[str, Any]]:
    """The first images of a model's sheet, and how they were made."""
    if one.sheet is None:
        raise FileNotFoundError("it has no sample sheet")
    images, info = pictures.read_sheet(one.sheet)
    shown = enumerate(images[:SHOWN])
    return [picture(image, f"{name}, sample {i + 1}", min(PIXELS, 3 * image.width)) for i, image in shown], info


def faithfulness(page: Page) -> Html:
    found = [one for one in page.judged if one.get("ssim") is not None or one.get("psnr") is not None]
    if not found:
        return missing("No samples were compared pair by pair with the dense model's.")
    text = (
        "How near a model's samples are to the dense model's of the same seeds. SSIM is 1 for identical images; PSNR "
        "is over the pairs that differ; the feature distance is in the extractor's own unit. Another image from "
        "the same noise is not a worse one: judge quality by the distances to the real images."
    )
    head = ["model", "pairs", "SSIM", "95 % interval", "PSNR, dB", "identical pairs", "feature distance"]
    rows = [
        [
            page.name(one),
            form(one.get("pairs"), "{:,}"),
            form(one.get("ssim"), "{:.4f}"),
            ends(one.get("ssim_low"), one.get("ssim_high"), "{:.4f}"),
            form(one.get("psnr"), "{:.2f}"),
            form(one.get("identical"), "{:,}"),
            form(one.get("feature_distance"), "{:.3f}"),
        ]
        for one in found
    ]
    return join(paragraph(text), table(head, rows, "Faithfulness to the dense model"))


def form(value: Any, how: str) -> str:
    return figures.ABSENT if value is None else how.format(value)


def ends(low: Any, high: Any, how: str) -> str:
    return figures.ABSENT if low is None or high is None else f"{how.format(low)} to {how.format(high)}"


def loss_bins(page: Page) -> Html:
    """A line a model; models with other bins in a chart of their own."""
    found: dict[tuple[int, int], list[Judged]] = {}
    for one in page.shown:
        if one.get("loss_bins") and one.get("timesteps"):
            found.setdefault((len(one.get("loss_bins")), one.get("timesteps")), []).append(one)
    parts = []
    for (count, steps), own in found.items():
        bins = [one.get("loss_bins") for one in own]
        drawn = model_charts.model_bins([page.model(one) for one in own], bins, steps, "loss bins")
        names = charts.bin_names(count, steps)
        rows = [[name, *(form(values[i], "{:.5f}") for values in bins)] for i, name in enumerate(names)]
        data = table(["timesteps", *map(page.name, own)], rows, "Validation loss by timestep")
        images = own[0].get("validation_images")
        note = f"{images} held-out images with fixed noise" if images else "held-out images with fixed noise"
        alt = f"Noise-prediction error of {len(own)} models in {count} timestep bins, from clean to noisy"
        parts.append(chart(drawn, "Noise-prediction error by timestep", alt, data, f"{note}; logarithmic scale."))
    return join(*parts) if parts else missing("The validation loss was not recorded by timestep.")
