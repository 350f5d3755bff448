"""Every figure against a direct formula (test_torch_fidelity.py: its command); intervals, floors and the cache."""

import numpy as np
import pytest
import scipy.linalg
import torch

from prunedm import cache, data, extractors, metrics


@pytest.fixture(scope="module")
def images():
    return data.load_bundled()


def distance(a, b):
    found = [metrics.statistics(metrics.extract(x.split(100))) for x in (a, b)]
    return metrics.frechet_distance(*found)


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENV, str(tmp_path))
    return tmp_path / "statistics"


class Counting(extractors.Bundled):
    """The bundled extractor, counting the batches that it reads."""

    batches = 0

    def features(self, images):
        self.batches += 1
        return super().features(images)


def drawn(n, d=8, mean=0.0, scale=1.0, seed=0):
    """Random features in float64."""
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, scale, (n, d)))


def test_equals_the_formula_in_float64():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 8)), rng.normal(0.3, 1.4, size=(400, 8))
    (m1, m2), (s1, s2) = (x.mean(0), y.mean(0)), (np.cov(x.T), np.cov(y.T))
    direct = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    found = metrics.frechet_distance(*(metrics.statistics(torch.from_numpy(v)) for v in (x, y)))
    assert found == pytest.approx(direct, rel=1e-9)


def test_the_wide_formula_gives_the_same_distance():
    for n in (40, 500):  # covariances singular and full
        a, b = (metrics.statistics(drawn(n, 60, mean, scale, seed)) for mean, scale, seed in ((0, 1, 1), (0.2, 1.3, 2)))
        assert metrics._wide_frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(a, b), rel=1e-6)
        assert metrics._wide_frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert metrics.fid_from_features(drawn(400, 300), drawn(400, 300, seed=1)) > 0


def direct_kid(x, y):
    """The unbiased squared MMD with the cubic kernel, pair by pair, in float64."""

    def mean(p, q, same):
        kernel = (p @ q.T / p.shape[1] + 1) ** 3
        return (kernel.sum() - (np.trace(kernel) if same else 0)) / (len(p) * (len(q) - same))

    return mean(x, x, 1) + mean(y, y, 1) - 2 * mean(x, y, 0)


def test_kid_equals_the_formula_in_float64():
    x, y = drawn(120, mean=0.4, seed=1), drawn(120, seed=2)
    whole = metrics.kid(x, y, subset_size=120, subsets=1)
    assert whole.mean == pytest.approx(direct_kid(x.numpy(), y.numpy()), rel=1e-9)
    assert sum(s.mean() for s in metrics.kid_shares(x, y[:90])) == pytest.approx(
        direct_kid(x.numpy(), y[:90].numpy()), rel=1e-9
    )
    rng, subsets = np.random.RandomState(5), []  # torch-fidelity's order of drawing
    for _ in range(7):
        subsets.append(direct_kid(*(v.numpy()[rng.choice(120, 50, replace=False)] for v in (x, y))))
    found = metrics.kid(x, y, 50, 7, seed=5)
    assert (found.mean, found.std) == pytest.approx((np.mean(subsets), np.std(subsets)), rel=1e-9)
    assert found == metrics.kid(x, y, 50, 7, seed=5) != metrics.kid(x, y, 50, 7, seed=6)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kids_interval_covers_the_true_distance_about_as_often_as_it_says(shift):
    truth = sum(s.mean() for s in metrics.kid_shares(drawn(8000, 3, shift, seed=1), drawn(8000, 3, seed=2)))
    hits = 0
    for seed in range(50):
        found = metrics.kid(drawn(150, 3, shift, seed=10 + seed), drawn(150, 3, seed=1000 + seed), 100, 20, seed)
        hits += found.low <= truth <= found.high
        assert found.low <= found.mean <= found.high
    assert hits >= 43  # of 50; 95 % promised


def test_inception_score_is_one_for_no_knowledge_and_the_classes_for_certainty():
    sure = 50 * torch.eye(10).repeat(40, 1)
    assert metrics.inception_score(torch.zeros(100, 10)) == pytest.approx((1, 0), abs=1e-9)
    assert metrics.inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-6)
    with pytest.raises(ValueError, match="10 splits need as many images; there are 4"):
        metrics.inception_score(torch.zeros(4, 10))


