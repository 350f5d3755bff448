"""What a running job does to its machine: a line of figures every two seconds in the run's ``system.jsonl``.

CPU and memory come from psutil, GPUs from NVML when the package nvidia-ml-py and a driver are there. What
cannot be read is None or absent, never zero. The file is thinned, so that it stays small however long the
run: evenly over the past, every two seconds of late.
"""

from __future__ import annotations

import importlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from . import parallel
from .files import as_lines, write_atomic
from .jsonl import read_jsonl
from .store import SYSTEM, Run

EVERY = 2.0  # seconds between samples
MOST = 5000  # lines of the file; when there are as many, half of them or more go
FIGURES = ("time", "cpu", "memory", "machine_cpu", "cores", "machine_memory", "machine_memory_total")
UNREADABLE = (OSError, ValueError, RuntimeError, AttributeError, psutil.Error)


class Gpus:
    """The NVIDIA GPUs of this machine through NVML; none where the package or the driver is missing."""

    def __init__(self) -> None:
        self.problem, self.handles = "", []
        try:
            self.nvml = importlib.import_module("pynvml")
        except ImportError:
            self.problem = "the package nvidia-ml-py is not installed (it is in requirements-extra.txt)"
            return
        try:
            self.nvml.nvmlInit()
            self.handles = [self.nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self.nvml.nvmlDeviceGetCount())]
        except self.nvml.NVMLError as error:
            self.problem = f"NVML does not answer ({error})"

    def look(self) -> list[dict[str, Any]]:
        """Figures of each GPU: percent, bytes, degrees Celsius, watts; None for what it does not tell."""
        return [self._one(index, handle) for index, handle in enumerate(self.handles)]

    def _one(self, index: int, handle: Any) -> dict[str, Any]:
        nvml = self.nvml
        name = self._read(lambda: nvml.nvmlDeviceGetName(handle))
        memory = self._read(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        milliwatts = self._read(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return {
            "index": index,
            "name": name.decode() if isinstance(name, bytes) else name,
            "utilisation": self._read(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "memory": None if memory is None else memory.used,
            "memory_total": None if memory is None else memory.total,
            "temperature": self._read(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "power": None if milliwatts is None else milliwatts / 1000,
        }

    def _read(self, call: Callable[[], Any]) -> Any:
        """One figure, or None: many a GPU does not tell all of them."""
        try:
            return call()
        except (self.nvml.NVMLError, AttributeError):
            return None


class Probe:
    """Looks at this process, this machine and its GPUs. CPU shares are those since the look before."""

    def __init__(self) -> None:
        self.process, self.gpus, self.cores = psutil.Process(), Gpus(), psutil.cpu_count() or 1
        self.look()  # psutil's first shares mean nothing

    def look(self) -> dict[str, Any]:
        """One record. ``cpu``: percent of one core, so 200 is two cores; memory in bytes."""
        memory = psutil.virtual_memory()
        found = {
            "time": round(time.time(), 3),
            "cpu": self.process.cpu_percent(),
            "memory": self.process.memory_info().rss,
            "machine_cpu": psutil.cpu_percent(),
            "cores": self.cores,
            "machine_memory": memory.total - memory.available,
            "machine_memory_total": memory.total,
        }
        gpus = self.gpus.look()
        return found | ({"gpus": gpus} if gpus else {})


class Sampler(threading.Thread):
    """Appends a record to the run's file every so many seconds until it is stopped. Never raises."""

    def __init__(self, run: Run, every: float = EVERY, most: int = MOST) -> None:
        super().__init__(name="prunedm-system", daemon=True)
        self.job, self.every, self.most = run, every, most
        self.ending, self.said = threading.Event(), False

    def run(self) -> None:
        with self._guarded():
            probe, lines = Probe(), len(records(self.job))
            while not self.ending.wait(self.every):
                with self._guarded():
                    self.job.beat()
                    self.job.append(SYSTEM, [probe.look()])
                    lines += 1
                    if lines >= self.most:
                        lines = thin(self.job, self.most, self.every)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong here is no reason to end a run: it is logged once."""
        try:
            yield
        except UNREADABLE as error:
            if not self.said:
                self.said = True
                with suppress(OSError):
                    self.job.log(f"no system figures: {' '.join(str(error).split())}; the run goes on without")

    def stop(self) -> None:
        self.ending.set()
        self.join(timeout=5)


@contextmanager
def sampled(run: Run) -> Iterator[None]:
    """The run's machine is looked at while the block runs; of several ranks, rank 0's is."""
    if not parallel.is_writer():
        yield
        return
    sampler = Sampler(run)
    try:
        sampler.start()
    except RuntimeError:  # no thread to be had: the run matters more
        yield
        return
    try:
        yield
    finally:
        sampler.stop()


def records(run: Run) -> list[dict[str, Any]]:
    """The run's samples so far, without lines that are none."""
    return [record for record in read_jsonl(run.folder / SYSTEM) if is_sample(record)]


def is_sample(record: Any) -> bool:
    """Whether a line of the file is one of :meth:`Probe.look`'s."""
    found = [record.get(key) for key in FIGURES] if isinstance(record, dict) else [None]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in found)


def thin(run: Run, most: int = MOST, every: float = EVERY) -> int:
    """Rewrite the file at half the resolution, or less, until at most half of ``most`` lines are left.

    Evenly over time and not over lines: the late ones lie closer together. Returns the lines left.
    """
    kept = whole = records(run)
    apart = every
    while len(kept) > most // 2:
        apart *= 2
        kept = spaced(whole, apart)
    write_atomic(run.folder / SYSTEM, as_lines(kept))
    return len(kept)


def spaced(samples: list[dict[str, Any]], apart: float) -> list[dict[str, Any]]:
    """The samples that lie at least so many seconds apart, in their order."""
    kept: list[dict[str, Any]] = []
    for record in samples:
        # a clock that was set back begins anew; a tenth is the sampler's own lateness
        if not kept or abs(record["time"] - kept[-1]["time"]) >= 0.9 * apart:
            kept.append(record)
    return kept
