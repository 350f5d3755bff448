"""Fine-tuning and mask learning: generators that yield one Step record a step.

Whoever iterates owns logging, checkpoints and stopping. Each random number is a function of the seed
and the step, so a trainer that loads a checkpoint goes on exactly as if it had never stopped.

Estimators for the masks (METHOD.md): ``gumbel``, straight-through with annealed temperature, and
``reinforce`` (MaskPro, arXiv 2506.12876), a policy gradient that needs forward passes only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import diffusion, masks, pattern
from .data import Batches
from .diffusion import NoisedBatch
from .masks import MaskedUNet
from .recipe import Mask
from .records import Step
from .seeds import generator

WARMUP_SHARE = 0.05
GRADIENT_CLIP = 1.0
TIMESTEP_BINS = 10
TRACKER_DECAY = 0.99  # of the paper
REFRESH_AFTER = 100  # steps for the tracker to mean something, at its decay
GUMBEL_FLIPS, GUMBEL_TAU = 0.05, (1.0, 0.1)
REINFORCE_FLIPS, REINFORCE_RATE = 0.01, 0.5


def use_bf16(device: torch.device, precision: str) -> bool:
    """Whether training autocasts to bf16: ``auto`` does where the hardware multiplies bf16 by itself."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


@contextmanager
def numerics(device: torch.device, bf16: bool) -> Iterator[None]:
    """Autocast for training. On a CPU the flash attention's bf16 backward is slow: use plain products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with ExitStack() as stack:
        if bf16:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@dataclass
class Task:
    """What is trained on: the scheduler, the images and the seed; one batch a step."""

    scheduler: object
    batches: Batches
    seed: int
    device: torch.device
    bf16: bool

    def batch(self, stage: str, step: int) -> NoisedBatch:
        """Images, timesteps and noise of this step of this stage."""
        x0 = self.batches.at(step, self.device)
        return diffusion.noised(self.scheduler, x0, generator(self.seed, stage, "noise", step))

    def numerics(self):
        return numerics(self.device, self.bf16)


def cosine_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then cosine to zero."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Weights:
    """The weights of a UNet in training: AdamW, cosine rate, gradient clipping, EMA (diffusers')."""

    def __init__(self, unet: nn.Module, lr: float, ema: float, steps: int) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = list(unet.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.lr, self.steps = lr, steps
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=fused)
        self.ema = EMAModel(self.parameters, decay=ema, foreach=True)

    def update(self, step: int) -> dict[str, float]:
        """One optimiser step on the gradients at hand; the figures to record."""
        rate = cosine_rate(self.lr, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return {"lr": rate, "grad_norm": norm.item()}

    def use_average(self) -> None:
        """Put the averaged weights into the UNet."""
        self.ema.copy_to(self.parameters)

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for i, parameter in enumerate(self.parameters):
            found |= {f"weight.{i}": parameter, f"ema.{i}": self.ema.shadow_params[i]}
            found |= {f"adam.{i}.{k}": v for k, v in self.optimizer.state[parameter].items()}
        return found | {"ema_step": torch.tensor(self.ema.optimization_step)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"weight.{i}"])
            self.ema.shadow_params[i].copy_(tensors[f"ema.{i}"])
            prefix = f"adam.{i}."
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): _to_state(value, parameter)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        self.ema.optimization_step = int(tensors["ema_step"])


def gumbel_rate(steps: int) -> float:
    """Adam moves a logit by at most one rate a step, and a flip takes a few units: fewer steps, larger
    ones (measured: at 60 steps 0.2 learns and 0.05 flips nothing; at 600 steps 0.05 is good)."""
    return min(0.5, 0.06 * math.sqrt(600 / max(1, steps)))