def test_precision_and_recall_of_known_sets():
    real = drawn(200, 2)
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real + 100, real) == (0, 0)
    precision, recall = metrics.precision_recall(real[:50] * 0.1, real)  # near one mode only
    assert precision > 0.9 and recall < 0.3
    with pytest.raises(ValueError, match="neighbourhood 3 must be from 1 to below the 3 images"):
        metrics.precision_recall(real[:3], real)


def test_identical_sets_are_at_zero_and_noise_moves_away(images):
    real = images.held_out[:500]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    levels = [(real + level * noise).round().clamp(0, 255).to(torch.uint8) for level in (0, 8, 16, 32)]
    found = [distance(real, level) for level in levels]
    assert found[0] == pytest.approx(0, abs=1e-4)
    assert found == sorted(found) and found[1] > 0.01


def test_identical_features_are_at_zero_and_few_images_are_refused():
    x = drawn(100)
    assert metrics.fid_from_features(x, x) == pytest.approx(0, abs=1e-6)
    assert sum(v.mean() for v in metrics.kid_shares(x, x)) <= 0  # unbiased: an image meets its copy across only
    with pytest.raises(ValueError, match="KID subset size 101 must be from 2 to the 100 images"):
        metrics.kid(x, x, 101)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.fid_from_features(x[:1], x)


def test_few_images_warn():
    assert metrics.few_images_warning(640, 64) == ""
    assert "639 images are few for 64 features (the Frechet distance is mostly bias)" in (
        metrics.few_images_warning(639, 64)
    )
    assert "singular" in metrics.few_images_warning(2048, 2048)
    assert "\n" not in metrics.few_images_warning(2, 2048)


def test_the_halves_of_a_noise_floor_are_disjoint_and_repeat_by_seed():
    first, second = metrics.halves(101, 3)
    assert len(first) == len(second) == 50
    assert len(set(first.tolist()) | set(second.tolist())) == 100
    assert torch.equal(first, metrics.halves(101, 3)[0])
    assert not torch.equal(first, metrics.halves(101, 4)[0])


def test_a_noise_floor_lies_below_a_true_difference_and_repeats():
    x, shifted = drawn(400, seed=1), drawn(400, mean=0.5, seed=2)
    floor, difference = metrics.noise_floor(x, seed=1), metrics.measure(shifted[:200], x[:200])
    assert floor == metrics.noise_floor(x, seed=1) != metrics.noise_floor(x, seed=2)
    assert floor["images"] == difference["images"] == 200
    assert floor["fid"] < difference["fid"] / 4 and floor["kid_low"] < 0 < floor["kid_high"] < difference["kid_low"]
    assert floor["precision"] > difference["precision"]
    with pytest.raises(ValueError, match="7 images have no two halves"):
        metrics.noise_floor(x[:7])


def test_a_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for level, fewest, most in ((0.95, 0.90, 0.985), (0.8, 0.74, 0.86)):
        hits = 0
        for seed in range(300):
            low, high = metrics.bootstrap_interval(rng.exponential(1.0, 150), seed, level, draws=300)
            hits += low <= 1.0 <= high
        assert fewest <= hits / 300 <= most
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert metrics.bootstrap_interval(values, 1) == metrics.bootstrap_interval(values, 1)
    assert metrics.bootstrap_interval(values, 1) != metrics.bootstrap_interval(values, 2)


def test_a_bootstrap_of_nothing_gives_one_line():
    for values, level in (([1.0], 0.95), ([[1.0, 2.0]], 0.95), ([1.0, 2.0], 1.0)):
        with pytest.raises(ValueError, match=r"at least 2|between 0 and 1"):
            metrics.bootstrap_interval(values, 0, level)


def test_a_cache_hit_extracts_nothing(images, cache_folder):
    real, extractor = images.train[:300], Counting()
    first = metrics.reference_statistics(real, is_bundled=False, extractor=extractor)
    assert extractor.batches == 2 and len(list(cache_folder.iterdir())) == 1
    again = metrics.reference_statistics(real.clone(), is_bundled=False, extractor=extractor)
    assert extractor.batches == 2
    assert all(np.array_equal(first[key], again[key]) for key in ("mu", "sigma"))
    assert torch.equal(metrics.reference_features(real, extractor=extractor), metrics.extract([real]))
    before = extractor.batches
    assert metrics.reference_features(real, extractor=extractor).shape == (300, 64)
    assert extractor.batches == before


