"""Training, whatever is trained: the task, the weights' optimiser, and a loop that yields a Step record a step.

Whoever iterates owns logging, checkpoints and stopping. Each random number is a function of the seed
and the step, so a trainer that loads a checkpoint goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import platform
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from . import diffusion, parallel, sharding
from .data import Batches
from .diffusion import NoisedBatch, Timesteps
from .failure import Diverged
from .recipe import Recipe, Train
from .records import Step
from .seeds import generator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 1 << 30


def use_bf16(device: torch.device, precision: str) -> bool:
    """Whether training autocasts to bf16: ``auto`` does where the hardware multiplies bf16 by itself."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


@contextmanager
def numerics(model: nn.Module, device: torch.device, bf16: bool) -> Iterator[None]:
    """Autocast for one forward pass of a model.

    One pass and no more: autocast keeps the casts of parameters, which masks change between passes. On a
    CPU, bf16 attention goes by plain products: flash attention's backward is slow there, and the checks
    of torch's own fallback take a tenth of the pass.
    """
    with ExitStack() as stack:
        if bf16:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(_plain_attention(model))
        yield


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    found = [(module, module.processor) for module in model.modules() if isinstance(module, Attention)]
    for module, _ in found:
        module.processor = AttnProcessor()
    try:
        yield
    finally:
        for module, processor in found:
            module.processor = processor


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let glibc keep what tensors free instead of returning it: page faults cost an eighth of a step here.

    It is given back at the end. Other C libraries are left as they are.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)
    try:
        yield
    finally:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@dataclass
class Task:
    """What is trained on: scheduler, images and seed; one batch a step.

    teacher: a dense model whose prediction is matched with weight ``distill``. cycle: how many batches
    come round again and again (0: never the same twice). accumulate: into how many parts a batch is split
    where gradients are taken, to save memory. compiled: pass networks through torch.compile.

    Each rank takes its slice of a batch that all of them draw: images, timesteps and noise of a step are the
    same for any number of ranks.
    """

    scheduler: object
    batches: Batches
    seed: int
    device: torch.device
    bf16: bool
    timesteps: Timesteps | None = None
    min_snr: float | None = None
    teacher: nn.Module | None = None
    distill: float = 0.0
    cycle: int = 0
    accumulate: int = 1
    compiled: bool = False
    networks: dict[nn.Module, nn.Module] = field(default_factory=dict, repr=False)  # to their compiled forms

    @classmethod
    def of(
        cls, recipe: Recipe, scheduler, images: Tensor, device: torch.device, teacher: nn.Module | None = None
    ) -> Task:
        """The task of a recipe on uint8 training images ``[N, C, H, W]``."""
        spec, timesteps = recipe.train, None
        if spec.timesteps != "uniform":
            timesteps = Timesteps(spec.timesteps, scheduler.config.num_train_timesteps)
        return cls(
            scheduler,
            Batches(images, recipe.data.batch_size, recipe.seed, recipe.data.flip),
            recipe.seed,
            device,
            use_bf16(device, spec.precision),
            timesteps,
            spec.min_snr,
            teacher,
            spec.distill,
            accumulate=spec.accumulate,
            compiled=spec.compile,
        )

    def batch(self, stage: str, step: int) -> NoisedBatch:
        """Images, timesteps and noise of this step of this stage: this rank's slice of them."""
        step = step % self.cycle if self.cycle else step
        x0 = self.batches.at(step, self.device)
        gen = generator(self.seed, stage, "noise", step)
        batch = self.own(diffusion.noised(self.scheduler, x0, gen, timesteps=self.timesteps, min_snr=self.min_snr))
        if self.teacher is None or not self.distill:
            return batch
        with numerics(self.teacher, self.device, self.bf16), torch.no_grad():
            prediction = self.teacher(batch.x_t, batch.t).sample.float()
        return dataclasses.replace(batch, teacher=prediction, distill=self.distill)

    def own(self, batch: NoisedBatch) -> NoisedBatch:
        """This rank's slice of a batch; ValueError when there are fewer images than ranks."""
        return batch if parallel.size() == 1 else batch.slice(*parallel.own_slice(len(batch.t)))

    def losses(self, denoiser: nn.Module, batch: NoisedBatch) -> Tensor:
        """What is minimised, ``[B]``, in the task's precision; the timestep sampler looks on."""
        objective, error = self._pass(denoiser, batch)
        self._observe(batch, error)
        return objective

    def backward(self, denoiser: nn.Module, batch: NoisedBatch, samples: int = 1) -> Tensor:
        """:meth:`losses`, and into ``.grad`` this rank's part of the gradient of their mean over the whole batch,
        divided by ``samples``. Ranks that do not share the model (sharding.py) still have to sum what they gathered.
        """
        losses, errors = [], []
        for part in batch.parts(self.accumulate):
            objective, error = self._pass(denoiser, part)
            objective.backward(torch.full_like(objective, part.share / (len(objective) * samples)))
            losses.append(objective.detach())
            errors.append(error)
        self._observe(batch, torch.cat(errors))
        return torch.cat(losses)

    def _pass(self, denoiser: nn.Module, batch: NoisedBatch) -> tuple[Tensor, Tensor]:
        network = self._compiled(denoiser) if self.compiled else denoiser
        with numerics(denoiser, self.device, self.bf16):
            objective, error = diffusion.losses(lambda x, t: network(x, t).sample, batch)
        return objective, error.detach()

    def _compiled(self, network: nn.Module) -> nn.Module:
        """The network's compiled form, which shares its weights."""
        if network not in self.networks:
            self.networks[network] = torch.compile(network)
        return self.networks[network]

    def _observe(self, batch: NoisedBatch, error: Tensor) -> None:
        if self.timesteps is not None:
            self.timesteps.observe(batch.t.cpu(), error.float().cpu())


