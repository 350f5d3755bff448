"""Sampling, log-probability and score of N:M masks against brute force and autograd."""

import itertools
import math

import pytest
import torch
from scipy import stats

from prunedm import masks, pattern

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


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)])
def test_score_takes_boolean_masks_and_logits_that_require_gradients(n, m):
    logits = torch.randn(5, m, generator=torch.Generator().manual_seed(0))
    mask = masks.sample_masks(logits, n, torch.Generator().manual_seed(1))
    wanted = masks.score(logits, mask)
    found = masks.score(logits.clone().requires_grad_(True), mask.bool())
    assert torch.equal(found, wanted) and not found.requires_grad
    assert pattern.entropy(logits.clone().requires_grad_(True)).requires_grad, "and entropy is differentiable"


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_score_has_mean_zero(n, m):
    torch.manual_seed(4)
    every = all_masks(n, m).double()
    logits = torch.randn(m, dtype=torch.float64).expand(len(every), m)
    weight = masks.log_prob(logits, every).exp()[:, None]
    assert (weight * masks.score(logits, every)).sum(0).abs().max() < 1e-12


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (2, 8), (4, 8), (5, 8)])
def test_the_score_is_exact_where_the_logits_are_nearly_certain(n, m):
    """float32 with logits far apart, as after much learning, against autograd in float64."""
    every = all_masks(n, m)[:20]
    logits = torch.randn(len(every), m, generator=torch.Generator().manual_seed(7)) * 6
    exact = logits.double().requires_grad_(True)
    masks.log_prob(exact, every.double()).sum().backward()
    assert torch.allclose(masks.score(logits, every).double(), exact.grad, atol=1e-4)


def test_the_ordered_score_is_unbiased_where_the_set_has_too_many_orders():
    """N = 5: zero in the mean, and the mean over the orders of one set is that set's own gradient."""
    torch.manual_seed(5)
    logits = torch.randn(8).expand(60_000, 8)
    u = masks.uniform(logits.shape, torch.Generator().manual_seed(6), logits)
    order = masks.keys(logits, u).topk(5, dim=-1).indices
    scores = masks.ordered_score(logits, order)
    standard_error = scores.std(0) / math.sqrt(len(scores))
    assert (scores.mean(0).abs() < 5 * standard_error).all()
    drawn = torch.zeros_like(logits).scatter_(-1, order, 1.0)
    favourite = drawn.unique(dim=0, return_counts=True)
    chosen = favourite[0][favourite[1].argmax()]
    same = scores[(drawn == chosen).all(-1)]
    wanted = masks.score(logits[:1].double(), chosen[None].double())[0]
    assert len(same) > 500
    assert ((same.mean(0) - wanted).abs() < 5 * same.std(0) / math.sqrt(len(same)) + 1e-6).all()


@pytest.mark.parametrize(("n", "m"), [pair for pair in PATTERNS if math.comb(*pair[::-1]) <= masks.ENUMERATED])
def test_the_entropy_of_the_kept_set_against_brute_force(n, m):
    torch.manual_seed(n)
    logits = torch.randn(3, m, dtype=torch.float64)
    for row, found in zip(logits, masks.entropy(logits, n)):
        p = [brute_force_probability(row.softmax(-1).tolist(), s) for s in itertools.combinations(range(m), n)]
        assert found.item() == pytest.approx(-sum(x * math.log2(x) for x in p), abs=1e-9)
    even = masks.entropy(torch.zeros(1, m, dtype=torch.float64), n).item()
    assert even == pytest.approx(math.log2(math.comb(m, n)), abs=1e-9)


def test_the_entropy_of_many_sets_is_estimated_without_bias(monkeypatch):
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(4)).expand(20_000, 8)
    found = masks.entropy(logits, 4)
    monkeypatch.setattr(masks, "ENUMERATED", 70)
    wanted = masks.entropy(logits[:1], 4).item()
    assert abs(found.mean().item() - wanted) < 5 * found.std().item() / math.sqrt(len(found))


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (7, 16)])
def test_confidence_meets_its_flip_budget_exactly(n, m):
    mask = torch.zeros(1, m, dtype=torch.float64)
    mask[0, :n] = 1
    for budget in (0.01, 0.05, 0.3):
        c = masks.confidence(n, m, budget)
        assert 1 - masks.log_prob(c * mask, mask).exp().item() == pytest.approx(budget, rel=1e-6)
