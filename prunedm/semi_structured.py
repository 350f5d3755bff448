"""PyTorch's semi-structured (2:4) kernels: which layers can use them and why the others cannot, and the conversion.

The kernels are CUDA-only (compute capability 8.0 and later), multiply matrices only, and in fp16 or bf16: in
fp32 the hardware's pattern is 1:2. The plan needs no GPU; the conversion does, and is done after each load,
because a converted tensor is laid out for the library and GPU at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import pattern
from .store import write_json
from .unet import ModelError

PLAN = "semi-structured.json"  # in the exported folder
SCHEMA = 1
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Multiples that [K, C] must be of, in fp16 and bf16 (torch.sparse.semi_structured).
MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}
NOT_PORTABLE = "converted tensors are laid out for one library and GPU and cannot be saved: convert after each load"


class SparseLinear(nn.Module):
    """``x @ weight.T + bias`` over the last axis, or over the channels of a 4-D input (a 1x1 convolution).

    The kernels take contiguous matrices only, and diffusers' attention hands its layers transposed views.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.is_conv = isinstance(layer, nn.Conv2d)
        self.out_features, self.in_features = layer.weight.shape[:2]
        self.weight = nn.Parameter(layer.weight.detach().flatten(1).contiguous(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., K]``, or ``[B, C, H, W]`` to ``[B, K, H, W]`` where it was a convolution."""
        rows = x.movedim(1, -1) if self.is_conv else x
        product = F.linear(rows.reshape(-1, self.in_features).contiguous(), self.weight, self.bias)
        product = product.reshape(*rows.shape[:-1], self.out_features)
        return product.movedim(-1, 1).contiguous() if self.is_conv else product


def plan(unet: nn.Module, backend: str = "cusparselt") -> list[dict[str, Any]]:
    """Each conv and linear layer: ``convert`` true, or false with the reason in words. Needs no GPU."""
    rows = []
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            reason = _obstacle(layer, backend)
            kind = "conv" if isinstance(layer, nn.Conv2d) else "linear"
            shape = list(layer.weight.shape)
            rows.append({"layer": name, "kind": kind, "shape": shape, "convert": not reason, "reason": reason})
    return rows


def _obstacle(layer: nn.Conv2d | nn.Linear, backend: str) -> str:
    """Why a layer cannot use the kernels, in words; empty when it can."""
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size != (1, 1):
            return f"{'x'.join(map(str, layer.kernel_size))} convolution: the kernels multiply matrices only"
        if layer.stride != (1, 1) or layer.padding not in ((0, 0), "valid", "same") or layer.groups > 1:
            return "1x1 convolution with stride, padding or groups: no plain matrix product"
    weight = layer.weight.detach()
    short = pattern.ineligible(weight.shape, 4)
    if short:
        return short
    found = pattern.compliance(weight, 2, 4)
    if found < 1:
        return f"not 2:4: only {found:.1%} of its groups have at most 2 non-zero weights"
    rows, columns = MULTIPLES[backend]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        size = f"{weight.shape[0]}x{weight.shape[1]}"
        return f"{size} is no multiple of {rows}x{columns}, which {backend} asks in fp16 and bf16"
    return ""


def none_fits(rows: list[dict[str, Any]]) -> str:
    """Why none of :func:`plan`'s layers uses the kernels, by a linear one where there is one; empty where one does."""
    if any(row["convert"] for row in rows):
        return ""
    row = next((row for row in rows if row["kind"] == "linear"), rows[0])
    return f"none of the {len(rows)} layers can use the 2:4 kernels; {row['layer']}: {row['reason']}"


EXPORT_REMEDY = "use --format diffusers and call prunedm.semi_structured.convert on the machine that has one"


def require_cuda(remedy: str = EXPORT_REMEDY) -> None:
    """ModelError, in one line, where the kernels cannot run; ``remedy``: what to do where no GPU is here."""
    if not torch.cuda.is_available():
        raise ModelError(f"semi-structured: PyTorch's 2:4 kernels need a CUDA GPU and none is here; {remedy}")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        found = f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
        raise ModelError(f"semi-structured: {found}; 2:4 kernels need 8.0 (Ampere) or later: use another GPU")


def convert(unet: nn.Module, dtype: torch.dtype = torch.float16) -> list[dict[str, Any]]:
    """Move the UNet to the GPU in ``dtype`` and give its 2:4 matrices to the sparse kernels, in place.

    Returns :func:`plan`'s rows. For inference only. ModelError without a fitting GPU or for another dtype.
    """
    if dtype not in DTYPES.values():
        raise ModelError(f"semi-structured: dtype {dtype} has no 2:4 kernel; use torch.float16 or torch.bfloat16")
    require_cuda()
    backend = _backend()
    nn.Module.to(unet, "cuda", dtype).eval().requires_grad_(False)
    rows = plan(unet, backend)
    for row in rows:
        if row["convert"]:
            parent, _, name = row["layer"].rpartition(".")
            sparse = SparseLinear(unet.get_submodule(row["layer"]))
            sparse.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(sparse.weight), requires_grad=False)
            setattr(unet.get_submodule(parent), name, sparse)
    return rows


def _backend() -> str:
    """cuSPARSELt where torch was built with it, else CUTLASS, which torch must be told to use."""
    if hasattr(torch.backends, "cusparselt") and torch.backends.cusparselt.is_available():
        return "cusparselt"
    torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = True
    return "cutlass"


def loading_lines(folder: str, dtype: str) -> list[str]:
    """The three lines of Python that load an exported folder and convert it."""
    return [
        "import torch; from prunedm import semi_structured, unet",
        f"model = unet.load({folder!r}).unet",
        f"rows = semi_structured.convert(model, torch.{str(DTYPES[dtype]).removeprefix('torch.')})",
    ]


def write_plan(folder: Path, shown: Path, unet: nn.Module, dtype: str, measured: dict[str, Any] | None) -> dict:
    """``semi-structured.json``: the plan, how to load, and what was measured on a GPU (None where none was)."""
    rows = plan(unet)
    record = {
        "schema": SCHEMA,
        "dtype": dtype,
        "note": NOT_PORTABLE,
        "load": loading_lines(str(shown), dtype),
        "converted": sum(row["convert"] for row in rows),
        "layers": rows,
        "measured": measured,
    }
    write_json(folder / PLAN, record)
    return record


@torch.no_grad()
def measure(unet: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """On the GPU: largest difference and time of the converted UNet against the dense one in the same dtype."""
    import copy
    import dataclasses

    from . import latency
    from .seeds import generator
    from .unet import image_shape

    require_cuda()
    dense = nn.Module.to(copy.deepcopy(unet), "cuda", dtype).eval()
    sparse = copy.deepcopy(unet)
    convert(sparse, dtype)
    x = torch.randn(latency.BATCH, *image_shape(unet), generator=generator(0, "semi-structured")).to("cuda", dtype)
    last = (unet.config.num_train_timesteps or 1000) - 1  # a table of timesteps ends there
    t = torch.linspace(0, last, latency.BATCH, device="cuda").long()
    difference = (dense(x, t).sample.float() - sparse(x, t).sample.float()).abs().max().item()
    for timed in latency.measure({"dense": dense, "semi-structured": sparse}):
        pass
    return {
        "largest_difference": difference,
        "backend": _backend(),
        "latency": {name: dataclasses.asdict(figure) for name, figure in timed.items()},
    }
