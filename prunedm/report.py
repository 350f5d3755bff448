"""What was found, in words and as files: sentences, CSV and Markdown. The page is report_page.py's. Knows no torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

from . import comparison, figures
from .comparison import Judged
from .figures import FLOOR_FIGURES, FLOORS, RATIOS, SIZES
from .records import VARIANT_LABELS, Evaluation
from .store import Run


def figure_rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """The table of figures of one run: (label, variant -> text with the difference from dense). Absent is 'n/a'."""
    dense = results.get("dense")
    judged = [Judged(name, found, name, dense=None if name == "dense" else dense) for name, found in results.items()]
    return [(label, dict(zip(results, cells))) for label, cells in figures.rows(judged)]


def headline(results: dict[str, dict[str, Any]]) -> str:
    """What happened, in one or two plain sentences."""
    dense = results.get("dense")
    last = results.get("nm") or results.get("structured")
    if not dense or not last:
        return "Only the dense model has been evaluated so far."
    kept = last["nonzero_parameters"] / dense["nonzero_parameters"]
    text = f"{1 - kept:.0%} of the dense model's weights are gone"
    if dense.get("validation_loss") and last.get("validation_loss"):
        loss = last["validation_loss"] / dense["validation_loss"] - 1
        text += f"; the noise-prediction error changed by {loss:+.1%}"
    if dense.get("fid") is not None and last.get("fid") is not None:
        text += f" and {last['fid_extractor']} from {dense['fid']:.2f} to {last['fid']:.2f}"
    text += _call_time(Judged("", last, dense=dense))
    if "nm" in results and "cpu" in str(results["nm"].get("device")):
        text += ". N:M masks save no time on a CPU: they save weights"
    return text + "."


def _call_time(one: Judged) -> str:
    """The time of a UNet call against the dense model's, or why the two do not compare; empty without times."""
    apart, ratio = comparison.timed_apart(one), comparison.efficiency(one)["latency"]
    if apart:
        return f". How a UNet call's time compares with the dense model's is not known: it was {apart}"
    return "" if ratio is None else f". A UNet call takes {ratio:.2f} times the dense model's time here"


def summary(run: Run) -> dict[str, Any]:
    """What ``run --json`` prints."""
    state = run.state()
    found: dict[str, Any] = {"run": run.id, "folder": str(run.folder.resolve()), "status": state.status}
    found |= {"stage": state.stage, "seconds": round(state.seconds, 2), "variants": run.evaluation()}
    return found | ({"error": state.error} if state.error else {})


def stage_one(found: dict[str, Any]) -> str:
    """What stage 1 did, in words. Runs of earlier versions recorded less."""
    rounds = f" in {found['rounds']} rounds" if found.get("rounds", 1) > 1 else ""
    layout = f", layout {found['layout']}" if "layout" in found else ""
    achieved = f"{found.get('achieved', found['reduction']):.1%} of the {found.get('of', 'parameters')}"
    text = f"Stage 1 ({found['method']}{layout}) removed {achieved}{rounds}; target {found['target']:.1%}."
    if "eligibility" in found:
        before, after = found["eligibility"]["before"], found["eligibility"]["after"]
        text += (
            f" Of {after['layers']} layers {after['eligible']} are eligible for N:M (before: {before['eligible']}), "
            f"{after['tensor_core_ready']} tensor-core ready (before: {before['tensor_core_ready']})."
        )
    return text


def groups(judged: Sequence[Judged]) -> list[tuple[str, list[Judged]]]:
    """The models by their run, in the order given; one that belongs to no run stands alone under its label."""
    found: dict[Any, list[Judged]] = {}
    for one in judged:
        found.setdefault(one.run.folder if one.run else id(one), []).append(one)
    return [(own[0].run.id if own[0].run else own[0].label, own) for own in found.values()]


