"""The knapsack against brute force, and sensitivities that leave the model as it was."""

import itertools

import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from prunedm import allocate, data, masked_unet, training
from prunedm.allocate import LayerChoice


@st.composite
def problems(draw):
    rows = draw(st.integers(1, 4))
    costs, values = [], []
    for _ in range(rows):
        count = draw(st.integers(1, 4))
        costs.append(draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)))
        values.append([v / 8 for v in draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))])
    return costs, values, draw(st.integers(0, 160))


@settings(deadline=None)
@given(problems())
def test_the_knapsack_is_the_best_of_all_choices(problem):
    costs, values, budget = problem
    every = [
        (sum(v[i] for v, i in zip(values, pick)), sum(c[i] for c, i in zip(costs, pick)))
        for pick in itertools.product(*(range(len(row)) for row in costs))
    ]
    possible = [value for value, cost in every if cost <= budget]
    if not possible:
        with pytest.raises(ValueError, match="more than the budget"):
            allocate.knapsack(costs, values, budget)
        return
    picked = allocate.knapsack(costs, values, budget)
    assert sum(c[i] for c, i in zip(costs, picked)) <= budget
    assert sum(v[i] for v, i in zip(values, picked)) == min(possible)


def test_large_budgets_are_rounded_and_never_exceeded():
    gen = torch.Generator().manual_seed(0)
    sizes = (torch.rand(60, generator=gen) * 1e7).long().tolist()
    costs = [[size, size // 2 + 1, size // 4 + 1] for size in sizes]
    values = [[0.0, *(torch.rand(2, generator=gen).sort().values.tolist())] for _ in sizes]
    budget = sum(sizes) // 2
    picked = allocate.knapsack(costs, values, budget)
    spent = sum(c[i] for c, i in zip(costs, picked))
    assert 0.99 * budget < spent <= budget


def test_the_layers_that_hurt_most_stay_densest():
    choices = [
        LayerChoice("tough", 800, {"dense": 0.0, "2:4": 0.001, "1:8": 0.002}),
        LayerChoice("tender", 800, {"dense": 0.0, "2:4": 0.5, "1:8": 2.0}),
    ]
    record = allocate.choose(choices, 0.6)
    assert [c.chosen for c in choices] == ["1:8", "dense"] and record["kept"] == pytest.approx(0.5625)
    assert allocate.overrides(record) == [("tough", "1:8"), ("tender", "dense")]
    with pytest.raises(ValueError, match=r"mask.density=0.1 cannot be reached.*set mask.density to 0.125 or more"):
        allocate.choose(choices, 0.1)


def test_sensitivity_measures_each_layer_alone_and_restores_it():
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    task = training.Task(DDPMScheduler(), data.Batches(images, 16, 0), 0, torch.device("cpu"), bf16=False)
    unet = make_unet().requires_grad_(False)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    batches = allocate.held_out_batches(task, images, 16, 0)
    seen = list(allocate.sensitivity(unet, "magnitude", [("up_blocks.*", "2:4")], task, batches))
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())
    assert [done for done, _, _ in seen] == list(range(1, seen[-1][1] + 1))
    choices = seen[-1][2]
    assert not any(choice.layer.startswith(("up_blocks", "conv_in")) for choice in choices)
    one = next(choice for choice in choices if choice.layer == "mid_block.resnets.0.conv1")
    assert set(one.increase) == {"dense", *allocate.CANDIDATES}
    masked = masked_unet.MaskedUNet(unet, 1, 4, [("*", "dense"), (one.layer, "1:4")])
    loss = allocate.validation_loss(lambda x, t: masked(x, t).sample, batches)
    masked.undress()
    dense = allocate.validation_loss(lambda x, t: masked(x, t).sample, batches)
    assert one.increase["1:4"] == pytest.approx(loss - dense, abs=1e-7)
