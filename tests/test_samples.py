"""Samples streamed in chunks: the same images however many are asked for, kept, resumed, and never all in memory."""

import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler

from prunedm import cache, diffusion, extractors, samples
from prunedm.recipe import Eval
from prunedm.unet import Diffusion


class Counted(torch.nn.Module):
    """A UNet that counts its calls."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = make_unet(), 0
        self.config = self.inner.config

    def forward(self, x, t):
        self.calls += 1
        return self.inner(x, t)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENV, str(tmp_path))
    monkeypatch.setattr(samples, "MOST", 4)
    return Diffusion(Counted(), DDPMScheduler(prediction_type="sample"))


def stream(model, count, **changes):
    use = changes.pop("use", "evaluation")
    found = samples.SampleSet(model, "model", Eval(**({"steps": 2} | changes)), use)
    chunks = list(found.stream(count, extractors.get("bundled")))
    return torch.cat([c.images for c in chunks]), torch.cat([c.features for c in chunks])


def test_they_are_the_samplers_images_in_the_seeds_order(model):
    images, features = stream(model, 10)
    seeds = samples.image_seeds(0, range(10))
    direct = diffusion.to_uint8(diffusion.sample(model.unet, model.scheduler, seeds, "ddim", 2))
    assert images.shape == (10, 1, 8, 8) and (images.int() - direct.int()).abs().max() <= 1
    assert torch.allclose(features, extractors.get("bundled").features(images), atol=1e-5)


def test_a_smaller_number_is_the_start_of_a_larger_one_and_nothing_is_sampled_twice(model):
    few, _ = stream(model, 6)
    calls = model.unet.calls
    assert calls == 2 * 2, "two chunks of two steps"
    many, _ = stream(model, 10)
    assert torch.equal(many[:6], few) and model.unet.calls == calls + 2
    stream(model, 10)
    assert model.unet.calls == calls + 2


def test_a_part_reads_only_its_own_chunks(model):
    whole, _ = stream(model, 12)
    fresh = samples.SampleSet(model, "other", Eval(steps=2))
    calls = model.unet.calls
    assert torch.equal(fresh.images(5, 11), whole[5:11]) and model.unet.calls == calls + 2 * 2


def test_an_interrupted_stream_goes_on_where_it_was(model):
    whole = samples.SampleSet(model, "model", Eval(steps=2))
    stopped = whole.stream(12, extractors.get("bundled"))
    next(stopped), next(stopped)
    stopped.close()
    calls = model.unet.calls
    images, _ = stream(model, 12)
    assert model.unet.calls == calls + 2 and len(images) == 12


def test_what_images_depend_on_keeps_them_apart(model):
    base, _ = stream(model, 4)
    for changes in ({"seed": 1}, {"steps": 3}, {"eta": 1.0}, {"sampler": "ddpm"}, {"use": "evaluation again"}):
        other, _ = stream(model, 4, **changes)
        assert not torch.equal(base, other), changes
    assert (
        samples.SampleSet(model, "other", Eval(steps=2)).folder
        != samples.SampleSet(model, "model", Eval(steps=2)).folder
    )


def test_another_extractor_samples_nothing_anew(model):
    stream(model, 8)
    calls = model.unet.calls

    class Other(extractors.Bundled):
        name, weights = "other", "0" * 64

        def features(self, images):
            return images.flatten(1).float()

    found = samples.SampleSet(model, "model", Eval(steps=2))
    assert [c.features.shape for c in found.stream(8, Other())] == [(4, 64), (4, 64)] and model.unet.calls == calls


def test_large_images_come_in_small_chunks(monkeypatch):
    model = Diffusion(make_unet(sample_size=256), DDPMScheduler())
    assert samples.SampleSet(model, "model", Eval()).size == 4
    assert samples.SampleSet(Diffusion(make_unet(sample_size=1024), DDPMScheduler()), "m", Eval()).size == 1
    whole = samples.SampleSet(Diffusion(make_unet(sample_size=100), DDPMScheduler()), "m", Eval())
    assert whole.size == 24, "whole calls of 8, where 26 images would have the pixels"
