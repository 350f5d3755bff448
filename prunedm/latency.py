"""Measured time of one UNet call, interleaved between variants so that drift falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .unet import image_shape

BATCH, ROUNDS, WARMUP = 8, 15, 2


@dataclass
class Latency:
    """Milliseconds of one UNet call: median, 10th and 90th percentile, with what they hold for."""

    median: float
    p10: float
    p90: float
    device: str
    dtype: str
    batch: int


@torch.no_grad()
def measure(unets: dict[str, nn.Module], batch: int = BATCH, rounds: int = ROUNDS) -> Iterator[dict[str, Latency]]:
    """Time each UNet once a round; yields the figures so far after each round."""
    times: dict[str, list[float]] = {name: [] for name in unets}
    inputs = {}
    for name, unet in unets.items():
        parameter = next(unet.parameters())
        x = torch.zeros(batch, *image_shape(unet), device=parameter.device, dtype=parameter.dtype)
        inputs[name] = (x, torch.zeros(batch, device=parameter.device, dtype=torch.long))
        for _ in range(WARMUP):
            unet(*inputs[name])
    for _ in range(rounds):
        for name, unet in unets.items():
            times[name].append(_once(unet, inputs[name]) * 1000)
        yield {name: _summary(times[name], inputs[name][0]) for name in unets}


def compare(dense: nn.Module, pruned: nn.Module, batch: int = BATCH, rounds: int = ROUNDS) -> dict[str, Any]:
    """Interleaved times of two UNets, milliseconds, and ``ratio``: the median of pruned over dense."""
    *_, found = measure({"dense": dense, "pruned": pruned}, batch, rounds)
    a, b = found["dense"], found["pruned"]
    return {"dense": a.median, "pruned": b.median, "ratio": b.median / a.median, "device": a.device, "batch": batch}


def _once(unet: nn.Module, inputs: tuple) -> float:
    _synchronize(inputs[0].device)
    start = time.perf_counter()
    unet(*inputs)
    _synchronize(inputs[0].device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(times: list[float], x: torch.Tensor) -> Latency:
    p10, median, p90 = (float(v) for v in np.percentile(times, [10, 50, 90]))
    dtype = str(x.dtype).removeprefix("torch.")
    return Latency(median, p10, p90, device_name(x.device), dtype, len(x))


def device_name(device: torch.device) -> str:
    """The device in words, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
