"""Sections of the report's page about the runs: training, masks, recipe, lineage, environment."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import charts, environment, recipe, report
from .comparison import Judged
from .layer_order import in_order
from .records import NOT_MASKED, STAGE_LABELS, VARIANT_LABELS, LayerReport
from .report_html import Html, bullets, chart, folded, join, missing, paragraph, table, tag
from .report_sections import BROKEN, Page, form, said
from .stage_recipes import parse_pattern
from .steps import Steps
from .store import VARIANT_RECORD, Run, read_json

CURVES = ("loss", "entropy", "flips", "top_probability", "tau")
TABLE_POINTS = 12  # of a stage, in the table beside a curve
LAYER_DEFAULTS = {f.name: f.default for f in dataclasses.fields(LayerReport) if f.default is not dataclasses.MISSING}


# --- training --------------------------------------------------------------------------------
def training(page: Page) -> Html:
    return page.each_run(_curves) or missing("These models were not trained by a run.")


def _curves(run: Run) -> Html:
    records = [r for r in run.metrics() if isinstance(r, dict) and "stage" in r and "step" in r]
    records = [r | {"stage": charts.plain(r["stage"])} for r in records]
    steps, parts = Steps.of(records), []
    for key in CURVES:
        own = [r for r in records if isinstance(r.get(key), int | float)]
        if own:
            drawn = charts.curve(steps, key, STAGE_LABELS, run.id, charts.Look(log=key == "loss"))
            title = charts.LABELS.get(key, key)
            stages = ", ".join(STAGE_LABELS.get(s, s) for s in dict.fromkeys(r["stage"] for r in own))
            alt = f"{title} of {run.id} over {len(own)} recorded steps ({stages})"
            parts.append(chart(drawn, title[0].upper() + title[1:], alt, _points(own, key)))
    return tag("div", join(*parts), class_="pair") if parts else missing(f"{run.id} has no record of its training.")


def _points(records: list[dict[str, Any]], key: str) -> Html:
    """Some steps of each stage, the last one always."""
    rows = []
    for stage in dict.fromkeys(r["stage"] for r in records):
        own = [r for r in records if r["stage"] == stage]
        every = max(1, -(-len(own) // TABLE_POINTS))
        kept = own[::-1][::every][::-1]
        rows += [[STAGE_LABELS.get(stage, stage), r["step"], f"{r[key]:.5g}"] for r in kept]
    return table(["stage", "step", charts.LABELS.get(key, key)], rows, charts.LABELS.get(key, key))


# --- masks -----------------------------------------------------------------------------------
def sparsity(page: Page) -> Html:
    """Of each model every layer: its density, why it is dense, its compliance, and which positions are kept."""
    found = []
    for one in page.shown:
        name = page.name(one)
        try:
            layers = one.layers or (one.run.layers(one.variant or "nm") if one.run else [])
            if layers or one.variant == "nm" or one.get("pattern"):
                found.append((name, _layers(name, one, [LAYER_DEFAULTS | layer for layer in in_order(layers)])))
        except BROKEN as error:
            found.append((name, missing(f"The layers of {name} cannot be shown: {said(error)}")))
    heads = [tag("h3", name) if len(found) > 1 else Html("") for name, _ in found]
    parts = [part for head, (_, content) in zip(heads, found) for part in (head, content)]
    return join(*parts) if parts else missing("No layers of these models were recorded.")


def _layers(name: str, one: Judged, layers: list[dict[str, Any]]) -> Html:
    masked = [la for la in layers if la["compliance"] is not None]
    parts = []
    if one.get("pattern"):
        kept = form(one.get("compliance"), "{:.1%}")
        text = f"Pattern {one.get('pattern')}: {form(one.get('masked_layers'), '{:,}')} layers masked, "
        text += f"{len(one.get('skipped_layers') or [])} left dense; compliance {kept}, read from the saved file."
        parts.append(paragraph(text))
    if not layers:
        return join(*parts, missing(f"{name} has no record of its layers."))
    if not masked and not one.get("pattern"):
        parts.append(paragraph(_unmasked(layers)))
    reasons = Counter(la["reason"] for la in layers if la["reason"])
    if reasons:
        lines = [f"{count} {'layer' if count == 1 else 'layers'}: {why}" for why, count in reasons.most_common()]
        parts += [paragraph("Left dense, and why:"), bullets(lines)]
    parts.append(folded(f"All {len(layers)} layers", _layer_table(layers, name)))
    parts += list(_mask_charts(name, masked))
    return join(*parts)


def _unmasked(layers: list[dict[str, Any]]) -> str:
    """What a model without masks keeps, and where masks could go."""
    known = [(la["density"], math.prod(la["shape"])) for la in layers if la["density"] is not None]
    weights = sum(size for _, size in known)
    density = form(sum(share * size for share, size in known) / weights if weights else None, "{:.1%}")
    free = sum(la["reason"] == NOT_MASKED for la in layers)
    return f"Nothing is masked; density {density}. {free} of {len(layers)} layers are eligible for N:M masks."


def _layer_table(layers: list[dict[str, Any]], name: str) -> Html:
    head = ["layer", "shape", "pattern", "groups", "compliance", "density", "tensor cores", "why dense"]
    rows = [
        [
            la["layer"],
            "x".join(map(str, la["shape"])),
            la["pattern"],
            form(la["groups"] or None, "{:,}"),
            form(la["compliance"], "{:.1%}"),
            form(la["density"], "{:.1%}"),
            "ready" if la["tensor_core_ready"] else "no",
            la["reason"],
        ]
        for la in layers
    ]
    return table(head, rows, f"Layers of {name}", kind="tall")


def _mask_charts(name: str, masked: list[dict[str, Any]]) -> Iterator[Html]:
    whole = [la for la in masked if la["position_balance"]]
    if whole:
        widest = max(len(la["position_balance"]) for la in whole)
        head = ["layer", "compliance", "density", *(f"position {i}" for i in range(widest))]
        rows = [[la["layer"], *(f"{v:.1%}" for v in (la["compliance"], la["density"], *la["position_balance"]))]
                for la in whole]  # fmt: skip
        data = table(head, [row + [""] * (len(head) - len(row)) for row in rows], "Compliance by layer", kind="tall")
        alt = f"Compliance, density and position balance of {len(whole)} masked layers of {name}"
        note = "Even is 1/M of the kept weights on each position: white. Blue is less, orange more, full a quarter off."
        yield chart(
            charts.compliance_heatmap(charts.plain(whole), "layers"), "Compliance and positions", alt, data, note
        )
    for text in dict.fromkeys(la["pattern"] for la in masked if la["pattern_shares"]):
        yield _kept_sets(name, text, [la for la in masked if la["pattern"] == text and la["pattern_shares"]])


def _kept_sets(name: str, text: str, layers: list[dict[str, Any]]) -> Html:
    """How often each set of kept positions is chosen, by layer."""
    n, m = parse_pattern(text) or (1, 2)
    if any(len(la["pattern_shares"]) != math.comb(m, n) for la in layers):
        raise ValueError(f"the shares of the kept sets do not fit {text}")
    drawn = charts.kept_sets_heatmap(layers, n, m, "kept sets")
    columns = drawn["data"][0]["x"]
    rows = [[la["layer"], *(f"{share:.1%}" for share in la["pattern_shares"])] for la in layers]
    data = table(["layer", *columns], rows, f"Kept sets of {text}", kind="tall")
    alt = f"Share of the groups that keep each of the {len(columns)} sets of {n} of {m} positions in {len(layers)} "
    alt += f"layers of {name}"
    note = f"1 is kept. Even is {1 / len(columns):.1%} of a layer's groups: white. Blue is less, orange more."
    return chart(drawn, f"Which {n} of {m} positions are kept", alt, data, note)


def choices(page: Page) -> Html | None:
    """Loss under the initial masks, and the patterns chosen for a budget; nothing where no run has either."""
    return page.each_run(lambda run: join(_baseline(run), _allocation(run)) or None) or None


def _baseline(run: Run) -> Html:
    """What the initial masks cost before any learning, by timestep bin."""
    found = next((e for e in reversed(run.events()) if e.get("kind") == "baseline"), None)
    if found is None:
        return Html("")
    count, steps = len(found["dense"]), found.get("timesteps")
    names = charts.bin_names(count, steps) if steps else [f"bin {b} of {count}" for b in range(1, count + 1)]
    pairs = zip([*found["dense"], found["dense_mean"]], [*found["m0"], found["m0_mean"]])
    rows = [[n, form(d, "{:.5f}"), form(m, "{:.5f}")] for n, (d, m) in zip([*names, "all"], pairs)]
    data = table(["timesteps", "dense weights", "initial masks"], rows, "Loss under the initial masks")
    note = f"{Path(found['initial']).name} masks, {found['images']} held-out images, before any learning."
    if not steps:
        return join(tag("h4", "Loss under the initial masks"), paragraph(note, "note"), data)
    alt = f"Noise-prediction error in {count} timestep bins, dense weights and initial masks"
    return chart(charts.loss_by_bin(found, "baseline"), "Loss under the initial masks", alt, data, note)


def _allocation(run: Run) -> Html:
    """The budgeted choice of patterns with the sensitivities it rests on."""
    found = run.allocation()
    if not found:
        return Html("")
    layers = in_order(found["layers"])
    patterns = list(dict.fromkeys(p for la in layers for p in la["increase"]))
    rows = [[la["layer"], la["chosen"], *(form(la["increase"].get(p), "{:+.5f}") for p in patterns)] for la in layers]
    data = table(["layer", "chosen", *patterns], rows, "Loss increase by layer and pattern", kind="tall")
    note = f"Density asked for {found['density']:.1%}, kept {found['kept']:.1%}. Loss increase with that layer alone "
    note += f"masked ({found['images']} held-out images); a dot is the pattern chosen."
    alt = f"Loss increase of {len(rows)} layers under {len(patterns)} patterns, and the pattern chosen for each"
    drawn = charts.sensitivity_heatmap(charts.plain(layers), "allocation")
    drawn["layout"]["yaxis"] |= {"autorange": False, "range": [len(rows) - 0.5, -0.5]}  # no rows beyond the layers
    return chart(drawn, "Patterns chosen for the budget", alt, data, note)


# --- recipe and lineage ------------------------------------------------------------------------
def recipes(page: Page) -> Html:
    """The first run's recipe in full, and in what the others differ."""
    if not page.runs:
        return missing("These models come from no run, so there is no recipe.")
    first, *others = page.runs
    parts = [paragraph(f"Of {first.id}:")] if others else []
    parts.append(tag("pre", tag("code", _yaml(first)), class_="recipe"))
    rows: dict[str, dict[str, str]] = {}
    for run in others:
        try:
            found = recipe.differences(first.recipe(), run.recipe())
        except BROKEN as error:
            parts.append(missing(f"The recipe of {run.id} cannot be compared: {said(error)}"))
            continue
        for path, (a, b) in found.items():
            rows.setdefault(path, {first.id: _value(a)})[run.id] = _value(b)
    if rows:
        names = [run.id for run in page.runs]
        lines = [[path, *(Html("") if n not in v else v[n] for n in names)] for path, v in rows.items()]
        note = "An empty cell is as in the first run."
        parts += [tag("h3", "Differences"), paragraph(note, "note"), table(["field", *names], lines, "Differences")]
    return join(*parts)


