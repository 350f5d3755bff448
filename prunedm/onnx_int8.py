"""8-bit ONNX files: weights only, dynamic activations, or static ones (QDQ, calibrated).

Zero stays zero in all three (symmetric weights, or a zero point that stands for it exactly), so N:M survives.
What was measured on the bundled model decides the settings: see :func:`dynamic` and :func:`static`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import data, onnx_graph
from .recipe import Data
from .seeds import generator
from .unet import Diffusion

if TYPE_CHECKING:
    from onnx import ModelProto

IMAGES, BATCH = 64, 8
PRODUCTS = ["Conv", "MatMul", "Gemm"]


def images_of(model: Diffusion, spec: Data | None) -> data.Images | None:
    """The images that the model was trained on (a run's own, or the bundled set); None where none fit."""
    try:
        return data.load(spec or Data(), model.image_shape)
    except (ValueError, OSError):
        return None


def noisy_inputs(model: Diffusion, count: int, use: str, images: data.Images | None) -> tuple[Tensor, Tensor, str]:
    """Seeded inputs of the UNet as it meets them, ``[N, C, H, W]`` and ``[N]``, and where they come from, in words.

    Held-out images with the noise of a random timestep; Gaussian noise alone where there are no images.
    """
    random = generator(0, "onnx", use)
    t = torch.randint(0, model.scheduler.config.num_train_timesteps, (count,), generator=random)
    noise = torch.randn(count, *model.image_shape, generator=random)
    if images is None:
        return noise, t, f"{count} draws of Gaussian noise at random timesteps (no images of the model's shape)"
    chosen = torch.randint(0, len(images.held_out), (count,), generator=random)
    x = model.scheduler.add_noise(data.to_float(images.held_out[chosen]), noise, t)
    return x, t, f"{count} held-out images of {images.name} with the scheduler's noise at random timesteps"


def weights_only(model: ModelProto, inputs: tuple[Tensor, Tensor]) -> ModelProto:
    """Weights as int8 with one scale an output channel, behind DequantizeLinear; all arithmetic stays float."""
    import onnx
    from onnx import helper, numpy_helper

    small = onnx.ModelProto()
    small.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in small.graph.initializer}
    added, drop = [], set()
    for node in (n for n in small.graph.node if n.op_type in PRODUCTS and n.input[1] in stored):
        name = node.input[1]
        if name not in drop:
            drop.add(name)
            axis = 0 if onnx_graph.is_upright(node) else 1
            steps, scale = _quantised(numpy_helper.to_array(stored[name]), axis)
            parts = {f"{name}_quantized": steps, f"{name}_scale": scale}
            small.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in parts.items())
            added.append(helper.make_node("DequantizeLinear", list(parts), [f"{name}_float"], name, axis=axis))
        node.input[1] = f"{name}_float"
    nodes = [*added, *small.graph.node]
    kept = [tensor for tensor in small.graph.initializer if tensor.name not in drop]
    del small.graph.node[:], small.graph.initializer[:]
    small.graph.node.extend(nodes)
    small.graph.initializer.extend(kept)
    return small


def _quantised(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 steps, -127 to 127, and float32 scales along one axis; a channel of zeros has scale 1."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale.reshape(-1)


def dynamic(model: ModelProto, inputs: tuple[Tensor, Tensor]) -> ModelProto:
    """ONNX Runtime's dynamic quantization: scales of the activations are found at each call.

    Convolutions become ConvInteger. Its fast kernel takes *unsigned* weights only (with int8 ones the bundled
    model took four times as long), so weights are uint8 with a zero point a channel.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def work(given: Path, made: Path) -> None:
        quantize_dynamic(given, made, weight_type=QuantType.QUInt8, per_channel=True, op_types_to_quantize=PRODUCTS)

    return _through_files(model, work)


def static(model: ModelProto, inputs: tuple[Tensor, Tensor]) -> ModelProto:
    """ONNX Runtime's static quantization: QDQ, int8, the activations' ranges taken from ``inputs``.

    Only matrix products and convolutions: with element-wise operations as well the bundled model's output
    was off by 44 % (root mean square) instead of 3 %.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            pairs = zip(*(part.split(BATCH) for part in inputs))
            self.feeds: Iterator[dict[str, Any]] = iter([_feed(x, t) for x, t in pairs])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    def work(given: Path, made: Path) -> None:
        kinds = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
        form = {"quant_format": QuantFormat.QDQ, "per_channel": True, "op_types_to_quantize": PRODUCTS}
        quantize_static(given, made, Reader(), **kinds, **form)

    return _through_files(model, work)


METHODS: dict[str, Callable[[Any, tuple[Tensor, Tensor]], Any]] = {
    "weights": weights_only,
    "dynamic": dynamic,
    "static": static,
}


def _feed(x: Tensor, t: Tensor) -> dict[str, np.ndarray]:
    return {"sample": x.numpy(), "timestep": t.numpy()}


def _through_files(model: ModelProto, work: Callable[[Path, Path], None]) -> ModelProto:
    """ONNX Runtime's quantizers read and write files; theirs are temporary."""
    with tempfile.TemporaryDirectory() as folder, _quietly():
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        given.write_bytes(model.SerializeToString())
        work(given, made)
        return onnx_graph.load(made)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the quantizer's advice to run a pre-processing, which this graph does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
