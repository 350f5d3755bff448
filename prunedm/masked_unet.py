"""A UNet that wears N:M masks, and which of its layers may."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import pattern
from .records import LayerReport
from .stage_recipes import Pattern, parse_pattern

# The first conv, the last conv and the time embedding stay dense by default (METHOD).
EXCLUDED = {
    "conv_in": "first convolution, kept dense",
    "conv_out": "last convolution, kept dense",
    "time_embedding.": "time embedding, kept dense",
}

# Gradients of masked weights gather in the layout of the groups, at no cost that could be measured.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

Overrides = Sequence[tuple[str, str]]  # (name pattern, "N:M" or "dense"); the last that matches wins


@dataclass(frozen=True)
class MaskedLayer:
    """One masked weight: its parameter name and its rows in the flat tensors of its pattern."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass
class Bank:
    """All layers of one pattern as flat tensors ``[G, M]``.

    weights: the dense weights. grad: the loss's gradient in the *masked* weights, into which backward
    writes directly. mask: what the UNet wears, boolean. initial: m0, boolean.
    """

    pattern: Pattern
    layers: list[MaskedLayer]
    weights: Tensor
    initial: Tensor
    mask: Tensor
    grad: Tensor | None = None
    logits: Tensor | None = None
    targets: list[Tensor] = field(default_factory=list)  # the UNet's parameters ...
    sources: list[Tensor] = field(default_factory=list)  # ... and the same weights and masks here, as views
    covers: list[Tensor] = field(default_factory=list)

    @property
    def n(self) -> int:
        return self.pattern.n

    @property
    def m(self) -> int:
        return self.pattern.m

    def rows(self) -> Tensor:
        """The layer that each group belongs to, ``[G]``."""
        counts = torch.tensor([layer.stop - layer.start for layer in self.layers], device=self.mask.device)
        return torch.repeat_interleave(torch.arange(len(self.layers), device=self.mask.device), counts)


class MaskedUNet:
    """A UNet whose eligible weights are multiplied by N:M masks.

    No layer is replaced: the UNet's own parameters hold ``weight * mask`` and the dense weights live in
    the banks. :meth:`wear` writes all masked weights in two (foreach) operations a pattern, and the
    parameters' ``.grad`` are views of the banks' ``grad``, so a step dispatches the same few operations for
    any number of layers. Names, shapes and checkpoints stay those of diffusers; baking is wearing the last mask.
    """

    def __init__(self, unet: nn.Module, n: int, m: int, overrides: Overrides = ()) -> None:
        """Masks start as magnitude's. ValueError when no layer is eligible or two layers share a weight.

        Put the UNet on its device first: the banks live where its weights are.
        """
        require_eligible(unet, n, m, overrides)
        self.unet = unet
        self.reports = layer_reports(unet, n, m, overrides)
        wanted: dict[Pattern, list[LayerReport]] = {}
        for report in self.reports:
            if report.eligible:
                wanted.setdefault(parse_pattern(report.pattern), []).append(report)
        self.banks = [self._bank(*item) for item in wanted.items()]
        self.set_initial([bank.weights.abs() for bank in self.banks])

    def __call__(self, x: Tensor, t: Tensor):
        """The UNet's output under the masks that it wears."""
        return self.unet(x, t)

    @torch.no_grad()
    def _bank(self, wanted: Pattern, reports: list[LayerReport]) -> Bank:
        layers, start = [], 0
        for report in reports:
            layers.append(MaskedLayer(f"{report.layer}.weight", tuple(report.shape), start, start + report.groups))
            start += report.groups
        parameters = [self.unet.get_parameter(layer.name) for layer in layers]
        weights = torch.cat([pattern.group(p.detach(), wanted.m) for p in parameters])
        mask = torch.ones_like(weights, dtype=torch.bool)
        bank = Bank(wanted, layers, weights, mask.clone(), mask)
        bank.targets = [p.detach() for p in parameters]
        bank.sources, bank.covers = self._views(bank, weights), self._views(bank, mask)
        return bank

    def _views(self, bank: Bank, flat: Tensor) -> list[Tensor]:
        return [pattern.unfold(flat[layer.start : layer.stop], layer.shape) for layer in bank.layers]

    def set_initial(self, scores: list[Tensor]) -> None:
        """Take the top N of these scores, one ``[G, M]`` a bank, as m0 and wear it."""
        for bank, values in zip(self.banks, scores):
            bank.initial = pattern.keep(values, bank.n)
            bank.mask.copy_(bank.initial)
        self.wear()

    @torch.no_grad()
    def wear(self, masks: list[Tensor] | None = None) -> None:
        """Write ``weight * mask`` into the UNet (default: the present masks and maybe newer weights)."""
        for i, bank in enumerate(self.banks):
            if masks is not None:
                bank.mask.copy_(masks[i])
            torch._foreach_copy_(bank.targets, bank.sources)
            torch._foreach_mul_(bank.targets, bank.covers)

    @torch.no_grad()
    def undress(self) -> None:
        """Write the dense weights into the UNet; the masks stay known."""
        for bank in self.banks:
            torch._foreach_copy_(bank.targets, bank.sources)

    def require_gradients(self, masked: bool, others: bool) -> None:
        """Which parameters backward serves; gradients of masked weights gather in ``Bank.grad``."""
        inside = {layer.name for bank in self.banks for layer in bank.layers}
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(masked if name in inside else others)
            parameter.grad = None
        for bank in self.banks:
            bank.grad = torch.zeros_like(bank.weights) if masked else None
            bank.weights.grad = None
            if masked:
                for layer, view in zip(bank.layers, self._views(bank, bank.grad)):
                    self.unet.get_parameter(layer.name).grad = view

    def zero_grad(self) -> None:
        """Empty the banks' gradients, and show them to an optimiser of the weights again."""
        for bank in self.banks:
            bank.weights.grad = bank.grad.zero_()

    def gradients(self) -> Iterator[Tensor]:
        """Those that are there: of the masked weights, a tensor a bank, and of the UNet's other parameters."""
        inside = {layer.name for bank in self.banks for layer in bank.layers}
        yield from (bank.grad for bank in self.banks if bank.grad is not None)
        others = (p.grad for name, p in self.unet.named_parameters() if name not in inside)
        yield from (grad for grad in others if grad is not None)

    def trainable(self) -> list[Tensor]:
        """The tensors that an optimiser of the weights moves: the UNet's other parameters and the banks."""
        inside = {layer.name for bank in self.banks for layer in bank.layers}
        others = [p for name, p in self.unet.named_parameters() if name not in inside]
        return others + [bank.weights.requires_grad_(True) for bank in self.banks]

    def masks(self) -> list[Tensor]:
        """A copy of the present masks, boolean ``[G, M]`` a bank."""
        return [bank.mask.clone() for bank in self.banks]

    def layer_masks(self) -> dict[str, Tensor]:
        """Layer name to its boolean mask in the weight's own shape."""
        return {
            layer.name.removesuffix(".weight"): view.contiguous()
            for bank in self.banks
            for layer, view in zip(bank.layers, bank.covers)
        }

    def set_layer_masks(self, given: dict[str, Tensor]) -> None:
        """Take m0 layer by layer. ValueError names a layer that is missing or that does not fit."""
        found = []
        for bank in self.banks:
            parts = []
            for layer in bank.layers:
                mask = given.get(layer.name.removesuffix(".weight"))
                if mask is None or tuple(mask.shape) != layer.shape:
                    why = "is not there" if mask is None else f"has the shape {tuple(mask.shape)}"
                    raise ValueError(f"mask of {layer.name} {why}, the model needs {layer.shape}; use the same model")
                groups = pattern.group(mask.to(bank.mask.device), bank.m)
                if not (groups.sum(-1) == bank.n).all():
                    raise ValueError(f"mask of {layer.name} is not {bank.pattern}; set mask.n and mask.m to its own")
                parts.append(groups)
            found.append(torch.cat(parts).float())
        self.set_initial(found)

    def bake(self) -> nn.Module:
        """The UNet with the present masks written into its weights."""
        self.wear()
        return self.unet

    def layer_reports(self) -> list[LayerReport]:
        """Per layer: eligibility, and compliance, density and balance of the present weights and masks."""
        rows = {layer.name: (bank, layer) for bank in self.banks for layer in bank.layers}
        for report in self.reports:
            bank, layer = rows.get(f"{report.layer}.weight", (None, None))
            if bank is not None:
                weight = self.unet.get_parameter(layer.name).detach()
                report.compliance = pattern.compliance(weight, bank.n, bank.m)
                report.density = pattern.density(weight)
                mask = bank.mask[layer.start : layer.stop]
                report.position_balance = [round(share, 4) for share in pattern.position_balance(mask).tolist()]
                shares = pattern.set_shares(mask, bank.n)
                report.pattern_shares = None if shares is None else [round(share, 4) for share in shares.tolist()]
        return self.reports


