"""What the device at hand does: products and bytes a second, and what whole networks reach of them; kept once measured.

Convolutions and matrix products, forward and backward, of three shapes that UNets have, give the rates of products;
sums of large tensors give the rate of bytes. Training steps of a small UNet at two batch sizes then tell what share
of those rates a network reaches, and what an operation takes however small it is: two equations, two unknowns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from . import cache, environment, latency, outline, training
from .devices import HERE, PRODUCTS, Device
from .plan_model import Setting, seconds

KIND = "calibration"
VERSION = 4  # of what is measured and how
ROUNDS = 5
SHAPES = ((64, 32), (128, 16), (256, 8))  # channels, side
BATCH, ELEMENTS = 8, 1 << 22
ON_GPU = 16  # times as many images and elements, which keep a GPU busy
NETWORK = {
    "_class_name": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
    "block_out_channels": (48, 96), "norm_num_groups": 16, "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
IMAGES = (2, 32)  # of the network's steps


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
    spread = {figure: tuple(ends) for figure, ends in found["spread"].items()}  # JSON knows lists alone
    return Device(**found | {"spread": spread})


def measure(device: torch.device) -> Device:
    """Measure rates, efficiency and overhead, each with its spread (10th and 90th percentile)."""
    with training.memory_kept():
        rates = _rates(device)
        flops = {kind: len(rates[kind]) / sum(1 / rate for rate in rates[kind]) for kind in PRODUCTS}  # over all shapes
        words = time.strftime("%Y-%m-%d %H:%M", time.localtime())
        found = Device(
            HERE, latency.device_name(device), device.type, "measured", f"measured on this machine, {words}",
            _memory(device), float(np.median(rates["bandwidth"])), flops,
        )  # fmt: skip
        reached = _reached(device, found)
    spread = {
        name: tuple(float(v) for v in np.percentile(values, (10, 90))) for name, values in (rates | reached).items()
    }
    efficiency, overhead = (float(np.median(reached[name])) for name in ("efficiency", "overhead"))
    return replace(found, efficiency=efficiency, overhead=overhead, spread=spread)


# --- single operations -----------------------------------------------------------------------------
def _rates(device: torch.device) -> dict[str, list[float]]:
    """FLOP/s of each kind of product and bytes/s, ``bandwidth``: over rounds and shapes."""
    rates: dict[str, list[float]] = {figure: [] for figure in (*PRODUCTS, "bandwidth")}
    calls = _calls(device)
    for call, _ in calls.values():
        call()
    for _ in range(ROUNDS):
        for (figure, _shape), (call, amount) in calls.items():
            rates[figure].append(amount / _seconds(call, device))
    return rates


def _calls(device: torch.device) -> dict[tuple[str, int], tuple[Callable[[], Any], float]]:
    """(figure, channels) -> what to call, and how many FLOPs or bytes it does."""
    scale = _scale(device)
    found: dict[tuple[str, int], tuple[Callable[[], Any], float]] = {}
    for channels, side in SHAPES:
        pixels = BATCH * scale * side * side
        for kind in PRODUCTS:
            given = {"device": device, "dtype": torch.bfloat16 if kind.startswith("bf16") else torch.float32}
            if kind.endswith("convolutions"):
                layer = nn.Conv2d(channels, channels, 3, padding=1, **given)
                shape, taps = (BATCH * scale, channels, side, side), 9
            else:
                layer, shape, taps = nn.Linear(channels, channels, **given), (pixels, channels), 1
            x = torch.randn(shape, requires_grad=True, **given)
            found[kind, channels] = (_step(layer, x), 3 * 2 * x.numel() * channels * taps)
    large, other, total = (torch.ones(ELEMENTS * scale, device=device) for _ in range(3))
    found["bandwidth", 0] = (lambda: torch.add(large, other, out=total), 3 * large.numel() * large.element_size())
    return found


def _step(layer: nn.Conv2d | nn.Linear, x: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, for weights and input."""
    ones = torch.ones_like(x)

    def step() -> None:
        x.grad = layer.weight.grad = layer.bias.grad = None
        layer(x).backward(ones)

    return step


# --- a whole network -------------------------------------------------------------------------------
def _reached(device: torch.device, rates: Device) -> dict[str, list[float]]:
    """Over rounds: ``efficiency``, the share of single operations' rates that a network reaches, and ``overhead``,
    seconds an operation. From the times t of steps at two batch sizes: t = predicted / efficiency + count * overhead.
    """
    bf16 = training.use_bf16(device, "auto")
    planned = outline.costs(outline.build(NETWORK), bf16, device.type)
    sizes = [images * _scale(device) for images in IMAGES]
    few, many = (seconds(planned.at(size), Setting(rates)) for size in sizes)
    count = len(planned.few.flops)
    calls = _network_steps(device, bf16, sizes)
    for call in calls:
        call()
    found: dict[str, list[float]] = {"efficiency": [], "overhead": []}
    for _ in range(ROUNDS):
        short, long = (_seconds(call, device) for call in calls)
        slower = max((long - short) / (many - few), 1.0)  # a network is no quicker than its operations
        found["efficiency"].append(1 / slower)
        found["overhead"].append(max(0.0, short - few * slower) / count)
    return found


def _network_steps(device: torch.device, bf16: bool, sizes: list[int]) -> list[Callable[[], None]]:
    from diffusers import UNet2DModel

    network = UNet2DModel.from_config(NETWORK).to(device)

    def step_of(images: int) -> Callable[[], None]:
        x, t = torch.randn(images, *outline.unet.image_shape(network), device=device), torch.ones(images, device=device)

        def step() -> None:
            network.zero_grad()
            with training.numerics(network, device, bf16):
                prediction = network(x, t).sample
            prediction.float().square().mean().backward()

        return step

    return [step_of(size) for size in sizes]


def _scale(device: torch.device) -> int:
    return 1 if device.type == "cpu" else ON_GPU


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
