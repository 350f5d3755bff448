"""Channel scores against a direct computation with autograd and loops."""

import copy

import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler

from prunedm import data, diffusion
from prunedm.channel_groups import channel_groups
from prunedm.channel_scores import kept_timesteps, saliencies, scoring, time_weights
from prunedm.recipe import Recipe
from prunedm.seeds import generator
from prunedm.stage_recipes import Prune
from prunedm.training import Task

LAYER = "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def task():
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Task.of(Recipe(), DDPMScheduler(), images, torch.device("cpu"))


def scores(unet, task, **spec):
    with scoring(
        unet,
        Prune(calibration_images=8, calibration_steps=4, **spec) if spec["method"] != "magnitude" else Prune(**spec),
        task,
        0,
    ) as score:
        groups = channel_groups(unet, score, 4)[1]
    return next(g for g in groups if g.layer == LAYER).scores


def slices(values, reduce=sum):
    """The group of LAYER by hand: its own outputs, the time projection's, and the inputs of conv2."""
    resnet = "mid_block.resnets.0."
    per_layer = (
        values[LAYER].flatten(1).abs().sum(1),
        values[resnet + "time_emb_proj"].abs().sum(1),
        values[resnet + "conv2"].transpose(0, 1).flatten(1).abs().sum(1),
    )
    mean = reduce(per_layer) / 3
    return mean / mean.mean()


def gradients(unet, losses):
    unet = copy.deepcopy(unet)
    for loss in losses(unet):
        loss.backward()
    return {
        n.removesuffix(".weight"): (p * p.grad).detach() for n, p in unet.named_parameters() if n.endswith("weight")
    }


@pytest.mark.parametrize("norm", [1, 2])
def test_magnitude_is_the_group_norm(norm):
    unet = make_unet()
    weights = {n.removesuffix(".weight"): p.detach().abs() ** norm for n, p in unet.named_parameters()}
    assert torch.allclose(scores(unet, None, method="magnitude", norm=norm), slices(weights), rtol=1e-5)


def test_taylor_is_weight_times_the_gradient_of_the_mean_loss(task):
    unet, images = make_unet(), data.Batches(task.batches.images, 8, task.seed)

    def losses(net):
        for step in range(4):
            batch = diffusion.noised(
                task.scheduler, images.at(step), generator(task.seed, "calibration", "noise", step)
            )
            prediction = net(batch.x_t, batch.t).sample
            yield (prediction - batch.target).square().mean() / 4

    assert torch.allclose(scores(unet, task, method="taylor"), slices(gradients(unet, losses)), rtol=1e-4)


@pytest.mark.parametrize("kept", [4, 2])
def test_diff_pruning_sums_gradients_of_the_timesteps_above_the_threshold(task, kept):
    unet = make_unet()
    x0 = data.to_float(task.batches.images[:8])
    noise = torch.randn(x0.shape, generator=generator(task.seed, "prune", "noise"))
    taken = []

    def loss_at(net, t):
        ts = torch.full((8,), t)
        return (net(task.scheduler.add_noise(x0, noise, ts), ts).sample - noise).square().mean()

    times = [0, 333, 666, 999]
    values = [loss_at(unet, t).item() for t in times]
    ranked = sorted(values, reverse=True)
    threshold = 0.0 if kept == 4 else (ranked[kept - 1] + ranked[kept]) / 2 / ranked[0]

    def losses(net):
        for t, value in zip(times, values):
            if value / max(values) > threshold:
                taken.append(t)
                yield loss_at(net, t)

    wanted = slices(gradients(unet, losses))
    assert len(taken) == kept
    found = scores(unet, task, method="diff-pruning", loss_threshold=threshold)
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_the_timesteps_of_diff_pruning():
    assert kept_timesteps([1.0, 0.5, 0.05, 0.04], 0.05) == [True, True, False, False]


@pytest.mark.parametrize("time", ["mean", "max", "early", "late"])
def test_activation_is_weight_times_the_input_norm_over_time(task, time):
    unet = make_unet()
    found = saliencies(unet, Prune(method="activation", time=time, calibration_images=8, calibration_steps=4), task)
    x0 = data.to_float(task.batches.images[:8])
    noise = torch.randn(x0.shape, generator=generator(task.seed, "prune", "noise"))
    seen = []
    handle = unet.get_submodule(LAYER).register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for t in (0, 333, 666, 999):
            ts = torch.full((8,), t)
            unet(task.scheduler.add_noise(x0, noise, ts), ts)
    handle.remove()
    squares = torch.stack([x.square().mean((0, 2, 3)) for x in seen])
    power = {
        "mean": squares.mean(0),
        "max": squares.max(0).values,
        "early": (squares * torch.tensor([1.0, 334, 667, 1000])[:, None]).sum(0) / 2002,
        "late": (squares * torch.tensor([1000.0, 667, 334, 1])[:, None]).sum(0) / 2002,
    }[time]
    wanted = unet.get_submodule(LAYER).weight.abs() * power.sqrt()[None, :, None, None]
    assert torch.allclose(found[LAYER], wanted, rtol=1e-4)


def test_time_weights_sum_to_one():
    for strategy in ("mean", "early", "late"):
        assert time_weights([0, 10, 999], 1000, strategy).sum().item() == pytest.approx(1)
    assert time_weights([0], 1000, "max") is None


@pytest.mark.parametrize("method", ["taylor", "diff-pruning", "activation"])
def test_scoring_leaves_the_model_as_it_was_and_repeats(task, method):
    unet = make_unet()
    before = {n: (p.clone(), p.requires_grad) for n, p in unet.named_parameters()}
    first, again = scores(unet, task, method=method), scores(unet, task, method=method)
    assert torch.equal(first, again)
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "prod", "first"])
@pytest.mark.parametrize("normalizer", ["none", "mean", "sum", "max", "gaussian", "standardize", "lamp"])
def test_every_reduction_and_normalizer_of_torch_pruning_cuts(reduction, normalizer):
    from prunedm import structured

    _, report = structured.prune(make_unet(), Prune(target=0.3, reduction=reduction, normalizer=normalizer), 4, 0)
    assert report.reason == "" and report.parameters_after < report.parameters_before


def test_scores_that_are_no_numbers_and_missing_images_are_refused(task):
    unet = make_unet()
    with torch.no_grad():
        unet.get_submodule(LAYER).weight[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"channel scores of .* are not finite: its weights or gradients are zero or no numbers"
    ):
        scores(unet, None, method="magnitude")
    with pytest.raises(ValueError, match=r"prune\.method=taylor looks at images and none are given"):
        scores(make_unet(), None, method="taylor")
