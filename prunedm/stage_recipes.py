"""The recipe's two stages: structured pruning and N:M masks, each field with its limits and its help."""

from __future__ import annotations

import itertools
import math
import re
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LARGEST_M = 16


class Pattern(NamedTuple):
    """N kept of every M weights, 1 <= N < M <= 16."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def kept_sets(self) -> list[str]:
        """The sets of N kept positions of M as ``1100``, ``1010``...: the order of :func:`pattern.set_shares`."""
        choices = itertools.combinations(range(self.m), self.n)
        return ["".join("1" if i in kept else "0" for i in range(self.m)) for kept in choices]


def parse_pattern(text: str) -> Pattern | None:
    """``"2:4"`` to a Pattern, ``"dense"`` to None. ValueError with value, rule and remedy otherwise."""
    if text == "dense":
        return None
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
    n, m = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= n < m <= LARGEST_M:
        raise ValueError(f"pattern {text!r} must be N:M with 1 <= N < M <= {LARGEST_M}, or dense; try 2:4")
    return Pattern(n, m)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


Steps = Annotated[int, Field(ge=0, le=10_000_000)]
HIGHEST_RATE = 10.0
Rate = Annotated[float, Field(gt=0, le=HIGHEST_RATE)]
Share = Annotated[float, Field(ge=0, le=1)]
Schedule = Literal["constant", "linear", "cosine"]


CHANNEL_METHODS = ("magnitude", "random", "taylor", "diff-pruning", "activation")
CALIBRATED = ("taylor", "diff-pruning", "activation")  # these look at images
PRUNE_READ_BY = {  # fields of prune that only some methods read: elsewhere they must keep their default
    "norm": ("magnitude",),
    **dict.fromkeys(("reduction", "normalizer"), ("magnitude", *CALIBRATED)),
    "time": ("activation",),
    "loss_threshold": ("diff-pruning",),
    **dict.fromkeys(("calibration_images", "calibration_steps"), CALIBRATED),
}


class LayerRatio(Section):
    match: str = Field(min_length=1, description="layers by shell pattern, such as mid_block.*")
    ratio: float = Field(ge=0, lt=1, description="share of the channels to remove; 0 keeps them all")


class Prune(Section):
    method: Literal[CHANNEL_METHODS] = Field(  # type: ignore[valid-type]
        "magnitude",
        description="how channels are ranked: by their weights (magnitude), at random, by the loss's gradient "
        "(taylor, diff-pruning), or by weights and activations (activation)",
    )
    target: float = Field(0.4, ge=0, le=0.9, description="share to remove; 0 skips the stage")
    of: Literal["parameters", "macs", "latency"] = Field(
        "parameters", description="what the target is a share of; latency is measured on this machine"
    )
    finetune_steps: Steps = Field(200, description="training steps after the channels are gone")
    layout: Literal["free", "uniform"] = Field(
        "free",
        description="free: each channel group has its own width; uniform: one width a resolution level, so that the "
        "result is an ordinary UNet2DModel that plain diffusers loads",
    )
    ranking: Literal["local", "global", "isomorphic"] = Field(
        "local",
        description="local: the same ratio for each channel group; global: channels of all groups compete; "
        "isomorphic: those of alike groups do",
    )
    norm: Literal[1, 2] = Field(2, description="magnitude: L1 or L2 norm of a channel's weights")
    reduction: Literal["mean", "sum", "max", "prod", "first"] = Field(
        "mean", description="how the scores of a channel group's layers become one"
    )
    normalizer: Literal["none", "mean", "sum", "max", "gaussian", "standardize", "lamp"] = Field(
        "mean", description="how a channel group's scores are scaled, so that groups can compete"
    )
    time: Literal["mean", "max", "early", "late"] = Field(
        "mean",
        description="activation: how timesteps are weighed; early: the noisy ones that sampling begins with count more",
    )
    loss_threshold: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="diff-pruning: timesteps whose loss is below this share of the largest are left out",
    )
    calibration_images: int = Field(32, ge=1, le=4096, description="images in a calibration batch")
    calibration_steps: int = Field(20, ge=1, le=1000, description="calibration batches, or timesteps evenly spaced")
    layers: list[LayerRatio] = Field(
        default_factory=list, description="ratios of single layers: [{match: mid_block.*, ratio: 0}]"
    )
    round_for: Literal["pattern", "tensor-core"] = Field(
        "pattern", description="widths stay multiples of M; tensor-core: of 16 too, as sparse tensor cores need"
    )
    rounds: int = Field(1, ge=1, le=20, description="prune in so many rounds, training in between")
    round_steps: Steps = Field(50, description="training steps between two rounds")

    @model_validator(mode="after")
    def _agrees(self) -> Prune:
        require_read(self, PRUNE_READ_BY)
        if self.round_steps != 50 and self.rounds == 1:
            raise ValueError(f"round_steps={self.round_steps} is read between rounds; set rounds to 2 or more")
        if self.layout == "uniform" and self.ranking != "local":
            raise ValueError(f"ranking={self.ranking} needs widths of their own; set layout to free")
        if self.layout == "uniform" and self.layers:
            raise ValueError("layers give single layers a ratio of their own; set layout to free")
        if self.ranking != "local" and self.normalizer == "none":
            raise ValueError(f"ranking={self.ranking} compares scores of unlike groups; set normalizer to mean")
        return self


def require_read(section: Section, read_by: dict[str, tuple[str, ...]]) -> None:
    """ValueError when a field is set that the section's method would ignore."""
    method = section.method  # type: ignore[attr-defined]
    for name, methods in read_by.items():
        if method in methods:
            continue
        value, kept = getattr(section, name), type(section).model_fields[name].get_default(call_default_factory=True)
        if value != kept:
            used = ", ".join(methods) if len(methods) < 6 else "a method other than none"
            raise ValueError(f"{name}={value} is not read by method={method}; remove it or use {used}")


