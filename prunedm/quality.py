"""Quality of one model's images, by the same seeds and the same judge for every model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import data, diffusion, extractors, faithfulness, metrics, parallel, pictures, subject
from .extractors import Extractor
from .recipe import Eval
from .samples import SampleSet
from .seeds import derive
from .store import write_atomic
from .unet import Diffusion

VALIDATION_IMAGES, VALIDATION_BATCH, SHEET = 512, 128, 64
ISC_SPLIT = 500  # fewest images of a part of the inception score: of few images it says too little
AGAIN = "evaluation again"  # the use of seeds of the dense model's second set, for the noise floor


@dataclass
class Target:
    """A model to judge: where it lies, its N:M layers (name to ``N:M``), and where its sample sheet goes.

    dense_sheet: the dense model's, for faithfulness; None for a dense model. info: goes into the sheet.
    """

    model: Diffusion
    place: Path
    sheet: Path
    patterns: dict[str, str] = field(default_factory=dict)
    dense_sheet: Path | None = None
    is_dense: bool = False
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.unet.parameters()).device


@dataclass
class Judge:
    """What every model is judged by: settings, real images and feature network."""

    settings: Eval
    images: data.Images
    extractor: Extractor

    @classmethod
    def of(cls, settings: Eval, images: data.Images, device: torch.device) -> Judge:
        """With the settings' extractor; ValueError where it or its weights are not at hand."""
        return cls(settings, images, extractors.get(settings.extractor, str(device)))

    def steps(self, target: Target) -> int:
        """How many times :meth:`quality` yields."""
        floors = target.is_dense and self.settings.noise_floor
        chunks = SampleSet(target.model, "", self.settings).chunks(self.settings.images)
        return 2 + chunks * (2 if floors else 1)

    def quality(self, target: Target) -> Iterator[dict[str, Any]]:
        """All figures of quality; yields once a chunk of images, the figures in the last yield.

        Ranks share the work and must all iterate; rank 0 alone has all the figures.
        """
        found = validation(target.model, self.settings, self.images)
        yield {}
        seen = Seen(SHEET)
        for _ in self._watch(target, seen, "evaluation"):
            yield {}
        reference, real = self._real(target.device)
        if parallel.is_writer():
            found |= self._distances(seen, reference, real)
            write_atomic(target.sheet, pictures.sheet_png(seen.shown, target.info | how(self.settings)))
            if target.dense_sheet is not None and target.dense_sheet.exists():
                found |= self._faithfulness(target.dense_sheet, seen.shown)
        if target.is_dense and self.settings.noise_floor:
            again = Seen(0)
            for _ in self._watch(target, again, AGAIN):
                yield {}
            found["noise_floor"] = self._noise_floor(seen, again, real) if parallel.is_writer() else {}
        yield found

    def _watch(self, target: Target, seen: Seen, use: str) -> Iterator[None]:
        samples = SampleSet(target.model, subject.fingerprint(target.place), self.settings, use)
        for chunk in samples.stream(self.settings.images, self.extractor):
            seen.add(chunk.images, chunk.features)
            yield

    def _real(self, device: torch.device) -> tuple[metrics.Statistics, Tensor]:
        """Statistics and features of the training images."""
        train = self.images.train
        reference = metrics.reference_statistics(train, self.images.is_bundled, str(device), self.extractor)
        return reference, metrics.reference_features(train, str(device), self.extractor)

    def _distances(self, seen: Seen, reference: metrics.Statistics, real: Tensor) -> dict[str, Any]:
        """Frechet distance to the training images, KID, precision and recall, inception score; how they were made."""
        s, network = self.settings, self.extractor
        found: dict[str, Any] = {
            "fid": metrics.frechet_distance(seen.moments.statistics(), reference),
            "fid_std": metrics.frechet_spread(seen.kept, reference, s.seed),
            "fid_extractor": network.label,
            "fid_images": seen.moments.count,
            "few_images": metrics.few_images_warning(seen.moments.count, network.dimensions),
            "sampling": how(self.settings) | {"eta": s.eta, "extractor": s.extractor, "weights": network.weights[:16]},
        }
        found["sampling"] |= {"data": self.images.name, "digest": self.images.digest[:16]}
        if min(len(seen.kept), len(real)) >= 4:
            found |= metrics.pairwise(seen.kept, real, s.seed) | {"kernel_images": len(seen.kept)}
        if network.name == "inception" or (network.name == "bundled" and self.images.is_bundled):
            splits = max(1, min(10, len(seen.kept) // ISC_SPLIT))
            found["isc"], spread = metrics.inception_score(network.logits(seen.kept), splits)
            found["isc_std"] = spread if splits > 1 else None
        return found

    def _noise_floor(self, first: Seen, second: Seen, real: Tensor) -> dict[str, dict[str, float]]:
        """What the metrics find between two sets of dense samples, and two of real images: no difference at all."""
        found = {}
        if len(first.kept) >= 4:
            found["samples"] = metrics.measure(first.kept, second.kept, self.settings.seed)
        count = min(len(first.kept), len(real) // 2)
        if count >= 4:
            a, b = metrics.halves(len(real), self.settings.seed)
            found["real"] = metrics.measure(real[a[:count]], real[b[:count]], self.settings.seed)
        return found

    def _faithfulness(self, dense_sheet: Path, shown: Tensor) -> dict[str, Any]:
        """Agreement with the dense model's samples of the same seeds; nothing where they were made otherwise."""
        theirs, info = pictures.read_sheet(dense_sheet)
        same = all(info.get(key, 0) == value for key, value in how(self.settings).items())
        count = min(len(theirs), len(shown))
        if not same or not count:
            return {}
        dense = pictures.as_tensor(theirs[:count])
        if dense.shape[1:] != shown.shape[1:]:
            return {}
        pairs = (dense, shown[:count], self.extractor.features(dense), self.extractor.features(shown[:count]))
        found = faithfulness.compare_samples(*pairs)
        low, high = interval(found["per_image"]["ssim"], self.settings.seed)
        keys = ("ssim", "psnr", "identical", "feature_distance")
        return {key: found[key] for key in keys} | {"ssim_low": low, "ssim_high": high, "pairs": count}


def how(settings: Eval) -> dict[str, Any]:
    """How images were made, for their sheet."""
    found = {"sampler": settings.sampler, "steps": settings.steps, "seed": settings.seed}
    return found | ({"eta": settings.eta} if settings.eta else {})


class Seen:
    """What is kept of a stream of samples: the first few images, moments, and features for the kernels."""

    def __init__(self, shown: int) -> None:
        self.most, self.moments, self._images, self._features = shown, metrics.Moments(), [], []

    def add(self, images: Tensor, features: Tensor) -> None:
        self.moments.add(features)
        missing = self.most - sum(map(len, self._images))
        if missing > 0:
            self._images.append(images[:missing])
        room = metrics.KERNEL_IMAGES - sum(map(len, self._features))
        if room > 0:
            self._features.append(features[:room])

    @property
    def shown(self) -> Tensor:
        return torch.cat(self._images)

    @property
    def kept(self) -> Tensor:
        return torch.cat(self._features)


def validation(model: Diffusion, settings: Eval, images: data.Images) -> dict[str, Any]:
    """Noise-prediction error on the held-out images: mean with its interval, each image's, each timestep bin's."""
    device = next(model.unet.parameters()).device
    held_out = data.to_float(images.held_out[:VALIDATION_IMAGES], device)
    batches = diffusion.validation_batches(
        model.scheduler, held_out, VALIDATION_IMAGES, VALIDATION_BATCH, settings.seed
    )
    steps = model.scheduler.config.num_train_timesteps
    errors = diffusion.per_image_losses(lambda x, t: model.unet(x, t).sample, batches).cpu()
    low, high = interval(errors, settings.seed)
    return {
        "validation_loss": errors.mean().item(),
        "validation_loss_low": low,
        "validation_loss_high": high,
        "validation_images": len(errors),
        "validation_errors": [float(f"{error:.6g}") for error in errors.tolist()],
        "loss_bins": diffusion.by_bin(errors, batches, steps),
        "timesteps": steps,
        "prediction_type": model.scheduler.config.prediction_type,
    }


def interval(values: Any, seed: int) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean; None for a single value."""
    values = np.asarray(values, np.float64)
    return metrics.bootstrap_interval(values, derive(seed, "interval")) if len(values) > 1 else (None, None)