def _value(value: Any) -> str:
    """As the recipe's file would say it."""
    return value if isinstance(value, str) else json.dumps(value)


def _yaml(run: Run) -> str:
    """The recipe with every default written out; as it stands in the file where this version cannot read it."""
    try:
        return run.recipe().to_yaml()
    except ValueError:
        return (run.folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace")


def lineage(page: Page) -> Html:
    return page.each_run(_lineage) or missing("These models come from no run; their origin is not recorded here.")


def _lineage(run: Run) -> Html:
    """From the source to the last variant: what each was made from, and how."""
    rows = []
    for name in run.variants():
        record = read_json(run.variant(name) / VARIANT_RECORD)
        record = record if isinstance(record, dict) else {}
        parent = {"dense": _source(run), "structured": "dense"}.get(name) or record.get("parent")
        rows.append([VARIANT_LABELS[name], VARIANT_LABELS.get(parent or "", parent), _done(run, name, record)])
    if not rows:
        return missing(f"{run.id} has no finished variant.")
    chain = " → ".join(str(part) for part in (_source(run), *(row[0] for row in rows)) if part)
    return join(paragraph(chain), table(["variant", "made from", "by"], rows, f"Lineage of {run.id}"))


def recipe_of(run: Run) -> recipe.Recipe | None:
    """The run's recipe, or None where this version cannot read it."""
    try:
        return run.recipe()
    except ValueError:
        return None


def _source(run: Run) -> str | None:
    spec = recipe_of(run)
    return spec.model.source if spec else None


def _done(run: Run, name: str, record: dict[str, Any]) -> str:
    """What a stage did to make a variant."""
    spec = recipe_of(run)
    if name == "dense":
        return "taken as it was"
    if name == "structured":
        text = report.stage_one(record) if "reduction" in record else "Stage 1."
        return text + (f" Then {spec.prune.finetune_steps} steps of fine-tuning." if spec else "")
    text = f"Masks by {record.get('method', 'a method not recorded')}, pattern {record.get('pattern', 'not recorded')}"
    steps = f"; {spec.mask.steps} mask steps, {spec.mask.recover_steps} steps of recovery" if spec else ""
    return f"{text}{steps}; masks baked into the weights."


OTHER = " This page was written elsewhere, or by other versions."


def surroundings(page: Page) -> Html:
    """Machine and versions of who evaluated and of who wrote the page; torch is asked, so only now is it loaded."""
    here = environment.versions() | environment.machine()
    found = _evaluated_on(page)
    columns = {"this page": here} if not found else {}
    note = "Of the machine that wrote this page. Measured figures name the device that they were measured on."
    if found:
        note = "Of the machine that evaluated the models."
        note += " It wrote this page too." if all(one == here for _, one in found) else OTHER
        columns = {f"evaluated: {', '.join(names)}" if len(found) > 1 else "evaluated": one for names, one in found}
        columns |= {"this page": here} if any(one != here for _, one in found) else {}
    what = dict.fromkeys(key for one in columns.values() for key in one)
    rows = [[key, *(one.get(key, "not recorded") for one in columns.values())] for key in what]
    head = ["what", *columns] if len(columns) > 1 else ["what", "found"]
    return join(paragraph(note, "note"), table(head, rows, "Environment"))


def _evaluated_on(page: Page) -> list[tuple[list[str], dict[str, str]]]:
    """The environments that the models were evaluated in, each with the models' names; older runs recorded none."""
    found: list[tuple[list[str], dict[str, str]]] = []
    for one in page.shown:
        made = one.get("made_by")
        if not made:
            continue
        own = made.get("versions", {}) | made.get("machine", {})
        names = next((names for names, other in found if other == own), None)
        if names is None:
            found.append((names := [], own))
        names.append(page.name(one))
    return found