def rate_at(schedule: str, peak: float, warmup: float, step: int, steps: int) -> float:
    """The rate of one step: a linear warm-up over a share of the steps, then constant, linear or cosine to zero."""
    rising = max(1, round(steps * warmup)) if warmup else 0
    if step < rising:
        return peak * (step + 1) / rising
    share = (step - rising) / max(1, steps - rising)
    falling = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return peak * falling[schedule]


@dataclass(frozen=True)
class Window:
    """The steps of a stage in which something moves: first <= step < last."""

    first: int
    last: int

    @classmethod
    def of(cls, steps: int, since: float = 0.0, until: float = 1.0) -> Window:
        return cls(round(steps * since), max(round(steps * until), round(steps * since) + 1))

    def holds(self, step: int) -> bool:
        return self.first <= step < self.last

    def rate(self, schedule: str, peak: float, warmup: float, step: int) -> float:
        return rate_at(schedule, peak, warmup, step - self.first, self.last - self.first)


class Weights:
    """Weights in training: AdamW, scheduled rate, gradient clipping, exponential average (diffusers')."""

    def __init__(self, parameters: Iterable[Tensor], spec: Train, window: Window) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.spec, self.window = spec, window
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.is_sharded = sharding.is_shard(self.parameters[0])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=spec.lr, weight_decay=0.0, fused=fused)
        self.ema = EMAModel(self.parameters, decay=spec.ema, foreach=not self.is_sharded)

    def update(self, step: int) -> dict[str, float]:
        """One optimiser step on the gradients at hand; the figures to record."""
        rate = self.window.rate(self.spec.schedule, self.spec.lr, self.spec.warmup, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return {"lr": rate, "grad_norm": norm.item()}

    def use_average(self) -> None:
        """Put the averaged weights in place."""
        self.ema.copy_to(self.parameters)

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for i, parameter in enumerate(self.parameters):
            own = {f"weight.{i}": parameter, f"ema.{i}": self.ema.shadow_params[i]}
            own |= {f"adam.{i}.{k}": v for k, v in self.optimizer.state[parameter].items()}
            found |= {name: sharding.whole_on_rank_0(tensor) for name, tensor in own.items()}
        return found | {"ema_step": torch.tensor(self.ema.optimization_step)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(sharding.as_held_by(tensors[f"weight.{i}"], parameter))
            self.ema.shadow_params[i].copy_(sharding.as_held_by(tensors[f"ema.{i}"], parameter))
            self.optimizer.state[parameter] = optimizer_state(tensors, f"adam.{i}.", parameter)
        self.ema.optimization_step = int(tensors["ema_step"])


def optimizer_state(tensors: dict[str, Tensor], prefix: str, like: Tensor) -> dict[str, Tensor]:
    """What an optimiser keeps of one parameter (moments, its step counter), as that is kept."""
    return {k.removeprefix(prefix): sharding.as_held_by(v, like) for k, v in tensors.items() if k.startswith(prefix)}


def require_finite(what: str, value: float, step: int, stage: str, rates: dict[str, float]) -> None:
    """Raise Diverged in one line unless ``value`` is a finite number; ``rates`` are those that led there."""
    if not math.isfinite(value):
        lower = " or ".join(rates) or "the rate"
        raise Diverged(f"the {what} became {value} at step {step + 1} of {stage}; lower {lower}", rates)


class Learner(Protocol):
    """What a trainer drives: DenseLoss below, and the mask methods of learn.py."""

    rates: dict[str, float]  # of its own parameters, by the recipe's names

    def prepare(self, step: int, train: bool) -> None:
        """Called before each step; ``train``: whether the weights move in it."""

    def step(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        """Forward and backward; moves its own parameters and leaves the weights' gradients."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: dict[str, Tensor]) -> None: ...


def gradients(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Those that ranks have to sum: gradients of shards are summed as they come."""
    found = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return (gradient for gradient in found if not sharding.is_shard(gradient))


class DenseLoss:
    """No masks: plain fine-tuning through the same loop."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.rates = unet, {}

    def prepare(self, step: int, train: bool) -> None:
        pass

    def step(self, task: Task, batch: NoisedBatch, step: int, train: bool) -> dict[str, float]:
        value = batch.mean(task.backward(self.unet, batch))
        parallel.sum_(itertools.chain([value], gradients(self.unet.parameters())))
        return {"loss": value.item()}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        pass


class Trainer:
    """A stage of training: a learner, maybe weights, so many steps; resumable at any of them."""

    def __init__(
        self,
        stage: str,
        steps: int,
        task: Task,
        learner: Learner,
        weights: Weights | None,
        window: Window | None = None,
    ) -> None:
        self.stage, self.steps, self.task = stage, steps, task
        self.learner, self.weights = learner, weights
        self.done, self.last = (window.first, window.last) if window else (0, steps)

    def __iter__(self) -> Iterator[Step]:
        """Train to the end (of the window, if one is given), yielding after each step.

        Diverged is raised when the loss is not finite.
        """
        while self.done < self.last:
            step, sent = self.done, parallel.bytes_sent()
            with parallel.talking() if self.is_sharded else nullcontext():
                values = self._step(step)
            if parallel.size() > 1 and not self.is_sharded:  # FSDP's own are not counted
                values["bytes_sent"] = parallel.bytes_sent() - sent
            self.done = step + 1
            yield Step(self.stage, self.done, self.steps, values)

    def _step(self, step: int) -> dict[str, float]:
        """The figures of a step, taken."""
        train = self.weights is not None and self.weights.window.holds(step)
        self.learner.prepare(step, train)
        values = self.learner.step(self.task, self.task.batch(self.stage, step), step, train)
        rate = {"train.lr": self.weights.spec.lr} if train else {}
        require_finite("loss", values["loss"], step, self.stage, self.rates(train))
        if train:
            values |= self.weights.update(step)
            require_finite("gradient norm", values["grad_norm"], step, self.stage, rate)
        return values

    @property
    def is_sharded(self) -> bool:
        """Whether ranks share the weights."""
        return self.weights is not None and self.weights.is_sharded

    def rates(self, train: bool = True) -> dict[str, float]:
        """The recipe's rates that move something here; ``train``: the weights too."""
        moves_weights = train and self.weights is not None
        return ({"train.lr": self.weights.spec.lr} if moves_weights else {}) | self.learner.rates

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        found = self.learner.tensors() | (self.weights.tensors() if self.weights else {})
        return found | (self.task.timesteps.tensors() if self.task.timesteps else {})

    def load(self, tensors: dict[str, Tensor], done: int) -> None:
        if self.weights is not None:
            self.weights.load(tensors)
        if self.task.timesteps is not None:
            self.task.timesteps.load(tensors)
        self.learner.load(tensors)
        self.done = done
