"""N:M patterns on weight tensors: pure functions, no model.

Groups of M run along the **input channels**, for each output channel and each kernel position
(NVIDIA 2:4, arXiv 2104.08378). Flattening ``C*R*S`` instead would straddle kernel positions, and no
hardware can use that. All figures of a group are sums over its M columns, written as M strided
operations: on narrow ``[G, M]`` tensors torch's own ``topk`` and ``softmax`` cost five to nine times as
much (``benchmarks/RESULTS.md``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .stage_recipes import Pattern

MOST_SETS = 128  # C(M, N) up to which the kept sets are counted one by one


def group(weight: Tensor, m: int) -> Tensor:
    """``[K, C, R, S]`` or ``[K, C]`` to ``[G, M]``, groups along C. ValueError unless C % m == 0."""
    channels = weight.shape[1]
    if channels % m:
        raise ValueError(f"{channels} input channels are not a multiple of M={m}")
    return weight.movedim(1, -1).reshape(-1, m)


def ungroup(groups: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of :func:`group` for a weight of this shape, contiguous."""
    return unfold(groups, shape).contiguous()


def unfold(groups: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """:func:`ungroup` without a copy: the groups seen as ``[K, C, R, S]`` or ``[K, C]``, strided."""
    out, channels, *kernel = shape
    return groups.view(out, *kernel, channels).movedim(-1, 1)


def keep(scores: Tensor, n: int) -> Tensor:
    """The n largest scores of each group, as a boolean mask ``[G, M]``; of equal ones the first wins.

    By counting for each column how many beat it: M (M - 1) / 2 comparisons of whole columns.
    """
    columns = scores.unbind(-1)
    ranks = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in columns]
    for i, column in enumerate(columns):
        for j in range(i + 1, len(columns)):
            beaten = columns[j] > column
            ranks[i] += beaten
            ranks[j] += beaten.logical_not_()
    return torch.stack(ranks, -1) < n


def top_n(scores: Tensor, n: int) -> Tensor:
    """0/1 mask ``[G, M]`` of the n largest scores of each group, in the dtype of ``scores``.

    Of equal scores the one that stands first is kept, on every device.
    """
    return keep(scores, n).to(scores.dtype)


def total(values: Tensor) -> Tensor:
    """Sum over each group, ``[G]``."""
    first, *rest = values.unbind(-1)
    summed = first.clone()
    for column in rest:
        summed = summed.add_(column)
    return summed


def others(values: Tensor) -> Tensor:
    """Sum over the other members of the group, ``[G, M]``: added up, not subtracted from the total, which
    would cancel where one member outweighs the rest."""
    columns = values.unbind(-1)
    summed = torch.zeros_like(values)
    left, right = torch.zeros_like(columns[0]), torch.zeros_like(columns[0])
    for i, column in enumerate(columns[:-1]):
        left += column
        summed[:, i + 1] += left
    for i in range(len(columns) - 1, 0, -1):
        right += columns[i]
        summed[:, i - 1] += right
    return summed


def probabilities(logits: Tensor) -> Tensor:
    """``softmax(logits)`` in each group, ``[G, M]``."""
    first, *rest = logits.unbind(-1)
    largest = first
    for column in rest:
        largest = torch.maximum(largest, column)
    powers = (logits - largest[:, None]).exp_()
    sums = total(powers)[:, None]
    return powers / sums if powers.requires_grad else powers.div_(sums)


def compliance(weight: Tensor, n: int, m: int) -> float:
    """Share of groups with at most N non-zero weights, 0 to 1."""
    return share(group(weight, m).ne(0).sum(-1) <= n)


def density(weight: Tensor) -> float:
    """Share of non-zero weights, 0 to 1."""
    return share(weight.ne(0))


def position_balance(mask: Tensor) -> Tensor:
    """Share of the kept weights on each of the M positions, ``[M]``, sums to 1; even is 1/M."""
    kept = mask.ne(0).sum(0).cpu().double()
    return kept / kept.sum().clamp(min=1)


def set_shares(mask: Tensor, n: int) -> Tensor | None:
    """Share of the groups ``[G, M]`` that keep each of ``Pattern.kept_sets``; None where there are over MOST_SETS.

    Groups that keep fewer than N (a kept weight is exactly zero) are of no set: then the shares sum to less than 1.
    """
    m = mask.shape[-1]
    if math.comb(m, n) > MOST_SETS:
        return None
    place = 2 ** torch.arange(m - 1, -1, -1, device=mask.device)
    counts = torch.bincount((mask.ne(0) * place).sum(-1), minlength=2**m)
    codes = torch.tensor([int(kept, 2) for kept in Pattern(n, m).kept_sets], device=mask.device)
    return counts[codes].cpu().double() / len(mask)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in bits of ``softmax(logits)`` of each group, ``[G]``: 0 to log2 M, that of the first draw.

    Cheap enough for each step; that of the kept set, which moves with it, is :func:`prunedm.masks.entropy`.
    """
    p = probabilities(logits)
    return total(p * p.clamp(min=1e-12).log()) * (-1 / math.log(2))


def flips(mask: Tensor, reference: Tensor) -> float:
    """Share of groups whose mask differs from the reference's, 0 to 1."""
    return share(flipped(mask, reference))


def share(found: Tensor) -> float:
    """Share of a boolean tensor that is true: counted in whole numbers, which every device has."""
    return int(found.sum()) / max(1, found.numel())


def flipped(mask: Tensor, reference: Tensor) -> Tensor:
    """Which groups differ, boolean ``[G]``."""
    return total(mask.ne(reference).to(torch.int8)).ne(0)


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