FIXED_METHODS = ("fixed", "random", "magnitude", "wanda", "fisher")  # masks that do not move
METHODS = ("none", *FIXED_METHODS, "sr-ste", "gumbel", "reinforce", "offset")
INITIALS = ("random", "magnitude", "wanda", "fisher")
LEARNED = ("gumbel", "reinforce", "offset")
READ_BY = {  # fields of mask that only some methods read: elsewhere they must keep their default
    **dict.fromkeys(("lr", "schedule", "warmup"), LEARNED),
    **dict.fromkeys(("masks_from", "masks_until"), ("sr-ste", *LEARNED)),
    "then": ("gumbel", "reinforce"),
    "initial": ("fixed", "gumbel", "reinforce"),
    "flip_budget": ("gumbel", "reinforce"),
    **dict.fromkeys(("temperature", "tau_start", "tau_end"), ("gumbel", "offset")),
    **dict.fromkeys(("normalize_advantage", "tracker_decay", "refresh"), ("reinforce",)),
    **dict.fromkeys(("samples", "antithetic", "cached_batches"), ("reinforce",)),
    "sr_decay": ("sr-ste", "offset", "gumbel", "reinforce"),
    **dict.fromkeys(("layers", "density"), tuple(m for m in METHODS if m != "none")),
}


class LayerPattern(Section):
    match: str = Field(min_length=1, description="layers by shell pattern, such as up_blocks.*")
    pattern: str = Field(description="N:M, or dense")

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        parse_pattern(value)
        return value


