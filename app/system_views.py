"""What a run does to its machine, over time and now; and what this machine is."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import streamlit as st

from app import lab, live_plot, parts
from prunedm import cache, charts, environment, support, system
from prunedm.charts import Figure
from prunedm.jobs import load_engine
from prunedm.store import SYSTEM, Run

POINTS = 300  # of a trace at most
FIRST_LOOK = 0.1  # seconds that a figure of the processor needs
FRESH = 10.0  # seconds within which a sample is the state of now
GIB = 2**30
COLORS, DASHES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"), ("solid", "dash", "dot", "dashdot")
NO_GPU = (
    "No GPU was seen. To see an NVIDIA GPU here, install nvidia-ml-py (it is in requirements-extra.txt) and start "
    "the lab again."
)
GPU_FIGURES = {  # key: title, unit, divisor, key of its upper end
    "utilisation": ("GPU load", "%", 1, None),
    "memory": ("GPU memory", "GiB", GIB, "memory_total"),
    "temperature": ("GPU temperature", "°C", 1, None),
    "power": ("GPU power", "W", 1, None),
}


# --- A run's figures


def samples(run: Run) -> list[dict[str, Any]]:
    return [record for record in lab.lines(run, SYSTEM) if system.is_sample(record)]


def strip(run: Run) -> str:
    """CPU, memory and GPU at this moment, in one line."""
    last = next(iter(lab.lines(run, SYSTEM)[-1:]), None)
    if not system.is_sample(last):
        return "CPU, memory and GPU: the first figures come a few seconds after the start."
    age = time.time() - last["time"]
    old = [] if age < FRESH else [f"{parts.duration(age)} ago"]
    return " · ".join(now(last) + old)


def now(record: dict[str, Any]) -> list[str]:
    """A sample in words."""
    cores, total = record["cores"], record["machine_memory_total"] / GIB
    said = [
        f"CPU {record['machine_cpu']:.0f} % of {cores} cores (this run {record['cpu'] / cores:.0f} %)",
        f"Memory {record['machine_memory'] / GIB:.1f} of {total:.1f} GiB (this run {record['memory'] / GIB:.1f})",
    ]
    gpus = record.get("gpus", [])
    return said + ([gpu_now(gpu) for gpu in gpus] or ["GPU none seen"])


def gpu_now(gpu: dict[str, Any]) -> str:
    """A GPU in words; what it does not tell is left out."""
    figures = []
    for key, (_, unit, divisor, upper) in GPU_FIGURES.items():
        if gpu[key] is not None:
            digits = 1 if divisor > 1 else 0
            of = f" of {gpu[upper] / divisor:.{digits}f}" if upper and gpu[upper] is not None else ""
            figures.append(f"{gpu[key] / divisor:.{digits}f}{of} {unit}")
    return f"GPU {gpu['index']}: {', '.join(figures) or 'tells nothing'}"


def tab(run: Run, every: float | None) -> None:
    """Charts of CPU, memory and each GPU over the run, drawn again every so many seconds; None: the run has ended."""
    found = samples(run)
    if not found:
        st.caption("CPU, memory and GPU appear here a few seconds after the run starts.")
        return

    def follow(name: str, chart: Callable[[Timeline], tuple[Figure, str]]) -> None:
        live_plot.follow(f"system-{name}", lambda: chart(Timeline.of(run)), every)

    left, right = st.columns(2)
    with left:
        follow("cpu", cpu)
    with right:
        follow("memory", memory)
    gpu_charts(Timeline.of(run), follow)
    st.caption(
        "Every two seconds; in long runs the past is thinned. This run is the process that works on it: in the lab, "
        "the server with its pages too. The time between a stop and Resume is left out."
    )


def gpu_charts(seen: Timeline, follow: Callable[[str, Callable[[Timeline], tuple[Figure, str]]], None]) -> None:
    names = gpu_names(seen.samples)
    if not names:
        st.caption(NO_GPU)
        return
    drawn = [key for key in GPU_FIGURES if any(g[key] is not None for r in seen.samples for g in r.get("gpus", []))]
    for position, key in enumerate(drawn):
        if position % 2 == 0:
            columns = st.columns(2)
        with columns[position % 2]:
            follow(f"gpu-{key}", functools.partial(gpu, key=key))
    st.caption(", ".join(f"GPU {index}: {parts.plain(name)}" for index, name in names.items()) + ".")
    missing = [GPU_FIGURES[key][0] for key in GPU_FIGURES if key not in drawn]
    if missing:
        st.caption(f"Not told by this GPU: {', '.join(missing)}.")


def gpu_names(shown: list[dict[str, Any]]) -> dict[int, str]:
    """Index to name of every GPU in the samples."""
    return {g["index"]: g["name"] or "unnamed" for r in shown for g in r.get("gpus", [])}


# --- Figures for live_plot


@dataclass(frozen=True)
class Timeline:
    """A run's samples, thinned to what a chart shows, and the minutes since the start of each."""

    run_id: str
    samples: list[dict[str, Any]]
    minutes: list[float]

    @classmethod
    def of(cls, run: Run) -> Timeline:
        found = samples(run)
        shown = system.spaced(found, (found[-1]["time"] - found[0]["time"]) / POINTS) if len(found) > POINTS else found
        starts = [event["time"] for event in lab.events(run, "started")]
        return cls(run.id, shown, charts.running_minutes([record["time"] for record in shown], starts))


