"""Which weights matter: scores ``[G, M]`` for the groups of a masked UNet, by random draw, magnitude, Wanda
or Fisher. The N largest of each group make an initial mask or a baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import giveway, parallel, pattern
from .masked_unet import Bank, MaskedUNet
from .seeds import generator
from .training import Task

CALIBRATION_BATCHES = 8


def weight_scores(masked: MaskedUNet, kind: str, task: Task, batches: int = CALIBRATION_BATCHES) -> list[Tensor]:
    """Scores ``[G, M]``, one a bank, larger for what should stay.

    random: uniform. magnitude: |w|. wanda: |w| times the root mean square of the weight's input channel
    over the calibration batches (arXiv 2306.11695, eq. 1, with the mean in place of the sum; convolutions
    share a channel's norm over kernel positions). fisher: w^2 times the mean of the squared gradient, the
    diagonal of the empirical Fisher information (Theis et al., arXiv 1801.05787), over batches. Calibration
    looks at the *dense* weights; batches are the task's, so the same recipe gives the same scores.

    Raises ValueError for another ``kind``.
    """
    if kind not in SCORES:
        raise ValueError(f"importance {kind!r} is not known; use one of {', '.join(SCORES)}")
    # Calibration must not teach the sampler of timesteps: a resumed run does not calibrate again.
    task = dataclasses.replace(task, timesteps=None, cycle=0)
    masked.undress()
    try:
        return SCORES[kind](masked, task, batches)
    finally:
        masked.wear()


def _random(masked: MaskedUNet, task: Task, batches: int) -> list[Tensor]:
    gen = generator(task.seed, "importance", "random")
    return [torch.rand(bank.weights.shape, generator=gen).to(bank.weights.device) for bank in masked.banks]


def _magnitude(masked: MaskedUNet, task: Task, batches: int) -> list[Tensor]:
    return [bank.weights.detach().abs() for bank in masked.banks]


@torch.no_grad()
def _wanda(masked: MaskedUNet, task: Task, batches: int) -> list[Tensor]:
    squares: dict[str, Tensor] = {}
    share, hooks = 1.0, []

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            # channels are dimension 1 of an image and the last of a sequence
            others = [d for d in range(x.dim()) if d != (1 if isinstance(module, nn.Conv2d) else x.dim() - 1)]
            found = x.square().mean(others)
            found = found if share == 1.0 else found * share
            squares[name] = squares[name] + found if name in squares else found

        return hook

    for bank in masked.banks:
        for layer in bank.layers:
            module = masked.unet.get_submodule(layer.name.removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(watch(layer.name)))
    try:
        for step in giveway.between(range(batches)):
            batch = task.batch("calibration", step)
            share = batch.share
            task.losses(masked.unet, batch)
    finally:
        for hook in hooks:
            hook.remove()
    parallel.sum_(squares.values())
    return [bank.weights.detach().abs() * _spread(bank, squares).sqrt() for bank in masked.banks]


def _spread(bank: Bank, by_layer: dict[str, Tensor]) -> Tensor:
    """One value per input channel and layer, laid out as the bank's weights ``[G, M]``."""
    parts = []
    for layer in bank.layers:
        values = by_layer[layer.name]
        shape = (1, -1, *[1] * (len(layer.shape) - 2))
        parts.append(pattern.group(values.view(shape).expand(layer.shape), bank.m))
    return torch.cat(parts)


def _fisher(masked: MaskedUNet, task: Task, batches: int) -> list[Tensor]:
    masked.require_gradients(True, False)
    squares = [torch.zeros_like(bank.weights) for bank in masked.banks]
    for step in giveway.between(range(batches)):
        masked.zero_grad()
        task.backward(masked.unet, task.batch("calibration", step))
        parallel.sum_(masked.gradients())
        for total, bank in zip(squares, masked.banks):
            total += bank.grad.square()
    masked.require_gradients(False, False)
    return [bank.weights.detach().square() * total / batches for total, bank in zip(squares, masked.banks)]


SCORES: dict[str, Callable[[MaskedUNet, Task, int], list[Tensor]]] = {
    "random": _random,
    "magnitude": _magnitude,
    "wanda": _wanda,
    "fisher": _fisher,
}
