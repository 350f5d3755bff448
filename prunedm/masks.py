"""The distribution of an N:M mask: drawing it, its exact probability, and the gradient of that.

One logit per weight, ``[G, M]`` for all groups of all layers of one pattern, so that sampling,
log-probability and update are a handful of large operations whatever the number of layers. ``p =
softmax(logits)`` in each group; a mask is drawn by taking N of M without replacement (Gumbel top-N), so
every sample is exactly N:M (MaskPro, arXiv 2506.12876; MaskLLM, arXiv 2409.17481, has one logit per
*pattern of a group* instead, C(M,N)/M times as many).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from . import pattern

ENUMERATED = 28  # sets, up to which an entropy is summed over all of them: C(8, 2)
EXACT_ORDERS = 24  # reinforce uses the set's gradient up to so many orders of drawing, N!
SMALLEST_UNIFORM = 2.0**-25  # half the smallest step of a float32 uniform


def uniform(shape: torch.Size, gen: torch.Generator | None, like: Tensor) -> Tensor:
    """Uniform noise in (0, 1), drawn where the generator lives: on the CPU every device gets the same."""
    device = gen.device if gen is not None else "cpu"
    return torch.rand(shape, generator=gen, device=device).clamp_(SMALLEST_UNIFORM, 1 - SMALLEST_UNIFORM).to(like)


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform noise, in place."""
    return u.log_().neg_().log_().neg_()


def keys(logits: Tensor, u: Tensor) -> Tensor:
    """``logits + Gumbel noise`` from uniform noise, which is overwritten. The places of the N largest keys of a
    group, largest first, are N draws without replacement from ``softmax(logits)`` (Kool et al., arXiv 1903.06059)."""
    return gumbel(u).add_(logits)