def cpu(seen: Timeline) -> tuple[Figure, str]:
    """Shares of all cores, this run and the whole machine; and the end of them in words."""
    run = [round(r["cpu"] / r["cores"], 1) for r in seen.samples]
    machine = [r["machine_cpu"] for r in seen.samples]
    traces = [trace("this run", seen.minutes, run, 0), trace("whole machine", seen.minutes, machine, 1)]
    found, last = layout("CPU, % of all cores", f"{seen.run_id}/cpu"), seen.samples[-1]
    found["yaxis"]["range"] = [0, 105]
    said = f"CPU over time; at the end {last['machine_cpu']:.0f} % of the machine's {last['cores']} cores"
    return {"data": traces, "layout": found}, said


def memory(seen: Timeline) -> tuple[Figure, str]:
    """GiB: what this run holds, what the machine has in use, and what there is; and the end of the first in words."""
    series = (("this run", "memory"), ("whole machine", "machine_memory"), ("installed", "machine_memory_total"))
    traces = [
        trace(name, seen.minutes, [round(r[key] / GIB, 3) for r in seen.samples], number)
        for number, (name, key) in enumerate(series)
    ]
    traces[-1]["line"] |= {"color": charts.GREY, "width": 1}
    said = f"Memory over time; at the end this run holds {seen.samples[-1]['memory'] / GIB:.1f} GiB"
    return {"data": traces, "layout": layout("memory, GiB", f"{seen.run_id}/memory")}, said


def gpu(seen: Timeline, key: str) -> tuple[Figure, str]:
    """One figure of every GPU; where it was not told the line has a gap."""
    title, unit, divisor, upper = GPU_FIGURES[key]
    names = gpu_names(seen.samples)
    by_index = [{g["index"]: g for g in r.get("gpus", [])} for r in seen.samples]
    traces = []
    for number, index in enumerate(names):
        for field in filter(None, (key, upper)):
            found = [gpus.get(index, {}).get(field) for gpus in by_index]
            values = [None if value is None else round(value / divisor, 2) for value in found]
            traces.append(trace(f"GPU {index}" if field == key else f"GPU {index} has", seen.minutes, values, number))
            if field == upper:
                line = traces[-1]["line"] | {"color": charts.GREY, "width": 1, "dash": "dot"}
                traces[-1] |= {"line": line, "showlegend": False}
    found = layout(f"{title}, {unit}", f"{seen.run_id}/gpu/{key}")
    if unit == "%":
        found["yaxis"]["range"] = [0, 105]
    return {"data": traces, "layout": found}, f"{title} over time: {', '.join(names.values())}"


