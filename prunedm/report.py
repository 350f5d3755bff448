"""One self-contained HTML page of a run: figures, same-seed samples, layers, recipe, environment."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from . import environment, pictures
from .records import VARIANT_LABELS
from .store import Run, write_atomic

SHOWN_SEEDS, ZOOM = 8, 3
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1f2b}
table{border-collapse:collapse;margin:1rem 0;width:100%}
th,td{border-bottom:1px solid #d8dce3;padding:.3rem .6rem;text-align:right}
th:first-child,td:first-child{text-align:left}
pre{background:#f4f6f9;padding:1rem;overflow:auto}
img{image-rendering:pixelated;max-width:100%}
"""


def figure_rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """The metric table: (label, variant -> text with the difference from dense). Absent is 'n/a'."""
    extractor = next((r["fid_extractor"] for r in results.values() if r.get("fid_extractor")), "FD")
    count = next((r["fid_images"] for r in results.values() if r.get("fid_images")), "?")
    timed = next((r for r in results.values() if r.get("latency_ms") is not None), {})
    where = f"{timed.get('device')}, {timed.get('dtype')}, batch {timed.get('batch')}"
    rows = [
        ("Parameters", "parameters", "{:,.0f}"),
        ("Non-zero parameters", "nonzero_parameters", "{:,.0f}"),
        ("MACs an image (dense arithmetic)", "macs", "{:,.0f}"),
        ("MACs an image (N:M hardware, theoretical)", "macs_sparse", "{:,.0f}"),
        ("Bytes of the weights on disk", "bytes", "{:,.0f}"),
        ("Validation loss", "validation_loss", "{:.5f}"),
        (f"{extractor} ({count} images)", "fid", "{:.3f}"),
        (f"Latency of a UNet call, ms (median; {where})", "latency_ms", "{:.1f}"),
    ]
    return [(label, {v: _cell(results, v, key, form) for v in results}) for label, key, form in rows]


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
    if dense.get("latency_ms") and last.get("latency_ms"):
        share = last["latency_ms"] / dense["latency_ms"]
        text += f". A UNet call takes {share:.2f} times the dense model's time here"
    if "nm" in results and "cpu" in str(results["nm"].get("device")):
        text += ". N:M masks save no time on a CPU: they save weights"
    return text + "."


def summary(run: Run) -> dict[str, Any]:
    """What ``run --json`` prints."""
    state = run.state()
    found: dict[str, Any] = {"run": run.id, "folder": str(run.folder.resolve()), "status": state.status}
    found |= {"stage": state.stage, "seconds": round(state.seconds, 2), "variants": run.evaluation()}
    return found | ({"error": state.error} if state.error else {})


def write(run: Run) -> None:
    """``report.html`` in the run folder."""
    write_atomic(run.report_path, render(run).encode())


def render(run: Run) -> str:
    """The page as text; it asks the web for nothing."""
    results, recipe = run.evaluation(), run.recipe()
    labels = [VARIANT_LABELS[v] for v in results]
    table = _table(["", *labels], [[label, *cells.values()] for label, cells in figure_rows(results)])
    setting = list((environment.versions() | environment.machine()).items())
    sections = [
        f"<h1>PruneDM report: {html.escape(run.id)}</h1><p>{html.escape(headline(results))}</p>",
        f"<h2>Figures</h2>{table}{_pruned(run)}",
        f"<h2>Samples from the same seeds</h2>{_grid(run)}",
        _sparsity(run, results),
        _baseline(run),
        _allocation(run),
        f"<h2>Recipe</h2><pre>{html.escape(recipe.to_yaml())}</pre>",
        f"<h2>Environment</h2>{_table(['', ''], setting)}",
        "<h2>Again</h2><pre>python -m prunedm run recipe.yaml</pre>",
    ]
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' "
        f"content='width=device-width'><title>{html.escape(run.id)}</title><style>{STYLE}</style>"
        f"<body>{''.join(sections)}</body></html>"
    )


