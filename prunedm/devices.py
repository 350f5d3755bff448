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
SHEET = "NVIDIA {} Tensor Core GPU datasheet"
ADA = "NVIDIA Ada GPU architecture whitepaper, V2.01"
MOST_BYTES_A_SECOND = 1e15


class DeviceError(ValueError):
    """An unknown device or a figure out of bounds, in one line."""


@dataclass(frozen=True)
class Device:
    """One device. flops and sparse: FLOP/s of matrix products by precision (a multiply-add is two), dense and 2:4.

    bandwidth: bytes/s of its memory. interconnect: bytes/s that one device sends to the others of its machine, one
    way; None where it is not known. overhead: seconds that an operation takes however small it is. spread: of a
    measured device, figure -> (10th, 90th percentile).
    """

    key: str
    name: str
    kind: str  # cuda, cpu or mps: how training computes there
    basis: str  # published or measured
    source: str
    memory: int
    bandwidth: float
    flops: dict[str, float]
    sparse: dict[str, float] = field(default_factory=dict)
    interconnect: float | None = None
    overhead: float = 0.0
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _published(key: str, name: str, source: str, memory: float, bandwidth: float, link: float, *tera: float) -> Device:
    """``tera``: TFLOP/s of bf16 (and fp16) with fp32 sums, dense and 2:4, and of fp32 outside tensor cores."""
    half, half_sparse, single = (value * TERA for value in tera)
    flops = {"bf16": half, "fp16": half, "fp32": single}
    sparse = {"bf16": half_sparse, "fp16": half_sparse}
    memory, bandwidth, link = int(memory * GB), bandwidth * GB, link * GB
    return Device(key, name, "cuda", "published", source, memory, bandwidth, flops, sparse, link)


# Links count one way, which is half of what the makers add up: NVLink where the board has it, else PCIe x16.
PUBLISHED = {
    device.key: device
    for device in (
        # GB, GB/s of memory, GB/s to the others; TFLOP/s of bf16, of bf16 in 2:4, of fp32
        _published("a100", "NVIDIA A100 80GB SXM", SHEET.format("A100"), 80, 2039, 300, 312, 624, 19.5),
        _published("h100", "NVIDIA H100 SXM", SHEET.format("H100"), 80, 3350, 450, 989.4, 1978.9, 66.9),
        _published("h200", "NVIDIA H200 SXM", SHEET.format("H200"), 141, 4800, 450, 989.4, 1978.9, 66.9),
        _published("l4", "NVIDIA L4", SHEET.format("L4"), 24, 300, 32, 121, 242, 30.3),
        _published("rtx4090", "NVIDIA GeForce RTX 4090", ADA, 24, 1008, 32, 165.2, 330.4, 82.6),
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
    return replace(device, interconnect=gigabytes * GB)
