"""The page's section on how to make each figure again: commands that work in any folder, seeds, sources."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import report
from .comparison import Judged
from .report_html import Html, command, join, missing, paragraph, table, tag
from .report_runs import recipe_of
from .report_sections import Page
from .store import Run

METHODS = {
    "reinforce": "MaskPro, arXiv 2506.12876",
    "gumbel": "MaskLLM, arXiv 2409.17481, with one logit a weight",
    "offset": "a learned offset over magnitude, after SR-STE, arXiv 2102.04010",
    "sr-ste": "SR-STE, arXiv 2102.04010",
    "wanda": "Wanda, arXiv 2306.11695",
    "magnitude": "NVIDIA 2:4, arXiv 2104.08378",
    "diff-pruning": "Diff-Pruning, arXiv 2305.10924",
}
SAMPLERS = {
    "ddim": "DDIM, arXiv 2010.02502",
    "ddpm": "DDPM, arXiv 2006.11239",
    "dpm-solver++": "DPM-Solver++, arXiv 2211.01095",
    "euler": "Euler, arXiv 2206.00364",
}
DISTANCES = (
    "Frechet distance: arXiv 1706.08500; kernel distance: arXiv 1801.01401; precision and recall: arXiv 1904.06991"
)
SSIM = "SSIM: doi 10.1109/TIP.2003.819861; pairs of the same seed and sampler"


def reproduce(page: Page) -> Html:
    """For each kind of figure its command, seeds and source."""
    parts = []
    for name, own in report.groups(page.judged):
        parts += [tag("h3", name)] if len(report.groups(page.judged)) > 1 else []
        rows = [[what, command(how), seeds, source] for what, how, seeds, source in _steps(own)]
        parts.append(table(["figure", "command", "seeds", "source"], rows, f"How to make the figures of {name} again"))
    if page.command:
        parts.append(join(paragraph("This page:"), tag("pre", command(page.command))))
    return join(*parts) if parts else missing("There is nothing to make again.")


def _steps(own: list[Judged]) -> Iterator[tuple[str, str, str, str]]:
    """What, the command, its seeds, and the source of the method."""
    run, judged = own[0].run, own[-1]
    evaluate = _again(judged)
    if run is not None:
        yield "models, training curves, masks", *_trained(run)
    seed, sampler = judged.get("sampling.seed"), SAMPLERS.get(judged.get("sampling.sampler"))
    seeds = f"evaluation seed {seed}" if seed is not None else "the recipe's eval.seed"
    sources = "; ".join(text for text in (DISTANCES, sampler) if text)
    yield "validation loss, distances, noise floor, samples", evaluate, seeds, sources
    yield "faithfulness to dense", evaluate, seeds, SSIM
    yield "latency, peak memory", f"{evaluate} --measure", "fixed noise", "measured, all models in turn"
    yield "parameters, MACs, sizes", evaluate, "none", "counted; packed files are written and measured"
    if run is not None and any(one.variant == "nm" for one in own):
        place = _place(run) / "variants" / "nm"
        yield "N:M compliance", _command("verify", place), "none", "groups along the input channels"
    yield "report, fronts, tables", _report(judged), "none", "the figures above"


def _trained(run: Run) -> tuple[str, str, str]:
    spec = recipe_of(run)
    methods = [spec.prune.method, spec.mask.method] if spec else []
    source = "; ".join(["DepGraph (torch-pruning), arXiv 2301.12900", *(METHODS[m] for m in methods if m in METHODS)])
    seeds = f"recipe seed {spec.seed}" if spec else "in the recipe"
    return _command("run", _place(run) / "recipe.yaml"), seeds, source


def _again(one: Judged) -> str:
    """The command that judges the model as it was judged; beside the run whose real images that was by."""
    beside = [one.beside.id] if one.beside else []
    verb = "compare" if beside else "evaluate"
    return _command(verb, _found_by(one), *beside, *_options(one), *_elsewhere(one.run or one.beside))


def _report(one: Judged) -> str:
    """The command that writes a page: of what a run recorded, else of the model judged again."""
    beside, out = [one.beside.id] if one.beside else [], [] if one.run else ["--out", "report.html"]
    options = [] if one.asked is None and one.run else _options(one)
    return _command("report", _found_by(one), *beside, *out, *options, *_elsewhere(one.run or one.beside))


def _options(one: Judged) -> list[Any]:
    """Those that are recorded with the figures, and those that it was judged with beside them."""
    given = one.get("sampling") or {}
    options = [("--images", one.get("fid_images"))] if given else []
    options += [("--steps", given.get("steps")), ("--sampler", given.get("sampler")), ("--seed", given.get("seed"))]
    options += [("--eta", given.get("eta") or None), ("--extractor", given.get("extractor"))]
    return [word for name, value in options if value is not None for word in (name, value)] + list(one.asked or ())


def _found_by(one: Judged) -> str:
    return one.run.id if one.run else one.source or one.label


def _command(*words: Any) -> str:
    return "python -m prunedm " + shlex.join(map(str, words))


def _place(run: Run) -> Path:
    """The run's folder: its whole path where it does not lie in ``runs``, which the commands look into."""
    return Path("runs") / run.id if not _elsewhere(run) else run.folder.absolute()


def _elsewhere(run: Run | None) -> list[str]:
    """The option that runs which do not lie in ``runs`` need."""
    folder = run.folder.parent.absolute() if run else None
    return [] if folder in (None, Path("runs").absolute()) else ["--runs-dir", str(folder)]
