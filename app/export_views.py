"""Exports on the Models page: the form, what is at work, and what lies ready."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app import exports, layer_views, pace, parts
from app.exports import Source, Task

FORMATS = {
    "diffusers": "a diffusers pipeline folder, zipped: loads with from_pretrained",
    "packed": "one safetensors file that stores kept weights only, with a manifest that explains it",
    "onnx": "an ONNX file for ONNX Runtime, checked against torch, with its latency",
    "tensorrt": "an ONNX file and the trtexec command that builds a sparse engine from it",
    "semi-structured": "for torch's 2:4 kernels: needs a CUDA GPU",
}
EXTRAS = {".json": "Record", ".sh": "Script"}  # what lies beside an export
VERIFIED = "models.verified"  # the export whose layers are shown


def export(source: Source) -> None:
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
            with st.spinner("Preparing the export…"):
                # 8-bit weights of a packed file have no other number type
                exports.exports().start(source, kind, None if kind == "packed" and int8 != "none" else dtype, int8)
    st.caption(f"{kind}: {FORMATS[kind]}.")
    busy = exports.exports().busy(source.folder)

    @st.fragment(run_every=pace.every(parts.EVERY_PROGRESS, pace.tab()) if busy else None)
    def listing() -> None:
        if busy and not exports.exports().busy(source.folder):
            st.rerun()
        tasks = exports.exports().of(source.folder)
        for task in tasks:
            at_work(task)
        ready(source, [task.path for task in tasks if not task.future.done()])

    listing()


def at_work(task: Task) -> None:
    """What one export is doing, or why it failed."""
    name = parts.plain(task.path.name)
    if task.error:
        st.error(f"{name}: {parts.plain(task.error)}")
    else:
        place = f" ({task.phase} of {task.phases})" if task.phase else ""
        said = f"{task.path.name}: {task.doing}{place}, {parts.duration(task.seconds)} so far"
        parts.bar(max(0, task.phase - 1) / task.phases, said)


def ready(source: Source, writing: list[Path]) -> None:
    """Each finished export: download, verify, delete."""
    for path in (p for p in exports.finished(source.folder) if p not in writing):
        with parts.said():  # another tab may delete it meanwhile
            ready_one(source, path)


def ready_one(source: Source, path: Path) -> None:
    """One export's name and size, with what can be done with it."""
    file = exports.archive(path)
    st.markdown(f"**{parts.plain(path.name)}** · {file.stat().st_size / 2**20:.2f} MiB")
    if exports.outdated(path, source):
        st.warning("This export is older than the model: its weights have been written again since.")
    with st.container(horizontal=True):
        st.download_button("Download", file.read_bytes, file.name, key=f"get.{path.name}", on_click="ignore")
        for extra in (p for p in exports.belonging(path) if p.suffix in EXTRAS):
            st.download_button(
                EXTRAS[extra.suffix], extra.read_bytes, extra.name, key=f"get.{extra.name}", on_click="ignore"
            )
        if st.button("Verify", key=f"check.{path.name}"):
            st.session_state[VERIFIED] = str(path)
        with st.popover("Delete"):
            delete(path)
    if st.session_state.get(VERIFIED) == str(path):
        layer_views.verified(path)


def delete(path: Path) -> None:
    """Ask first."""
    st.write(f"Delete {parts.plain(path.name)}? The model itself stays.")
    if st.button("Delete it", key=f"delete.{path.name}"):
        with parts.said():
            exports.delete(path)
            st.rerun()
