"""The policy-gradient estimator of stage 2 (MaskPro, arXiv 2506.12876). METHOD.md has the maths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import masks, parallel, pattern
from .diffusion import TIMESTEP_BINS, NoisedBatch, bin_of, bin_sums
from .mask_methods import LogitMasks
from .masked_unet import Bank, MaskedUNet
from .seeds import generator
from .stage_recipes import Mask
from .training import Task, require_finite

RATE = 0.5
SPREAD_MEMORY = 100  # steps over which the advantage's spread is averaged


class ReinforceMasks(LogitMasks):
    """Policy gradient on the loss residual against a reference mask (MaskPro, arXiv 2506.12876).

    r = f(m_t * w) - f(m_0 * w) on the same images, timesteps and noise; a tracker for each timestep bin
    is subtracted, the advantage is divided by its running spread (``normalize_advantage``; off is the
    paper's update), and the logits move against it along the exact gradient of log P(S). The reference
    m_0 starts as the initial mask and becomes the top N of the logits once the tracker shows that the
    sampled masks are better. No activations are kept unless the weights train too.
    """

    flip_budget = 0.01

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        super().__init__(masked, spec, steps, seed)
        self.reference = [bank.initial.clone() for bank in masked.banks]
        self.tracker, self.since = torch.zeros(TIMESTEP_BINS), torch.zeros(1)
        self.spread = torch.zeros(2)  # running mean square of the advantage, number of advantages
        self.cached: dict[int, Tensor] = {}  # position in the cycle -> f(m_0) of its images

    def default_rate(self, steps: int) -> float:
        return RATE

    @torch.no_grad()
    def _learn(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        base = self._base(task, batch, step)
        bins, counts = _bins(batch, task.scheduler.config.num_train_timesteps)
        moves: list[Tensor | None] = [None] * len(self.masked.banks)
        values, residuals, advantages = [], [], []
        if train:
            self.masked.zero_grad()
        for sample in range(self.spec.samples):
            drawn, orders = self._draw(step, sample)
            self.masked.wear(drawn)
            losses = self._backward(task, batch, drawn) if train else task.losses(self.masked.unet, batch)
            loss, residual, advantage = self._measure(batch, losses.float().cpu() - base, losses, bins, counts)
            for i, bank in enumerate(self.masked.banks):
                direction = self._score(bank, drawn[i], orders[i]).mul_(advantage / self.spec.samples)
                moves[i] = direction if moves[i] is None else moves[i].add_(direction)
            values.append(loss)
            residuals.append(residual)
            advantages.append(advantage)
        if train:
            parallel.sum_(self.masked.gradients())
        rate, norm = self.rate(step), torch.nn.utils.get_total_norm(moves).item()
        require_finite("masks' gradient norm", norm, step, "mask", self.rates)
        for bank, move in zip(self.masked.banks, moves):
            bank.logits -= rate * move
        self._refresh()
        mean = 1 / self.spec.samples
        figures = {"loss": sum(values) * mean, "residual": sum(residuals) * mean, "advantage": sum(advantages) * mean}
        bins_of_tracker = {f"tracker.{b}": value for b, value in enumerate(self.tracker.tolist())}
        spread = self.spread[0].sqrt().item()
        figures |= {"residual_spread": spread, "tracker": self.tracker.mean().item(), **bins_of_tracker}
        return figures | {"mask_lr": rate, "mask_grad_norm": norm}

    def _base(self, task: Task, batch: NoisedBatch, step: int) -> Tensor:
        """f(m_0) of each image, from the cache where the recipe keeps one (the paper's way)."""
        position = step % self.spec.cached_batches if self.spec.cached_batches else -1
        if position in self.cached:
            return self.cached[position]
        self.masked.wear(self.reference)
        found = task.losses(self.masked.unet, batch).float().cpu()
        if position >= 0:
            self.cached[position] = found
        return found

    def _draw(self, step: int, sample: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Boolean masks of all banks and, where the set has too many orders, the order drawn."""
        pair, opposite = divmod(sample, 2) if self.spec.antithetic else (sample, 0)
        gen = generator(self.seed, "mask", "reinforce", step, pair)
        drawn, orders = [], []
        for bank in self.masked.banks:
            u = masks.uniform(bank.logits.shape, gen, bank.logits)
            keys = masks.keys(bank.logits, 1 - u if opposite else u)
            exact = math.factorial(bank.n) <= masks.EXACT_ORDERS
            orders.append(None if exact else keys.topk(bank.n, dim=-1).indices)
            drawn.append(pattern.keep(keys, bank.n))
        return drawn, orders

    def _backward(self, task: Task, batch: NoisedBatch, drawn: list[Tensor]) -> Tensor:
        """The losses, and gradients of the weights: the mean over the samples, each through its own mask."""
        before = [bank.grad.clone() for bank in self.masked.banks]
        for bank in self.masked.banks:
            bank.grad.zero_()
        with torch.enable_grad():
            losses = task.backward(self.masked.unet, batch, self.spec.samples)
        for bank, mask, earlier in zip(self.masked.banks, drawn, before):
            bank.grad.mul_(mask).add_(earlier)
        return losses

    @staticmethod
    def _score(bank: Bank, mask: Tensor, order: Tensor | None) -> Tensor:
        if order is None:
            return masks.score(bank.logits, mask)
        return masks.ordered_score(bank.logits, order)

    def _measure(
        self, batch: NoisedBatch, residual: Tensor, losses: Tensor, bins: Tensor, counts: Tensor
    ) -> tuple[float, float, float]:
        """(loss, residual, advantage), means over the whole batch, and the tracker moved; tensors ``[B]``.

        All that ranks tell one another of a mask: these three and a sum a timestep bin, whatever the model's size.
        """
        means = [batch.mean(values) for values in (losses.float().cpu(), residual, residual - self.tracker[bins])]
        told = torch.cat([torch.stack(means), bin_sums(residual, bins)])
        parallel.sum_([told])
        return told[0].item(), told[1].item(), self._advantage(told[2], told[3:], counts)

    def _advantage(self, advantage: Tensor, sums: Tensor, counts: Tensor) -> float:
        """The advantage by its spread; ``sums`` of the residuals of each bin's images go into the tracker."""
        moved = (1 - self.spec.tracker_decay) * (sums / counts.clamp(min=1) - self.tracker)
        self.tracker += torch.where(counts > 0, moved, 0.0)
        # The spread of the steps before: one that held the present advantage would bias the gradient.
        before = self.spread[0].sqrt() if self.spread[1] else advantage.abs()
        scale = before.clamp(min=1e-12) if self.spec.normalize_advantage else 1.0
        self.spread[1] += 1
        self.spread[0] += (advantage.square() - self.spread[0]) / self.spread[1].clamp(max=SPREAD_MEMORY)
        return (advantage / scale).item()

    def _refresh(self) -> None:
        """Measure against the present choice once samples beat the old reference on average."""
        self.since += 1
        settled = self.since >= 1 / (1 - self.spec.tracker_decay)  # the tracker has forgotten its start
        if self.spec.refresh and settled and self.tracker.mean() < 0:
            self.reference = self._choose()
            self.cached.clear()
            self.tracker.zero_()
            self.since.zero_()

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors() | {name: getattr(self, name) for name in ("tracker", "spread", "since")}
        found |= {f"reference.{i}": mask for i, mask in enumerate(self.reference)}
        if parallel.size() > 1:
            return found  # a rank's f(m0) are of its own slices; another number of ranks finds them anew
        return found | {f"cached.{position}": losses for position, losses in self.cached.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        for name in ("tracker", "spread", "since"):
            getattr(self, name).copy_(tensors[name])
        for i, mask in enumerate(self.reference):
            mask.copy_(tensors[f"reference.{i}"])
        kept = [key for key in tensors if key.startswith("cached.") and parallel.size() == 1]
        self.cached = {int(key.removeprefix("cached.")): tensors[key] for key in kept}


def _bins(batch: NoisedBatch, steps: int) -> tuple[Tensor, Tensor]:
    """The timestep bin of each image ``[B]``, and how many images of the whole batch fall into each bin."""
    whole = batch.t if batch.whole_t is None else batch.whole_t
    counts = torch.bincount(bin_of(whole.cpu(), steps), minlength=TIMESTEP_BINS)
    return bin_of(batch.t.cpu(), steps), counts
