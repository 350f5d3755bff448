"""Images of a model from numbered seeds, streamed in chunks that are kept on disk.

Memory does not grow with the number of images; an evaluation that was cut short goes on where it was; more images
of the same model, or another extractor, compute only what is new. A chunk is always sampled whole, so that its
images do not depend on how many were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import cache, diffusion, parallel
from .extractors import Extractor
from .recipe import Eval
from .seeds import derive
from .unet import Diffusion

PIXELS, MOST = diffusion.CALL_PIXELS, 64  # a chunk has so many pixels at most, and so many images
KIND = "samples"


class Chunk(NamedTuple):
    """uint8 ``[B, C, H, W]`` and their features float32 ``[B, D]``."""

    images: Tensor
    features: Tensor


class SampleSet:
    """The images of one model under one way of sampling. ``fingerprint``: digest of the model's files.

    ``use`` names the set of seeds: two uses of the same settings give independent images.
    """

    def __init__(self, model: Diffusion, fingerprint: str, settings: Eval, use: str = "evaluation") -> None:
        self.model, self.settings, self.use = model, settings, use
        device = next(model.unet.parameters()).device
        call, self.size = diffusion.call_size(model.image_shape, device), chunk_size(model.image_shape, device)
        how = (settings.sampler, settings.steps, settings.eta, settings.seed, use, self.size, call)
        self.folder = cache.folder(KIND) / cache.digest(fingerprint, how, device.type, torch.__version__)

    def chunks(self, count: int) -> int:
        """How many chunks hold so many images."""
        return -(-count // self.size)

    def stream(self, count: int, extractor: Extractor) -> Iterator[Chunk]:
        """The first ``count`` images and their features, a chunk at a time, from disk or made now.

        Ranks deal the chunks out, so all of them must call.
        """
        own: dict[int, Tensor] = {}

        def images_of(i: int) -> Tensor:
            own[i] = self._images(i)
            return own[i]

        made = parallel.dealt(self.chunks(count), images_of)
        seen = parallel.dealt(self.chunks(count), lambda i: self._features(i, own.pop(i), extractor))
        for i, (images, features) in enumerate(zip(made, seen)):
            kept = min(self.size, count - i * self.size)
            yield Chunk(images[:kept], features[:kept])
        if parallel.is_writer():
            cache.trim(KIND, self.folder)

    def images(self, start: int, stop: int) -> Tensor:
        """The images at places ``start`` to ``stop`` (less one): only their own chunks are read or made."""
        first = start // self.size
        found = torch.cat([self._images(i) for i in range(first, self.chunks(stop))])
        return found[start - first * self.size : stop - first * self.size]

    def _images(self, i: int) -> Tensor:
        key = f"images-{i:06d}"
        found = cache.read_arrays(self.folder, key)
        if found is not None:
            return torch.from_numpy(found["images"])
        seeds = image_seeds(self.settings.seed, range(i * self.size, (i + 1) * self.size), self.use)
        s = self.settings
        images = diffusion.sample(self.model.unet, self.model.scheduler, seeds, s.sampler, s.steps, s.eta)
        images = diffusion.to_uint8(images)
        cache.write_arrays(self.folder, key, {"images": images.numpy()})
        return images

    def _features(self, i: int, images: Tensor, extractor: Extractor) -> Tensor:
        key = f"features-{extractor.name}-{extractor.weights[:16]}-{i:06d}"
        found = cache.read_arrays(self.folder, key)
        if found is not None:
            return torch.from_numpy(found["features"])
        features = extractor.features(images)
        cache.write_arrays(self.folder, key, {"features": features.numpy()})
        return features


def chunk_size(shape: tuple[int, int, int], device: torch.device) -> int:
    """How many images of this ``(C, H, W)`` are sampled and kept together."""
    _, height, width = shape
    call, most = diffusion.call_size(shape, device), max(1, min(MOST, PIXELS // (height * width)))
    return most - most % call or most  # whole calls, so that none is filled up in vain


def image_seeds(seed: int, places: range, use: str = "evaluation") -> list[int]:
    """The noise seeds of images at these places, the same for every variant."""
    return [derive(seed, use, i) for i in places]
