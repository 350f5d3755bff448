"""Which channels matter: what stage 1 ranks channel groups by.

Every method gives each *weight* a saliency, and torch-pruning's group norm makes channel scores of them:
the norm of a channel's slice in each layer of the group, reduced over the layers and normalised. So methods
differ in the saliency alone:

- magnitude: the weight itself (L1 or L2 norm).
- taylor: w dL/dw, L the mean loss over calibration batches at random timesteps (Molchanov et al., arXiv
  1906.10771, eq. 8, per weight and summed as absolute values).
- diff-pruning: the same with the gradients of those timesteps only whose loss exceeds a share of the
  largest (Diff-Pruning, arXiv 2305.10924, sec. 3.3: converged, noisy timesteps bring no information).
- activation: |w| times the root mean square of its input channel (Wanda, arXiv 2306.11695, eq. 1), over
  timesteps by a strategy: mean, max, or weighted towards the early (noisy) or late steps of sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch_pruning as tp
from torch import Tensor, nn

from . import diffusion, giveway, parallel
from .channel_groups import Score
from .data import Batches, to_float
from .diffusion import NoisedBatch
from .seeds import generator
from .stage_recipes import CALIBRATED, Prune
from .training import Task, gradients


@contextmanager
def scoring(unet: nn.Module, spec: Prune, task: Task | None, seed: int) -> Iterator[Score]:
    """The scores of a recipe's method, valid inside; the UNet's weights are as before afterwards.

    task: the images to calibrate on; ValueError when the method needs them and there are none.
    """
    if spec.method == "random":
        names = {module: name for name, module in unet.named_modules()}
        yield lambda group: torch.rand(
            len(group[0].idxs), generator=generator(seed, "channels", names[group[0].dep.target.module])
        )
        return
    norm = spec.norm if spec.method == "magnitude" else 1
    normalizer = {"none": None, "standardize": "standarization"}.get(spec.normalizer, spec.normalizer)
    score = tp.importance.GroupMagnitudeImportance(norm, spec.reduction, normalizer)
    if spec.method == "magnitude":
        yield score
        return
    with _worn(unet, saliencies(unet, spec, task)):
        yield score


def saliencies(unet: nn.Module, spec: Prune, task: Task | None) -> dict[str, Tensor]:
    """Layer name to the saliency of each weight, in the weight's shape, for a method that looks at images."""
    if spec.method not in CALIBRATED:
        raise ValueError(f"method={spec.method} needs no calibration; use one of {', '.join(CALIBRATED)}")
    if task is None:
        raise ValueError(f"prune.method={spec.method} looks at images and none are given; use magnitude")
    images = Batches(task.batches.images, spec.calibration_images, task.seed)
    plain = dataclasses.replace(task, batches=images, timesteps=None, cycle=0, teacher=None, min_snr=None, bf16=False)
    home = next(unet.parameters()).device
    unet.to(task.device)
    try:
        method = {"taylor": _taylor, "diff-pruning": _diff_pruning, "activation": _activation}[spec.method]
        return {name: values.to(home) for name, values in method(unet, plain, spec).items()}
    finally:
        unet.to(home)


def spaced_batches(task: Task, spec: Prune) -> Iterator[NoisedBatch]:
    """The same calibration images and noise at evenly spaced timesteps, the cleanest first."""
    steps = task.scheduler.config.num_train_timesteps
    x0 = to_float(task.batches.images[: spec.calibration_images], task.device)
    noise = torch.randn(x0.shape, generator=generator(task.seed, "prune", "noise")).to(x0)
    for t in giveway.between(torch.linspace(0, steps - 1, spec.calibration_steps).round().long().tolist()):
        ts = torch.full((len(x0),), t, device=x0.device)
        target = diffusion.regression_target(task.scheduler, x0, noise, ts)
        yield task.own(NoisedBatch(task.scheduler.add_noise(x0, noise, ts), ts, target))


def kept_timesteps(losses: list[float], threshold: float) -> list[bool]:
    """Which timesteps Diff-Pruning takes: those whose loss exceeds this share of the largest."""
    largest = max(losses)
    return [loss > threshold * largest for loss in losses]


def _taylor(unet: nn.Module, task: Task, spec: Prune) -> dict[str, Tensor]:
    with _gradients(unet):
        for step in giveway.between(range(spec.calibration_steps)):
            task.backward(unet, task.batch("calibration", step), spec.calibration_steps)
        return _weight_times_gradient(unet)


def _diff_pruning(unet: nn.Module, task: Task, spec: Prune) -> dict[str, Tensor]:
    with torch.no_grad():
        losses = torch.stack([batch.mean(task.losses(unet, batch)) for batch in spaced_batches(task, spec)])
    parallel.sum_([losses])
    kept = kept_timesteps(losses.tolist(), spec.loss_threshold)
    with _gradients(unet):
        for batch, wanted in zip(spaced_batches(task, spec), kept, strict=True):
            if wanted:
                task.backward(unet, batch)
        return _weight_times_gradient(unet)


@torch.no_grad()
def _activation(unet: nn.Module, task: Task, spec: Prune) -> dict[str, Tensor]:
    layers, share = _layers(unet), 1.0
    squares: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, channels = inputs[0].float(), 1 if isinstance(module, nn.Conv2d) else inputs[0].dim() - 1
            found = x.square().mean([d for d in range(x.dim()) if d != channels])
            squares[name].append(found if share == 1.0 else found * share)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    times = []
    try:
        for batch in spaced_batches(task, spec):
            times.append(batch.t[0].item())
            share = batch.share
            task.losses(unet, batch)
    finally:
        for hook in hooks:
            hook.remove()
    weights = time_weights(times, task.scheduler.config.num_train_timesteps, spec.time)
    found = {}
    for name, module in layers.items():
        seen = torch.stack(squares[name])  # [timesteps, input channels]
        parallel.sum_([seen])
        power = seen.amax(0) if weights is None else (weights.to(seen)[:, None] * seen).sum(0)
        found[name] = module.weight.abs() * power.sqrt().view(1, -1, *[1] * (module.weight.dim() - 2))
    return found


def time_weights(times: list[int], steps: int, strategy: str) -> Tensor | None:
    """Weights of the timesteps, summing to 1, ``[K]``; None for the maximum.

    early: in proportion to t + 1 (the noisy steps that sampling begins with); late: to T - t.
    """
    t = torch.tensor(times, dtype=torch.float32)
    found = {"mean": torch.ones_like(t), "early": t + 1, "late": steps - t, "max": None}[strategy]
    return None if found is None else found / found.sum()


def _layers(unet: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


@contextmanager
def _gradients(unet: nn.Module) -> Iterator[None]:
    """Gradients of every parameter, from zero; none are left behind."""
    before = [p.requires_grad for p in unet.parameters()]
    unet.requires_grad_(True).zero_grad(set_to_none=True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, wanted in zip(unet.parameters(), before, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None


def _weight_times_gradient(unet: nn.Module) -> dict[str, Tensor]:
    parallel.sum_(gradients(unet.parameters()))
    return {
        name: torch.zeros_like(m.weight) if m.weight.grad is None else (m.weight * m.weight.grad).detach()
        for name, m in _layers(unet).items()
    }


@contextmanager
def _worn(unet: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The UNet with these tensors in place of its weights, for torch-pruning to take norms of."""
    kept = {name: unet.get_submodule(name).weight.data for name in values}
    try:
        for name, tensor in values.items():
            unet.get_submodule(name).weight.data = tensor
        yield
    finally:
        for name, tensor in kept.items():
            unet.get_submodule(name).weight.data = tensor
