"""Stage 2: how masks are learned, all methods behind one interface (:data:`METHODS`).

``gumbel``: straight-through with a falling temperature (MaskLLM's relaxation, arXiv 2409.17481, over
MaskPro's linear logits). ``offset``: a learned correction to magnitude for training beside the weights.
``reinforce`` stands in its own module, the baselines and what all share in ``mask_methods``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import masks, pattern
from .diffusion import NoisedBatch
from .mask_methods import FixedMasks, LogitMasks, SrSteMasks, decay_pruned
from .masked_unet import Bank, MaskedUNet
from .reinforce import ReinforceMasks
from .seeds import generator
from .stage_recipes import FIXED_METHODS, Mask
from .training import Task, optimizer_state, require_finite

GUMBEL_TAU = (1.0, 0.1)
OFFSET_RATE, OFFSET_MOMENTUM, OFFSET_TAU = 0.01, 0.9, (0.5, 0.05)
ADAM_EPSILON = 1e-2  # of the root mean square of the logits' gradient: weights that hardly matter stay
ADAPT_EVERY = 10  # steps between looks at the entropy (adaptive temperature)


class GumbelMasks(LogitMasks):
    """Straight-through Gumbel top-N: the forward pass sees the hard mask, the gradient the soft one.

    key = (logits + g) / tau, mask = top-N(key), soft = N softmax(key); the gradient in the mask,
    w * dL/d(w mask), goes through soft:  N / tau * p (grad - sum p grad). Adam moves the logits.
    """

    tau = GUMBEL_TAU

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        super().__init__(masked, spec, steps, seed)
        self.optimizer = self._optimizer([bank.logits.requires_grad_(True) for bank in masked.banks])
        self.first_tau = spec.tau_start or self.tau[0]
        self.last_tau = min(spec.tau_end or self.tau[1], self.first_tau)
        # adaptive temperature: entropy at the start and the share of it that is left
        self.entropy = torch.tensor([self._entropy(), 1.0])

    def default_rate(self, steps: int) -> float:
        return gumbel_rate(steps)

    def _optimizer(self, logits: list[Tensor]) -> torch.optim.Optimizer:
        fused = logits[0].device.type in ("cpu", "cuda")
        return torch.optim.Adam(logits, lr=self.peak, eps=ADAM_EPSILON, fused=fused)

    def needs_gradients(self, step: int) -> bool:
        return self.window.holds(step)

    def temperature(self, step: int) -> float:
        """Of this step of the masks' window, by the recipe's schedule."""
        start, end = self.first_tau, self.last_tau
        share = (step - self.window.first) / max(1, self.window.last - self.window.first - 1)
        return {
            "constant": lambda: start,
            "linear": lambda: start + (end - start) * share,
            "cosine": lambda: end + (start - end) * 0.5 * (1 + math.cos(math.pi * share)),
            "exponential": lambda: start * (end / start) ** share,
            "adaptive": lambda: end + (start - end) * min(1.0, self.entropy[1].item()),
        }[self.spec.temperature]()

    def _entropy(self) -> float:
        total = sum(pattern.entropy(values).sum().item() for values in self.logits())
        return total / sum(len(values) for values in self.logits())

    def _keys(self, bank: Bank, tau: float, gen: torch.Generator) -> Tensor:
        return masks.keys(bank.logits, masks.uniform(bank.logits.shape, gen, bank.logits)).div_(tau)

    @torch.no_grad()
    def _learn(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        if self.spec.temperature == "adaptive" and step % ADAPT_EVERY == 0:
            self.entropy[1] = self._entropy() / max(self.entropy[0].item(), 1e-9)
        tau, gen = self.temperature(step), generator(self.seed, "mask", "gumbel", step)
        keys = [self._keys(bank, tau, gen) for bank in self.masked.banks]
        hard = [pattern.keep(key, bank.n) for key, bank in zip(keys, self.masked.banks)]
        value = self._loss(task, batch, lambda: self.masked.wear(hard), True)
        gradients = [straight_through(bank, key).mul_(bank.n) for bank, key in zip(self.masked.banks, keys)]
        norm = torch.nn.utils.get_total_norm(gradients).item()  # in the keys: tau times that in the logits
        require_finite("masks' gradient norm", norm, step, "mask", self.rates)
        # In units of its root mean square: what the optimiser does is then the same for any size of model.
        scale = math.sqrt(sum(gradient.numel() for gradient in gradients)) / max(norm, 1e-30)
        for bank, gradient in zip(self.masked.banks, gradients):
            bank.logits.grad = gradient.mul_(scale)
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if train:
            self._weights_gradient()
        return {"loss": value, "tau": tau, "mask_lr": rate, "mask_grad_norm": norm / tau}

    def _weights_gradient(self) -> None:
        """What reaches the dense weights: here the kept ones only."""
        for bank in self.masked.banks:
            bank.grad.mul_(bank.mask)

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors() | {"entropy": self.entropy}
        for i, bank in enumerate(self.masked.banks):
            found |= {f"optimizer_mask.{i}.{k}": v for k, v in self.optimizer.state[bank.logits].items()}
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, bank in enumerate(self.masked.banks):
            self.optimizer.state[bank.logits] = optimizer_state(tensors, f"optimizer_mask.{i}.", bank.logits)
        self.entropy = tensors["entropy"].clone()
        super().load(tensors)


class OffsetMasks(GumbelMasks):
    """A learned offset over magnitude, for training beside the weights: score = log|w| + offset.

    The masks follow the weights as in SR-STE, and the offset, trained straight-through without noise,
    corrects magnitude where the loss says so. Pruned weights go on receiving gradient and decay, as there.
    """

    tau = OFFSET_TAU

    def _start(self, bank: Bank, budget: float) -> Tensor:
        return torch.zeros_like(bank.weights)

    def default_rate(self, steps: int) -> float:
        return OFFSET_RATE

    def logits(self) -> list[Tensor]:
        return [bank.logits.detach() + magnitude_score(bank) for bank in self.masked.banks]

    def _keys(self, bank: Bank, tau: float, gen: torch.Generator) -> Tensor:
        return magnitude_score(bank).add_(bank.logits).div_(tau)

    def _optimizer(self, logits: list[Tensor]) -> torch.optim.Optimizer:
        """Momentum, so that a group that matters more moves further: Adam gives each weight the same step,
        and the many that do not matter then flip at random."""
        return torch.optim.SGD(logits, lr=self.peak, momentum=OFFSET_MOMENTUM)

    def _weights_gradient(self) -> None:
        decay_pruned(self.masked, self.spec.sr_decay)


def gumbel_rate(steps: int) -> float:
    """Adam moves a logit by at most one rate a step, and a flip takes a few units: fewer steps, larger ones
    (measured, RESULTS.md: 0.15 for 300 steps removes half as much again as 0.085)."""
    return min(0.25, 0.15 * math.sqrt(300 / max(1, steps)))


def straight_through(bank: Bank, key: Tensor) -> Tensor:
    """Gradient of the loss in the keys of the soft mask, up to the factor N / tau, ``[G, M]``.

    With p = softmax(key) and g = w * dL/d(w mask):  p (g - sum over the group of p g).
    """
    p = pattern.probabilities(key)
    weighted = (bank.grad * bank.weights.detach()).mul_(p)
    return weighted.sub_(p.mul_(pattern.total(weighted)[:, None]))


def magnitude_score(bank: Bank) -> Tensor:
    """log|w|, a new tensor ``[G, M]``."""
    return bank.weights.detach().abs().clamp_(min=1e-12).log_()


METHODS: dict[str, type[FixedMasks]] = {
    **dict.fromkeys(FIXED_METHODS, FixedMasks),
    "sr-ste": SrSteMasks,
    "gumbel": GumbelMasks,
    "reinforce": ReinforceMasks,
    "offset": OffsetMasks,
}
