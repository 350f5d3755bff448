"""Every figure is that of torch-fidelity's own command, on the same images by the same network."""

import os

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from prunedm import data, extractors, metrics

EXACT = {"rel": 1e-6, "abs": 1e-6}
# Of 16 images the covariances have rank 15, and some 2000 eigenvalues of their product are rounding errors, each up to
# 1e-16 of the largest: torch-fidelity takes off twice the roots of those that came out positive, up to 1e-8 of the
# traces for each, and so finds less than the true distance (2.4e-5 of it here).
SINGULAR = {"rel": 1e-4, "abs": 1e-6}


class Bundled(FeatureExtractorBase):
    """Our network as torch-fidelity's own extractor."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.network = extractors.feature_network()

    @staticmethod
    def get_provided_features_list():
        return ("64", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "64"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 1, 28, 28, dtype=torch.uint8)

    def forward(self, images):
        found = {"64": self.network.features(images), "logits": self.network(images)}
        return tuple(found[name] for name in self.features_list)


class Uint8(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def theirs(a, b, kid_subset_size, isc_splits, **changes):
    """torch-fidelity's own figures of ``a`` judged by ``b``."""
    return torch_fidelity.calculate_metrics(
        input1=Uint8(a), input2=Uint8(b), isc=True, fid=True, kid=True, prc=True, isc_splits=isc_splits,
        kid_subset_size=kid_subset_size, kid_subsets=20, cuda=False, verbose=False, cache=False, save_cpu_ram=True,
        **changes,
    )  # fmt: skip


def check(found, a, b, extractor, kid_subset_size, isc_splits, fid=EXACT):
    """Our figures against those that torch-fidelity found."""
    x, y = (metrics.extract(v.split(64), extractor=extractor) for v in (a, b))
    assert metrics.fid_from_features(x, y) == pytest.approx(found["frechet_inception_distance"], **fid)
    ours = metrics.kid(x, y, subset_size=kid_subset_size, subsets=20, seed=2020)
    assert ours.mean == pytest.approx(found["kernel_inception_distance_mean"], **EXACT)
    assert ours.std == pytest.approx(found["kernel_inception_distance_std"], **EXACT)
    assert metrics.precision_recall(x, y) == pytest.approx((found["precision"], found["recall"]), **EXACT)
    score = found["inception_score_mean"], found["inception_score_std"]
    assert metrics.inception_score(extractor.logits(x), isc_splits) == pytest.approx(score, **EXACT)
    assert min(found["frechet_inception_distance"], ours.std, score[0] - 1, score[1]) > 1e-3, "nothing is compared"


def test_the_bundled_networks_figures():
    if "prunedm-test" not in FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("prunedm-test", Bundled)
    images = data.load_bundled()
    a, b = images.train[:300], images.held_out[:300]
    found = theirs(a, b, 100, 5, feature_extractor="prunedm-test")
    check(found, a, b, extractors.get("bundled"), 100, 5)


def check_inception(extractor, weights):
    images = data.load_bundled()
    a, b = (v[:16].expand(-1, 3, -1, -1) for v in (images.train, images.held_out))
    found = theirs(a, b, 8, 4, feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights))
    check(found, a, b, extractor, 8, 4, fid=SINGULAR)


@pytest.mark.slow
def test_inceptions_figures_where_its_weights_are_random(random_weights):
    network = extractors.inception_network(extractors.read_weights(random_weights))
    check_inception(extractors.Inception(network), random_weights)


@pytest.mark.slow
def test_inceptions_figures_where_its_weights_are_given():
    if not os.environ.get(extractors.INCEPTION_ENV):
        pytest.skip(f"set {extractors.INCEPTION_ENV} to {extractors.INCEPTION_NAME} to test the real weights")
    check_inception(extractors.get("inception"), extractors.inception_weights())


@pytest.mark.parametrize("width", [300, pytest.param(2048, marks=pytest.mark.slow)])
def test_the_frechet_distance_of_wide_features(width):
    """More images than features, as a figure to publish has: full rank, and equal to a millionth."""
    assert width > metrics.NARROW
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(width, width)) / width**0.5  # features of a network are correlated
    x = torch.from_numpy(rng.normal(size=(2 * width, width)) @ mixed)
    y = torch.from_numpy(rng.normal(0.1, 1.2, (2 * width, width)))
    a, b = metrics.statistics(x), metrics.statistics(y)
    assert metrics.frechet_distance(a, b) == pytest.approx(
        fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID], rel=1e-6
    )


def test_the_frechet_distance_of_fewer_images_than_features():
    """Ours is the true one, by the few singular values that there are; torch-fidelity's lies a little below."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 300)), rng.normal(0.1, 1.2, (16, 300))
    a, b = (metrics.statistics(torch.from_numpy(v)) for v in (x, y))
    across = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T / 15, compute_uv=False).sum()
    true = ((a["mu"] - b["mu"]) ** 2).sum() + np.trace(a["sigma"]) + np.trace(b["sigma"]) - 2 * across
    assert metrics.frechet_distance(a, b) == pytest.approx(true, rel=1e-7)
    assert fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID] == pytest.approx(true, rel=1e-6)
