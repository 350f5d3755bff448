"""Sampling, log-probability and score of N:M masks against brute force and autograd; baking."""

import itertools
import math

import pytest
import torch
from conftest import make_unet
from scipy import stats

from prunedm import masks, pattern
from prunedm.masks import MaskedUNet

PATTERNS = [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8)]


def all_masks(n: int, m: int) -> torch.Tensor:
    rows = torch.zeros(math.comb(m, n), m)
    for row, kept in zip(rows, itertools.combinations(range(m), n)):
        row[list(kept)] = 1
    return rows


def brute_force_probability(p: list[float], kept: tuple[int, ...]) -> float:
    total = 0.0
    for order in itertools.permutations(kept):
        product, drawn = 1.0, 0.0
        for a in order:
            product *= p[a] / (1 - drawn)
            drawn += p[a]
        total += product
    return total


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_log_prob_is_the_sum_over_all_orders(n, m):
    torch.manual_seed(n * 100 + m)
    logits = torch.randn(m, dtype=torch.float64)
    p = logits.softmax(-1).tolist()
    every = all_masks(n, m).double()
    found = masks.log_prob(logits.expand(len(every), m), every).exp()
    wanted = [brute_force_probability(p, kept) for kept in itertools.combinations(range(m), n)]
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)
    assert found.sum().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_sampled_frequencies_equal_the_probabilities(n, m):
    torch.manual_seed(1)
    logits, count = torch.randn(m), 20_000
    drawn = masks.sample_masks(logits.expand(count, m), n, torch.Generator().manual_seed(2))
    every = all_masks(n, m)
    expected = masks.log_prob(logits.expand(len(every), m), every).exp() * count
    index = {tuple(row.tolist()): i for i, row in enumerate(every)}
    observed = torch.zeros(len(every))
    for row in drawn:
        observed[index[tuple(row.tolist())]] += 1
    likely = expected >= 5  # the chi-square approximation needs a few counts a cell
    f_obs = [*observed[likely].tolist(), observed[~likely].sum().item()]
    f_exp = [*expected[likely].tolist(), expected[~likely].sum().item()]
    if f_exp[-1] < 1:
        f_obs, f_exp = f_obs[:-1], f_exp[:-1]
    scale = sum(f_obs) / sum(f_exp)
    assert stats.chisquare(f_obs, [e * scale for e in f_exp]).pvalue > 1e-3


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_score_equals_autograd_for_every_set(n, m):
    torch.manual_seed(3)
    every = all_masks(n, m).double()
    logits = torch.randn(m, dtype=torch.float64).expand(len(every), m).clone().requires_grad_(True)
    masks.log_prob(logits, every).sum().backward()
    assert torch.allclose(masks.score(logits.detach(), every), logits.grad, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_score_has_mean_zero(n, m):
    torch.manual_seed(4)
    every = all_masks(n, m).double()
    logits = torch.randn(m, dtype=torch.float64).expand(len(every), m)
    weight = masks.log_prob(logits, every).exp()[:, None]
    assert (weight * masks.score(logits, every)).sum(0).abs().max() < 1e-12


def test_the_ordered_score_is_unbiased_where_the_set_has_too_many_orders():
    with pytest.raises(ValueError, match="120 orders"):
        masks.score(torch.zeros(1, 8), torch.tensor([[1.0] * 5 + [0] * 3]))
    torch.manual_seed(5)
    logits = torch.randn(8).expand(40_000, 8)
    order = masks.sample_orders(logits, 5, torch.Generator().manual_seed(6))
    scores = masks.ordered_score(logits, order)
    standard_error = scores.std(0) / math.sqrt(len(scores))
    assert (scores.mean(0).abs() < 5 * standard_error).all()


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (7, 16)])
def test_confidence_meets_its_flip_budget_exactly(n, m):
    mask = torch.zeros(1, m, dtype=torch.float64)
    mask[0, :n] = 1
    for budget in (0.01, 0.05, 0.3):
        c = masks.confidence(n, m, budget)
        assert 1 - masks.log_prob(c * mask, mask).exp().item() == pytest.approx(budget, rel=1e-6)


def inputs():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_baked_equals_masked_bit_for_bit_and_is_compliant(n, m):
    masked = MaskedUNet(make_unet(), n, m)
    masked.logits = torch.randn(masked.logits.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = masked(*inputs()).sample
        after = masked.bake()(*inputs()).sample
    assert torch.equal(before, after)
    for report in masked.layer_reports():
        if report.eligible:
            assert report.compliance == 1.0 and report.density == pytest.approx(n / m)


def test_layers_left_out_are_untouched():
    dense, masked = make_unet(), MaskedUNet(make_unet(), 2, 4)
    masked.logits = masked.initial
    baked = masked.bake()
    touched = {layer.name for layer in masked.layers}
    for name, parameter in dense.named_parameters():
        if name not in touched:
            assert torch.equal(parameter, baked.get_parameter(name)), name
    reasons = {r.layer: r.reason for r in masked.reports if not r.eligible}
    assert reasons["conv_in"] == "first convolution, kept dense"
    assert set(reasons) == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def test_initial_mask_is_magnitude_in_place():
    masked = MaskedUNet(make_unet(), 2, 4)
    layer = masked.layers[3]
    weight = masked.unet.get_parameter(layer.name).detach()
    kept = pattern.ungroup(masked.initial[layer.start : layer.stop], layer.shape)
    for k, r, s in itertools.product(*(range(d) for d in (weight.shape[0], *weight.shape[2:]))):
        for c in range(0, weight.shape[1], 4):
            values = weight[k, c : c + 4, r, s].abs() if weight.dim() == 4 else weight[k, c : c + 4].abs()
            chosen = kept[k, c : c + 4, r, s] if weight.dim() == 4 else kept[k, c : c + 4]
            assert set(values.argsort()[-2:].tolist()) == set(chosen.nonzero().flatten().tolist())


def test_shared_weights_and_models_without_eligible_layers_are_refused():
    tied = make_unet()
    tied.mid_block.resnets[1].conv1.weight = tied.mid_block.resnets[0].conv1.weight
    with pytest.raises(ValueError, match="share one weight"):
        MaskedUNet(tied, 2, 4)
    odd = make_unet(block_out_channels=(6, 6), norm_num_groups=3, attention_head_dim=3)
    with pytest.raises(ValueError, match="no layer is eligible"):
        MaskedUNet(odd, 8, 16)
