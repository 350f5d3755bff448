"""What the device at hand does: products and bytes a second, measured in seconds and kept.

Convolutions forward and backward, of three shapes that UNets have, count as products; sums of large tensors count
bytes; a sum of tiny ones is what an operation takes however small it is. Each figure comes with its spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from . import cache, environment, latency, training
from .devices import HERE, Device

KIND = "calibration"
VERSION = 1  # of what is measured and how
ROUNDS, TINY = 5, 200  # rounds; tiny sums in a round
SHAPES = ((64, 32), (128, 16), (256, 8))  # channels, side
ELEMENTS = 1 << 21
ON_GPU = 16  # times as many images and elements, which keep a GPU busy
BATCH = 8


def here(device: torch.device, again: bool = False) -> Device:
    """The device as measured: from the cache, or now. ``again``: measure anew."""
    threads = torch.get_num_threads() if device.type == "cpu" else None
    place, key = (
        cache.folder(KIND),
        cache.digest(environment.machine(), str(device), threads, torch.__version__, VERSION),
    )
    if again:
        cache.forget(place, key)
    found = cache.read_record(place, key)
    if found is None:
        found = asdict(measure(device))
        cache.write_record(place, key, found)
    return Device(**found)


def measure(device: torch.device) -> Device:
    """Measure rates and their spread (10th and 90th percentile over rounds and shapes)."""
    rates: dict[str, list[float]] = {"fp32": [], "bf16": [], "bandwidth": [], "overhead": []}
    calls = _calls(device)
    with training.memory_kept():
        for call, _ in calls.values():
            call()
        for _ in range(ROUNDS):
            for (figure, _shape), (call, amount) in calls.items():
                rates[figure].append(amount / _seconds(call, device))
    middle = {name: float(np.median(values)) for name, values in rates.items()}
    for precision in ("fp32", "bf16"):  # all shapes together: each gives its share of the time
        middle[precision] = len(rates[precision]) / sum(1 / rate for rate in rates[precision])
    spread = {name: tuple(float(v) for v in np.percentile(values, (10, 90))) for name, values in rates.items()}
    spread["overhead"] = tuple(1 / rate for rate in reversed(spread["overhead"]))
    words = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return Device(
        HERE, latency.device_name(device), device.type, "measured", f"measured on this machine, {words}",
        _memory(device), middle["bandwidth"], {name: middle[name] for name in ("fp32", "bf16")},
        overhead=1 / middle["overhead"], spread=spread,
    )  # fmt: skip


def _calls(device: torch.device) -> dict[tuple[str, Any], tuple[Callable[[], Any], float]]:
    """(figure, shape) -> what to call, and how much of the figure's unit (FLOPs, bytes, operations) it does."""
    scale = 1 if device.type == "cpu" else ON_GPU
    found: dict[tuple[str, Any], tuple[Callable[[], Any], float]] = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for channels, side in SHAPES:
            layer = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
            x = torch.randn(BATCH * scale, channels, side, side, device=device, dtype=dtype, requires_grad=True)
            flops = 3 * 2 * x.numel() * channels * 9
            found[precision, channels] = (_step(layer, x), flops)
    large, other, tiny = (torch.ones(n, device=device) for n in (ELEMENTS * scale, ELEMENTS * scale, 8))
    found["bandwidth", 0] = (lambda: large + other, 3 * large.numel() * large.element_size())
    found["overhead", 0] = (lambda: [tiny + tiny for _ in range(TINY)], TINY)
    return found


def _step(layer: nn.Conv2d, x: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, for weights and input."""
    ones = torch.ones_like(x)

    def step() -> None:
        x.grad = layer.weight.grad = layer.bias.grad = None
        layer(x).backward(ones)

    return step


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    latency.synchronize(device)
    began = time.perf_counter()
    call()
    latency.synchronize(device)
    return time.perf_counter() - began


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