class Mask(Section):
    n: int = Field(2, ge=1, le=LARGEST_M - 1, description="weights kept in each group")
    m: int = Field(4, ge=2, le=LARGEST_M, description="weights in a group, along the input channels")
    method: Literal[METHODS] = Field(  # type: ignore[valid-type]
        "gumbel",
        description="learned: gumbel, reinforce, or offset (beside the weights); baselines: random, magnitude, "
        "wanda, fisher, fixed (as 'initial' says), sr-ste; none: no N:M stage",
    )
    layers: list[LayerPattern] = Field(
        default_factory=list, description="patterns of single layers: [{match: up_blocks.*, pattern: '1:4'}]"
    )
    density: float | None = Field(
        None, gt=0, lt=1, description="choose each layer's pattern to keep this share of the eligible weights"
    )
    initial: str | None = Field(
        None, min_length=1, description="m0: random, magnitude, wanda, fisher, an earlier run or a masks file"
    )
    steps: Steps = Field(300, description="mask-learning steps")
    train_weights: bool = Field(False, description="train the weights while the masks learn")
    recover_steps: Steps = Field(200, description="training steps with the masks frozen")
    lr: Rate | None = Field(None, description="rate of the mask logits; empty: the method's own")
    schedule: Schedule = Field("constant", description="how the masks' rate goes")
    warmup: Share = Field(0.0, description="share of the mask steps in which their rate rises")
    masks_from: Share = Field(0.0, description="share of the steps before the masks begin to learn")
    masks_until: Share = Field(1.0, description="share of the steps after which the masks learn no more")
    then: Literal["frozen", "sr-ste"] = Field(
        "frozen", description="what the masks do after masks_until: stay, or follow the training weights as in SR-STE"
    )
    weights_from: Share = Field(0.0, description="share of the steps before the weights begin to train")
    weights_until: Share = Field(1.0, description="share of the steps after which the weights are frozen")
    flip_budget: float | None = Field(
        None, gt=0, lt=1, description="share of groups a first sample changes; empty: the method's own"
    )
    temperature: Literal["constant", "linear", "cosine", "exponential", "adaptive"] = Field(
        "exponential", description="gumbel, offset: how the temperature falls; adaptive: with the entropy"
    )
    tau_start: float | None = Field(None, gt=0, le=100, description="first temperature; empty: the method's own")
    tau_end: float | None = Field(None, gt=0, le=100, description="last temperature; empty: the method's own")
    normalize_advantage: bool = Field(
        True, description="reinforce: divide the advantage by its running spread; off is the paper's update"
    )
    tracker_decay: float = Field(0.99, ge=0, lt=1, description="reinforce: memory of the loss tracker")
    refresh: bool = Field(True, description="reinforce: measure against better masks once they are found")
    samples: int = Field(1, ge=1, le=1024, description="reinforce: masks drawn and averaged in a step")
    antithetic: bool = Field(False, description="reinforce: draw the masks in opposite pairs")
    cached_batches: int = Field(
        0, ge=0, le=100_000, description="reinforce: cycle over so many fixed batches and keep their f(m0); 0: off"
    )
    sr_decay: float = Field(2e-4, ge=0, le=1, description="decay of the pruned weights: sr-ste, offset, then=sr-ste")
    snapshot_every: int | None = Field(None, ge=1, description="steps between mask snapshots; empty: 20 in all")

    @model_validator(mode="after")
    def _agrees(self) -> Mask:
        if self.n >= self.m:
            raise ValueError(f"n={self.n} must be less than m={self.m}; try 2:4")
        require_read(self, READ_BY)
        self._require_windows()
        self._require_choices()
        return self

    def _require_windows(self) -> None:
        """When masks and weights train, and that something trains the weights where they are needed."""
        for a, b in (("masks_from", "masks_until"), ("weights_from", "weights_until")):
            if getattr(self, a) >= getattr(self, b):
                raise ValueError(f"{a}={getattr(self, a)} must be less than {b}={getattr(self, b)}; try 0 and 1")
        if not self.train_weights and (self.weights_from, self.weights_until) != (0, 1):
            raise ValueError(
                "weights_from and weights_until are read when the weights train; set train_weights to true"
            )
        if self.then == "sr-ste" and (self.masks_until == 1 or not self.train_weights):
            raise ValueError(
                "then=sr-ste follows the weights after masks_until; set train_weights, and masks_until to 0.2"
            )
        if self.method == "sr-ste" and not self.train_weights:
            raise ValueError("method=sr-ste follows the weights; set train_weights to true")
        if self.cached_batches and self.train_weights:
            raise ValueError("cached_batches keeps losses of frozen weights; set train_weights to false")

    def _require_choices(self) -> None:
        """Fields that must fit one another."""
        if self.tau_start and self.tau_end and self.tau_end > self.tau_start:
            raise ValueError(f"tau_end={self.tau_end} must not exceed tau_start={self.tau_start}; try 1 and 0.1")
        most = 1 - 1 / math.comb(self.m, self.n)
        if self.flip_budget is not None and self.flip_budget >= most:
            raise ValueError(f"flip_budget={self.flip_budget} must be below {most:.3f} for {self.n}:{self.m}; try 0.05")
        if self.density is not None and self.initial not in (None, *INITIALS):
            raise ValueError(f"density chooses patterns and initial={self.initial} brings its own; remove one of them")
        if self.antithetic and self.samples % 2:
            raise ValueError(f"antithetic draws masks in pairs and samples={self.samples} is odd; try 2")
