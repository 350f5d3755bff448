"""What the engine reports: plain records, each one a line of JSON in the run folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["queued", "running", "paused", "stopping", "done", "stopped", "failed", "interrupted"]
ACTIVE: tuple[Status, ...] = ("queued", "running", "paused", "stopping")
RESUMABLE: tuple[Status, ...] = ("stopped", "failed", "interrupted")
VARIANTS = ("dense", "structured", "nm")
VARIANT_LABELS = {"dense": "dense", "structured": "structured", "nm": "N:M"}

EXTRACTOR_LABELS = {"bundled": "FD-fashion", "inception": "FID", "efficientnet-lite0": "FD-efficientnet-lite0"}
SUFFIXES = {"bundled": "-fashion", "inception": "", "efficientnet-lite0": "-efficientnet-lite0"}

STAGES = ("prune", "finetune", "mask", "recover", "evaluate", "report")
STAGE_LABELS = {
    "prune": "Prune channels",
    "finetune": "Fine-tune",
    "mask": "Learn N:M masks",
    "recover": "Recover and bake",
    "evaluate": "Evaluate variants",
    "report": "Write report",
}


def labels(name: str) -> dict[str, str]:
    """What each figure of this extractor is called; FID, KID and ISC are names of Inception's alone."""
    suffix = SUFFIXES[name]
    found = {"fid": EXTRACTOR_LABELS[name], "precision": f"precision{suffix}", "recall": f"recall{suffix}"}
    return found | ({"kid": f"KD{suffix}", "isc": f"IS{suffix}"} if suffix else {"kid": "KID", "isc": "ISC"})


NOT_MASKED = "eligible, but not masked"  # the reason of a layer that only its model leaves dense


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
    pattern_shares: list[float] | None = None  # of each set of kept positions, in Pattern.kept_sets' order


@dataclass
class Evaluation:
    """One model's figures. Absent figures are None, never invented.

    Sizes. bytes: of the weights file as it lies on disk. sizes: bytes in each way of storing
    (``sizes.FORMATS``). macs: of one image at dense arithmetic; macs_sparse: what N:M hardware would do
    (theoretical, and None without a pattern).

    Quality. validation_loss with its 95 % bootstrap interval, that of each timestep bin (``loss_bins``, the
    cleanest first, of ``timesteps`` trained timesteps) and that of each image (``validation_errors``: the same
    images, timesteps and noise for every model, so that models can be compared in pairs); it is the error of what
    the network predicts (``prediction_type``). fid: Frechet distance, called ``fid_extractor``, at ``fid_images``
    images, with its bootstrap deviation ``fid_std`` over them; ``few_images`` is a line where they are few. kid,
    precision, recall: at ``kernel_images``. sampling: how the images were made and by what they were judged.
    noise_floor (of a dense model): the same figures between two sets that do not differ: ``samples`` (of other
    seeds) and ``real``.

    Faithfulness. ssim (with its interval), psnr (dB, over the pairs that differ; ``identical`` counts the others)
    and feature_distance to the dense model's first ``pairs`` samples of the same seeds.

    Speed, measured. latency_ms: median of one UNet call on ``device`` at ``dtype`` and ``batch``, with the 10th
    and 90th percentile, on the machine ``host`` with this ``processor``; speed: a row for each way and batch size
    (``latency.Speed``); speed_session: models with the same one were timed in turn, so that drift fell on all.

    made_by: of which files, on which device and machine and by which versions (``provenance.of``).
    """

    parameters: int
    nonzero_parameters: int
    macs: int
    bytes: int
    sizes: dict[str, int] | None = None
    macs_sparse: int | None = None
    validation_loss: float | None = None
    validation_loss_low: float | None = None
    validation_loss_high: float | None = None
    validation_images: int | None = None
    validation_errors: list[float] | None = None
    loss_bins: list[float | None] | None = None
    timesteps: int | None = None
    prediction_type: str | None = None
    fid: float | None = None
    fid_std: float | None = None
    fid_extractor: str | None = None
    fid_images: int | None = None
    few_images: str | None = None
    kid: float | None = None
    kid_std: float | None = None
    kid_low: float | None = None
    kid_high: float | None = None
    precision: float | None = None
    recall: float | None = None
    kernel_images: int | None = None
    isc: float | None = None
    isc_std: float | None = None
    sampling: dict[str, Any] | None = None
    noise_floor: dict[str, dict[str, float]] | None = None
    ssim: float | None = None
    ssim_low: float | None = None
    ssim_high: float | None = None
    psnr: float | None = None
    identical: int | None = None
    feature_distance: float | None = None
    pairs: int | None = None
    latency_ms: float | None = None
    latency_ms_p10: float | None = None
    latency_ms_p90: float | None = None
    device: str | None = None
    dtype: str | None = None
    batch: int | None = None
    host: str | None = None
    processor: str | None = None
    speed: list[dict[str, Any]] | None = None
    speed_session: str | None = None
    made_by: dict[str, Any] | None = None
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
    pid_started: float | None = None  # by the clock of its host
    began: float | None = None  # by its machine: ticks since boot on Linux, else seconds
    host: str | None = None
    machine: str | None = None  # the boot and the set of pids of its owner; None in files of schema 1
    program: str = ""  # what the owner calls itself
    error: str | None = None  # one line, plain words
    remedy: dict[str, Any] = field(default_factory=dict)  # of a failure: section.field to the value to try next
    schema: int = 2
