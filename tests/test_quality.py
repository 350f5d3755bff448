"""The judge of quality: figures equal to the metrics' own, growing with noise, resumed, and said to be absent."""

import json

import numpy as np
import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler

from prunedm import cache, data, extractors, metrics, pictures, quality, samples
from prunedm import unet as unets
from prunedm.recipe import Eval

SETTINGS = {"images": 70, "steps": 2}


@pytest.fixture(scope="module")
def real():
    """Real images of the tiny model's shape: garments in 8x8."""
    bundled = data.load_bundled()
    small = [torch.nn.functional.avg_pool2d(part[:300].float(), 3)[..., :8, :8].to(torch.uint8) for part in
             (bundled.train, bundled.held_out)]  # fmt: skip
    return data.Images("tiny garments", *small)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two models on disk: a dense one, and one with other weights."""
    made = {}
    for name, factor in (("dense", 1.0), ("other", 0.5)):
        model = make_unet()
        with torch.no_grad():
            model.conv_out.weight.mul_(factor)
        made[name] = tmp_path_factory.mktemp("models") / name
        unets.save(model, DDPMScheduler(prediction_type="sample"), made[name], {"variant": name})
    return made


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENV, str(tmp_path / "cache"))


def target(places, name, tmp_path, **changes):
    return quality.Target(unets.load(str(places[name])), places[name], tmp_path / f"{name}.png", **changes)


def judge(real, **changes):
    return quality.Judge.of(Eval(**(SETTINGS | changes)), real, torch.device("cpu"))


def last(steps):
    *_, found = steps
    return found


def test_every_figure_is_that_of_the_metrics_on_the_same_images(places, real, tmp_path, own_cache):
    one, two = target(places, "dense", tmp_path, is_dense=True), judge(real)
    found = last(two.quality(one))
    images = samples.SampleSet(one.model, quality.subject.fingerprint(one.place), two.settings)
    chunks = list(images.stream(70, two.extractor))
    features = torch.cat([c.features for c in chunks])
    train = metrics.extract([real.train])
    assert found["fid"] == pytest.approx(metrics.fid_from_features(features, train), rel=1e-6)
    direct = metrics.pairwise(features, train, 0)
    assert {key: found[key] for key in direct} == pytest.approx(direct)
    assert found["fid_images"] == 70 == found["kernel_images"] and "70 images are few" in found["few_images"]
    assert len(found["loss_bins"]) == 10 and found["timesteps"] == 1000
    assert found["validation_loss_low"] <= found["validation_loss"] <= found["validation_loss_high"]
    assert np.mean([b for b in found["loss_bins"] if b is not None]) == pytest.approx(
        found["validation_loss"], rel=0.05
    )
    assert found["sampling"]["sampler"] == "ddim" and found["sampling"]["extractor"] == "bundled"
    assert "ssim" not in found, "a dense model is not compared with itself"
    json.dumps(found, allow_nan=False)


def test_the_noise_floor_is_between_two_independent_sets(places, real, tmp_path, own_cache):
    found = last(judge(real).quality(target(places, "dense", tmp_path, is_dense=True)))["noise_floor"]
    assert found["samples"]["images"] == 70 and found["real"]["images"] == 70
    assert 0 < found["samples"]["fid"] < 5 and found["samples"]["kid_low"] < 0.01
    without = last(judge(real, noise_floor=False).quality(target(places, "dense", tmp_path, is_dense=True)))
    assert "noise_floor" not in without
    other = last(judge(real).quality(target(places, "other", tmp_path)))
    assert "noise_floor" not in other, "the floor is the dense model's"


def test_faithfulness_is_to_the_dense_models_sheet_of_the_same_seeds(places, real, tmp_path, own_cache):
    dense = target(places, "dense", tmp_path, is_dense=True)
    last(judge(real).quality(dense))
    same = quality.Target(dense.model, dense.place, tmp_path / "same.png", dense_sheet=dense.sheet)
    found = last(judge(real).quality(same))
    assert found["ssim"] == 1 and found["identical"] == found["pairs"] == 64 and found["feature_distance"] == 0
    other = last(judge(real).quality(target(places, "other", tmp_path, dense_sheet=dense.sheet)))
    assert other["ssim"] < 1 and other["ssim_low"] <= other["ssim"] <= other["ssim_high"]
    assert other["feature_distance"] > 0 and other["psnr"] > 0
    otherwise = last(judge(real, steps=3).quality(target(places, "other", tmp_path, dense_sheet=dense.sheet)))
    assert "ssim" not in otherwise, "another number of steps: not the same noise's images"


@pytest.mark.parametrize(("name", "is_bundled", "has_score"), [
    ("bundled", True, True), ("bundled", False, False), ("inception", False, True), ("efficientnet-lite0", True, False),
])  # fmt: skip
def test_the_inception_score_is_given_only_where_the_network_knows_the_images(real, name, is_bundled, has_score):
    """A network says something of the classes that it was taught: Inception of photographs, ours of its garments."""
    judged = judge(data.Images("some", real.train, real.held_out, is_bundled=is_bundled))
    judged.extractor = extractors.Bundled()
    judged.extractor.name = name
    seen = quality.Seen(0)
    seen.add(real.held_out, metrics.extract([real.held_out]))
    train = metrics.extract([real.train])
    found = judged._distances(seen, metrics.statistics(train), train)
    assert ("isc" in found, "isc_std" in found) == (has_score, has_score)
    if has_score:
        expected = metrics.inception_score(judged.extractor.logits(seen.kept), splits=1)[0]
        assert found["isc"] == expected > 1 and found["isc_std"] is None, "300 images are one part, without a spread"


def test_the_sheet_holds_the_first_images_and_how_they_were_made(places, real, tmp_path, own_cache):
    one = target(places, "dense", tmp_path, info={"run": "r"})
    last(judge(real, eta=0.5).quality(one))
    images, info = pictures.read_sheet(one.sheet)
    assert len(images) == 64 and (info["sampler"], info["eta"], info["seed"], info["run"]) == ("ddim", 0.5, 0, "r")
    chunk = next(samples.SampleSet(one.model, quality.subject.fingerprint(one.place), judge(real, eta=0.5).settings)
                 .stream(64, extractors.get("bundled")))  # fmt: skip
    assert torch.equal(pictures.as_tensor(images), chunk.images)


def test_steps_are_counted_rightly(places, real, tmp_path, own_cache):
    for is_dense in (True, False):
        one, two = target(places, "dense", tmp_path, is_dense=is_dense), judge(real)
        assert sum(1 for _ in two.quality(one)) == two.steps(one)


def test_growing_noise_gives_a_growing_distance_and_identical_sets_none(real):
    images = data.load_bundled().train[:600].float()
    features = [metrics.extract([images.to(torch.uint8)])]
    gen = torch.Generator().manual_seed(0)
    for level in (10, 30, 60, 100):
        noisy = (images + level * torch.randn(images.shape, generator=gen)).clamp(0, 255).to(torch.uint8)
        features.append(metrics.extract([noisy]))
    distances = [metrics.fid_from_features(x, features[0]) for x in features]
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances == sorted(distances) and distances[-1] > 10
    kids = [metrics.kid(x, features[0], 300, 20).mean for x in features]
    assert abs(kids[0]) < 0.01 and kids == sorted(kids)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheets_images_come_back_as_they_were(channels, tmp_path):
    images = torch.randint(0, 256, (11, channels, 5, 7), dtype=torch.uint8)
    path = tmp_path / "sheet.png"
    path.write_bytes(pictures.sheet_png(images, {}))
    assert torch.equal(pictures.as_tensor(pictures.read_sheet(path)[0]), images)


def test_memory_holds_few_of_many_images():
    seen = quality.Seen(5)
    for _ in range(30):
        seen.add(torch.zeros(300, 1, 2, 2, dtype=torch.uint8), torch.randn(300, 4))
    assert len(seen.shown) == 5 and len(seen.kept) == metrics.KERNEL_IMAGES and seen.moments.count == 9000
