"""The report: one self-contained HTML page of a run, or of any models side by side. It asks the web for nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import comparison, report, report_again, report_costs, report_runs, report_sections
from .comparison import Judged
from .report_html import Html, join, missing, page, paragraph
from .report_sections import BROKEN, Page, said
from .store import Run, StoreError, write_atomic

SECTIONS: tuple[tuple[str, str, Callable[[Page], Html | None]], ...] = (
    ("summary", "What happened", report_sections.summary),
    ("figures", "Figures", report_sections.figure_table),
    ("conditions", "What the figures hold for", report_sections.conditions),
    ("noise-floor", "Noise floor", report_sections.noise_floor),
    ("samples", "Samples from the same seeds", report_sections.samples),
    ("faithfulness", "Faithfulness to the dense model", report_sections.faithfulness),
    ("loss", "Loss by timestep", report_sections.loss_bins),
    ("training", "Training", report_runs.training),
    ("sparsity", "Layers", report_runs.sparsity),
    ("choices", "Initial masks and patterns", report_runs.choices),
    ("speed", "Speed", report_costs.speed),
    ("sizes", "Sizes", report_costs.sizes),
    ("efficiency", "Against the dense model", report_costs.efficiency),
    ("pareto", "Pareto fronts", report_costs.pareto),
    ("recipe", "Recipe", report_runs.recipes),
    ("lineage", "Lineage", report_runs.lineage),
    ("environment", "Environment", report_runs.surroundings),
    ("reproduce", "How to make each figure again", report_again.reproduce),
)


def render(judged: Sequence[Judged], title: str | None = None, command: str | None = None) -> str:
    """The page as text. ``command`` is what made it, to be given again."""
    shared = Page.of(judged, command)
    names = [name for name, _ in report.groups(judged)]
    told = title or f"PruneDM report: {names[0] if len(names) == 1 else f'{len(judged)} models'}"
    intro = paragraph(", ".join(names), "note") if len(names) > 1 else Html("")
    found = [(anchor, name, _made(make, shared)) for anchor, name, make in SECTIONS]
    return page(told, intro, [(anchor, name, content) for anchor, name, content in found if content is not None])


def write(run: Run) -> None:
    """``report.html`` in the run's folder."""
    write_atomic(run.report_path, render(of_run(run)).encode())


def of_run(run: Run) -> list[Judged]:
    """:func:`comparison.of_run`, also of a run whose record of layers is damaged: its section then says so."""
    results = run.evaluation()
    try:
        return comparison.of_run(run, results)
    except StoreError:
        return comparison.of_run(run, results, layers=[])


def _made(make: Callable[[Page], Html | None], shared: Page) -> Html | None:
    """A section; a damaged file or record costs that section and says why, never the page."""
    try:
        return make(shared)
    except BROKEN as error:
        return join(missing(f"This section cannot be shown: {said(error)}"))