class GumbelMasks:
    """Straight-through Gumbel top-N: the forward pass sees the hard mask, the gradient the soft one.

    key = (logits + g) / tau, mask = top-N(key) + N softmax(key) - (the same, without gradient); tau
    falls geometrically from 1 to 0.1.
    """

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        self.masked, self.steps, self.seed = masked, steps, seed
        budget = spec.flip_budget or GUMBEL_FLIPS
        masked.logits = masks.confidence(masked.n, masked.m, budget) * masked.initial
        masked.logits.requires_grad_(True)
        self.rate = spec.lr or gumbel_rate(steps)
        fused = masked.logits.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam([masked.logits], lr=self.rate, fused=fused)

    def temperature(self, step: int) -> float:
        start, end = GUMBEL_TAU
        return start * (end / start) ** (step / max(1, self.steps - 1))

    def step(self, task: Task, batch: NoisedBatch, step: int, weights: Weights | None) -> dict[str, float]:
        tau, logits = self.temperature(step), self.masked.logits
        noise = masks.gumbel(logits.shape, generator(self.seed, "mask", "gumbel", step), logits)
        key = (logits + noise) / tau
        soft = self.masked.n * key.softmax(-1)
        mask = pattern.top_n(key.detach(), self.masked.n) + (soft - soft.detach())
        with task.numerics():
            value = diffusion.loss(lambda x, t: self.masked(x, t, mask).sample, batch)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": value.item(), "tau": tau, "mask_lr": self.rate}

    def tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state[self.masked.logits]
        return {"logits": self.masked.logits} | {f"adam_mask.{k}": v for k, v in state.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        logits = self.masked.logits
        logits.copy_(tensors["logits"])
        prefix = "adam_mask."
        self.optimizer.state[logits] = {
            k.removeprefix(prefix): _to_state(v, logits) for k, v in tensors.items() if k.startswith(prefix)
        }


class ReinforceMasks:
    """Policy gradient on the loss residual against a reference mask (MaskPro, arXiv 2506.12876).

    r = f(m_t * w) - f(m_0 * w) on the same images, timesteps and noise; a tracker for each timestep bin
    is subtracted, the advantage is divided by its running spread (``normalize_advantage``; off is the
    paper's update), and the logits move against it along the exact gradient of log P(S). The reference
    m_0 starts as the initial mask and becomes the top N of the logits once the tracker shows that the
    sampled masks are better. No activations are kept unless the weights train too.
    """

    def __init__(self, masked: MaskedUNet, spec: Mask, steps: int, seed: int) -> None:
        self.masked, self.seed, self.normalize = masked, seed, spec.normalize_advantage
        budget = spec.flip_budget or REINFORCE_FLIPS
        masked.logits = masks.confidence(masked.n, masked.m, budget) * masked.initial
        self.rate = spec.lr or REINFORCE_RATE
        self.reference = masked.initial.clone()
        self.tracker, self.since = torch.zeros(TIMESTEP_BINS), torch.zeros(1)
        self.spread = torch.zeros(2)  # running mean square of the advantage, number of steps

    def step(self, task: Task, batch: NoisedBatch, step: int, weights: Weights | None) -> dict[str, float]:
        masked, gen = self.masked, generator(self.seed, "mask", "reinforce", step)
        order = masks.sample_orders(masked.logits, masked.n, gen)
        mask = torch.zeros_like(masked.logits).scatter_(-1, order, 1.0)
        with task.numerics(), torch.no_grad():
            base = self._loss(batch, self.reference)
        # An autocast of its own: the cached casts of the pass above carry no gradient.
        with task.numerics(), torch.set_grad_enabled(weights is not None):
            drawn = self._loss(batch, mask)
        if weights is not None:
            drawn.mean().backward()
        residual = (drawn.detach() - base).float().cpu()
        advantage = self._advantage(residual, batch.t.cpu(), task.scheduler.config.num_train_timesteps)
        if math.factorial(masked.n) <= masks.EXACT_ORDERS:
            gradient = masks.score(masked.logits, mask)
        else:
            gradient = masks.ordered_score(masked.logits, order)
        masked.logits -= self.rate * advantage * gradient
        self._refresh()
        return {
            "loss": drawn.mean().item(),
            "residual": residual.mean().item(),
            "tracker": self.tracker.mean().item(),
            "advantage": advantage,
            "mask_lr": self.rate,
        }

    def _loss(self, batch: NoisedBatch, mask: Tensor) -> Tensor:
        return diffusion.per_image_loss(lambda x, t: self.masked(x, t, mask).sample, batch)

    def _advantage(self, residual: Tensor, t: Tensor, timesteps: int) -> float:
        bins = t * TIMESTEP_BINS // timesteps
        advantage = (residual - self.tracker[bins]).mean()
        for b in bins.unique().tolist():
            mean = residual[bins == b].mean()
            self.tracker[b] += (1 - TRACKER_DECAY) * (mean - self.tracker[b])
        self.spread[1] += 1
        self.spread[0] += (advantage.square() - self.spread[0]) / self.spread[1].clamp(max=100)
        scale = self.spread[0].sqrt().clamp(min=1e-12) if self.normalize else 1.0
        return (advantage / scale).item()

    def _refresh(self) -> None:
        """Measure against the present choice once samples beat the old reference on average."""
        self.since += 1
        if self.since >= REFRESH_AFTER and self.tracker.mean() < 0:
            self.reference = self.masked.mask()
            self.tracker.zero_()
            self.since.zero_()

    def tensors(self) -> dict[str, Tensor]:
        names = ("reference", "tracker", "spread", "since")
        return {"logits": self.masked.logits} | {name: getattr(self, name) for name in names}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.masked.logits.copy_(tensors["logits"])
        for name in ("reference", "tracker", "spread", "since"):
            getattr(self, name).copy_(tensors[name])


class FixedMasks:
    """Masks that do not move (magnitude, or after learning) while the weights train."""

    def __init__(self, masked: MaskedUNet) -> None:
        self.masked = masked

    def step(self, task: Task, batch: NoisedBatch, step: int, weights: Weights | None) -> dict[str, float]:
        mask = self.masked.mask()
        with task.numerics():
            value = diffusion.loss(lambda x, t: self.masked(x, t, mask).sample, batch)
        value.backward()
        return {"loss": value.item()}

    def tensors(self) -> dict[str, Tensor]:
        return {"logits": self.masked.logits}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.masked.logits.copy_(tensors["logits"])


class DenseLoss:
    """No masks: plain fine-tuning through the same loop."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def step(self, task: Task, batch: NoisedBatch, step: int, weights: Weights | None) -> dict[str, float]:
        with task.numerics():
            value = diffusion.loss(lambda x, t: self.unet(x, t).sample, batch)
        value.backward()
        return {"loss": value.item()}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        pass


LEARNERS = {"gumbel": GumbelMasks, "reinforce": ReinforceMasks}
Learner = GumbelMasks | ReinforceMasks | FixedMasks | DenseLoss


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


class Trainer:
    """A stage of training: a learner, maybe weights, so many steps; resumable at any of them."""

    def __init__(self, stage: str, steps: int, task: Task, learner: Learner, weights: Weights | None) -> None:
        self.stage, self.steps, self.task = stage, steps, task
        self.learner, self.weights, self.done = learner, weights, 0

    def __iter__(self) -> Iterator[Step]:
        """Train to the end, yielding after each step; raises Diverged when the loss is not finite."""
        while self.done < self.steps:
            step = self.done
            batch = self.task.batch(self.stage, step)
            values = self.learner.step(self.task, batch, step, self.weights)
            self._require_finite("loss", values["loss"])
            if self.weights is not None:
                values |= self.weights.update(step)
                self._require_finite("gradient norm", values["grad_norm"])
            self.done = step + 1
            yield Step(self.stage, self.done, self.steps, values)

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            where = f"at step {self.done + 1} of {self.stage}"
            raise Diverged(f"the {what} became {value} {where}; lower train.lr or mask.lr")

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return self.learner.tensors() | (self.weights.tensors() if self.weights else {})

    def load(self, tensors: dict[str, Tensor], done: int) -> None:
        self.learner.load(tensors)
        if self.weights is not None:
            self.weights.load(tensors)
        self.done = done


def _to_state(value: Tensor, like: Tensor) -> Tensor:
    """Adam's moments and its step counter (fused Adam keeps that beside them) on the parameter's device."""
    return value.to(like.device)
