"""What all mask methods share: when masks learn, what they do before and after, and how a step runs.

Here too are the methods without logits: the baselines whose masks do not move, and ``sr-ste`` (arXiv
2102.04010). Every operation works on the flat ``[G, M]`` tensors of a pattern, so that a step costs the
same number of operations for any number of layers.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from . import masks, parallel, pattern
from .diffusion import NoisedBatch
from .masked_unet import Bank, MaskedUNet
from .stage_recipes import Mask
from .training import Task, Window

AGREEING = 0.99  # of the smallest kept weight: where a pruned one may stand at most


class FixedMasks:
    """Masks that do not move: the baselines, and every method once its masks are frozen.

    The base of the other methods: they override :meth:`_learn` and :meth:`_choose`.
    """

    learns = False

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        self.masked, self.spec, self.seed = masked, spec, seed
        self.rates: dict[str, float] = {}
        self.steps, self.window = steps, Window.of(steps, spec.masks_from, spec.masks_until)
        self.at = 0  # the step at hand
        self._state: tuple[bool, bool] | None = None

    def prepare(self, step: int, train: bool) -> None:
        if self.learns and step == self.window.last:
            self.masked.wear(self._choose())  # for good
            if self.spec.then == "sr-ste":
                self._let_magnitude_agree()
        self.at = step
        state = (self.needs_gradients(step) or train, train)
        if state != self._state:
            self.masked.require_gradients(*state)
            self._state = state

    def needs_gradients(self, step: int) -> bool:
        """Whether the masks' own update at this step asks for gradients of the masked weights."""
        return False

    def follows(self, step: int) -> bool:
        """Whether the masks follow the weights at this step, as in SR-STE."""
        return self.learns and self.spec.then == "sr-ste" and step >= self.window.last

    def step(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        if self.window.holds(step):
            return self._learn(task, batch, step, train)
        if train and self.follows(step):
            return self._follow(task, batch)
        return self._stand(task, batch, train)

    def _stand(self, task: Task, batch: NoisedBatch, train: bool) -> dict[str, float]:
        """A step under the masks as they are; the weights that they keep train."""
        value = self._loss(task, batch, self.masked.wear, train)
        if train:
            for bank in self.masked.banks:
                bank.grad.mul_(bank.mask)
        return {"loss": value}

    def _learn(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        """A step inside the masks' window."""
        return self._stand(task, batch, train)

    def _follow(self, task: Task, batch: NoisedBatch) -> dict[str, float]:
        """A step under magnitude masks, chosen anew (SR-STE, arXiv 2102.04010, eq. 8): the gradient in the
        masked weights goes to all dense weights, and the pruned ones decay: grad + lambda (1 - mask) w."""
        value = self._loss(task, batch, lambda: self.masked.wear(by_magnitude(self.masked)), True)
        decay_pruned(self.masked, self.spec.sr_decay)
        return {"loss": value}

    @torch.no_grad()
    def _let_magnitude_agree(self) -> None:
        """Shrink pruned weights below the smallest kept one of their group: the model under its masks is the
        same, and magnitude now chooses these very masks."""
        for bank in self.masked.banks:
            kept = bank.weights.detach().abs().masked_fill(bank.mask.logical_not(), math.inf)
            most = kept.amin(-1, keepdim=True) * AGREEING
            shrunk = bank.weights.detach().clamp(-most, most)
            bank.weights.copy_(torch.where(bank.mask, bank.weights, shrunk))

    def _loss(self, task: Task, batch: NoisedBatch, wear, backward: bool) -> float:
        """The loss under the masks that ``wear()`` puts on, and its gradients when asked for."""
        if backward:
            self.masked.zero_grad()
        wear()
        with torch.set_grad_enabled(backward):
            losses = (task.backward if backward else task.losses)(self.masked.unet, batch)
        value = batch.mean(losses)
        parallel.sum_(itertools.chain([value], self.masked.gradients() if backward else ()))
        return value.item()

    def choice(self) -> list[Tensor]:
        """The masks that the method would choose now, boolean ``[G, M]`` a bank."""
        if self.follows(self.at):
            return by_magnitude(self.masked)
        return self._choose() if self.window.holds(self.at) else self.masked.masks()

    def _choose(self) -> list[Tensor]:
        """The masks that the method has found so far."""
        return self.masked.masks()

    def finish(self) -> None:
        """Wear what the whole stage chose. Averaged weights, if any, are in place by now."""
        if self.follows(self.steps):
            self.masked.wear(by_magnitude(self.masked))
        else:
            self.masked.wear(self._choose() if self.window.last >= self.steps else None)

    def logits(self) -> list[Tensor]:
        """What the masks are drawn from, for diagnostics; empty when nothing is learned."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        return {f"mask.{i}": bank.mask for i, bank in enumerate(self.masked.banks)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, bank in enumerate(self.masked.banks):
            bank.mask.copy_(tensors[f"mask.{i}"])
        self.masked.wear()


class SrSteMasks(FixedMasks):
    """Magnitude masks, chosen anew at each step, while the weights train (SR-STE, arXiv 2102.04010)."""

    learns = True

    def needs_gradients(self, step: int) -> bool:
        return self.window.holds(step)

    def _learn(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        return self._follow(task, batch)

    def _choose(self) -> list[Tensor]:
        return by_magnitude(self.masked)


class LogitMasks(FixedMasks, ABC):
    """One logit per weight, started at ``C * m0``: what gumbel, reinforce and offset share."""

    learns = True
    flip_budget = 0.05  # share of the groups that a first sample changes

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        super().__init__(masked, spec, steps, seed)
        budget = spec.flip_budget or self.flip_budget
        for bank in masked.banks:
            bank.logits = self._start(bank, budget)
        self.peak = spec.lr or self.default_rate(self.window.last - self.window.first)
        self.rates = {"mask.lr": self.peak}

    def _start(self, bank: Bank, budget: float) -> Tensor:
        return bank.initial.to(bank.weights.dtype) * masks.confidence(bank.n, bank.m, budget)

    @abstractmethod
    def default_rate(self, steps: int) -> float:
        """The logits' rate for so many mask steps, where the recipe names none."""

    def rate(self, step: int) -> float:
        return self.window.rate(self.spec.schedule, self.peak, self.spec.warmup, step)

    def _choose(self) -> list[Tensor]:
        return [pattern.keep(values, bank.n) for values, bank in zip(self.logits(), self.masked.banks)]

    def logits(self) -> list[Tensor]:
        return [bank.logits.detach() for bank in self.masked.banks]

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"logits.{i}": bank.logits for i, bank in enumerate(self.masked.banks)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, bank in enumerate(self.masked.banks):
            bank.logits.copy_(tensors[f"logits.{i}"])
        super().load(tensors)


def by_magnitude(masked: MaskedUNet) -> list[Tensor]:
    """Magnitude masks of the weights of the moment, boolean ``[G, M]`` a bank."""
    return [pattern.keep(bank.weights.detach().abs(), bank.n) for bank in masked.banks]


def decay_pruned(masked: MaskedUNet, rate: float) -> None:
    """Add ``rate`` times the pruned weights to the gradient (SR-STE's term)."""
    for bank in masked.banks:
        bank.grad.addcmul_(bank.weights.detach(), bank.mask.logical_not(), value=rate)
