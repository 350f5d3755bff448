"""Scores of weights against their definitions."""

import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler

from prunedm import data, importance, pattern, training
from prunedm.diffusion import Timesteps
from prunedm.masked_unet import MaskedUNet


@pytest.fixture
def task():
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return training.Task(DDPMScheduler(), data.Batches(images, 16, 0), 0, torch.device("cpu"), bf16=False)


def scores_by_layer(masked, task, kind):
    found = importance.weight_scores(masked, kind, task, batches=2)
    return {
        layer.name.removesuffix(".weight"): pattern.ungroup(values[layer.start : layer.stop], layer.shape)
        for bank, values in zip(masked.banks, found)
        for layer in bank.layers
    }


def test_wanda_is_magnitude_times_the_norm_of_the_input(task):
    unet, inputs = make_unet(), {}
    watched = ("mid_block.resnets.0.conv1", "mid_block.attentions.0.to_q", "down_blocks.0.resnets.0.time_emb_proj")
    for name in watched:
        unet.get_submodule(name).register_forward_pre_hook(
            lambda module, x, name=name: inputs.setdefault(name, []).append(x[0].detach())
        )
    with torch.no_grad():
        for step in range(2):
            batch = task.batch("calibration", step)
            unet(batch.x_t, batch.t)
    found = scores_by_layer(MaskedUNet(make_unet(), 2, 4), task, "wanda")
    for name in watched:
        x = torch.cat(inputs[name])
        channels = x.movedim(1, -1).reshape(-1, x.shape[1]) if x.dim() == 4 else x.reshape(-1, x.shape[-1])
        weight = unet.get_parameter(f"{name}.weight").detach()
        norm = channels.square().sum(0).sqrt().view(1, -1, *[1] * (weight.dim() - 2))
        ratio = found[name] / (weight.abs() * norm)
        assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-4), name


def test_fisher_is_the_mean_squared_gradient_times_the_squared_weight(task):
    unet = make_unet()
    total = torch.zeros_like(unet.mid_block.resnets[0].conv1.weight)
    for step in range(2):
        unet.zero_grad()
        task.losses(unet, task.batch("calibration", step)).mean().backward()
        total += unet.mid_block.resnets[0].conv1.weight.grad.square()
    found = scores_by_layer(MaskedUNet(make_unet(), 2, 4), task, "fisher")["mid_block.resnets.0.conv1"]
    wanted = unet.mid_block.resnets[0].conv1.weight.detach().square() * total / 2
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-14)


@pytest.mark.parametrize("kind", ["random", "magnitude", "wanda", "fisher"])
def test_scores_leave_the_model_and_the_timestep_sampler_as_they_were(task, kind):
    task.timesteps = Timesteps("importance", 1000)
    masked = MaskedUNet(make_unet().requires_grad_(False), 2, 4)
    before = {k: v.clone() for k, v in masked.unet.state_dict().items()}
    first = importance.weight_scores(masked, kind, task)
    second = importance.weight_scores(masked, kind, task)
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "the same recipe, the same scores"
    assert all(torch.equal(before[k], v) for k, v in masked.unet.state_dict().items())
    assert task.timesteps.seen.sum() == 0
    assert not any(module._forward_pre_hooks for module in masked.unet.modules())


def test_an_unknown_score_is_refused(task):
    with pytest.raises(ValueError, match="importance 'best' is not known; use one of random, magnitude"):
        importance.weight_scores(MaskedUNet(make_unet(), 2, 4), "best", task)