def sample_masks(logits: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """0/1 masks ``[G, M]`` with exactly N ones a group, drawn from the logits ``[G, M]``.

    Gumbel top-N: the N largest :func:`keys` (MaskPro, arXiv 2506.12876; Kool et al., arXiv 1903.06059).
    """
    return pattern.top_n(keys(logits, uniform(logits.shape, generator, logits)), n)


def log_prob(logits: Tensor, mask: Tensor) -> Tensor:
    """log P(S) of the kept set of each group, ``[G]``: exact, summed over all orders of drawing.

    P(S) = sum over the orders of prod p_a / (1 - sum of those already drawn), by recursion over the
    2^N subsets of the kept set rather than over its N! orders. Differentiable in the logits.
    """
    kept, rest = _kept_first(logits, mask)
    return _reach(kept, rest)[-1]


@torch.no_grad()
def entropy(logits: Tensor, n: int) -> Tensor:
    """Entropy in bits of the kept set of each group, ``[G]``: 0 to log2 C(M, N).

    Summed over all sets where there are at most ENUMERATED; else -log2 P of one drawn set a group, whose mean
    over many groups is as good (its expectation is the entropy). The same logits give the same figure.
    """
    m = logits.shape[1]
    if math.comb(m, n) > ENUMERATED:
        drawn = sample_masks(logits, n, torch.Generator().manual_seed(0))
        return log_prob(logits, drawn) / -math.log(2)
    total = torch.zeros_like(logits[:, 0])
    for kept in itertools.combinations(range(m), n):
        mask = torch.zeros_like(logits)
        mask[:, list(kept)] = 1
        log_p = log_prob(logits, mask)
        total -= log_p.exp() * log_p / math.log(2)
    return total


def score(logits: Tensor, mask: Tensor) -> Tensor:
    """Gradient of :func:`log_prob` in the logits, ``[G, M]``, in closed form (MaskPro, arXiv 2506.12876).

    Draws pass through a chain of subsets T of the kept set S. With w_T = P(T is passed | S),

        d log P(S) / d logit_j = [j in S] - sum over T not holding j of w_T p_j / (1 - P(T)).

    Exact for every N: 2^N subsets; N = 1 and N = 2 need no subsets at all and are written out.
    """
    logits, mask = logits.detach(), mask.to(logits.dtype)  # boolean masks may come, too
    n = int(mask[0].sum())
    if n == 1:
        return mask - pattern.probabilities(logits)
    if n == 2:
        return _score_of_pairs(logits, mask)
    kept, rest = _kept_first(logits, mask)
    reach, leave = _reach(kept, rest), _leave(kept, rest)
    gradient = torch.ones_like(kept)
    outside = torch.zeros_like(rest)
    for subset in range((1 << n) - 1):
        inside = [i for i in range(n) if not subset >> i & 1]
        mass = torch.stack([rest, *(kept[:, i] for i in inside)]).logsumexp(0)
        share = (reach[subset] + leave[subset] - reach[-1] - mass).exp()  # w_T / (1 - P(T))
        outside = outside + share
        for i in inside:
            gradient[:, i] -= share * kept[:, i].exp()
    everywhere = -outside[:, None] * logits.softmax(-1)
    return everywhere.masked_scatter(mask.bool(), gradient)


def _score_of_pairs(logits: Tensor, mask: Tensor) -> Tensor:
    """:func:`score` for N = 2: with u_a = 1 / (1 - p_a) for the kept a and U their sum, the first draw was
    a with probability u_a / U, so grad_j = mask_j - p_j (1 + sum over kept a != j of u_a^2 / U)."""
    powers = pattern.probabilities(logits)
    u = mask / pattern.others(powers).clamp_(min=torch.finfo(logits.dtype).tiny)
    v = u * (u / pattern.total(u)[:, None])
    return mask - powers * (1 + pattern.others(v))


def ordered_score(logits: Tensor, order: Tensor) -> Tensor:
    """Gradient of the log-probability of one drawn order ``[G, N]`` (Plackett-Luce), ``[G, M]``.

    Unbiased like :func:`score` and noisier; its cost grows with N and not with 2^N.
    """
    logits = logits.detach()
    remaining = logits
    gradient = torch.zeros_like(logits).scatter_(-1, order, 1.0)
    for a in order.unbind(-1):
        gradient -= pattern.probabilities(remaining)
        remaining = remaining.scatter(-1, a[:, None], -math.inf)
    return gradient


def _kept_first(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept ``[G, N]`` and of all others together ``[G]``; logits normalised."""
    normal = logits.log_softmax(-1)
    chosen = mask.bool()
    kept = normal.masked_select(chosen).view(len(mask), -1)
    return kept, normal.masked_fill(chosen, -math.inf).logsumexp(-1)


def _reach(kept: Tensor, rest: Tensor) -> list[Tensor]:
    """log P(the first |T| draws are exactly T), for each subset T of the kept set as a bit mask."""
    n = kept.shape[1]
    reach = [torch.zeros_like(rest)]
    for subset in range(1, 1 << n):
        ways = []
        for a in (i for i in range(n) if subset >> i & 1):
            before = subset ^ (1 << a)
            ways.append(reach[before] + kept[:, a] - _mass(kept, rest, before))
        reach.append(torch.stack(ways).logsumexp(0))
    return reach


def _leave(kept: Tensor, rest: Tensor) -> list[Tensor]:
    """log P(the kept set is completed | the first |T| draws were T), for each subset T."""
    n = kept.shape[1]
    whole = (1 << n) - 1
    leave = [torch.zeros_like(rest)] * (1 << n)
    for subset in range(whole - 1, -1, -1):
        mass = _mass(kept, rest, subset)
        ways = [leave[subset | 1 << a] + kept[:, a] - mass for a in range(n) if not subset >> a & 1]
        leave[subset] = torch.stack(ways).logsumexp(0)
    return leave


def _mass(kept: Tensor, rest: Tensor, drawn: int) -> Tensor:
    """log(1 - P(T)): what is left to draw from once T is gone."""
    return torch.stack([rest, *(kept[:, i] for i in range(kept.shape[1]) if not drawn >> i & 1)]).logsumexp(0)


def confidence(n: int, m: int, flip_budget: float) -> float:
    """The C for which logits ``C * m0`` give samples that differ from m0 in this share of groups.

    P(no flip) = prod over i = 1..N of i e^C / (i e^C + M - N), solved by bisection.
    """
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        kept = math.prod(i / (i + (m - n) * math.exp(-middle)) for i in range(1, n + 1))
        low, high = (middle, high) if 1 - kept > flip_budget else (low, middle)
    return (low + high) / 2
