"""How far a variant's images are from the dense model's of the same seeds and sampler: SSIM, PSNR, features.

Sources: SSIM, Wang et al. 2004 (doi 10.1109/TIP.2003.819861): Gaussian window of 11x11 and sigma 1.5, K1 = 0.01,
K2 = 0.03, windows inside the image only. Here the range is 255, colours count alike and sums are float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA, K1, K2, RANGE = 11, 1.5, 0.01, 0.03, 255.0
CHUNK = 256  # images at a time, so that memory does not grow with their number


def compare_samples(
    dense: Tensor,
    other: Tensor,
    dense_features: Tensor | None = None,
    other_features: Tensor | None = None,
) -> dict[str, Any]:
    """Agreement of two sets of images uint8 ``[N, C, H, W]``, the i-th of each from the same seed.

    ``ssim``: mean, -1 to 1. ``psnr``: mean over the images that differ, dB; ``identical`` counts the others,
    whose PSNR is infinite and None here. ``feature_distance``: mean Euclidean distance of the pairs' features
    ``[N, D]``, None where none were given. ``per_image`` holds the three for each image. ValueError when the
    sets do not pair.
    """
    _require_pairs(dense, other, dense_features, other_features)
    pairs = list(zip(dense.split(CHUNK), other.split(CHUNK)))
    similar = torch.cat([ssim(a, b) for a, b in pairs]).tolist()
    ratios = [None if value == float("inf") else value for a, b in pairs for value in psnr(a, b).tolist()]
    finite = [value for value in ratios if value is not None]
    distances = None
    if dense_features is not None and other_features is not None:
        distances = feature_distances(dense_features, other_features).tolist()
    return {
        "images": len(dense),
        "ssim": _mean(similar),
        "psnr": _mean(finite),
        "identical": len(ratios) - len(finite),
        "feature_distance": None if distances is None else _mean(distances),
        "window": window_side(dense),
        "per_image": {"ssim": similar, "psnr": ratios, "feature_distance": distances},
    }


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair, float64 ``[N]``, of images ``[N, C, H, W]`` with values 0 to 255.

    Images with a side under 11 pixels get the largest odd window that fits, with the same sigma: their figures
    compare among themselves only.
    """
    count, (height, width) = len(a), a.shape[-2:]
    x, y = (images.double().reshape(-1, 1, height, width) for images in (a, b))
    side = window_side(a)
    at = torch.arange(side, dtype=torch.float64, device=a.device) - side // 2
    line = torch.exp(-at.square() / (2 * SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    mean_x, mean_y, xx, yy, xy = (F.conv2d(v, window) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    variances = xx - mean_x.square() + yy - mean_y.square()
    covariance = xy - mean_x * mean_y
    levels = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (levels * (2 * covariance + c2) / (variances + c2)).reshape(count, -1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio of each pair, dB, float64 ``[N]``; infinite where the two are identical."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / error)


def feature_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of each pair of features ``[N, D]``, float64 ``[N]``, in the extractor's own unit."""
    return (a.double() - b.double()).norm(dim=1)


def window_side(images: Tensor) -> int:
    """Side of SSIM's window: 11, or the largest odd number that fits into smaller images."""
    least = min(*images.shape[-2:], WINDOW)
    return least - 1 + least % 2


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _require_pairs(dense: Tensor, other: Tensor, *features: Tensor | None) -> None:
    if dense.shape != other.shape or dense.ndim != 4 or not len(dense):
        shapes = f"{list(dense.shape)} and {list(other.shape)}"
        raise ValueError(f"image sets {shapes} must be pairs [N, C, H, W]; sample both with the same seeds")
    if dense.dtype != torch.uint8 or other.dtype != torch.uint8:
        raise ValueError(f"images are {dense.dtype} and {other.dtype} and must be uint8; use diffusion.to_uint8")
    given = [f for f in features if f is not None]
    if len(given) == 1:
        raise ValueError("features were given for one set and are needed for both or none; extract the other's")
    if given and (given[0].shape != given[1].shape or given[0].ndim != 2 or len(given[0]) != len(dense)):
        shapes = " and ".join(str(list(f.shape)) for f in given)
        raise ValueError(f"features {shapes} must be [N, D] for {len(dense)} pairs; use one extractor for both")
