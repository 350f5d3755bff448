"""What optimisers, averages and masks cost for each weight: found by running the engine's own code on one small layer.

No table of bytes to fall behind the code: each figure is what :class:`ledger.Ledger` saw.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .diffusion import TIMESTEP_BINS, NoisedBatch
from .learn import METHODS
from .ledger import Ledger
from .masked_unet import MaskedUNet
from .recipe import Train
from .stage_recipes import Mask
from .training import Weights, Window

ABOUT = 240  # side of the layer's weight, brought to a multiple of M
STEPS = 10**6  # of the make-believe stage: its windows open and close at whole shares of them


@dataclass(frozen=True)
class Upkeep:
    """For each weight. held: bytes between steps. during: bytes more while the UNet runs. transient: bytes more at most
    outside it. moved: bytes read and written in a step. operations: in a step, whatever the number of weights."""

    held: float
    during: float
    transient: float
    moved: float
    operations: int


@functools.cache
def of_update() -> Upkeep:
    """An optimiser step on weights in training: AdamW, clipping, the average. The gradient itself is not in it."""
    layer = nn.Linear(ABOUT, ABOUT, bias=False)
    weights = None
    for _ in range(2):  # the first step makes the optimiser's state
        layer.weight.grad = torch.zeros_like(layer.weight)  # backward's work is counted elsewhere
        with Ledger() as book:
            if weights is None:
                weights = Weights(layer.parameters(), Train(), Window.of(STEPS))
                weights.update(0)
                held = book.live
            else:
                weights.update(0)
    return _upkeep(held, 0, book, layer.weight.numel())


def of_masks(spec: Mask, train: bool) -> Upkeep:
    """A step of a mask method inside its window, for each prunable weight: beside the UNet's passes and the weights'
    optimiser, and with the dense weights, m0 and (where it asks for them) the gradients that masked models keep."""
    return _of_masks(spec.model_dump_json(), train)


@functools.cache
def _of_masks(spec_json: str, train: bool) -> Upkeep:
    spec = Mask.model_validate_json(spec_json)
    side = ABOUT // spec.m * spec.m
    module = nn.Sequential(nn.Linear(side, side, bias=False))
    with Ledger() as book:
        masked = MaskedUNet(module, spec.n, spec.m)
        learner = METHODS[spec.method](masked, spec, STEPS, 0)
        still = _Still(book)
        first = learner.window.first
        _step(learner, still, first, train)
        held = book.live
    with Ledger() as book:
        still = _Still(book)
        _step(learner, still, first + spec.cached_batches, train)  # the same batch again, where batches come round
    return _upkeep(held, still.held, book, module[0].weight.numel())


def _step(learner, still: _Still, step: int, train: bool) -> None:
    learner.prepare(step, train)
    zeros = torch.zeros(1)
    learner.step(still, NoisedBatch(zeros, torch.zeros(1, dtype=torch.long), zeros), step, train)


class _Still:
    """A task whose UNet does nothing: what is left of a step is the mask method's own."""

    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=TIMESTEP_BINS))

    def __init__(self, book: Ledger) -> None:
        self.book, self.held = book, 0

    def losses(self, denoiser: nn.Module, batch: NoisedBatch, samples: int = 1) -> Tensor:
        self.held = max(self.held, self.book.live)
        return torch.ones(1)

    backward = losses  # which leaves the gradients as they are


def _upkeep(held: int, during: int, book: Ledger, weights: int) -> Upkeep:
    lines = book.table()
    peak, moved = int(lines[:, 3].max()), int(lines[:, 1].sum())
    return Upkeep(*(value / weights for value in (held, during, peak, moved)), len(lines))
