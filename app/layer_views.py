"""A model on disk, looked into: its figures, weights by block, each layer, and its config."""

from __future__ import annotations

import fnmatch
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from app import model_files, parts
from prunedm import charts, model_charts
from prunedm.layer_order import in_order

KEPT = "#56B4E9"
BAR = 26  # pixels of a block
FEW = 0.001  # share of zeros that are chance, and not shown


def layers(path: Path) -> None:
    """A model folder: its figures, blocks, layers and config."""
    with parts.said():
        found = model_files.inspect(path)
        figures(found)
        chart(in_order(found["layers"]), str(path))
        table(found, str(path))
        config(path)


def verified(path: Path) -> None:
    """What a file or folder keeps of what it claims, with each layer."""
    with st.container(border=True), parts.said():
        found = model_files.inspect(path)
        figures(found)
        if not found["problems"] and not found["claimed_layers"]:
            st.success(f"Every layer was read just now ({found['kind']}); none claims an N:M pattern.")
        table(found, str(path))


def figures(found: dict[str, Any]) -> None:
    """The figures of a model on disk, and whether it keeps its patterns."""
    boxes = [
        ("Weights", short_number(found["weights"])),
        ("Density", f"{found['density']:.1%}"),
        ("N:M layers", f"{found['claimed_layers']}"),
        ("Tensor-core ready", f"{found['tensor_core_ready_layers']}"),
    ]
    for column, (label, value) in zip(st.columns(4), boxes):
        column.metric(label, value, border=True)
    if found["problems"]:
        st.error("\n\n".join(parts.plain(problem) for problem in found["problems"]))
    elif found["claimed_layers"]:
        st.success("Every N:M layer keeps its pattern: read from the file just now.")


def short_number(count: int) -> str:
    """``216``, ``58.4 k``, ``3.47 M``."""
    if count < 1000:
        return str(count)
    value, unit = (count / 1e6, "M") if count >= 1e6 else (count / 1e3, "k")
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f} {unit}"


# --- blocks ------------------------------------------------------------------------------------------
@dataclass
class Block:
    """Layers that stand together: how many, their weights and those that are not zero, and the widths they put out."""

    name: str
    layers: int = 0
    weights: int = 0
    kept: float = 0
    widths: tuple[int, int] = (0, 0)

    @property
    def label(self) -> str:
        low, high = self.widths
        return f"{charts.short(self.name)} · {low if low == high else f'{low} to {high}'} ch"

    @property
    def told(self) -> str:
        share = self.kept / max(1, self.weights)
        return f"{self.name}: {self.weights:,} weights in {self.layers} layers, {share:.0%} not zero"


def block_of(layer: str) -> str:
    """``down_blocks.1`` of ``down_blocks.1.resnets.0.conv1``."""
    found = re.match(r"[^.]+_blocks\.\d+|[^.]+", layer)
    return found[0] if found else layer


def blocks(rows: list[dict[str, Any]]) -> list[Block]:
    """The blocks of a model, in the order of their first layers. A block's width is that of its convolutions."""
    found: dict[str, Block] = {}
    for row in rows:
        block = found.setdefault(block_of(row["layer"]), Block(block_of(row["layer"])))
        count = math.prod(row["shape"])
        block.layers, block.weights = block.layers + 1, block.weights + count
        block.kept += count * row["density"]
        if len(row["shape"]) > 2 or not block.widths[0]:
            out, (low, high) = row["shape"][0], block.widths
            block.widths = (min(low or out, out), max(high, out))
    return list(found.values())


def chart(rows: list[dict[str, Any]], view: str) -> None:
    """A bar of weights for each block."""
    found = blocks(rows)
    total = max(1, sum(block.weights for block in found))
    alt = "Weights of each block. " + "; ".join(block.told for block in found)
    st.markdown("**Weights of convolutions and linear layers, by block**")
    st.plotly_chart(bars(found, total, view), key=f"blocks {view}", alt=alt, config={"displayModeBar": False})