def _cell(results: dict[str, dict[str, Any]], variant: str, key: str, form: str) -> str:
    value, dense = results[variant].get(key), results.get("dense", {}).get(key)
    if value is None:
        return "n/a"
    difference = f" ({value / dense - 1:+.1%})" if variant != "dense" and dense else ""
    return form.format(value) + difference


def _grid(run: Run) -> str:
    rows = []
    for name in run.variants():
        images, _ = pictures.read_sheet(run.sheet(name))
        cells = "".join(
            f"<img alt='{VARIANT_LABELS[name]} sample, seed {i}' src='{_data_url(image)}'>"
            for i, image in enumerate(images[:SHOWN_SEEDS])
        )
        rows.append([VARIANT_LABELS[name], cells])
    head = ["", f"seeds 0 to {SHOWN_SEEDS - 1}"]
    return _table(head, rows, raw=True)


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


def _pruned(run: Run) -> str:
    """Stage 1 in a sentence, with the reason where its target was missed."""
    found = next((e["report"] for e in reversed(run.events()) if e["kind"] == "pruned"), None)
    if found is None:
        return ""
    text = stage_one(found)
    return f"<p>{html.escape(text)} {html.escape(found['reason'])}</p>"


def _sparsity(run: Run, results: dict[str, dict[str, Any]]) -> str:
    if "nm" not in results:
        return ""
    figures = results["nm"]
    rows = [
        [
            layer["layer"],
            "x".join(map(str, layer["shape"])),
            layer["pattern"],
            f"{layer['compliance']:.0%}" if layer["compliance"] is not None else "",
            f"{layer['density']:.0%}" if layer["density"] is not None else "",
            layer["reason"],
        ]
        for layer in run.layers()
    ]
    return (
        f"<h2>N:M layers</h2><p>Pattern {figures['pattern']}, {figures['masked_layers']} layers masked, "
        f"{len(figures['skipped_layers'])} left dense, compliance {figures['compliance']:.1%} "
        "(read from the saved file).</p>"
        + _table(["layer", "shape", "pattern", "compliance", "density", "why dense"], rows)
    )


def _baseline(run: Run) -> str:
    """What the initial masks cost before any learning, by timestep bin."""
    found = next((e for e in reversed(run.events()) if e["kind"] == "baseline"), None)
    if found is None:
        return ""
    pairs = zip([*found["dense"], found["dense_mean"]], [*found["m0"], found["m0_mean"]])
    names = [*(f"bin {b} of {len(found['dense'])}" for b in range(1, len(found["dense"]) + 1)), "all"]
    rows = [
        [n, "n/a" if d is None else f"{d:.5f}", "n/a" if m is None else f"{m:.5f}"] for n, (d, m) in zip(names, pairs)
    ]
    return (
        "<h2>Loss under the initial masks</h2>"
        f"<p>{html.escape(Path(found['initial']).name)}, {found['images']} held-out images, before any learning; "
        "timestep bins from clean to noisy.</p>" + _table(["timesteps", "dense", "initial masks"], rows)
    )


def _allocation(run: Run) -> str:
    """The budgeted choice of patterns with the sensitivities it rests on."""
    found = run.allocation()
    if not found:
        return ""
    patterns = list(dict.fromkeys(p for layer in found["layers"] for p in layer["increase"]))
    rows = [
        [la["layer"], la["chosen"], *(f"{la['increase'][p]:+.5f}" if p in la["increase"] else "" for p in patterns)]
        for la in found["layers"]
    ]
    return (
        "<h2>Patterns chosen for the budget</h2>"
        f"<p>Density asked for {found['density']:.1%}, kept {found['kept']:.1%}. "
        f"Loss increase with that layer alone masked ({found['images']} held-out images).</p>"
        + _table(["layer", "chosen", *patterns], rows)
    )


def _table(head: list[str], rows: list[Any], raw: bool = False) -> str:
    def show(value: Any) -> str:
        return str(value) if raw else html.escape(str(value))

    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(f"<tr>{''.join(f'<td>{show(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _data_url(image) -> str:
    buffer = io.BytesIO()
    pictures.enlarged(image, ZOOM).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
