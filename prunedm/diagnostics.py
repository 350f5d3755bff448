"""What can be seen of a loss and of masks while they learn, cheaply, and when to raise an alarm."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import failure, masks, pattern
from .learn import OffsetMasks
from .mask_methods import FixedMasks
from .masked_unet import Bank, MaskedUNet

LOOKED_AT, CHEAP_N = 256, 4  # groups of a layer whose entropy is computed, up to this N
COLLAPSED = 1e-4  # share of groups that a sample still changes
MOVERS = {"sr-ste": "train.lr"}  # the rate that moves the masks of a method without logits
EARLY, MOVED_BY = 0.5, 0.25  # shares of the steps
SPAN, RISEN = 20, 10.0  # steps of a running mean of the loss, and how far above its lowest it is an alarm
RISING = "rising loss"


class LossWatch:
    """Follows the losses of one stage. ``since``: the step at which the rate has warmed up; no alarm comes before.

    earlier: steps and losses from before this process; ``raised``: whether it has given its one alarm already.
    """

    def __init__(self, since: int, earlier: Iterable[tuple[int, float]] = (), raised: bool = False) -> None:
        self.since, self.raised = since, raised
        self.latest: deque[float] = deque(maxlen=SPAN)
        self.lowest = float("inf")
        for step, loss in earlier:
            self.alarm(step, loss)

    def alarm(self, step: int, loss: float) -> str | None:
        """What is wrong once this loss is known, the first time that it is."""
        self.latest.append(loss)
        if len(self.latest) < SPAN:
            return None
        mean = sum(self.latest) / SPAN
        self.lowest = min(self.lowest, mean)
        if self.raised or step < self.since or mean <= RISEN * self.lowest:
            return None
        self.raised = True
        return f"the loss, {mean:.3g} over the last {SPAN} steps, is {mean / self.lowest:.0f} times its lowest so far"


class Watcher:
    """Follows one mask stage. ``raised``: alerts that an earlier process of this run has already given."""

    def __init__(self, masked: MaskedUNet, learner: FixedMasks, raised: set[str]) -> None:
        self.masked, self.learner, self.raised = masked, learner, raised
        self.previous: list[Tensor] | None = None  # the choice at the last snapshot

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Over all layers: entropy of the kept set (bits), mean top probability, flips of the choice against m0,
        and the share of groups in which the sample at hand differs from the choice."""
        chosen, banks, logits = self.learner.choice(), self.masked.banks, self.learner.logits()
        found = {
            "flips": _share(pattern.flipped(mask, bank.initial) for mask, bank in zip(chosen, banks)),
        }
        if logits:
            found["entropy"] = _share(self._entropy(i, values) for i, values in enumerate(logits))
            found["top_probability"] = _share(pattern.probabilities(values).amax(-1) for values in logits)
            found["sample_flips"] = _share(pattern.flipped(mask, bank.mask) for mask, bank in zip(chosen, banks))
        return found

    @torch.no_grad()
    def layers(self) -> dict[str, Any]:
        """Per layer, in the order of the banks: the same figures, flips since the last look, compliance and
        position balance (entropy of the kept positions over log2 M: 1 is even)."""
        chosen, logits = self.learner.choice(), self.learner.logits()
        found: dict[str, list[float]] = {}
        for i, bank in enumerate(self.masked.banks):
            mask, rows = chosen[i], bank.rows()
            columns = {
                "flips": pattern.flipped(mask, bank.initial),
                "compliance": pattern.total(mask.to(torch.int8)) == bank.n,
            }
            if self.previous is not None:
                columns["moved"] = pattern.flipped(mask, self.previous[i])
            if logits:
                of = rows[self._looked_at(i)]
                found.setdefault("entropy", []).extend(_means(self._entropy(i, logits[i]), of, len(bank.layers)))
                columns["top_probability"] = pattern.probabilities(logits[i]).amax(-1)
            for name, values in columns.items():
                found.setdefault(name, []).extend(_means(values, rows, len(bank.layers)))
            found.setdefault("position_balance", []).extend(_evenness(bank, mask, rows))
        self.previous = [mask.clone() for mask in chosen]
        return found

    def _entropy(self, at: int, logits: Tensor) -> Tensor:
        """Entropy of the groups that are looked at: all of them would cost as much as some steps."""
        return masks.entropy(logits[self._looked_at(at)], self.masked.banks[at].n)

    def _looked_at(self, at: int) -> Tensor:
        """Evenly spaced groups of each layer of a bank: the cost of log P doubles with each N."""
        bank = self.masked.banks[at]
        most = max(1, LOOKED_AT >> max(0, bank.n - CHEAP_N))
        spaced = [
            torch.linspace(layer.start, layer.stop - 1, min(layer.stop - layer.start, most)).round().long()
            for layer in bank.layers
        ]
        return torch.cat(spaced).to(bank.mask.device)

    def alerts(self, step: int, figures: dict[str, float], rates: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Alarms that these figures are a reason for, each once: what, text, remedy and ``changes``, fields of the
        recipe to the values to try. ``rates``: the recipe's that move something (:meth:`training.Trainer.rates`).
        """
        for alert in self._alarms(step, figures, rates):
            if alert["what"] not in self.raised:
                self.raised.add(alert["what"])
                yield alert

    def _alarms(self, step: int, figures: dict[str, float], rates: dict[str, float]) -> Iterator[dict[str, Any]]:
        window = self.learner.window
        share = (step - window.first) / max(1, window.last - window.first)
        if not self.learner.learns or self.learner.follows(step - 1) or not 0 < share <= 1:
            return
        draws = "sample_flips" in figures and not isinstance(self.learner, OffsetMasks)
        if draws and share < EARLY and figures["sample_flips"] < COLLAPSED:
            yield {
                "what": "collapse",
                "text": f"the masks have nearly stopped varying at {share:.0%} of their steps "
                f"(a sample changes {figures['sample_flips']:.4%} of the groups)",
                "remedy": "lower mask.lr or raise mask.flip_budget",
                "changes": failure.slower(self.learner.rates),
            }
        if share >= MOVED_BY and figures["flips"] == 0:
            mover = MOVERS.get(self.learner.spec.method, "mask.lr")
            other = " or mask.flip_budget" if draws else ""
            yield {
                "what": "no movement",
                "text": f"no group differs from the initial mask after {share:.0%} of the mask steps",
                "remedy": f"raise {mover}{other}, or give more mask.steps",
                "changes": failure.faster({mover: rates[mover]} if mover in rates else {}),
            }


def _share(per_group: Any) -> float:
    """Mean over the groups of all banks."""
    parts = list(per_group)
    return sum(values.sum().item() for values in parts) / sum(len(values) for values in parts)


def _means(values: Tensor, rows: Tensor, count: int) -> list[float]:
    """Mean of each layer's groups, in one scatter."""
    sums = torch.zeros(count, device=values.device).index_add_(0, rows, values.float())
    return [round(x, 5) for x in (sums / torch.bincount(rows, minlength=count)).tolist()]


def _evenness(bank: Bank, mask: Tensor, rows: Tensor) -> list[float]:
    counts = torch.zeros(len(bank.layers), bank.m, device=mask.device).index_add_(0, rows, mask.float())
    p = (counts / counts.sum(-1, keepdim=True)).cpu()
    bits = -(p * p.clamp(min=1e-12).log2()).sum(-1)
    return [round(x, 5) for x in (bits / torch.tensor(float(bank.m)).log2()).tolist()]
