"""The diffusion side: noise-prediction loss, timestep sampling, seeded sampling of images.

Sources: DDPM (arXiv 2006.11239, eq. 14 for the loss), DDIM (arXiv 2010.02502). Schedulers are those
of diffusers; this module only fixes where each random number comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .seeds import generator
from .unet import image_shape

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t [B,C,H,W], t [B]) -> prediction [B,C,H,W]


@dataclass(frozen=True)
class NoisedBatch:
    """One batch at fixed timesteps and noise, so that two networks can be judged on the same task.

    x_t, target: ``[B, C, H, W]``; t: ``[B]`` integer timesteps.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor


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


def noised(scheduler, x0: Tensor, gen: torch.Generator, stratify: bool = False) -> NoisedBatch:
    """Draw timesteps and noise on the CPU (the same on every device) and build the batch.

    ``stratify`` spreads the timesteps evenly instead of drawing them, for a quieter validation loss.
    """
    steps, count = scheduler.config.num_train_timesteps, len(x0)
    if stratify:
        t = (torch.arange(count) * steps // count).long()
        t = t[torch.randperm(count, generator=gen)]
    else:
        t = torch.randint(steps, (count,), generator=gen)
    noise = torch.randn(x0.shape, generator=gen).to(x0)
    t = t.to(x0.device)
    return NoisedBatch(scheduler.add_noise(x0, noise, t), t, regression_target(scheduler, x0, noise, t))


def per_image_loss(denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
    """Mean squared error of each image, ``[B]`` (DDPM, eq. 14, at the batch's timesteps)."""
    error = denoiser(batch.x_t, batch.t).float() - batch.target
    return error.square().flatten(1).mean(1)


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
def validation_loss(denoiser: Denoiser, batches: list[NoisedBatch]) -> float:
    """Mean noise-prediction error over :func:`validation_batches`."""
    return torch.cat([per_image_loss(denoiser, batch) for batch in batches]).mean().item()


def make_sampler(name: str, scheduler, steps: int):
    """A diffusers sampler with the trained scheduler's betas, set to ``steps`` steps."""
    from diffusers import DDIMScheduler, DDPMScheduler

    classes = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
    if name not in classes:
        raise ValueError(f"eval.sampler={name!r} is not known; use one of {', '.join(classes)}")
    sampler = classes[name].from_config(scheduler.config)
    sampler.set_timesteps(steps)
    return sampler


@torch.no_grad()
def sample(
    unet,
    scheduler,
    image_seeds: list[int],
    sampler: str = "ddim",
    steps: int = 25,
) -> Tensor:
    """Images ``[B, C, H, W]`` in [-1, 1], one for each seed, the same whatever the batch size."""
    stepper = make_sampler(sampler, scheduler, steps)
    shape, parameter = image_shape(unet), next(unet.parameters())
    generators = [generator(seed, "image") for seed in image_seeds]
    x = torch.stack([torch.randn(shape, generator=gen) for gen in generators])
    x = (x * stepper.init_noise_sigma).to(parameter.device)
    for t in stepper.timesteps:
        prediction = unet(stepper.scale_model_input(x, t), t).sample.float()
        x = stepper.step(prediction, t, x, generator=generators).prev_sample
    return x.clamp(-1, 1)


def sample_stream(
    unet, scheduler, image_seeds: list[int], sampler: str, steps: int, batch_size: int = 64
) -> Iterator[Tensor]:
    """:func:`sample` in batches, as uint8 ``[B, C, H, W]`` on the CPU."""
    for start in range(0, len(image_seeds), batch_size):
        yield to_uint8(sample(unet, scheduler, image_seeds[start : start + batch_size], sampler, steps))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] floats to 0..255 bytes on the CPU."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