def test_the_cache_depends_on_the_images_the_extractor_and_its_weights(images):
    real, extractor = images.train[:4], Counting()
    keys = [metrics.cache_key("statistics", v, extractor) for v in (real, real.flip(0), real.view(2, 2, 28, 28))]
    keys.append(metrics.cache_key("features", real, extractor))
    extractor.weights = "other"
    keys.append(metrics.cache_key("statistics", real, extractor))
    extractor.name = "inception"
    keys.append(metrics.cache_key("statistics", real, extractor))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("harm", ["bit", "torn", "empty", "other"])
def test_an_altered_cache_file_is_computed_again(images, cache_folder, harm):
    real, extractor = images.train[:50], Counting()
    first = metrics.reference_statistics(real, is_bundled=False, extractor=extractor)
    (path,) = cache_folder.iterdir()
    content = bytearray(path.read_bytes())
    if harm == "bit":
        content[len(content) // 2] ^= 1
    elif harm == "other":
        np.savez(path, mu=first["mu"] + 1, sigma=first["sigma"])
        content = path.read_bytes()
    path.write_bytes(content[: {"torn": 100, "empty": 0}.get(harm, len(content))])
    again = metrics.reference_statistics(real, is_bundled=False, extractor=extractor)
    assert extractor.batches == 2 and np.array_equal(first["mu"], again["mu"])
    metrics.reference_statistics(real, is_bundled=False, extractor=extractor)
    assert extractor.batches == 2 and len(list(cache_folder.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_no_error(images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cache.ENV, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written .*; set PRUNEDM_CACHE"):
        found = metrics.reference_statistics(images.train[:50], is_bundled=False)
    assert found["mu"].shape == (64,)


def test_the_shipped_reference_is_that_of_the_training_images(images):
    computed = metrics.statistics(metrics.extract(images.train.split(500)))
    shipped = metrics.reference_statistics(images.train, is_bundled=True)
    assert metrics.frechet_distance(computed, shipped) == pytest.approx(0, abs=1e-4)


def test_the_feature_network_knows_garments(images):
    _, labels = data.load_bundled_labels()
    with torch.no_grad():
        found = torch.cat([extractors.feature_network()(x).argmax(1) for x in images.held_out.split(500)])
    assert (found == labels).float().mean() >= 0.91


def test_other_sizes_and_colours_are_accepted():
    assert metrics.extract([torch.zeros(2, 3, 32, 40, dtype=torch.uint8)]).shape == (2, 64)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.statistics(torch.zeros(1, 64))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_in_parts_are_those_of_the_whole(offset):
    features = drawn(503, 6, mean=offset, seed=3)
    moments = metrics.Moments()
    for part in features.split(64):
        moments.add(part)
    found, whole = moments.statistics(), metrics.statistics(features)
    assert np.allclose(found["mu"], whole["mu"], rtol=1e-12) and np.allclose(found["sigma"], whole["sigma"], rtol=1e-9)
    assert found["sigma"] == pytest.approx(np.cov(features.numpy().T), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.Moments().statistics()


def test_the_spread_of_the_frechet_distance_is_about_that_of_other_images():
    real = metrics.statistics(drawn(4000, 4, seed=99))
    others = [metrics.frechet_distance(metrics.statistics(drawn(200, 4, 0.3, seed=s)), real) for s in range(60)]
    found = np.mean([metrics.frechet_spread(drawn(200, 4, 0.3, seed=s), real, s) for s in range(5)])
    assert 0.6 < found / np.std(others) < 1.6
    assert metrics.frechet_spread(drawn(50, metrics.NARROW + 1), real) is None


def test_real_images_beyond_the_most_are_a_fixed_draw(images, cache_folder, monkeypatch):
    monkeypatch.setattr(metrics, "KERNEL_IMAGES", 30)
    found = metrics.reference_features(images.train[:90])
    assert len(found) == 30 and torch.equal(found, metrics.reference_features(images.train[:90]))
    everything = metrics.extract([images.train[:90]])
    assert all((everything - row).abs().amax(1).min() < 1e-4 for row in found)
