"""The arithmetic of a plan: time of operations on a device, bytes between ranks, what fits into a memory.

A step's time is a sum over its operations, each of which takes the longer of its products at the device's rate and
its bytes at the device's bandwidth (the roofline model, Williams et al., 2009). With measured rates that is a
prediction; with published peaks it is the least that a step can take.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from .devices import PRODUCTS, Device
from .diffusion import TIMESTEP_BINS
from .outline import Trace
from .stage_recipes import Mask
from .upkeep import Upkeep

FP32 = 4  # bytes
TOLD = 3 + TIMESTEP_BINS  # loss, residual, advantage, and the residual of each timestep bin
MOST_DEVICES = 65_536
MOST_IMAGES = 1 << 20  # of a batch that is asked for
Line = Callable[[float], float]  # batch -> bytes


class PlanError(ValueError):
    """A plan that cannot be made, in one line."""


@dataclass(frozen=True)
class Setting:
    """Where a recipe shall run. efficiency: the share of published peaks that is assumed to be reached; a measured
    device has its own."""

    device: Device
    gpus: int = 1
    price: float | None = None  # of one device and hour, in whatever currency the caller thinks
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= MOST_DEVICES:
            raise PlanError(f"gpus={self.gpus} must be 1 to {MOST_DEVICES}; try 8")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise PlanError(f"price-per-hour={self.price} must be 0 or more for one device; try 2.5")
        if not 0 < self.efficiency <= 1:
            raise PlanError(f"efficiency={self.efficiency} must be above 0 and at most 1; try 0.4")
        if self.efficiency < 1 and self.device.basis == "measured":
            raise PlanError(f"efficiency={self.efficiency} is a share of published peaks and these rates are measured")

    @property
    def reached(self) -> float:
        """The share of the device's rates that a step reaches."""
        return self.efficiency * self.device.efficiency

    @property
    def words(self) -> str:
        """What times are in this setting."""
        if self.device.basis == "measured":
            return "predicted from measured rates"
        if self.efficiency == 1:
            return "the least possible, at published peaks"
        return f"at {self.efficiency:g} of published peaks, an assumption"


@dataclass
class Memory:
    """Bytes of one device at a stage's peak."""

    weights: float
    state: float  # gradients that stay, optimiser, average, masks: whatever the batch
    activations: float  # and what comes and goes in a step, at the stage's batch

    @property
    def total(self) -> float:
        return self.weights + self.state + self.activations


@dataclass
class Stage:
    """One row of a plan. batch: images a device works on at once; sent: bytes that a rank sends in a step."""

    stage: str
    what: str
    steps: int
    batch: int
    compute: float  # seconds a step
    sent: float
    communication: float | None  # seconds a step; None where the interconnect is not known
    memory: Memory
    fits: bool
    largest_batch: int | None  # None: it does not fit at any
    basis: str  # of the seconds: measured or published rates

    @property
    def seconds(self) -> float:
        return self.steps * (self.compute + (self.communication or 0.0))

    def as_dict(self) -> dict:
        return asdict(self) | {"seconds": self.seconds, "memory_bytes": self.memory.total}


def seconds(trace: Trace, setting: Setting) -> float:
    """Time of the operations, each at the slower of its products and its bytes."""
    device = setting.device
    rates = np.array([device.flops[kind] for kind in PRODUCTS])
    slower = np.maximum(trace.flops / rates[trace.kind], trace.moved / device.bandwidth)
    return float(slower.sum()) / setting.reached + device.overhead * len(trace.flops)


def upkeep_seconds(found: Upkeep, weights: int, setting: Setting) -> float:
    """Time of what is done to each weight in a step."""
    device = setting.device
    return found.moved * weights / device.bandwidth / setting.reached + found.operations * device.overhead


def ring(size: float, ranks: int) -> float:
    """Bytes that each rank sends to sum ``size`` bytes over all ranks by a ring: 2 (n - 1) / n times their number
    (reduce-scatter and all-gather; Patarasuk and Yuan, 2009)."""
    return 2 * (ranks - 1) / ranks * size


def link_seconds(sent: float, setting: Setting) -> float | None:
    """Time to send so many bytes; None where there is something to send and the interconnect is not known."""
    link = setting.device.interconnect
    if not sent:
        return 0.0
    return sent / link / setting.efficiency if link else None


def summed_bytes(spec: Mask | None, parameters: int, prunable: int) -> float:
    """Bytes that the ranks sum in a step: of plain training (no ``spec``), or of a mask step.

    Gradients of all weights where they train, of the prunable ones where masks alone learn by gradient, and the loss.
    Reinforce sums TOLD figures a drawn mask in their place, whatever the model's size.
    """
    if spec is None:
        return FP32 * (1 + parameters)
    told = TOLD * spec.samples if spec.method == "reinforce" else 1
    if spec.train_weights:
        return FP32 * (told + parameters)
    return FP32 * (told if spec.method == "reinforce" else told + prunable)


def largest(room: float, at: Line) -> int | None:
    """The most images, up to MOST_IMAGES, whose ``at(images)`` bytes fit into ``room``; None where one does not.

    ``at`` must never fall.
    """
    if at(1) > room:
        return None
    return bisect.bisect_right(range(1, MOST_IMAGES + 1), room, key=at)
