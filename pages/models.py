"""Models: what a run has made and what was imported, layer by layer; exports, downloads, checks of files."""

from pathlib import Path

import streamlit as st

from app import exports, lab, model_views, parts
from prunedm.records import VARIANT_LABELS
from prunedm.store import Run

FORMATS = {
    "diffusers": "a diffusers pipeline folder, zipped: loads with from_pretrained",
    "packed": "one safetensors file that stores kept weights only, with a manifest that explains it",
    "onnx": "an ONNX file for ONNX Runtime, checked against torch, with its latency",
    "tensorrt": "an ONNX file and the trtexec command that builds a sparse engine from it",
    "semi-structured": "for torch's 2:4 kernels: needs a CUDA GPU",
}
EXTRAS = {".json": "Record", ".sh": "Script"}  # what lies beside an export


def layers(path: Path) -> None:
    """Figures of a model on disk, and each layer's."""
    with parts.said():
        found = exports.inspect(path)
        boxes = [
            ("Weights", f"{found['weights']:,}"),
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
        with st.expander(f"Layers ({len(found['layers'])})"):
            st.dataframe([row(layer) for layer in found["layers"]], hide_index=True)


def row(layer: dict) -> dict:
    return {
        "layer": layer["layer"],
        "shape": " x ".join(map(str, layer["shape"])),
        "pattern": layer["claimed"] or "dense",
        "compliance": "n/a" if layer["compliance"] is None else f"{layer['compliance']:.1%}",
        "density": f"{layer['density']:.1%}",
        "fits N:M": f"{layer['pattern']}" if layer["eligible"] else "no",
        "tensor cores": "ready" if layer["tensor_core_ready"] else "no",
        "why not": layer["reason"],
    }


def export(run: Run, variant: str) -> None:
    """The form, then what is at work and what is ready."""
    st.subheader("Export")
    known = exports.choices()
    format_, dtype_, int8_, button = st.columns([3, 2, 2, 2], vertical_alignment="bottom")
    kind = format_.selectbox("Format", list(FORMATS), key="models.format")
    dtypes, ways = known[kind]
    dtype = dtype_.selectbox("Number type", dtypes, key=f"models.dtype.{kind}", disabled=len(dtypes) == 1)
    int8 = int8_.selectbox("8-bit", ways, key=f"models.int8.{kind}", disabled=len(ways) == 1)
    with parts.said():
        if button.button("Export", type="primary", width="stretch"):
            # 8-bit weights of a packed file have no other number type
            exports.exports().start(run, variant, kind, None if kind == "packed" and int8 != "none" else dtype, int8)
    st.caption(f"{kind}: {FORMATS[kind]}.")
    busy = any(not task.future.done() for task in exports.exports().of(run))

    @st.fragment(run_every=1.0 if busy else None)
    def listing() -> None:
        tasks = exports.exports().of(run)
        if busy and all(task.future.done() for task in tasks):
            st.rerun()
        for task in tasks:
            if task.error:
                st.error(f"{parts.plain(task.path.name)}: {parts.plain(task.error)}")
            else:
                st.info(f"Writing {parts.plain(task.path.name)}: {parts.duration(task.seconds)}")
        ready(run, [task.path for task in tasks if not task.future.done()])

    listing()


def ready(run: Run, writing: list[Path]) -> None:
    for path in (p for p in exports.finished(run) if p not in writing):
        name, size, download, check, remove = st.columns([5, 2, 2, 2, 2], vertical_alignment="center")
        file = exports.archive(path)
        name.markdown(f"**{parts.plain(path.name)}**")
        size.caption(f"{file.stat().st_size / 2**20:.2f} MiB")
        download.download_button("Download", file.read_bytes, file.name, key=f"get.{path.name}", on_click="ignore")
        for extra in (p for p in exports.belonging(path) if p.suffix in EXTRAS):
            download.download_button(
                EXTRAS[extra.suffix], extra.read_bytes, extra.name, key=f"get.{extra.name}", on_click="ignore"
            )
        if check.button("Verify", key=f"check.{path.name}"):
            layers(path)
        with remove.popover("Delete"):
            st.write(f"Delete {parts.plain(path.name)}? The run itself stays.")
            if st.button("Delete it", key=f"delete.{path.name}"):
                with parts.said():
                    exports.delete(path)
                    st.rerun()


st.title("Models")
cards = [card for card in lab.cards() if not card.problem and card.run.variants()]
if not cards:
    parts.empty("No run has made a model yet: the demo makes two.", "home", "Run the demo")
else:
    card = parts.choose_run(cards)
    names = card.run.variants()
    variant = st.segmented_control(
        "Variant", names, default=names[-1], format_func=VARIANT_LABELS.get, required=True, key=f"variant.{card.run.id}"
    )
    layers(card.run.variant(variant))
    export(card.run, variant)
model_views.imported(layers)
with parts.said():
    lab.jobs()
