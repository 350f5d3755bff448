"""What is recorded of masks, layer by layer, and when an alarm is raised."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import make_unet

from prunedm import diagnostics, learn, masks, pattern
from prunedm.diagnostics import LossWatch, Watcher
from prunedm.masked_unet import MaskedUNet
from prunedm.stage_recipes import Mask


def watcher(**spec) -> Watcher:
    mask = Mask(**spec)
    masked = MaskedUNet(make_unet().requires_grad_(False), 2, 4, [("mid_block.*", "1:4")])
    return Watcher(masked, learn.METHODS[mask.method](masked, mask, 100, 0), set())


def test_layer_figures_are_those_of_each_layers_own_rows():
    found = watcher(method="reinforce")
    for i, bank in enumerate(found.masked.banks):
        bank.logits = torch.randn(bank.logits.shape, generator=torch.Generator().manual_seed(i))
    found.layers()
    earlier = [mask.clone() for mask in found.previous]
    for bank in found.masked.banks:
        bank.logits[: len(bank.logits) // 2] *= -1
    rows = found.layers()
    at = 0
    for i, bank in enumerate(found.masked.banks):
        chosen = found.learner.choice()[i]
        for layer in bank.layers:
            part = slice(layer.start, layer.stop)
            assert rows["flips"][at] == pytest.approx(pattern.flips(chosen[part], bank.initial[part]), abs=1e-5)
            assert rows["moved"][at] == pytest.approx(pattern.flips(chosen[part], earlier[i][part]), abs=1e-5)
            count = min(layer.stop - layer.start, diagnostics.LOOKED_AT)
            spaced = torch.linspace(layer.start, layer.stop - 1, count).round().long()
            entropy = masks.entropy(bank.logits[spaced], bank.n).mean().item()
            assert rows["entropy"][at] == pytest.approx(entropy, abs=1e-4)
            top = bank.logits[part].softmax(-1).amax(-1).mean().item()
            assert rows["top_probability"][at] == pytest.approx(top, abs=1e-4)
            p = pattern.position_balance(chosen[part])
            even = (-(p * p.clamp(min=1e-12).log2()).sum() / torch.tensor(float(bank.m)).log2()).item()
            assert rows["position_balance"][at] == pytest.approx(even, abs=1e-4)
            assert rows["compliance"][at] == 1.0
            at += 1
    assert at == len(rows["flips"])


def test_figures_over_all_layers_weigh_every_group_alike():
    found = watcher(method="gumbel", flip_budget=0.3)
    with torch.no_grad():
        for bank in found.masked.banks:
            drawn = torch.rand(bank.mask.shape, generator=torch.Generator().manual_seed(0))
            bank.mask.copy_(pattern.keep(drawn, bank.n))
    figures = found.figures()
    assert figures["flips"] == 0
    differ = [pattern.flipped(bank.mask, bank.initial) for bank in found.masked.banks]
    assert figures["sample_flips"] == pytest.approx(torch.cat(differ).double().mean().item())
    assert set(watcher(method="sr-ste", train_weights=True).figures()) == {"flips"}


@pytest.mark.parametrize(
    ("step", "figures", "alarms"),
    [
        (10, {"flips": 0.0, "sample_flips": 0.01}, []),
        (25, {"flips": 0.0, "sample_flips": 0.01}, ["no movement"]),
        (25, {"flips": 0.001, "sample_flips": 0.01}, []),
        (40, {"flips": 0.1, "sample_flips": 0.0}, ["collapse"]),
        (60, {"flips": 0.1, "sample_flips": 0.0}, []),
        (30, {"flips": 0.0, "sample_flips": 0.0}, ["collapse", "no movement"]),
    ],
)
def test_alarms(step, figures, alarms):
    found = watcher(method="gumbel")
    raised = list(found.alerts(step, figures, {"mask.lr": 0.3}))
    assert [alert["what"] for alert in raised] == alarms
    assert all(alert["remedy"] and "mask." in alert["remedy"] for alert in raised)
    for alert in raised:
        higher = alert["what"] == "no movement"
        assert alert["changes"] == {"mask.lr": 0.9 if higher else pytest.approx(found.learner.peak / 3, rel=0.05)}
    assert list(found.alerts(step + 1, figures, {"mask.lr": 0.3})) == [], "each once"


def test_masks_that_follow_the_weights_are_moved_by_the_weights_rate():
    found = watcher(method="sr-ste", train_weights=True)
    (alert,) = found.alerts(25, {"flips": 0.0}, {"train.lr": 1e-3})
    assert "train.lr" in alert["remedy"] and alert["changes"] == {"train.lr": 3e-3}


def test_no_rate_is_raised_past_what_a_recipe_allows():
    (alert,) = watcher(method="gumbel").alerts(25, {"flips": 0.0, "sample_flips": 0.1}, {"mask.lr": 10.0})
    assert alert["changes"] == {}


def test_fixed_masks_raise_no_alarm_for_standing_still():
    assert list(watcher(method="magnitude").alerts(90, {"flips": 0.0}, {})) == []


def alarms(losses, **given) -> list[int]:
    watch = LossWatch(**{"since": 0} | given)
    return [step for step, loss in enumerate(losses, 1) if watch.alarm(step, loss)]


def test_a_loss_that_runs_away_is_an_alarm_once_after_the_warm_up():
    losses = [0.05 * 1.05 ** max(0, step - 100) for step in range(250)]
    (step,) = alarms(losses)
    mean = sum(losses[step - diagnostics.SPAN : step]) / diagnostics.SPAN
    assert mean > 10 * 0.05 and alarms(losses, since=220) == [220]
    watch = LossWatch(0, enumerate(losses[:120], 1))  # a resumed run knows what was lowest
    assert next(s for s, loss in enumerate(losses[120:], 121) if watch.alarm(s, loss)) == step
    assert alarms(losses, raised=True) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_falling_and_a_noisy_loss_are_none(seed):
    draw = random.Random(seed)
    assert alarms([1.5 * 0.97**step + 0.02 for step in range(300)]) == []
    assert alarms([0.05 * draw.lognormvariate(0, 1) for _ in range(2000)]) == []
    assert alarms([0.05] * 100 + [5.0] + [0.05] * 100) == [], "nor is a single spike, which the clipping holds"
    assert alarms([0.05, 50.0] * 9) == [], "nor a stage of a few steps"


def test_the_demos_own_losses_are_none():
    """As the bundled demo recorded them: loss of each step, stage by stage."""
    known = json.loads(Path(__file__).with_name("demo_losses.json").read_text())
    assert set(known) == {"finetune", "mask", "recover"}
    assert [alarms(losses) for losses in known.values()] == [[], [], []]
    assert alarms([*itertools.chain(*known.values()), *[5.0] * 20]), "what runs away after them is one"
