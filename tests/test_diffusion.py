"""Loss and sampling against diffusers; images that depend on their seed alone."""

import pytest
import torch
from conftest import make_unet
from diffusers import DDIMScheduler, DDPMScheduler

from prunedm import diffusion
from prunedm.seeds import derive, generator


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noised_batches_follow_the_scheduler(prediction):
    scheduler = DDPMScheduler(prediction_type=prediction)
    x0 = torch.rand(6, 1, 4, 4) * 2 - 1
    batch = diffusion.noised(scheduler, x0, generator(0, "x"))
    alpha = scheduler.alphas_cumprod[batch.t][:, None, None, None]
    noise = (batch.x_t - alpha.sqrt() * x0) / (1 - alpha).sqrt()
    target = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * x0,
    }[prediction]
    assert torch.allclose(batch.target, target, atol=1e-3)
    perfect = diffusion.loss(lambda x, t: batch.target, batch)
    assert perfect == 0


def test_validation_is_the_same_for_everyone_and_covers_all_times():
    x0 = torch.rand(20, 1, 4, 4)
    a, b = (diffusion.validation_batches(DDPMScheduler(), x0, 20, 8, 3) for _ in range(2))
    assert all(torch.equal(p.x_t, q.x_t) and torch.equal(p.t, q.t) for p, q in zip(a, b))
    times = torch.cat([p.t for p in a]).sort().values
    assert times.tolist() == [i * 50 for i in range(20)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(sampler):
    unet, scheduler = make_unet(), DDPMScheduler()
    seeds = [derive(0, i) for i in range(9)]
    together = diffusion.sample(unet, scheduler, seeds, sampler, 5)
    alone = torch.cat([diffusion.sample(unet, scheduler, [seed], sampler, 5) for seed in seeds])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_ddim_equals_diffusers_own_loop():
    unet, scheduler = make_unet(), DDPMScheduler()
    stepper = DDIMScheduler.from_config(scheduler.config)
    stepper.set_timesteps(5)
    x = torch.randn(1, 1, 8, 8, generator=generator(7, "image"))
    with torch.no_grad():
        for t in stepper.timesteps:
            x = stepper.step(unet(x, t).sample, t, x).prev_sample
    assert torch.allclose(diffusion.sample(unet, scheduler, [7], "ddim", 5), x.clamp(-1, 1), atol=1e-6)


def test_seeds_have_names():
    assert derive(0, "a", 1) == derive(0, "a", 1)
    assert len({derive(0, "a", 1), derive(0, "a", 2), derive(0, "b", 1), derive(1, "a", 1), derive(0, "a1")}) == 5


def test_bytes_and_floats_agree():
    from prunedm import data

    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(diffusion.to_uint8(data.to_float(images)), images)
