"""Trainers: the estimators move towards better masks, and every state round-trips."""

import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler

from prunedm import data, diffusion, learn, pattern
from prunedm.masks import MaskedUNet
from prunedm.recipe import Mask
from prunedm.seeds import generator


@pytest.fixture
def task():
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return learn.Task(DDPMScheduler(), data.Batches(images, 16, 0), 0, torch.device("cpu"), bf16=False)


def masked_unet():
    unet = make_unet()
    unet.requires_grad_(False)
    return MaskedUNet(unet, 2, 4)


def test_finetuning_is_adamw_with_clipping_and_a_cosine_rate(task):
    """Three steps against the plain loop of a textbook."""
    ours, plain = make_unet(), make_unet()
    trainer = learn.Trainer("finetune", 3, task, learn.DenseLoss(ours), learn.Weights(ours, 1e-3, 0.9, 3))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for step, record in enumerate(trainer):
        optimizer.param_groups[0]["lr"] = learn.cosine_rate(1e-3, step, 3)
        optimizer.zero_grad()
        loss = diffusion.loss(lambda x, t: plain(x, t).sample, task.batch("finetune", step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert record.values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_average_follows_the_weights():
    unet = make_unet()
    weights = learn.Weights(unet, 1e-3, 0.5, 10)
    start = [p.detach().clone() for p in unet.parameters()]
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights.update(0)
    moved = [p.detach().clone() for p in unet.parameters()]
    weights.use_average()
    decay = weights.ema.cur_decay_value
    for s, m, p in zip(start, moved, unet.parameters()):
        assert torch.allclose(p, decay * s + (1 - decay) * m, atol=1e-6)


def test_the_rate_warms_up_and_ends_at_zero():
    rates = [learn.cosine_rate(1.0, step, 100) for step in range(101)]
    assert rates[0] < rates[4] == max(rates) == 1.0 and rates[100] == pytest.approx(0, abs=1e-12)


def test_gumbel_lowers_the_loss_of_the_initial_mask(task):
    masked = masked_unet()
    masked.initial = pattern.top_n(torch.rand(masked.initial.shape, generator=generator(0, "bad")), 2)
    learner = learn.GumbelMasks(masked, Mask(method="gumbel", lr=0.3, flip_budget=0.3), 40, 0)
    batches = [task.batch("check", step) for step in range(4)]

    def loss(mask):
        with torch.no_grad():
            return sum(diffusion.loss(lambda x, t: masked(x, t, mask).sample, b).item() for b in batches)

    before = loss(masked.initial)
    for _ in learn.Trainer("mask", 40, task, learner, None):
        pass
    assert loss(masked.mask()) < before
    assert pattern.flips(masked.mask(), masked.initial) > 0.01
    assert (masked.mask().sum(-1) == 2).all()


def test_frozen_weights_stay_bitwise(task):
    masked = masked_unet()
    before = {k: v.clone() for k, v in masked.unet.state_dict().items()}
    for method in learn.LEARNERS:
        learner = learn.LEARNERS[method](masked, Mask(method=method), 3, 0)
        for _ in learn.Trainer("mask", 3, task, learner, None):
            pass
        masked.logits = masked.logits.detach()
    assert all(torch.equal(before[k], v) for k, v in masked.unet.state_dict().items())


def test_reinforce_pushes_away_from_a_worse_sample_and_towards_a_better_one(task, monkeypatch):
    """With a made-up loss that counts kept weights on position 0, those logits must rise."""
    masked = masked_unet()
    learner = learn.ReinforceMasks(masked, Mask(method="reinforce", lr=1.0, flip_budget=0.9), 1, 0)
    masked.logits = torch.zeros_like(masked.logits)

    def counted(batch, mask):
        return -mask[:50, 0].mean().expand(len(batch.t)) * 10

    monkeypatch.setattr(learner, "_loss", counted)
    for _ in learn.Trainer("mask", 300, task, learner, None):
        pass
    kept = masked.logits.softmax(-1)[:50, 0].mean().item()
    others = masked.logits.softmax(-1)[50:, 0].mean().item()
    assert kept > others + 0.1, (kept, others)


def test_the_reference_is_refreshed_once_samples_are_better(task):
    masked = masked_unet()
    learner = learn.ReinforceMasks(masked, Mask(method="reinforce"), 1, 0)
    masked.logits = torch.randn(masked.logits.shape, generator=torch.Generator().manual_seed(1))
    learner.tracker -= 0.1
    learner.since += learn.REFRESH_AFTER
    learner._refresh()
    assert torch.equal(learner.reference, masked.mask()) and learner.tracker.abs().sum() == 0
    assert not torch.equal(learner.reference, masked.initial), "flips go on being counted from the first mask"


def test_without_normalising_the_advantage_is_the_papers(task):
    learner = learn.ReinforceMasks(masked_unet(), Mask(method="reinforce", normalize_advantage=False), 1, 0)
    residual, t = torch.tensor([0.2, 0.4]), torch.tensor([0, 999])
    learner.tracker[0] = 0.1
    assert learner._advantage(residual, t, 1000) == pytest.approx((0.2 - 0.1 + 0.4) / 2)
    assert learner.tracker[0].item() == pytest.approx(0.1 + 0.01 * 0.1)
    assert learner.tracker[9].item() == pytest.approx(0.01 * 0.4)


@pytest.mark.parametrize("method", [*learn.LEARNERS])
def test_a_trainer_round_trips_at_any_step(task, method):
    def fresh():
        masked = MaskedUNet(make_unet(), 2, 4)
        weights = learn.Weights(masked.unet, 1e-3, 0.9, 6)
        return learn.Trainer("mask", 6, task, learn.LEARNERS[method](masked, Mask(method=method), 6, 0), weights)

    whole, first, second = fresh(), fresh(), fresh()
    for _ in whole:
        pass
    for record in first:
        if record.step == 3:
            break
    second.load({k: v.detach().clone() for k, v in first.tensors().items()}, first.done)
    for _ in second:
        pass
    a, b = whole.tensors(), second.tensors()
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_loss_or_gradient_that_is_no_number_stops_at_once(task, monkeypatch):
    unet = make_unet()
    weights = learn.Weights(unet, 1e-3, 0.9, 3)
    monkeypatch.setattr(weights, "update", lambda step: {"lr": 0.0, "grad_norm": float("inf")})
    with pytest.raises(learn.Diverged, match="gradient norm became inf at step 1 of finetune"):
        list(learn.Trainer("finetune", 3, task, learn.DenseLoss(unet), weights))
