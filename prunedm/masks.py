"""Stage 2's masks: which N of every M weights stay, as one flat tensor of logits.

One logit per weight, ``[G, M]`` for all groups of all layers, so that sampling, log-probability and
update are a handful of large operations whatever the number of layers. ``p = softmax(logits)`` in each
group; a mask is drawn by taking N of M without replacement (Gumbel top-N), so every sample is exactly
N:M (MaskPro, arXiv 2506.12876; MaskLLM, arXiv 2409.17481, has one logit per *pattern* instead, C(M,N)/M
times as many).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import pattern
from .records import LayerReport

# The first conv, the last conv and the time embedding stay dense by default (METHOD).
EXCLUDED = {
    "conv_in": "first convolution, kept dense",
    "conv_out": "last convolution, kept dense",
    "time_embedding.": "time embedding, kept dense",
}
EXACT_ORDERS = 24  # the set gradient sums over N! orders up to this many


def gumbel(shape: torch.Size, gen: torch.Generator | None, like: Tensor) -> Tensor:
    """Standard Gumbel noise, drawn on the CPU so that every device gets the same."""
    noise = torch.empty(shape).exponential_(generator=gen).log_().neg_()
    return noise.to(like)


def sample_orders(logits: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """N positions of each group without replacement, in the order drawn: ``[G, N]`` indices."""
    return (logits + gumbel(logits.shape, generator, logits)).topk(n, dim=-1).indices


def sample_masks(logits: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """0/1 masks ``[G, M]`` with exactly N ones a group, drawn from the logits (Gumbel top-N)."""
    return pattern.top_n(logits + gumbel(logits.shape, generator, logits), n)


def log_prob(logits: Tensor, mask: Tensor) -> Tensor:
    """log P(S) of the kept set of each group, ``[G]``: exact, summed over all orders of drawing.

    P(S) = sum over the orders of prod p_a / (1 - sum of those already drawn), by recursion over the
    2^N subsets of the kept set rather than over its N! orders.
    """
    n = int(mask[0].sum())
    kept = mask.topk(n, dim=-1).indices.sort(-1).values
    inside = logits.gather(-1, kept)
    rest = logits.masked_fill(mask.bool(), -math.inf).logsumexp(-1)
    # reach[T]: log-probability that the first |T| draws are exactly the subset T of the kept set.
    reach: dict[int, Tensor] = {0: torch.zeros_like(rest)}
    for subset in range(1, 1 << n):
        ways = []
        for a in (i for i in range(n) if subset >> i & 1):
            before = subset ^ (1 << a)
            left = [inside[:, i] for i in range(n) if not before >> i & 1]
            mass = torch.stack([rest, *left]).logsumexp(0)
            ways.append(reach[before] + inside[:, a] - mass)
        reach[subset] = torch.stack(ways).logsumexp(0)
    return reach[(1 << n) - 1]


def score(logits: Tensor, mask: Tensor) -> Tensor:
    """Gradient of :func:`log_prob` in the logits, ``[G, M]``, in closed form (MaskPro, eq. of log P(S)).

    ValueError when N! > 24: use :func:`ordered_score` on the drawn order there.
    """
    n = int(mask[0].sum())
    if math.factorial(n) > EXACT_ORDERS:
        raise ValueError(f"N={n} has {math.factorial(n)} orders; use ordered_score")
    kept = mask.topk(n, dim=-1).indices.sort(-1).values
    log_weights, scores = [], []
    for order in itertools.permutations(range(n)):
        log_weight, gradient = _ordered(logits, kept[:, list(order)])
        log_weights.append(log_weight)
        scores.append(gradient)
    weights = torch.stack(log_weights).softmax(0)  # P(order | set)
    return (weights[..., None] * torch.stack(scores)).sum(0)


def ordered_score(logits: Tensor, order: Tensor) -> Tensor:
    """Gradient of the log-probability of one drawn order ``[G, N]`` (Plackett-Luce), ``[G, M]``."""
    return _ordered(logits, order)[1]


def _ordered(logits: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    remaining, log_weight = logits, torch.zeros_like(logits[:, 0])
    gradient = torch.zeros_like(logits).scatter_(-1, order, 1.0)
    for a in order.unbind(-1):
        q = remaining.softmax(-1)
        gradient = gradient - q
        log_weight = log_weight + q.gather(-1, a[:, None]).squeeze(-1).clamp(min=1e-30).log()
        remaining = remaining.scatter(-1, a[:, None], -math.inf)
    return log_weight, gradient


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


@dataclass(frozen=True)
class MaskedLayer:
    """One masked weight: its parameter name and its rows in the flat tensors."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