def results_of(own: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Variant to figures of one run's models, with the dense ones that differences are taken from."""
    dense = next((one.dense for one in own if one.dense is not None), None)
    found = {one.variant: one.figures for one in own if one.variant}
    return ({"dense": dense} if dense is not None else {}) | found


def sentences(own: Sequence[Judged]) -> list[str]:
    """What is to be said of the models of one run: what happened, whether it means something, what to beware of."""
    results = results_of(own)
    found = [headline(results)] if results else []
    told: dict[str, list[str]] = {}  # what holds for several is said once
    for one in own:
        for text in (comparison.verdict(one), one.get("few_images"), one.get("quality_absent")):
            if text:
                told.setdefault(text, []).append(VARIANT_LABELS.get(one.variant or "", one.label))
    return found + [f"{', '.join(names)}: {text}." for text, names in told.items()]


# --- CSV -------------------------------------------------------------------------------------
SAMPLING = ("sampler", "steps", "eta", "seed", "extractor", "weights", "data", "digest")
PLAIN = tuple(f.name for f in dataclasses.fields(Evaluation) if "dict" not in str(f.type) and "list" not in str(f.type))
FRONTS = {f"front.{q.key}.{c.key}": (q.key, c.key) for q in comparison.QUALITIES for c in comparison.COSTS}
COLUMNS = (
    "run",
    "variant",
    "label",
    *(f"sampling.{key}" for key in SAMPLING),
    *PLAIN,
    *(f"sizes.{name}" for name in SIZES),
    *(f"noise_floor.{kind}.{key}" for kind in FLOORS for key in FLOOR_FIGURES),
    *(f"ratio.{name}" for name in RATIOS),
    *FRONTS,
)
WORDS = {"fid": "frechet_distance", "kid": "kernel_distance", "isc": "inception_score"}
OWN_NAMES = re.compile(rf"(?<![a-z])({'|'.join(WORDS)})(?=[._]|$)")


def column(key: str) -> str:
    """The header of a column: the record's key, but FID, KID and ISC are names of Inception's figures alone."""
    return OWN_NAMES.sub(lambda found: WORDS[found[1]], key)


FORMULA = ("=", "+", "-", "@")  # what makes a spreadsheet run a cell


def csv_text(judged: Sequence[Judged]) -> str:
    """One row a model, one column a figure (:data:`COLUMNS`, always all); an absent figure is an empty cell."""
    output = io.StringIO()
    writer = csv.DictWriter(output, COLUMNS, lineterminator="\n")
    writer.writerow({key: column(key) for key in COLUMNS})
    fronts = comparison.fronts(judged)
    for one in judged:
        found = {key: one.get(key) for key in COLUMNS}
        found |= {"run": one.run.id if one.run else None, "variant": one.variant, "label": one.label}
        found |= {f"ratio.{name}": value for name, value in comparison.efficiency(one).items() if name in RATIOS}
        found |= {f"front.{q.key}.{c.key}": "yes" if on else "no" for q, c, on in fronts.get(id(one), [])}
        writer.writerow({key: _safe(value) for key, value in found.items()})
    return output.getvalue()


def _safe(value: Any) -> Any:
    """Text that no spreadsheet takes for a formula, and no reader for two lines; labels come from users."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


# --- Markdown --------------------------------------------------------------------------------
def markdown(judged: Sequence[Judged]) -> str:
    """What happened, the figures, what they hold for, what differences mean, and who is on a front."""
    names = [one.label for one in judged]
    parts = ["# PruneDM report"]
    for name, own in groups(judged):
        parts += [f"## {plain(name)}", "\n".join(f"- {plain(text)}" for text in sentences(own)) or "No figures yet."]
    parts += ["## Figures", _table(["", *names], [[label, *cells] for label, cells in figures.rows(judged)])]
    parts += ["## What the figures hold for", _table(["", *names], _flat(figures.condition_rows(judged)))]
    floors, ratios = figures.floor_table(judged), figures.efficiency_rows(judged)
    if floors:
        parts += ["## Noise floor", _table(*floors)]
    if ratios:
        parts += ["## Against the dense model", _table(["", *RATIOS.values()], ratios)]
    fronts = _front_rows(judged)
    if fronts:
        parts += ["## Pareto fronts", _table(["quality", "cost", "on the front", "beaten"], fronts)]
    return "\n\n".join(parts) + "\n"


def _front_rows(judged: Sequence[Judged]) -> list[list[str]]:
    found = []
    for plot in comparison.pareto(judged):
        on = [one.label for one, is_on in zip(plot.judged, plot.on_front) if is_on]
        off = [one.label for one, is_on in zip(plot.judged, plot.on_front) if not is_on]
        found.append([plot.quality.label, plot.cost.label, ", ".join(on), ", ".join(off) or "none"])
    return found


def _flat(found: Sequence[tuple[str, list[str]]]) -> list[list[str]]:
    return [[name, *cells] for name, cells in found]


def plain(text: str) -> str:
    """Foreign text in Markdown as it is: one line, no markup, no link and no picture, no cell's end."""
    text = " ".join(str(text).split()).replace("\\", "\\\\")
    for mark in ("|", "`", "*", "#", "!["):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("](", "]\\(").replace("&", "&amp;").replace("<", "&lt;")


def _table(head: Sequence[str], found: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *found]
    return "\n".join(f"| {' | '.join(plain(cell) for cell in line)} |" for line in lines)
