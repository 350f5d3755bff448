"""Peak memory of a call: resident set on a CPU, the allocator's own count on a CUDA device."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable

import psutil
import torch

from . import giveway

LOOK_EVERY = 0.001  # seconds between two looks at the resident set
RESIDENT, CUDA = "resident set growth", "torch.cuda.max_memory_allocated growth"


class PeakMemory:
    """How far memory grows while the block runs, bytes: ``growth`` after it, ``of`` says of what.

    On a CPU a thread looks at the resident set each millisecond, so what lives for less can be missed; pages
    that earlier calls freed are handed back first, or they would be used again without growth. On a CUDA
    device the allocator counts exactly. ``growth`` is None on devices that keep no peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.growth = device, None
        self.of = {"cpu": RESIDENT, "cuda": CUDA}.get(device.type)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            _give_back_free_pages()
            self.process, self.running = psutil.Process(), True
            self.before = self.peak = self.process.memory_info().rss
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(LOOK_EVERY)

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.growth = torch.cuda.max_memory_allocated(self.device) - self.before
        elif self.device.type == "cpu":
            self.running = False
            self.thread.join()
            self.growth = self.peak - self.before


def peak_growth(call: Callable[[], object], device: torch.device, calls: int = 3) -> int | None:
    """The largest growth of memory in some calls, bytes; None on devices that keep no peak."""
    gc.collect()
    found = []
    for _ in giveway.between(range(calls)):
        with PeakMemory(device) as memory:
            call()
        found.append(memory.growth)
    return None if None in found else max(found)


def _give_back_free_pages() -> None:
    """glibc keeps freed memory for itself; elsewhere there is nothing to call and growth may read too small."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
