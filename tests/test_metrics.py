"""The Frechet distance against torch-fidelity's own command and a direct formula."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from prunedm import bundled, data, metrics


class Bundled(FeatureExtractorBase):
    """Our network as torch-fidelity's own extractor."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.network = metrics.feature_network()

    @staticmethod
    def get_provided_features_list():
        return ("64",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "64"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 1, 28, 28, dtype=torch.uint8)

    def forward(self, images):
        return (self.network.features(images),)


class Uint8(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(scope="module")
def images():
    return data.load_bundled()


def distance(a, b):
    found = [metrics.statistics(metrics.extract(x.split(100))) for x in (a, b)]
    return metrics.frechet_distance(*found)


def test_equals_torch_fidelitys_own_calculation(images):
    if "prunedm-test" not in FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("prunedm-test", Bundled)
    a, b = images.train[:300], images.held_out[:300]
    found = torch_fidelity.calculate_metrics(
        input1=Uint8(a), input2=Uint8(b), fid=True, feature_extractor="prunedm-test",
        cuda=False, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    assert distance(a, b) == pytest.approx(found["frechet_inception_distance"], rel=1e-4)


def test_equals_the_formula_in_float64():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 8)), rng.normal(0.3, 1.4, size=(400, 8))
    (m1, m2), (s1, s2) = (x.mean(0), y.mean(0)), (np.cov(x.T), np.cov(y.T))
    direct = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    found = metrics.frechet_distance(*(metrics.statistics(torch.from_numpy(v)) for v in (x, y)))
    assert found == pytest.approx(direct, rel=1e-9)


def test_identical_sets_are_at_zero_and_noise_moves_away(images):
    real = images.held_out[:500]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    levels = [(real + level * noise).round().clamp(0, 255).to(torch.uint8) for level in (0, 8, 16, 32)]
    found = [distance(real, level) for level in levels]
    assert found[0] == pytest.approx(0, abs=1e-4)
    assert found == sorted(found) and found[1] > 0.01


def test_the_shipped_reference_is_that_of_the_training_images(images):
    computed = metrics.statistics(metrics.extract(images.train.split(500)))
    shipped = metrics.reference_statistics(images.train, is_bundled=True)
    assert metrics.frechet_distance(computed, shipped) == pytest.approx(0, abs=1e-4)


def test_the_feature_network_knows_garments(images):
    _, labels = data.load_bundled_labels()
    with torch.no_grad():
        found = torch.cat([metrics.feature_network()(x).argmax(1) for x in images.held_out.split(500)])
    assert (found == labels).float().mean() >= 0.91


def test_other_sizes_and_colours_are_accepted():
    assert metrics.extract([torch.zeros(2, 3, 32, 40, dtype=torch.uint8)]).shape == (2, 64)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.statistics(torch.zeros(1, 64))


def test_no_other_extractors_figure_is_called_fid():
    assert metrics.EXTRACTOR_LABELS == {"bundled": "FD-fashion"}
    assert bundled.FEATURE_NETWORK.exists()
