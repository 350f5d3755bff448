"""Quality of generated images, through torch-fidelity's own functions on features of any extractor.

What a figure is called depends on the extractor (:func:`prunedm.extractors.labels`): FID and KID mean Inception-v3.
The Frechet distance shrinks as images are added, so it is comparable only at the same number of images; KID is
unbiased at any number. :func:`noise_floor` tells which differences mean something.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import cache, extractors, giveway, parallel
from .bundled import REFERENCE
from .extractors import Extractor
from .seeds import derive, generator

Statistics = dict[str, np.ndarray]  # mu [D] and sigma [D, D], float64
AT_ONCE = 256  # real images whose features are computed in one go
NARROW = 256  # features up to which torch-fidelity's general eigenvalues take under a second
PER_FEATURE = 10  # images for each feature below which the Frechet distance is mostly bias
KID_SUBSET, KID_SUBSETS, NEIGHBOURHOOD = 1000, 100, 3  # torch-fidelity's defaults
KERNEL_IMAGES = 5_000  # most images of a side for KID, precision and recall, which look at all pairs
CACHE_VERSION = "2"


def extract(batches: Sequence[Tensor], device: str = "cpu", extractor: Extractor | None = None) -> Tensor:
    """Features float32 ``[N, D]`` on the CPU of batches of uint8 images; the bundled extractor unless one is given.

    Ranks deal the batches out, so all of them must call.
    """
    extractor = extractor or extractors.get("bundled", device)
    found = giveway.before_each(lambda i: extractor.features(batches[i]))
    return torch.cat(list(parallel.dealt(len(batches), found)))


# --- The Frechet distance


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance of the features ``[N, D]``, as torch-fidelity defines them, in float64.

    torch-fidelity's own command sums the mean in float32; its figure differs by about 1e-6 of itself.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise ValueError(f"{len(features)} images have no covariance; evaluate at least 2")
    return fid_features_to_statistics(features.double())


class Moments:
    """:func:`statistics` of features that come in parts: memory for D x D numbers, whatever their count.

    Sums are taken about the first part's mean, in float64: a mean far from zero costs no digits.
    """

    def __init__(self) -> None:
        self.count, self.centre = 0, None

    def add(self, features: Tensor) -> None:
        """Count a part ``[B, D]`` in."""
        values = features.double()
        if self.centre is None:
            self.centre = values.mean(0)
            self.first, self.second = (
                torch.zeros_like(self.centre),
                torch.zeros(2 * values.shape[1:], dtype=values.dtype),
            )
        values = values - self.centre
        self.count += len(values)
        self.first += values.sum(0)
        self.second += values.T @ values

    def statistics(self) -> Statistics:
        """Mean and covariance (with N - 1) of all parts so far."""
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance; evaluate at least 2")
        mean = self.first / self.count
        sigma = (self.second - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return {"mu": (mean + self.centre).numpy(), "sigma": sigma.numpy()}


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians: torch-fidelity's, and for wide features the same figure sooner."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if len(a["mu"]) > NARROW:
        return _wide_frechet_distance(a, b)
    return max(0.0, fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID])


def _wide_frechet_distance(a: Statistics, b: Statistics) -> float:
    """By eigenvalues of symmetric matrices: minutes become seconds at 2048 features."""
    values, vectors = np.linalg.eigh(a["sigma"])
    root = vectors * np.sqrt(values.clip(0))  # root @ root.T is a's covariance
    product = np.linalg.eigvalsh(root.T @ b["sigma"] @ root).clip(0)
    mean = ((a["mu"] - b["mu"]) ** 2).sum()
    return max(0.0, float(mean + np.trace(a["sigma"]) + np.trace(b["sigma"]) - 2 * np.sqrt(product).sum()))


def fid_from_features(generated: Tensor, real: Tensor) -> float:
    """Frechet distance of two sets of features ``[N, D]`` and ``[M, D]``."""
    return frechet_distance(statistics(generated), statistics(real))


def frechet_spread(features: Tensor, real: Statistics, seed: int = 0, draws: int = 50) -> float | None:
    """Standard deviation of the Frechet distance over other images like these ``[N, D]``, by the bootstrap.

    What is left of a difference between two models beyond it is not the luck of the seeds. None for wide features,
    where every draw costs seconds.
    """
    if features.shape[1] > NARROW or len(features) < 4:
        return None
    rng, values = np.random.default_rng(derive(seed, "frechet")), features.double()
    found = []
    for _ in giveway.between(range(draws)):
        moments = Moments()
        moments.add(values[torch.from_numpy(rng.integers(len(values), size=len(values)))])
        found.append(frechet_distance(moments.statistics(), real))
    return float(np.std(found, ddof=1))


def few_images_warning(n: int, features: int) -> str:
    """One line when ``n`` images are few for the Frechet distance in that many features, else nothing."""
    enough = PER_FEATURE * features
    if n >= enough:
        return ""
    reason = "the covariance is singular" if n <= features else "the Frechet distance is mostly bias"
    return f"{n} images are few for {features} features ({reason}); take {enough}, or judge by the kernel distance"


# --- Kernel distance, precision and recall, inception score


class Kid(NamedTuple):
    """Kernel distance: mean and standard deviation over subsets, and an interval for other images like these."""

    mean: float
    std: float
    low: float
    high: float


def kid(
    a: Tensor, b: Tensor, subset_size: int = KID_SUBSET, subsets: int = KID_SUBSETS, seed: int = 0, level: float = 0.95
) -> Kid:
    """Kernel distance of features ``[N, D]`` and ``[M, D]``: torch-fidelity's mean and std over random subsets.

    The interval resamples images, not subsets: more subsets would narrow the latter without more knowledge. It
    bootstraps the share of each image in the estimate (Hoeffding's projection), as resampled images themselves would
    meet their own copies and bias the kernel's mean. Simulated, 95 % covers 93 % where the sets differ and 99 % where
    they do not (there it is wide).
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"KID subset size {subset_size} must be from 2 to the {min(len(a), len(b))} images; lower it or add images"
        )
    found = kid_features_to_metric(a, b, kid_subset_size=subset_size, kid_subsets=subsets, rng_seed=seed, verbose=False)
    mean, shares = found[KEY_METRIC_KID_MEAN], kid_shares(a, b)
    spread = sum(2 * (_resampled_means(s, derive(seed, "kid", i), 1000) - s.mean()) for i, s in enumerate(shares))
    low, high = np.quantile(mean + spread, [(1 - level) / 2, (1 + level) / 2])
    return Kid(mean, found[KEY_METRIC_KID_STD], float(low), float(high))