class MaskedUNet(nn.Module):
    """A UNet whose eligible weights are multiplied by N:M masks.

    No layer is replaced: forward is ``torch.func.functional_call`` with masked weights, so names, shapes
    and checkpoints stay those of diffusers and baking is one copy.
    """

    def __init__(self, unet: nn.Module, n: int, m: int) -> None:
        """ValueError when no layer is eligible or when two layers share a weight."""
        super().__init__()
        require_eligible(unet, n, m)
        self.unet, self.n, self.m = unet, n, m
        self.reports = layer_reports(unet, m)
        self.layers: list[MaskedLayer] = []
        start = 0
        for report in self.reports:
            if report.eligible:
                stop = start + report.groups
                name = f"{report.layer}.weight"
                self.layers.append(MaskedLayer(name, tuple(report.shape), start, stop))
                start = stop
        initial = pattern.top_n(self.flat_weights().abs(), n)
        self.register_buffer("initial", initial)
        self.register_buffer("logits", torch.zeros_like(initial))

    @property
    def config(self):
        """The UNet's own configuration, so that sampling can treat both alike."""
        return self.unet.config

    @torch.no_grad()
    def flat_weights(self) -> Tensor:
        """All masked weights as groups, ``[G, M]``."""
        return torch.cat([pattern.group(self._weight(layer), self.m) for layer in self.layers])

    def mask(self) -> Tensor:
        """The mask that the logits choose: their top N, ``[G, M]``."""
        return pattern.top_n(self.logits, self.n)

    def masked_weights(self, mask: Tensor) -> dict[str, Tensor]:
        """Parameter name to ``weight * mask``; differentiable in both."""
        return {
            layer.name: self._weight(layer) * pattern.ungroup(mask[layer.start : layer.stop], layer.shape)
            for layer in self.layers
        }

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None):
        """The UNet's output under ``mask`` (default: the top N of the logits)."""
        weights = self.masked_weights(self.mask() if mask is None else mask)
        return torch.func.functional_call(self.unet, weights, (x, t))

    @torch.no_grad()
    def bake(self) -> nn.Module:
        """Write the masks into the UNet's weights and return it."""
        for name, weight in self.masked_weights(self.mask()).items():
            self.unet.get_parameter(name).copy_(weight)
        return self.unet

    def layer_reports(self) -> list[LayerReport]:
        """Per layer: eligibility, and compliance, density and balance of the present weights."""
        rows = {layer.name: layer for layer in self.layers}
        mask = self.mask()
        for report in self.reports:
            layer = rows.get(f"{report.layer}.weight")
            if layer is not None:
                weight = self._weight(layer)
                report.compliance = pattern.compliance(weight, self.n, self.m)
                report.density = pattern.density(weight)
                balance = pattern.position_balance(mask[layer.start : layer.stop])
                report.position_balance = [round(share, 4) for share in balance.tolist()]
        return self.reports

    def _weight(self, layer: MaskedLayer) -> Tensor:
        return self.unet.get_parameter(layer.name)


def layer_reports(unet: nn.Module, m: int) -> list[LayerReport]:
    """Eligibility of every conv and linear weight for groups of M, with the reason in words."""
    reports = []
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        shape = tuple(module.weight.shape)
        excluded = next((why for prefix, why in EXCLUDED.items() if name.startswith(prefix)), None)
        reason = excluded or pattern.ineligible(shape, m) or ""
        groups = 0 if reason else module.weight.numel() // m
        kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        ready = not reason and pattern.tensor_core_ready(shape)
        reports.append(LayerReport(name, kind, list(shape), not reason, reason, groups, ready))
    return reports


def require_eligible(unet: nn.Module, n: int, m: int) -> None:
    """ValueError, in one line, when no layer can be masked or when two layers share a weight."""
    reports = layer_reports(unet, m)
    if not any(report.eligible for report in reports):
        reasons = sorted({report.reason for report in reports})
        raise ValueError(f"mask {n}:{m}: no layer is eligible ({'; '.join(reasons)[:200]}); use a smaller m")
    seen: dict[int, str] = {}
    for name, parameter in unet.named_parameters(remove_duplicate=False):
        other = seen.setdefault(id(parameter), name)
        if other != name:
            raise ValueError(f"{name} and {other} share one weight; masks need a weight for each layer")
