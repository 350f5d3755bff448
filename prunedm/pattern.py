"""N:M patterns on weight tensors: pure functions, no model.

Groups of M run along the **input channels**, for each output channel and each kernel position
(NVIDIA 2:4, arXiv 2104.08378). Flattening ``C*R*S`` instead would straddle kernel positions, and no
hardware can use that.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group(weight: Tensor, m: int) -> Tensor:
    """``[K, C, R, S]`` or ``[K, C]`` to ``[G, M]``, groups along C. ValueError unless C % m == 0."""
    channels = weight.shape[1]
    if channels % m:
        raise ValueError(f"{channels} input channels are not a multiple of M={m}")
    last = weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight
    return last.reshape(-1, m)


def ungroup(groups: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of :func:`group` for a weight of this shape, contiguous."""
    if len(shape) == 2:
        return groups.reshape(shape)
    out, channels, height, width = shape
    return groups.reshape(out, height, width, channels).permute(0, 3, 1, 2).contiguous()


def top_n(scores: Tensor, n: int) -> Tensor:
    """0/1 mask ``[G, M]`` of the n largest scores of each group, in the dtype of ``scores``."""
    kept = scores.topk(n, dim=-1).indices
    return torch.zeros_like(scores).scatter_(-1, kept, 1.0)


def compliance(weight: Tensor, n: int, m: int) -> float:
    """Share of groups with at most N non-zero weights, 0 to 1."""
    return (group(weight, m).ne(0).sum(-1) <= n).double().mean().item()


def density(weight: Tensor) -> float:
    """Share of non-zero weights, 0 to 1."""
    return weight.ne(0).double().mean().item()


def position_balance(mask: Tensor) -> Tensor:
    """Share of the kept weights on each of the M positions, ``[M]``, sums to 1; even is 1/M."""
    kept = mask.ne(0).double().sum(0)
    return kept / kept.sum().clamp(min=1)


def mean_entropy(logits: Tensor) -> float:
    """Mean entropy in bits of ``softmax(logits)`` of the groups ``[G, M]``: 0 to log2 M.

    The entropy of one draw; that of the whole set of N (0 to log2 C(M, N)) has no cheap closed form
    and moves with it.
    """
    p = logits.softmax(-1)
    return -(p * p.clamp(min=1e-12).log2()).sum(-1).mean().item()


def flips(mask: Tensor, reference: Tensor) -> float:
    """Share of groups whose mask differs from the reference's, 0 to 1."""
    return mask.ne(reference).any(-1).double().mean().item()


def ineligible(shape: torch.Size | tuple[int, ...], m: int) -> str | None:
    """Why a weight of this shape cannot carry groups of M, in words; None when it can."""
    channels = shape[1]
    if channels < m:
        return f"{channels} input channels are fewer than M={m}"
    if channels % m:
        return f"{channels} input channels are not a multiple of M={m}"
    return None


def tensor_core_ready(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether NVIDIA's ASP would take the shape for 2:4: K % 8 == 0 and C % 16 == 0."""
    return shape[0] % 8 == 0 and shape[1] % 16 == 0
