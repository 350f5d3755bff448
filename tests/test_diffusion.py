"""Loss and sampling against diffusers; images that depend on their seed alone."""

import pytest
import torch
from conftest import make_unet
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

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


def test_losses_of_single_images_are_those_of_the_mean_and_of_the_bins():
    def denoiser(x, t):
        return x * 0.5

    batches = diffusion.validation_batches(DDPMScheduler(), torch.rand(30, 1, 4, 4), 30, 8, 3)
    found = diffusion.per_image_losses(denoiser, batches)
    target, x_t = (torch.cat([getattr(b, name) for b in batches]) for name in ("target", "x_t"))
    assert torch.allclose(found, ((x_t * 0.5 - target) ** 2).mean((1, 2, 3)))
    assert found.mean().item() == diffusion.validation_loss(denoiser, batches)
    assert diffusion.losses_by_bin(denoiser, batches, 1000)[0] == found.mean().item()


WAYS = [("ddim", 0.0), ("ddim", 1.0), ("ddim", 0.3), ("ddpm", 0.0), ("dpm-solver++", 0.0), ("euler", 0.0)]


def alone_and_together(unet, scheduler, sampler, steps, eta, places=(0, 17, 63)):
    """The largest difference of images drawn alone from the same among 64."""
    seeds = [derive(0, i) for i in range(64)]
    together = diffusion.sample(unet, scheduler, seeds, sampler, steps, eta)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    alone = torch.cat([diffusion.sample(unet, scheduler, [seeds[i]], sampler, steps, eta) for i in places])
    return (together[list(places)] - alone).abs().max().item()


@pytest.mark.in_turn(4)
@pytest.mark.parametrize("prediction", ["sample", "epsilon"])  # an untrained UNet's noise grows the last digits most
@pytest.mark.parametrize(("sampler", "eta"), WAYS)
def test_an_image_depends_on_its_seed_and_not_on_its_batch(sampler, eta, prediction):
    assert alone_and_together(make_unet(), DDPMScheduler(prediction_type=prediction), sampler, 25, eta) <= 1e-5


@pytest.mark.parametrize(("sampler", "eta", "steps"), [("euler", 0.0, 8), ("dpm-solver++", 0.0, 8), *(
    pytest.param(*way, 25, marks=pytest.mark.slow) for way in WAYS)])  # fmt: skip
def test_the_bundled_model_draws_the_same_image_alone_and_among_64(sampler, eta, steps):
    from prunedm import unet as unets

    model = unets.load("bundled")
    assert alone_and_together(model.unet, model.scheduler, sampler, steps, eta, (40,)) <= 1e-5


class Sizes(torch.nn.Module):
    """A UNet that notes how many images each call has."""

    def __init__(self, side=8):
        super().__init__()
        self.inner, self.seen = make_unet(sample_size=side), []
        self.config = self.inner.config

    def forward(self, x, t):
        self.seen.append(len(x))
        return self.inner(x, t)


def test_every_call_while_sampling_has_the_same_number_of_images():
    for count in (1, 8, 11):
        unet = Sizes()
        assert len(diffusion.sample(unet, DDPMScheduler(), list(range(count)), "ddim", 2)) == count
        assert unet.seen == [diffusion.CALL_ON_CPU] * 2 * -(-count // diffusion.CALL_ON_CPU)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sides = (28, 64, 128, 256, 1024)
    assert [diffusion.call_size((1, side, side), gpu) for side in sides] == [64, 64, 16, 4, 1]
    assert [diffusion.call_size((3, side, side), cpu) for side in sides] == [8, 8, 8, 4, 1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(("sampler", "eta"), WAYS)
def test_sampling_equals_diffusers_own_loop(sampler, eta, spacing, prediction):
    """The loop of diffusers' pipelines with the same scheduler, first noise and generator; a call's other images, which
    are dropped, are there because kernels are chosen by batch size."""
    unet = make_unet()
    scheduler = DDPMScheduler(timestep_spacing=spacing, prediction_type=prediction)
    kinds = {
        "ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm-solver++": DPMSolverMultistepScheduler,
        "euler": EulerDiscreteScheduler,
    }  # fmt: skip
    stepper = kinds[sampler].from_config(scheduler.config)
    stepper.set_timesteps(6)
    gen = generator(7, "image")
    x = torch.randn(1, 1, 8, 8, generator=gen) * stepper.init_noise_sigma
    more = {"eta": eta} if sampler == "ddim" else {}
    with torch.no_grad():
        for t in stepper.timesteps:
            call = stepper.scale_model_input(x, t).expand(diffusion.CALL_ON_CPU, -1, -1, -1)
            x = stepper.step(unet(call, t).sample[:1], t, x, generator=gen, **more).prev_sample
    found = diffusion.sample(unet, scheduler, [7], sampler, 6, eta)
    assert torch.allclose(found, x.clamp(-1, 1), atol=1e-6) and found.isfinite().all()
    assert torch.equal(found, diffusion.sample(unet, scheduler, [7], sampler, 6, eta))  # nothing is left in between


def test_eta_one_is_not_eta_zero_and_zero_is_the_default():
    unet, scheduler = make_unet(), DDPMScheduler()
    default = diffusion.sample(unet, scheduler, [7], steps=5)
    assert torch.equal(default, diffusion.sample(unet, scheduler, [7], "ddim", 5, 0.0))
    assert not torch.allclose(default, diffusion.sample(unet, scheduler, [7], "ddim", 5, 1.0), atol=1e-2)


def test_a_table_over_timesteps_refuses_euler_and_takes_the_others():
    unet = make_unet(time_embedding_type="learned", num_train_timesteps=1000)
    for sampler in ("ddim", "ddpm", "dpm-solver++"):
        assert diffusion.sample(unet, DDPMScheduler(), [1], sampler, 3).isfinite().all()
    with pytest.raises(ValueError, match=r"eval.sampler=euler .* table .* use ddim, ddpm or dpm-solver\+\+$"):
        diffusion.sample(unet, DDPMScheduler(), [1], "euler", 3)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sampler": "heun"}, r"eval.sampler='heun' is not known; use one of ddim, ddpm, dpm-solver\+\+, euler"),
        ({"sampler": "ddpm", "eta": 0.5}, "eval.eta=0.5 is not read by sampler=ddpm; remove it or use ddim"),
        ({"steps": 101}, "eval.steps=101 is too many for ddim on a model of 100 timesteps; use fewer steps"),
        ({"sampler": "dpm-solver++", "steps": 100}, r"eval.steps=100 is too many for dpm-solver\+\+"),
    ],
)
def test_what_cannot_be_sampled_is_said_in_one_line(changes, line):
    with pytest.raises(ValueError, match=line) as caught:
        diffusion.sample(make_unet(), DDPMScheduler(num_train_timesteps=100), [1], **changes)
    assert "\n" not in str(caught.value)


def test_seeds_have_names():
    assert derive(0, "a", 1) == derive(0, "a", 1)
    assert len({derive(0, "a", 1), derive(0, "a", 2), derive(0, "b", 1), derive(1, "a", 1), derive(0, "a1")}) == 5


def test_bytes_and_floats_agree():
    from prunedm import data

    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(diffusion.to_uint8(data.to_float(images)), images)
