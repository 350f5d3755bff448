"""Quality of generated images: the Frechet distance through torch-fidelity.

The extractor ``bundled`` is a small classifier trained on the bundled images (``assets/build``); its
distance is in-domain and quick, and is called *FD-fashion*, never FID, which means Inception-v3.
Figures are comparable only at the same number of images.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .bundled import FEATURE_NETWORK, REFERENCE

EXTRACTOR_LABELS = {"bundled": "FD-fashion"}
FEATURES = 64
SIDE = 28


class FeatureNetwork(nn.Module):
    """Classifier of 28x28 grey images; its 64 features before the last layer are what is compared."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(1, 32), (32, 32), "pool", (32, 64), (64, 64), "pool", (64, FEATURES)]
        layers: list[nn.Module] = []
        for width in widths:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                conv = nn.Conv2d(*width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width[1]), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """uint8 ``[B, C, H, W]`` of any size and colour to ``[B, 64]``."""
        x = images.to(self.head.weight.device).float().mean(1, keepdim=True)
        if x.shape[-2:] != (SIDE, SIDE):
            x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.body(x / 127.5 - 1).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images to class logits ``[B, 10]``."""
        return self.head(self.features(images))


@cache
def feature_network(device: str = "cpu") -> FeatureNetwork:
    """The bundled network, evaluation mode."""
    from safetensors.torch import load_file

    network = FeatureNetwork().eval().requires_grad_(False).to(device)
    network.load_state_dict(load_file(FEATURE_NETWORK, device=device))
    return network


@torch.no_grad()
def extract(images: Iterable[Tensor], device: str = "cpu") -> Tensor:
    """Features ``[N, 64]`` on the CPU of batches of uint8 images."""
    network = feature_network(device)
    return torch.cat([network.features(batch).cpu() for batch in images])


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    """Mean and covariance of the features, as torch-fidelity defines them, in float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise ValueError(f"{len(features)} images have no covariance; evaluate at least 2")
    return fid_features_to_statistics(features.double())


def frechet_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Frechet distance of two Gaussians (torch-fidelity's)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return max(0.0, fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID])


def reference_statistics(images: Tensor, is_bundled: bool, device: str = "cpu") -> dict[str, np.ndarray]:
    """Statistics of real images: from the assets for the bundled training set, else computed."""
    if is_bundled:
        return read_statistics(REFERENCE)
    return statistics(extract(images.split(256), device))


def read_statistics(path: Path) -> dict[str, np.ndarray]:
    """What :func:`write_statistics` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in ("mu", "sigma")}


def write_statistics(path: Path, value: dict[str, np.ndarray]) -> None:
    np.savez_compressed(path, **value)
