"""What computing devices can do: published figures of some, and how to look one up.

Published figures are the makers' peaks. Real kernels reach a part of them, so a time that rests on peaks is the
least that a step can take. What is measured on the device at hand comes from calibration.py; each figure says by
``basis`` which of the two it is, and they are never mixed in one device.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

GB, TERA = 1e9, 1e12
HERE = "here"
PRODUCTS = ("fp32", "bf16", "fp32 convolutions", "bf16 convolutions")  # each has a rate of its own; fp16 counts as bf16
CONVOLUTIONS = 2  # the place of the first of them
SHEET = "NVIDIA {} Tensor Core GPU datasheet"
HOPPER = "NVIDIA H100 Tensor Core GPU architecture whitepaper"
ADA = "NVIDIA Ada GPU architecture whitepaper, V2.01"
MOST_BYTES_A_SECOND = 1e15


class DeviceError(ValueError):
    """An unknown device or a figure out of bounds, in one line."""


@dataclass(frozen=True)
class Device:
    """One device. flops: FLOP/s of each kind of PRODUCTS (a multiply-add is two).

    bandwidth: bytes/s of its memory. interconnect: bytes/s that one device sends to the others of its machine, one
    way; None where it is not known. Of a measured device: efficiency, the share of these rates that whole networks
    reach; overhead, seconds that an operation takes however small it is; spread, figure -> (10th, 90th percentile).
    """

    key: str
    name: str
    kind: str  # cuda, cpu or mps: how training computes there
    basis: str  # published or measured
    source: str
    memory: int
    bandwidth: float
    flops: dict[str, float]  # dense
    interconnect: float | None = None
    efficiency: float = 1.0
    overhead: float = 0.0
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _published(
    key: str,
    name: str,
    source: str,
    memory: float,
    bandwidth: float,
    link: float,
    half: float,
    tf32: float,
    fp32: float,
) -> Device:
    """half, tf32: TFLOP/s of tensor cores with fp32 sums, dense (twice that in 2:4); fp32: outside tensor cores.

    torch lets fp32 convolutions, but not fp32 matrix products, go by TF32 unless it is told otherwise.
    """
    rates = (fp32 * TERA, half * TERA, tf32 * TERA, half * TERA)
    flops = dict(zip(PRODUCTS, rates, strict=True))
    return Device(key, name, "cuda", "published", source, int(memory * GB), bandwidth * GB, flops, link * GB)


# Links count one way, which is half of what the makers add up: NVLink where the board has it, else PCIe x16.
PUBLISHED = {
    device.key: device
    for device in (
        # GB, GB/s of memory, GB/s to the others; TFLOP/s of bf16, TF32, fp32
        _published("a100", "NVIDIA A100 80GB SXM", SHEET.format("A100"), 80, 2039, 300, 312, 156, 19.5),
        _published("h100", "NVIDIA H100 80GB SXM", HOPPER, 80, 3350, 450, 989.4, 494.7, 66.9),
        _published("h200", "NVIDIA H200 SXM", SHEET.format("H200"), 141, 4800, 450, 989.5, 494.5, 67),
        _published("l4", "NVIDIA L4", SHEET.format("L4"), 24, 300, 32, 121, 60, 30.3),
        _published("rtx4090", "NVIDIA GeForce RTX 4090", ADA, 24, 1008, 32, 165.2, 82.6, 82.6),
    )
}  # fmt: skip


def published(key: str) -> Device:
    """The device of that name, upper or lower case; DeviceError names those that are known."""
    wanted = key.lower().replace(" ", "").replace("-", "").replace("_", "")
    if wanted in PUBLISHED:
        return PUBLISHED[wanted]
    near = difflib.get_close_matches(wanted, PUBLISHED, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DeviceError(f"device {key!r} is not known; use {HERE} (this machine, measured), {', '.join(PUBLISHED)}{hint}")


def with_link(device: Device, gigabytes: float | None) -> Device:
    """The device with an interconnect that the caller gives, GB/s one way."""
    if gigabytes is None:
        return device
    if not 0 < gigabytes * GB <= MOST_BYTES_A_SECOND:
        raise DeviceError(f"interconnect={gigabytes} must be GB/s above 0 and at most {MOST_BYTES_A_SECOND / GB:g}")
    return replace(device, interconnect=gigabytes * GB, source=f"{device.source}; link as given")