def bars(found: list[Block], total: int, view: str) -> charts.Figure:
    """Weights of each block, the first on top; those that are zero hatched behind those that are kept."""
    names = charts.plain([block.label for block in found])
    kept = [round(block.kept) for block in found]
    zero = [block.weights - count for block, count in zip(found, kept)]
    told = charts.plain([block.told for block in found])
    bar = {"type": "bar", "orientation": "h", "y": names, "hovertext": told}
    bar["hovertemplate"] = "%{hovertext}<extra></extra>"
    shares = [f"{short_number(block.weights)} ({block.weights / total:.0%})" for block in found]
    has_zeros = sum(zero) > FEW * total
    traces = [bar | {"name": "not zero", "x": kept, "marker": {"color": KEPT}}]
    if has_zeros:
        hatched = {"color": charts.GREY, "pattern": model_charts.HATCHING | {"shape": "/"}}
        traces.append(bar | {"name": "zero", "x": zero, "marker": hatched})
    traces[-1] |= {"text": shares, "textposition": "outside", "cliponaxis": False}
    drawn = charts.layout("", "", view) | {"barmode": "stack", "height": 60 + BAR * len(found), "showlegend": has_zeros}
    drawn["margin"] = {"l": 10, "r": 10, "t": 30 if has_zeros else 5, "b": 25}
    drawn["xaxis"] |= {"range": [0, 1.6 * max(block.weights for block in found)], "tickformat": "~s", "nticks": 5}
    drawn["legend"] |= {"traceorder": "normal"}
    drawn["yaxis"] |= {"autorange": "reversed", "type": "category", "dtick": 1, "showgrid": False}
    return {"data": traces, "layout": drawn}


# --- layers ------------------------------------------------------------------------------------------
def table(found: dict[str, Any], key: str) -> None:
    """All layers, sortable, folded; of these, those whose names match what is typed."""
    rows, total = in_order(found["layers"]), max(1, found["weights"])
    with st.expander(f"Layers ({len(rows)})"):
        wanted = st.text_input(
            "Filter by name",
            key=f"filter {key}",
            placeholder="conv1, or up_blocks.*",
            help="part of a name, or * and ?",
        )
        shown = [row_of(row, total) for row in rows if matches(row["layer"], wanted)]
        if wanted.strip():
            count = sum(row["weights"] for row in shown)
            st.caption(f"{len(shown)} of {len(rows)} layers, {count:,} weights ({count / total:.1%})")
        st.dataframe(shown, hide_index=True, column_config=columns(rows, total), placeholder="n/a", alt="All layers")


def columns(rows: list[dict[str, Any]], total: int) -> dict[str, Any]:
    """How the numbers are shown; they sort as numbers."""
    number, largest = st.column_config.NumberColumn, max(math.prod(row["shape"]) for row in rows) / total
    return {
        "layer": st.column_config.TextColumn(width=240),
        "weights": number(format="localized"),
        "share": st.column_config.ProgressColumn("share of weights", format="percent", max_value=largest),
        "compliance": number(format="percent"),
        "density": number(format="percent"),
    }


def matches(layer: str, wanted: str) -> bool:
    """Whether a name holds a text, or fits a pattern with * or ?, in any case."""
    name, text = layer.lower(), wanted.strip().lower()
    return fnmatch.fnmatchcase(name, text) if set(text) & set("*?[") else text in name


def row_of(row: dict[str, Any], total: int) -> dict[str, Any]:
    count = math.prod(row["shape"])
    return {
        "layer": row["layer"],
        "shape": " x ".join(map(str, row["shape"])),
        "weights": count,
        "share": count / total,
        "pattern": row["claimed"] or "dense",
        "compliance": row["compliance"],
        "density": row["density"],
        "fits N:M": row["pattern"] if row["eligible"] else "no",
        "tensor cores": "ready" if row["tensor_core_ready"] else "no",
        "why not": row["reason"],
    }


def config(path: Path) -> None:
    """A model folder's own configs, folded."""
    found = model_files.configs(path)
    if not found:
        return
    with st.expander("Config"):
        for name, text in found.items():
            st.caption(parts.plain(name))
            st.code(text, language="json")
