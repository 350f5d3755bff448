"""What the engine reports: plain records, each one a line of JSON in the run folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["queued", "running", "stopping", "done", "stopped", "failed", "interrupted"]
ACTIVE: tuple[Status, ...] = ("queued", "running", "stopping")
RESUMABLE: tuple[Status, ...] = ("stopped", "failed", "interrupted")
VARIANTS = ("dense", "structured", "nm")
VARIANT_LABELS = {"dense": "dense", "structured": "structured", "nm": "N:M"}

STAGES = ("prune", "finetune", "mask", "recover", "evaluate", "report")
STAGE_LABELS = {
    "prune": "Prune channels",
    "finetune": "Fine-tune",
    "mask": "Learn N:M masks",
    "recover": "Recover and bake",
    "evaluate": "Evaluate variants",
    "report": "Write report",
}


@dataclass
class Step:
    """One step of one stage. ``values`` holds the stage's own scalars (loss, rate, entropy...)."""

    stage: str
    step: int  # 1-based: how many steps of the stage are done
    of: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass
class LayerReport:
    """One weight under one pattern: eligible or not and why; figures are None where not masked."""

    layer: str
    kind: str  # conv or linear
    shape: list[int]
    eligible: bool
    reason: str  # why it is left dense, in words; empty when eligible
    groups: int = 0
    tensor_core_ready: bool = False
    compliance: float | None = None
    density: float | None = None
    position_balance: list[float] | None = None
    pattern: str = "dense"


@dataclass
class Evaluation:
    """One variant's figures. Absent figures are None, never invented.

    latency_ms: median of one UNet call on ``device`` at ``dtype`` and ``batch``. macs: of one image at
    dense arithmetic; macs_sparse: what N:M hardware would do (theoretical).
    """

    parameters: int
    nonzero_parameters: int
    macs: int
    bytes: int
    validation_loss: float | None = None
    fid: float | None = None
    fid_extractor: str | None = None
    fid_images: int | None = None
    latency_ms: float | None = None
    latency_ms_p10: float | None = None
    latency_ms_p90: float | None = None
    device: str | None = None
    dtype: str | None = None
    batch: int | None = None
    macs_sparse: int | None = None
    pattern: str | None = None
    compliance: float | None = None
    masked_layers: int | None = None
    skipped_layers: list[dict[str, str]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the N:M fields only where there is a pattern."""
        sparse = {"macs_sparse", "pattern", "compliance", "masked_layers", "skipped_layers"}
        items = dataclasses.asdict(self).items()
        return {k: v for k, v in items if self.pattern is not None or k not in sparse}


@dataclass
class RunState:
    """The content of ``state.json``: who runs the run, how far it is, how it ended."""

    status: Status = "queued"
    stage: str = ""
    step: int = 0
    of: int = 0
    rate: float | None = None  # steps a second
    eta: float | None = None  # seconds to the end of the stage
    stages_done: list[str] = field(default_factory=list)
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    seconds: float = 0.0  # time spent running, over all resumes
    heartbeat: float = 0.0
    pid: int | None = None
    pid_started: float | None = None
    host: str | None = None
    error: str | None = None  # one line, plain words
    schema: int = 1