def kid_shares(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each image its mean kernel to its own set less that to the other, ``[N]`` and ``[M]``, in float64.

    The sum of their two means is the unbiased squared MMD of the whole sets, kernel ``(x.y / D + 1) ** 3``.
    """
    x, y = a.double(), b.double()
    across, back = _kernel_sums(x, y)
    own = [
        (_kernel_sums(v, v)[0] - (v.square().sum(1) / v.shape[1] + 1) ** 3) / (len(v) - 1)  # less each with itself
        for v in (x, y)
    ]
    return (own[0] - across / len(y)).numpy(), (own[1] - back / len(x)).numpy()


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the kernel over y for each of x and over x for each of y; memory for 1024 rows at a time."""
    rows, columns = [], torch.zeros(len(y), dtype=x.dtype)
    for part in giveway.between(x.split(1024)):
        kernel = ((part @ y.T) / x.shape[1] + 1).pow_(3)
        rows.append(kernel.sum(1))
        columns += kernel.sum(0)
    return torch.cat(rows), columns


def precision_recall(generated: Tensor, real: Tensor, neighbourhood: int = NEIGHBOURHOOD) -> tuple[float, float]:
    """Share of generated images within the real ones' k-nearest-neighbour balls, and the reverse; torch-fidelity's."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    fewest = min(len(generated), len(real))
    if not 1 <= neighbourhood < fewest:
        raise ValueError(f"neighbourhood {neighbourhood} must be from 1 to below the {fewest} images; lower it")
    found = prc_features_to_metric(
        generated, real, prc_neighborhood=neighbourhood, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and std over splits of the exponential mutual information of image and class; from 1 to the classes.

    It makes sense for images of the classifier's own classes: photographs with Inception, garments with the bundled
    network. torch-fidelity's, with its seed of the shuffle.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if not 1 <= splits <= len(logits):
        raise ValueError(f"{splits} splits need as many images; there are {len(logits)}: lower splits")
    found = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


# --- What a difference means


def measure(generated: Tensor, real: Tensor, seed: int = 0) -> dict[str, float | int]:
    """Every figure between two sets of features, and the number of images of the smaller set (at least 4)."""
    found = {"fid": fid_from_features(generated, real)} | pairwise(generated, real, seed)
    return found | {"images": min(len(generated), len(real))}


def pairwise(generated: Tensor, real: Tensor, seed: int = 0) -> dict[str, float]:
    """The figures that look at all pairs of two sets of at least 4: KID with its interval, precision and recall."""
    distance = kid(generated, real, min(KID_SUBSET, min(len(generated), len(real)) // 2), seed=seed)
    precision, recall = precision_recall(generated, real)
    return {
        "kid": distance.mean,
        "kid_std": distance.std,
        "kid_low": distance.low,
        "kid_high": distance.high,
        "precision": precision,
        "recall": recall,
    }


def halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two random disjoint halves of n images, ``[n // 2]`` each; the same for the same seed."""
    order = torch.randperm(n, generator=generator(seed, "noise floor"))
    return order[: n // 2], order[n // 2 : n // 2 * 2]


def noise_floor(features: Tensor, seed: int = 0) -> dict[str, float | int]:
    """What :func:`measure` finds between two random disjoint halves of one set: no difference at all.

    A half has half the images, so its Frechet distance is an upper bound of the floor of the whole set; where two
    independent sets are at hand, ``measure`` them instead.
    """
    if len(features) < 8:
        raise ValueError(f"{len(features)} images have no two halves to compare; evaluate at least 8")
    first, second = halves(len(features), seed)
    return measure(features[first], features[second], seed)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray | Tensor, seed: int, level: float = 0.95, draws: int = 1000
) -> tuple[float, float]:
    """Percentile interval of the mean of independent values ``[N]``, such as one validation loss an image."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values of shape {values.shape} have no spread; give at least 2, one for each image")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level {level} must be between 0 and 1, and draws {draws} at least 1")
    means = _resampled_means(values, derive(seed, "bootstrap"), draws)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """Means ``[draws]`` of as many values drawn with replacement; memory for one draw at a time."""
    rng = np.random.default_rng(seed)
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)])


# --- Real images: shipped, cached or computed


def reference_statistics(
    images: Tensor, is_bundled: bool, device: str = "cpu", extractor: Extractor | None = None
) -> Statistics:
    """Statistics of real images ``[N, C, H, W]``: from the assets for the bundled training set, else cached."""
    extractor = extractor or extractors.get("bundled", device)
    if is_bundled and extractor.name == "bundled":
        return read_statistics(REFERENCE)
    return _cached(
        "statistics", images, extractor, lambda: statistics(extract(images.split(AT_ONCE), device, extractor))
    )


def reference_features(images: Tensor, device: str = "cpu", extractor: Extractor | None = None) -> Tensor:
    """Features ``[N, D]`` of real images, for KID, precision and recall: a fixed draw of KERNEL_IMAGES at most."""
    extractor = extractor or extractors.get("bundled", device)
    if len(images) > KERNEL_IMAGES:
        images = images[torch.randperm(len(images), generator=generator(0, "kernel images"))[:KERNEL_IMAGES]]

    def compute() -> dict[str, np.ndarray]:
        return {"features": extract(images.split(AT_ONCE), device, extractor).numpy()}

    return torch.from_numpy(_cached("features", images, extractor, compute)["features"])


def read_statistics(path: Path) -> Statistics:
    """What :func:`write_statistics` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in ("mu", "sigma")}


def write_statistics(path: Path, value: Statistics) -> None:
    np.savez_compressed(path, **value)


def cache_key(kind: str, images: Tensor, extractor: Extractor) -> str:
    """Digest of all that a cached figure depends on: the images' bytes and the extractor's weights."""
    content = hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()
    return cache.digest(CACHE_VERSION, kind, extractor.name, extractor.weights, images.dtype, images.shape, content)


def _cached(
    kind: str, images: Tensor, extractor: Extractor, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The cached arrays, or those computed now and cached."""
    folder, key = cache.folder("statistics"), cache_key(kind, images, extractor)
    found = cache.read_arrays(folder, key)
    names = parallel.shared(lambda: sorted(found or {}))
    if names:  # as rank 0 has them: a cache is a machine's own
        told = (parallel.of_rank_0(lambda name=name: torch.from_numpy(found[name])) for name in names)
        return {name: tensor.numpy() for name, tensor in zip(names, told)}
    found = compute()
    if parallel.is_writer():
        cache.write_arrays(folder, key, found)
    return found
