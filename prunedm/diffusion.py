"""The diffusion side: noise-prediction loss, timestep sampling, seeded sampling of images.

Sources: DDPM (arXiv 2006.11239, eq. 14 for the loss), DDIM (arXiv 2010.02502), DPM-Solver++ (arXiv
2211.01095, its multistep form of order 2), Euler (arXiv 2206.00364, algorithm 2 without churn). Schedulers
are those of diffusers; this module only fixes where each random number comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import giveway, parallel
from .recipe import SAMPLERS, TIMESTEPS
from .seeds import generator
from .unet import image_shape

TIMESTEP_BINS = 10
CALL, CALL_ON_CPU, CALL_PIXELS = 64, 8, 64 * 64 * 64  # images of a UNet call while sampling, and their pixels, at most

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t [B,C,H,W], t [B]) -> prediction [B,C,H,W]


@dataclass(frozen=True)
class NoisedBatch:
    """One batch at fixed timesteps and noise, so that two networks can be judged on the same task.

    x_t, target: ``[B, C, H, W]``; t: ``[B]`` integer timesteps; weight: ``[B]`` factors of each image's
    loss (None: 1); teacher: the dense model's prediction, to be matched with ``distill`` times the weight
    of the target. share: which share of the step's whole batch these images are (a rank's slice, a part that
    is passed by itself), and whole_t: the timesteps of all of it, ``[whole B]``; None where this is all.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor | None = None
    teacher: Tensor | None = None
    distill: float = 0.0
    share: float = 1.0
    whole_t: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """The part of these images, ``values [B]``, in the mean over the whole batch."""
        return values.mean() if self.share == 1.0 else values.mean() * self.share

    def slice(self, start: int, stop: int) -> NoisedBatch:
        """The images at places ``start`` to ``stop`` (less one)."""
        tensors = {name: getattr(self, name) for name in ("x_t", "t", "target", "weight", "teacher")}
        cut = {name: None if tensor is None else tensor[start:stop] for name, tensor in tensors.items()}
        whole = self.t if self.whole_t is None else self.whole_t
        return dataclasses.replace(self, **cut, share=self.share * (stop - start) / len(self.t), whole_t=whole)

    def parts(self, count: int) -> list[NoisedBatch]:
        """So many parts of nearly equal size, fewer where there are fewer images."""
        if count == 1:
            return [self]
        images = len(self.t)
        count = min(count, images)
        return [self.slice(images * i // count, images * (i + 1) // count) for i in range(count)]


def regression_target(scheduler, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network is asked to predict, as the scheduler's ``prediction_type`` says."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(x0, noise, t)
    if kind == "sample":
        return x0
    raise ValueError(f"prediction_type {kind!r} is not known; use epsilon, v_prediction or sample")


class Timesteps:
    """How training draws timesteps (METHOD.md).

    uniform: p(t) = 1/T. early: p(t) grows linearly with the noise, so that the first steps of sampling
    train more; late: the reverse. Both change what is minimised, on purpose. importance: p of a timestep
    bin in proportion to the root mean square of its loss (improved DDPM, arXiv 2102.09672, eq. 18), mixed
    with a tenth of uniform, and each loss divided by T p(t): the same minimum, a steadier gradient.
    """

    def __init__(self, kind: str, steps: int) -> None:
        if kind not in TIMESTEPS:
            raise ValueError(f"timesteps={kind!r} is not known; use one of {', '.join(TIMESTEPS)}")
        self.kind, self.steps = kind, steps
        self.squares, self.seen = torch.zeros(TIMESTEP_BINS), torch.zeros(TIMESTEP_BINS)

    def draw(self, count: int, gen: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """(t ``[B]``, weights ``[B]`` or None for ones)."""
        if self.kind == "uniform" or (self.kind == "importance" and self.seen.min() < 1):
            return torch.randint(self.steps, (count,), generator=gen), None
        p = self.probabilities()
        t = torch.multinomial(p, count, replacement=True, generator=gen)
        return t, (1 / (self.steps * p[t])).float() if self.kind == "importance" else None

    def probabilities(self) -> Tensor:
        """p(t) of each timestep, ``[T]``, float64, sums to 1."""
        t = torch.arange(self.steps, dtype=torch.float64)
        if self.kind == "importance":
            p = self.squares.double().sqrt()[bin_of(t.long(), self.steps)]
            return 0.9 * p / p.sum() + 0.1 / self.steps
        p = {"uniform": torch.ones_like(t), "early": t + 1, "late": self.steps - t}[self.kind]
        return p / p.sum()

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Learn the size of each bin's loss from this batch: ``losses [B]`` without weights, on the CPU."""
        if self.kind != "importance":
            return
        bins = bin_of(t, self.steps)
        counts = torch.bincount(bins, minlength=TIMESTEP_BINS).float()
        squares = bin_sums(losses.square(), bins)
        parallel.sum_([counts, squares])
        for b in counts.nonzero()[:, 0].tolist():
            rate = max(0.05, 1 / (1 + self.seen[b].item()))
            self.squares[b] += rate * (squares[b] / counts[b] - self.squares[b])
            self.seen[b] += 1

    def tensors(self) -> dict[str, Tensor]:
        return {"timesteps.squares": self.squares, "timesteps.seen": self.seen}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.squares, self.seen = tensors["timesteps.squares"], tensors["timesteps.seen"]


def bin_of(t: Tensor, steps: int) -> Tensor:
    """The timestep bin of each t: TIMESTEP_BINS of equal width, the cleanest first."""
    return t * TIMESTEP_BINS // steps


def bin_sums(values: Tensor, bins: Tensor) -> Tensor:
    """The sum of the values ``[B]`` in each timestep bin, ``[TIMESTEP_BINS]``."""
    return torch.stack([values[bins == b].sum() for b in range(TIMESTEP_BINS)])


def min_snr_weight(scheduler, t: Tensor, gamma: float) -> Tensor:
    """min-SNR weights ``[B]`` (arXiv 2303.09556): min(SNR, gamma) over the weight that the prediction
    type gives each timestep by itself: SNR for epsilon, SNR + 1 for v, 1 for x0."""
    alphas = scheduler.alphas_cumprod.to(t.device)[t].double()
    snr = alphas / (1 - alphas).clamp(min=1e-12)
    natural = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    kind = scheduler.config.prediction_type
    return (snr.clamp(max=gamma) / natural[kind].clamp(min=1e-12)).float()


def noised(
    scheduler,
    x0: Tensor,
    gen: torch.Generator,
    stratify: bool = False,
    timesteps: Timesteps | None = None,
    min_snr: float | None = None,
) -> NoisedBatch:
    """Draw timesteps and noise on the CPU (the same on every device) and build the batch.

    ``stratify`` spreads the timesteps evenly instead of drawing them, for a quieter validation loss.
    """
    steps, count = scheduler.config.num_train_timesteps, len(x0)
    weight = None
    if stratify:
        t = (torch.arange(count) * steps // count).long()
        t = t[torch.randperm(count, generator=gen)]
    elif timesteps is not None:
        t, weight = timesteps.draw(count, gen)
    else:
        t = torch.randint(steps, (count,), generator=gen)
    noise = torch.randn(x0.shape, generator=gen).to(x0)
    if min_snr is not None:
        snr = min_snr_weight(scheduler, t, min_snr)
        weight = snr if weight is None else weight * snr
    t = t.to(x0.device)
    target = regression_target(scheduler, x0, noise, t)
    return NoisedBatch(scheduler.add_noise(x0, noise, t), t, target, None if weight is None else weight.to(x0.device))


def losses(denoiser: Denoiser, batch: NoisedBatch) -> tuple[Tensor, Tensor]:
    """(what is minimised, noise-prediction error), each ``[B]``.

    The first adds ``distill`` times the distance to the teacher and the batch's weights; without them
    the two are one.
    """
    prediction = denoiser(batch.x_t, batch.t).float()
    error = (prediction - batch.target).square().flatten(1).mean(1)
    objective = error
    if batch.teacher is not None:
        objective = objective + batch.distill * (prediction - batch.teacher).square().flatten(1).mean(1)
    if batch.weight is not None:
        objective = objective * batch.weight
    return objective, error


def per_image_loss(denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
    """Mean squared error of each image, ``[B]`` (DDPM, eq. 14, at the batch's timesteps)."""
    return losses(denoiser, batch)[1]


def loss(denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
    """Mean of :func:`per_image_loss` over the batch, a scalar."""
    return per_image_loss(denoiser, batch).mean()


def validation_batches(scheduler, images: Tensor, count: int, batch_size: int, seed: int) -> list[NoisedBatch]:
    """Fixed (x, t, noise) from the first ``count`` held-out images, shared by all variants."""
    images = images[:count]
    gen = generator(seed, "validation")
    whole = noised(scheduler, images, gen, stratify=True)
    parts = zip(*(part.split(batch_size) for part in (whole.x_t, whole.t, whole.target)))
    return [NoisedBatch(*part) for part in parts]


@torch.no_grad()
def per_image_losses(denoiser: Denoiser, batches: list[NoisedBatch]) -> Tensor:
    """Noise-prediction error of each image, ``[N]``, in the batches' order: pairs of variants, for intervals.

    Ranks deal the batches out, so all of them must call.
    """
    found = giveway.before_each(lambda i: per_image_loss(denoiser, batches[i]))
    return torch.cat(list(parallel.dealt(len(batches), found)))


def validation_loss(denoiser: Denoiser, batches: list[NoisedBatch]) -> float:
    """Mean of :func:`per_image_losses` over :func:`validation_batches`."""
    return per_image_losses(denoiser, batches).mean().item()


def by_bin(errors: Tensor, batches: list[NoisedBatch], steps: int) -> list[float | None]:
    """Mean of :func:`per_image_losses` in each timestep bin, the cleanest first; None where no image fell."""
    bins = bin_of(torch.cat([batch.t for batch in batches]).cpu(), steps)
    return [errors[bins == b].mean().item() if (bins == b).any() else None for b in range(TIMESTEP_BINS)]


def losses_by_bin(denoiser: Denoiser, batches: list[NoisedBatch], steps: int) -> tuple[float, list[float | None]]:
    """:func:`validation_loss`, and that of each timestep bin."""
    errors = per_image_losses(denoiser, batches).cpu()
    return errors.mean().item(), by_bin(errors, batches, steps)


def make_sampler(name: str, scheduler, steps: int):
    """A new diffusers sampler with the trained scheduler's betas, set to ``steps`` steps.

    Samplers keep what they saw (DPM-Solver++ its last outputs, Euler its place): one for each batch.
    ValueError when the name is not known or the trained timesteps are too few for so many steps.
    """
    import diffusers

    classes = {"ddim": "DDIM", "ddpm": "DDPM", "dpm-solver++": "DPMSolverMultistep", "euler": "EulerDiscrete"}
    if name not in classes:
        raise ValueError(f"eval.sampler={name!r} is not known; use one of {', '.join(SAMPLERS)}")
    trained = scheduler.config.num_train_timesteps
    fixed = {"algorithm_type": "dpmsolver++"} if name == "dpm-solver++" else {}
    stepper = getattr(diffusers, f"{classes[name]}Scheduler").from_config(scheduler.config, **fixed)
    if steps <= trained:
        stepper.set_timesteps(steps)
        if not (stepper.timesteps.diff() >= 0).any():  # DPM-Solver++ repeats timesteps when they run out
            return stepper
    raise ValueError(f"eval.steps={steps} is too many for {name} on a model of {trained} timesteps; use fewer steps")


def require_sampler(unet, sampler: str) -> None:
    """ValueError when the UNet cannot be sampled so: Euler's timesteps are real numbers, and tables have rows."""
    if sampler == "euler" and getattr(unet.config, "time_embedding_type", None) == "learned":
        raise ValueError(
            "eval.sampler=euler gives timesteps as real numbers and this model looks whole ones up in a table "
            "(layout=uniform); use ddim, ddpm or dpm-solver++"
        )


def call_size(image_shape: tuple[int, int, int], device: torch.device) -> int:
    """How many images ``(C, H, W)`` each UNet call of :func:`sample` has, whatever the batch."""
    _, height, width = image_shape
    most = CALL_ON_CPU if device.type == "cpu" else CALL
    return max(1, min(most, CALL_PIXELS // (height * width)))


def _in_calls(unet, x: Tensor, t: Tensor, size: int) -> Tensor:
    """The UNet's output for ``x [B, C, H, W]``, float32, by calls of ``size`` images; the last is filled up.

    Kernels are chosen by batch size and differ in the last digits, which sampling grows: Euler's images differed by
    1.2e-5 after 25 steps. Calls of one size give each image the same digits in any batch.
    """
    missing = -len(x) % size
    filled = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
    return torch.cat([unet(part, t).sample.float() for part in giveway.between(filled.split(size))])[: len(x)]


@torch.no_grad()
def sample(
    unet,
    scheduler,
    image_seeds: list[int],
    sampler: str = "ddim",
    steps: int = 25,
    eta: float = 0.0,
) -> Tensor:
    """Images ``[B, C, H, W]`` in [-1, 1], one for each seed, the same in any batch (:func:`_in_calls`).

    Each image's generator gives its first noise and then that of the steps (ddpm, and ddim with ``eta`` > 0:
    the share of DDPM's noise, DDIM eq. 16). ValueError as :func:`make_sampler` and :func:`require_sampler`.
    """
    if eta and sampler != "ddim":
        raise ValueError(f"eval.eta={eta} is not read by sampler={sampler}; remove it or use ddim")
    require_sampler(unet, sampler)
    stepper = make_sampler(sampler, scheduler, steps)
    options = {"eta": eta} if sampler == "ddim" else {}
    shape, parameter = image_shape(unet), next(unet.parameters())
    generators = [generator(seed, "image") for seed in image_seeds]
    x = torch.stack([torch.randn(shape, generator=gen) for gen in generators])
    x, size = (x * stepper.init_noise_sigma).to(parameter.device), call_size(shape, parameter.device)
    for t in stepper.timesteps:
        prediction = _in_calls(unet, stepper.scale_model_input(x, t), t, size)
        x = stepper.step(prediction, t, x, generator=generators, **options).prev_sample
    return x.clamp(-1, 1)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] floats to 0..255 bytes on the CPU."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