def trace(name: str, x: list[float], y: list[float | None], number: int) -> dict[str, Any]:
    line = {"color": COLORS[number % len(COLORS)], "dash": DASHES[number % len(DASHES)], "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, "connectgaps": False}


def layout(title: str, view: str) -> dict[str, Any]:
    """The axes of a figure over the run, both from zero: their numbers stand off, or the two zeros would touch."""
    found = charts.layout("minutes since the start", title, view) | {"height": 300, "showlegend": True}
    for axis in ("xaxis", "yaxis"):
        found[axis] |= {"rangemode": "tozero", "ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}
    return found


# --- This machine


@st.cache_resource(show_spinner=False)
def _gpus() -> system.Gpus:
    return system.Gpus()


class Processor:
    """How busy all cores are, since the look before; looks in quick succession share one figure."""

    def __init__(self) -> None:
        self.busy, self.at = psutil.cpu_percent(FIRST_LOOK), time.monotonic()

    def look(self) -> float:
        """Percent."""
        if time.monotonic() - self.at >= FIRST_LOOK:
            self.busy, self.at = psutil.cpu_percent(), time.monotonic()
        return self.busy


@st.cache_resource(show_spinner=False)
def _processor() -> Processor:
    return Processor()


def machine_now() -> list[tuple[str, str, str]]:
    """CPU, memory, GPU and disk at this moment: label, figure, and what it means."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(existing(lab.runs_dir()))
    return [
        (f"CPU, {os.cpu_count()} cores", f"{_processor().look():.0f} %", "of all processes, since the last look"),
        ("Memory free", bytes_in_words(memory.available), f"of {bytes_in_words(memory.total)}"),
        gpus_in_words(_gpus().look()),
        ("Disk free", bytes_in_words(disk.free), f"where runs are kept: {parts.plain(lab.runs_dir())}"),
    ]


def gpus_in_words(seen: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Names of the GPUs in the label, alike ones once; how many; and what each is at."""
    if not seen:
        return "GPU", "none seen", NO_GPU
    names = Counter(gpu["name"] or "unnamed" for gpu in seen)
    said = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items())
    return f"GPU, {parts.plain(said)}", f"{len(seen)}", ", ".join(gpu_now(one) for one in seen)


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


class Folder(NamedTuple):
    """A folder on disk: how large it is, and what is free beside it, bytes."""

    name: str
    path: Path
    size: int
    free: int


@dataclass
class Look:
    """All that the System page asks of the machine, at one time."""

    checks: list[environment.Check]
    devices: dict[str, str]
    gpus: list[dict[str, Any]]
    gpu_problem: str
    folders: list[Folder]
    taken: float


@st.cache_resource(show_spinner=False)
def _looking(runs_dir: Path) -> Future[Look]:
    pool = ThreadPoolExecutor(1, "prunedm-look")
    try:
        return pool.submit(take, runs_dir)
    finally:
        pool.shutdown(wait=False)


def look() -> Future[Look]:
    """The machine as it was looked at last, in the background: importing torch takes seconds."""
    return _looking(lab.runs_dir())


def look_again() -> None:
    """The next look is a new one."""
    _looking.clear()


def take(runs_dir: Path) -> Look:
    load_engine()  # environment's checks use torch
    gpus = system.Gpus()
    folders = [folder("Runs", runs_dir), folder("Cache", cache.folder(""))]
    devices, checks = environment.machine(), environment.checks(runs_dir)
    return Look(checks, devices, gpus.look(), gpus.problem, folders, time.time())


def support_bundle() -> bytes:
    """The zip for whoever helps, made when it is asked for."""
    load_engine()  # as above
    return support.build(lab.runs_dir())


def folder(name: str, path: Path) -> Folder:
    return Folder(name, path, size_of(path), shutil.disk_usage(existing(path)).free)


def size_of(path: Path) -> int:
    """Bytes of all files below; what cannot be read, or goes meanwhile, is not counted."""
    total = 0
    for place, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def bytes_in_words(count: float) -> str:
    """Bytes as MiB below one GiB, else as GiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


@functools.cache  # looking all of them up takes 60 ms
def licence(package: str) -> str | None:
    """What an installed package's metadata says of its licence; None when it is not installed."""
    try:
        found = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    stated = (found.get("License") or "").strip()
    named = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    short = stated if stated and len(stated) < 60 and "\n" not in stated else ""  # some put the whole text there
    return found.get("License-Expression") or short or ", ".join(named) or "not stated in its metadata"
