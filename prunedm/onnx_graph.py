"""The weights inside an ONNX file, found by the nodes that use them and named as diffusers names the layers.

A linear layer may be a Gemm (weight ``[K, C]``) or a MatMul (weight ``[C, K]``, transposed), and a quantised
weight hides behind a DequantizeLinear or inside a ConvInteger. Here every one is seen as ``[K, C, R, S]`` or
``[K, C]``, so that groups of M can be counted along the input channels C *in the file itself*.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

CLAIMS = "prunedm.patterns"  # key in metadata_props: a JSON object, layer to "N:M"
INTEGER_OPS = ("ConvInteger", "MatMulInteger")
OPS = ("Conv", "Gemm", "MatMul", *INTEGER_OPS)


class OnnxError(ValueError):
    """An ONNX file that cannot be read or does not hold what it should, in one line."""


def require() -> None:
    """OnnxError, in one line, where onnx or onnxruntime is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise OnnxError(f"{error.name} is not installed; run `make lab`, or pip install onnx onnxruntime") from error


def load(path: Path) -> ModelProto:
    """The model in an ONNX file. Data outside the file is not followed. OnnxError when there is no graph."""
    require()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        line = " ".join(str(error).split())[:120]
        raise OnnxError(f"{path} cannot be read as ONNX ({line}); export it again") from error
    if not model.graph.node or not model.graph.initializer:
        raise OnnxError(f"{path} holds no ONNX graph with weights; export it again")
    return model


def weights(model: ModelProto) -> dict[str, Tensor]:
    """Layer to its weight, ``[K, C, R, S]`` or ``[K, C]``; quantised ones in steps, zero where they mean zero."""
    return {layer: torch.from_numpy(values.copy()) for layer, values, _ in _users(model)}


def claims(model: ModelProto) -> Any:
    """What the file says of its layers' patterns: parsed JSON, or None where it says nothing."""
    found = next((p.value for p in model.metadata_props if p.key == CLAIMS), None)
    return None if found is None else json.loads(found)


def set_metadata(model: ModelProto, values: dict[str, str]) -> None:
    """Write key and value pairs into metadata_props; a key that is there already is replaced."""
    kept = [(p.key, p.value) for p in model.metadata_props if p.key not in values]
    del model.metadata_props[:]
    for key, value in [*kept, *values.items()]:
        model.metadata_props.add(key=key, value=value)


def name_weights(model: ModelProto, unet: nn.Module) -> None:
    """Give every conv and linear weight its own initialiser, named ``layer.weight``, as the UNet has it.

    The exporter calls transposed weights ``onnx::MatMul_123`` and lets equal weights share one initialiser.
    The layer is read off the node's scope and its values are compared with the UNet's: OnnxError when they
    differ, so that no claim is ever made of the wrong weight.
    """
    from onnx import numpy_helper

    layers = {name: m.weight.detach() for name, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    named = {}
    for _, values, node in list(_users(model)):
        layer = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        weight = layers.get(layer)
        if weight is None or tuple(weight.shape) != values.shape or not np.array_equal(weight.numpy(), values):
            raise OnnxError(f"node {node.name} does not hold the weight of layer {layer!r}; report this model")
        stored = values if is_upright(node) else values.T
        named[f"{layer}.weight"] = numpy_helper.from_array(np.ascontiguousarray(stored), f"{layer}.weight")
        node.input[1] = f"{layer}.weight"
    others = [tensor for tensor in model.graph.initializer if tensor.name not in named]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*named.values(), *others])
    for node in [n for n in model.graph.node if set(n.output) & set(named)]:
        model.graph.node.remove(node)  # the Identity through which a weight was shared
    _sweep(model)


def _users(model: ModelProto) -> Iterator[tuple[str, np.ndarray, NodeProto]]:
    """(layer, weight as ``[K, C, ...]``, node) for each node with a constant weight, in the graph's order."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in list(model.graph.node):
        if node.op_type not in OPS:
            continue
        found = _constant(node, constants, made_by)
        if found is None or found[1].ndim < 2 or (not _is_conv(node) and found[1].ndim != 2):
            continue
        name, values = found
        yield name.partition(".weight")[0], values if is_upright(node) else values.T, node


def _constant(node: NodeProto, constants: dict[str, Any], made_by: dict[str, NodeProto]):
    """(name, values) of a node's second input where it is a constant, quantised or shared, else None."""
    name = node.input[1]
    source = made_by.get(name)
    while source is not None and source.op_type == "Identity":
        name = source.input[0]
        source = made_by.get(name)
    if source is not None and source.op_type == "DequantizeLinear":
        axis = next((a.i for a in source.attribute if a.name == "axis"), 1)
        return _steps(source.input[0], source.input[2] if len(source.input) > 2 else "", axis, constants)
    if node.op_type in INTEGER_OPS:
        axis = 0 if _is_conv(node) else 1
        return _steps(name, node.input[3] if len(node.input) > 3 else "", axis, constants)
    return (name, _array(constants[name])) if name in constants else None


def _steps(name: str, zero: str, axis: int, constants: dict[str, Any]):
    """(name, quantised values minus their zero point), or None when the values are no constant."""
    if name not in constants:
        return None
    values = _array(constants[name]).astype(np.int32)
    if not zero:
        return name, values
    if zero not in constants:
        raise OnnxError(f"the zero point of {name} is not a constant; only files with fixed weights can be checked")
    point = _array(constants[zero]).astype(np.int32)
    shape = [1] * values.ndim
    if point.size > 1:
        if point.size != values.shape[axis]:
            raise OnnxError(f"{name} is quantised in blocks; only one zero point a tensor or channel can be checked")
        shape[axis] = point.size
    return name, values - point.reshape(shape)


def _array(tensor: Any) -> np.ndarray:
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL:
        raise OnnxError(f"{tensor.name} lies outside the ONNX file; save the model in one file")
    values = numpy_helper.to_array(tensor)
    # Types that only ml_dtypes knows (bfloat16, int4 ...) have no torch counterpart to go through numpy.
    return values if values.dtype.kind in "fiu" else values.astype(np.float32)


def _is_conv(node: NodeProto) -> bool:
    return node.op_type in ("Conv", "ConvInteger")


def is_upright(node: NodeProto) -> bool:
    """Whether the stored weight has the output channels first."""
    return _is_conv(node) or (node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute))


def _sweep(model: ModelProto) -> None:
    """Drop initialisers and Identity nodes that nothing uses any more."""
    kept_outputs = {output.name for output in model.graph.output}
    while True:
        used = kept_outputs | {name for node in model.graph.node for name in node.input}
        idle = [n for n in model.graph.node if n.op_type == "Identity" and not used & set(n.output)]
        if not idle:
            break
        for node in idle:
            model.graph.node.remove(node)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