def layer_reports(unet: nn.Module, n: int, m: int, overrides: Overrides = ()) -> list[LayerReport]:
    """Pattern and eligibility of every conv and linear weight, with the reason in words.

    ``overrides`` name layers by shell patterns (``up_blocks.*``) and give each a pattern or ``dense``.
    """
    reports = []
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        shape = tuple(module.weight.shape)
        chosen, reason = _choose(name, Pattern(n, m), overrides)
        reason = reason or pattern.ineligible(shape, chosen.m) or ""
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not reason:
            reason = "grouped convolution: its input channels are not shared"
        groups = 0 if reason else module.weight.numel() // chosen.m
        kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        ready = not reason and chosen == (2, 4) and pattern.tensor_core_ready(shape)
        label = "dense" if reason else str(chosen)
        reports.append(LayerReport(name, kind, list(shape), not reason, reason, groups, ready, pattern=label))
    return reports


def _choose(name: str, default: Pattern, overrides: Overrides) -> tuple[Pattern, str]:
    """(pattern, reason to stay dense) of one layer."""
    given = override(name, overrides)
    if given is None:
        return default, next((why for prefix, why in EXCLUDED.items() if name.startswith(prefix)), "")
    found = parse_pattern(given)
    return (default, "kept dense by the recipe or the allocation") if found is None else (found, "")


def override(name: str, overrides: Overrides) -> str | None:
    """What the overrides say of a layer, if anything."""
    return next((text for match, text in reversed(overrides) if fnmatch.fnmatchcase(name, match)), None)


def require_eligible(unet: nn.Module, n: int, m: int, overrides: Overrides = ()) -> None:
    """ValueError, in one line, when no layer can be masked, two layers share a weight or a name matches none."""
    reports = layer_reports(unet, n, m, overrides)
    for match, _ in overrides:
        if not any(fnmatch.fnmatchcase(report.layer, match) for report in reports):
            example = reports[-1].layer if reports else "mid_block.*"
            raise ValueError(f"mask.layers: {match!r} matches no layer; names look like {example}")
    if not any(report.eligible for report in reports):
        reasons = sorted({report.reason for report in reports})
        raise ValueError(f"mask {n}:{m}: no layer is eligible ({'; '.join(reasons)[:200]}); use a smaller m")
    seen: dict[int, str] = {}
    for name, parameter in unet.named_parameters(remove_duplicate=False):
        other = seen.setdefault(id(parameter), name)
        if other != name:
            raise ValueError(f"{name} and {other} share one weight; masks need a weight for each layer")
