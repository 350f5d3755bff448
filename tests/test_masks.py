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
    order = masks.sample_orders(logits, 5, torch.Generator().manual_seed(6))
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


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (7, 16)])
def test_confidence_meets_its_flip_budget_exactly(n, m):
    mask = torch.zeros(1, m, dtype=torch.float64)
    mask[0, :n] = 1
    for budget in (0.01, 0.05, 0.3):
        c = masks.confidence(n, m, budget)
        assert 1 - masks.log_prob(c * mask, mask).exp().item() == pytest.approx(budget, rel=1e-6)


def inputs():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


def random_masks(masked: MaskedUNet, seed: int = 1) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [pattern.keep(torch.rand(bank.weights.shape, generator=gen), bank.n) for bank in masked.banks]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 16)])
def test_the_masked_unet_is_functional_call_with_masked_weights_bit_for_bit(n, m):
    dense, masked = make_unet(), MaskedUNet(make_unet(), n, m)
    chosen = random_masks(masked)
    masked.wear(chosen)
    weights = dict(dense.named_parameters())
    changed = {
        layer.name: weights[layer.name] * pattern.ungroup(chosen[0][layer.start : layer.stop], layer.shape)
        for layer in masked.banks[0].layers
    }
    with torch.no_grad():
        wanted = torch.func.functional_call(dense, changed, inputs()).sample
        assert torch.equal(masked(*inputs()).sample, wanted)
        assert torch.equal(masked.bake()(*inputs()).sample, wanted), "baked equals masked"
    for report in masked.layer_reports():
        if report.eligible:
            assert report.compliance == 1.0 and report.density == pytest.approx(n / m)
    masked.undress()
    assert all(torch.equal(p, weights[name]) for name, p in masked.unet.named_parameters())


def test_gradients_of_the_masked_weights_gather_in_the_banks():
    """Against autograd through weight * mask; two patterns at once."""
    overrides = [("mid_block.*", "1:4"), ("up_blocks.*", "4:8")]
    masked, dense = MaskedUNet(make_unet(), 2, 4, overrides), make_unet()
    masked.wear(random_masks(masked))
    leaves = {name: mask.float() for name, mask in masked.layer_masks().items()}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    changed = {f"{name}.weight": dense.get_parameter(f"{name}.weight") * leaf for name, leaf in leaves.items()}
    torch.func.functional_call(dense, changed, inputs()).sample.square().mean().backward()
    masked.require_gradients(True, True)
    masked.zero_grad()
    masked(*inputs()).sample.square().mean().backward()
    for bank in masked.banks:
        for layer in bank.layers:
            wanted = leaves[layer.name.removesuffix(".weight")].grad
            found = bank.grad[layer.start : layer.stop] * bank.weights[layer.start : layer.stop]
            assert torch.allclose(pattern.ungroup(found, layer.shape), wanted, atol=1e-7), layer.name
    assert torch.allclose(masked.unet.conv_in.weight.grad, dense.conv_in.weight.grad, atol=1e-7)


def test_layers_left_out_are_untouched():
    dense, masked = make_unet(), MaskedUNet(make_unet(), 2, 4)
    baked = masked.bake()
    touched = {layer.name for bank in masked.banks for layer in bank.layers}
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, baked.get_parameter(name)) == (name not in touched), name
    reasons = {r.layer: r.reason for r in masked.reports if not r.eligible}
    assert reasons["conv_in"] == "first convolution, kept dense"
    assert set(reasons) == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def test_initial_mask_is_magnitude_in_place():
    """Element for element against a loop over the groups of a conv and a linear layer."""
    weights, masked = make_unet(), MaskedUNet(make_unet(), 2, 4)
    chosen = masked.layer_masks()
    for name in ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.to_q"):
        weight, kept = weights.get_parameter(f"{name}.weight").detach(), chosen[name]
        for k, *rs in itertools.product(*(range(d) for d in (weight.shape[0], *weight.shape[2:]))):
            for c in range(0, weight.shape[1], 4):
                at = (k, slice(c, c + 4), *rs)
                assert set(weight[at].abs().argsort()[-2:].tolist()) == set(kept[at].nonzero().flatten().tolist())


def test_patterns_of_single_layers_and_the_last_match_wins():
    overrides = [("up_blocks.*", "1:4"), ("up_blocks.1.*", "dense"), ("conv_in", "dense"), ("mid_block.*", "2:8")]
    masked = MaskedUNet(make_unet(), 2, 4, overrides)
    assert sorted(str(bank.pattern) for bank in masked.banks) == ["1:4", "2:4", "2:8"]
    for report in masked.reports:
        block = report.layer.split(".")[0]
        if report.layer.startswith("up_blocks.1."):
            assert not report.eligible and "kept dense by the recipe" in report.reason
        elif block == "up_blocks":
            assert report.pattern == "1:4"
        elif block == "mid_block":
            assert report.pattern == "2:8" or "multiple of M=8" in report.reason
    excluded = MaskedUNet(make_unet(), 2, 4, [("conv_out", "2:4")])
    assert next(r for r in excluded.reports if r.layer == "conv_out").eligible, "an override can mask what is excluded"
    with pytest.raises(ValueError, match=r"'upblocks.\*' matches no layer; names look like"):
        MaskedUNet(make_unet(), 2, 4, [("upblocks.*", "1:4")])


def test_masks_of_another_model_or_pattern_are_refused():
    masked = MaskedUNet(make_unet(), 2, 4)
    given = masked.layer_masks()
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"{name}.weight is not there"):
        masked.set_layer_masks({k: v for k, v in given.items() if k != name})
    with pytest.raises(ValueError, match="is not 1:4"):
        MaskedUNet(make_unet(), 1, 4).set_layer_masks(given)
    masked.wear(random_masks(masked))
    masked.set_layer_masks(given)
    assert all(torch.equal(v, given[k]) for k, v in masked.layer_masks().items())


def test_shared_weights_and_models_without_eligible_layers_are_refused():
    tied = make_unet()
    tied.mid_block.resnets[1].conv1.weight = tied.mid_block.resnets[0].conv1.weight
    with pytest.raises(ValueError, match="share one weight"):
        MaskedUNet(tied, 2, 4)
    odd = make_unet(block_out_channels=(6, 6), norm_num_groups=3, attention_head_dim=3)
    with pytest.raises(ValueError, match="no layer is eligible"):
        MaskedUNet(odd, 8, 16)
