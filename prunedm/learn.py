"""Stage 2: how masks are chosen and learned, all methods behind one interface.

Learned: ``gumbel``, straight-through with a falling temperature (MaskLLM's relaxation, arXiv 2409.17481,
over MaskPro's linear logits); ``reinforce`` (MaskPro, arXiv 2506.12876), a policy gradient that needs
forward passes only; ``offset``, a learned correction to magnitude for training beside the weights.
Baselines: masks that do not move, and ``sr-ste`` (arXiv 2102.04010). METHOD.md has the maths.

Every operation works on the flat ``[G, M]`` tensors of a pattern, so that a step costs the same number of
operations for any number of layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import masks, pattern
from .diffusion import TIMESTEP_BINS, NoisedBatch, bin_of
from .masks import Bank, MaskedUNet
from .recipe import FIXED_METHODS, Mask
from .seeds import generator
from .training import Task, Window, adam_state, require_finite

GUMBEL_FLIPS, GUMBEL_TAU = 0.05, (1.0, 0.1)
REINFORCE_FLIPS, REINFORCE_RATE = 0.01, 0.5
OFFSET_RATE, OFFSET_MOMENTUM, OFFSET_TAU = 0.01, 0.9, (0.5, 0.05)
AGREEING = 0.99  # of the smallest kept weight: where a pruned one may stand at most
SPREAD_MEMORY = 100  # steps over which the advantage's spread is averaged
ADAM_EPSILON = 1e-2  # of the root mean square of the logits' gradient (measured: RESULTS.md)
ADAPT_EVERY = 10  # steps between looks at the entropy (adaptive temperature)


class FixedMasks:
    """Masks that do not move: the baselines, and every method once its masks are frozen.

    The base of the other methods: they override :meth:`_learn`, which runs inside the masks' window.
    """

    learns = False

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        self.masked, self.spec, self.seed = masked, spec, seed
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
        if self.learns and self.window.holds(step):
            return self._learn(task, batch, step, train)
        if train and self.follows(step):
            return self._follow(task, batch)
        value = self._loss(task, batch, self.masked.wear, train)
        if train:
            for bank in self.masked.banks:
                bank.grad.mul_(bank.mask)
        return {"loss": value}

    def _learn(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        raise AssertionError("a method that learns has its own")

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
            value = task.losses(self.masked.unet, batch).mean()
        if backward:
            value.backward()
        return value.item()

    def choice(self) -> list[Tensor]:
        """The masks that the method would choose now, boolean ``[G, M]`` a bank."""
        if self.follows(self.at):
            return by_magnitude(self.masked)
        return self._choose() if self.learns and self.window.holds(self.at) else self.masked.masks()

    def _choose(self) -> list[Tensor]:
        raise AssertionError("a method that learns has its own")

    def finish(self) -> None:
        """Wear what the whole stage chose. Averaged weights, if any, are in place by now."""
        if self.follows(self.steps):
            self.masked.wear(by_magnitude(self.masked))
        else:
            open_to_the_end = self.learns and self.window.last >= self.steps
            self.masked.wear(self._choose() if open_to_the_end else None)

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


class LogitMasks(FixedMasks):
    """One logit per weight, started at ``C * m0``: what gumbel, reinforce and offset share."""

    learns = True
    flip_budget = GUMBEL_FLIPS

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        super().__init__(masked, spec, steps, seed)
        budget = spec.flip_budget or self.flip_budget
        for bank in masked.banks:
            bank.logits = self._start(bank, budget)
        self.peak = spec.lr or self.default_rate(self.window.last - self.window.first)

    def _start(self, bank: Bank, budget: float) -> Tensor:
        return bank.initial.to(bank.weights.dtype) * masks.confidence(bank.n, bank.m, budget)

    def default_rate(self, steps: int) -> float:
        raise AssertionError("each method has its own")

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
        noise = masks.gumbel(masks.uniform(bank.logits.shape, gen, bank.logits))
        return noise.add_(bank.logits).div_(tau)

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
        require_finite("masks' gradient norm", norm, step, "mask", "mask.lr")
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
            found |= {f"adam_mask.{i}.{k}": v for k, v in self.optimizer.state[bank.logits].items()}
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, bank in enumerate(self.masked.banks):
            self.optimizer.state[bank.logits] = adam_state(tensors, f"adam_mask.{i}.", bank.logits)
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


class ReinforceMasks(LogitMasks):
    """Policy gradient on the loss residual against a reference mask (MaskPro, arXiv 2506.12876).

    r = f(m_t * w) - f(m_0 * w) on the same images, timesteps and noise; a tracker for each timestep bin
    is subtracted, the advantage is divided by its running spread (``normalize_advantage``; off is the
    paper's update), and the logits move against it along the exact gradient of log P(S). The reference
    m_0 starts as the initial mask and becomes the top N of the logits once the tracker shows that the
    sampled masks are better. No activations are kept unless the weights train too.
    """

    flip_budget = REINFORCE_FLIPS

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        super().__init__(masked, spec, steps, seed)
        self.reference = [bank.initial.clone() for bank in masked.banks]
        self.tracker, self.since = torch.zeros(TIMESTEP_BINS), torch.zeros(1)
        self.spread = torch.zeros(2)  # running mean square of the advantage, number of advantages
        self.cached: dict[int, Tensor] = {}  # position in the cycle -> f(m_0) of its images

    def default_rate(self, steps: int) -> float:
        return REINFORCE_RATE

    @torch.no_grad()
    def _learn(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        base = self._base(task, batch, step)
        bins = bin_of(batch.t.cpu(), task.scheduler.config.num_train_timesteps)
        moves: list[Tensor | None] = [None] * len(self.masked.banks)
        values, residuals, advantages = [], [], []
        if train:
            self.masked.zero_grad()
        for sample in range(self.spec.samples):
            drawn, orders = self._draw(step, sample)
            self.masked.wear(drawn)
            with torch.set_grad_enabled(train):
                losses = task.losses(self.masked.unet, batch)
            if train:
                self._backward(losses, drawn)
            residual = losses.detach().float().cpu() - base
            advantage = self._advantage(residual, bins)
            for i, bank in enumerate(self.masked.banks):
                direction = self._score(bank, drawn[i], orders[i]).mul_(advantage / self.spec.samples)
                moves[i] = direction if moves[i] is None else moves[i].add_(direction)
            values.append(losses.mean().item())
            residuals.append(residual.mean().item())
            advantages.append(advantage)
        rate, norm = self.rate(step), torch.nn.utils.get_total_norm(moves).item()
        require_finite("masks' gradient norm", norm, step, "mask", "mask.lr")
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
            keys = masks.gumbel(1 - u if opposite else u).add_(bank.logits)
            exact = math.factorial(bank.n) <= masks.EXACT_ORDERS
            orders.append(None if exact else keys.topk(bank.n, dim=-1).indices)
            drawn.append(pattern.keep(keys, bank.n))
        return drawn, orders

    def _backward(self, losses: Tensor, drawn: list[Tensor]) -> None:
        """Gradients of the weights: the mean over the samples, each through its own mask."""
        before = [bank.grad.clone() for bank in self.masked.banks]
        for bank in self.masked.banks:
            bank.grad.zero_()
        losses.backward(torch.full_like(losses, 1 / (losses.numel() * self.spec.samples)))
        for bank, mask, earlier in zip(self.masked.banks, drawn, before):
            bank.grad.mul_(mask).add_(earlier)

    @staticmethod
    def _score(bank: Bank, mask: Tensor, order: Tensor | None) -> Tensor:
        if order is None:
            return masks.score(bank.logits, mask.to(bank.logits.dtype))
        return masks.ordered_score(bank.logits, order)

    def _advantage(self, residual: Tensor, bins: Tensor) -> float:
        advantage = (residual - self.tracker[bins]).mean()
        for b in bins.unique().tolist():
            mean = residual[bins == b].mean()
            self.tracker[b] += (1 - self.spec.tracker_decay) * (mean - self.tracker[b])
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
        return found | {f"cached.{position}": losses for position, losses in self.cached.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        for name in ("tracker", "spread", "since"):
            getattr(self, name).copy_(tensors[name])
        for i, mask in enumerate(self.reference):
            mask.copy_(tensors[f"reference.{i}"])
        self.cached = {int(k.removeprefix("cached.")): v for k, v in tensors.items() if k.startswith("cached.")}


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


def by_magnitude(masked: MaskedUNet) -> list[Tensor]:
    """Magnitude masks of the weights of the moment, boolean ``[G, M]`` a bank."""
    return [pattern.keep(bank.weights.detach().abs(), bank.n) for bank in masked.banks]


def decay_pruned(masked: MaskedUNet, rate: float) -> None:
    """Add ``rate`` times the pruned weights to the gradient (SR-STE's term)."""
    for bank in masked.banks:
        bank.grad.addcmul_(bank.weights.detach(), bank.mask.logical_not(), value=rate)


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
