"""N:M groups: identities over any shape, and brute force over all masks."""

import collections
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunedm import pattern
from prunedm.stage_recipes import Pattern


@st.composite
def weights(draw):
    m = draw(st.integers(2, 16))
    shape = [draw(st.integers(1, 5)), m * draw(st.integers(1, 3))]
    if draw(st.booleans()):
        shape += [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    count = torch.tensor(shape).prod().item()
    return torch.arange(1, count + 1, dtype=torch.float32).reshape(shape), m


@given(weights())
def test_ungroup_is_the_inverse_of_group(case):
    weight, m = case
    assert torch.equal(pattern.ungroup(pattern.group(weight, m), weight.shape), weight)


@given(weights())
def test_a_group_stays_in_one_output_channel_and_one_kernel_position(case):
    weight, m = case
    kernel = weight[0, 0].numel()
    channels = weight.shape[1]
    flat = (pattern.group(weight, m) - 1).long()
    output, position = flat // (channels * kernel), flat % kernel
    assert (output == output[:, :1]).all() and (position == position[:, :1]).all()
    inputs = flat // kernel % channels
    assert (inputs.diff(dim=1) == 1).all(), "the members are neighbours along the input channels"


@settings(deadline=None)
@given(weights(), st.data())
def test_magnitude_masks_equal_the_best_of_all_masks(case, data):
    weight, m = case
    n = data.draw(st.integers(1, min(m - 1, 3)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    groups = pattern.group(torch.randn(weight.shape), m)[:6]
    mask = pattern.top_n(groups.abs(), n)
    for row, chosen in zip(groups.abs(), mask):
        best = max(itertools.combinations(range(m), n), key=lambda kept: row[list(kept)].sum().item())
        assert sorted(best) == chosen.nonzero().flatten().tolist()


def test_compliance_counts_groups_with_at_most_n_nonzero():
    weight = torch.tensor([[1.0, 2, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 5]])
    assert pattern.compliance(weight, 2, 4) == 0.75
    assert pattern.compliance(weight, 3, 4) == 1.0
    assert pattern.density(weight) == 6 / 16


def test_flips_and_position_balance():
    a = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 1]])
    assert pattern.flips(b, a) == 0.5
    assert pattern.position_balance(b).tolist() == [0.25, 0.5, 0, 0.25]


def test_entropy_runs_from_certain_to_even():
    assert pattern.entropy(torch.zeros(3, 4)).tolist() == pytest.approx([2.0] * 3, abs=1e-6)
    assert pattern.entropy(torch.tensor([[100.0, 0, 0, 0]])).item() == pytest.approx(0.0, abs=1e-6)


@given(st.integers(2, 16), st.integers(0, 1000))
def test_columnwise_figures_equal_torchs_own(m, seed):
    values = torch.randn(7, m, generator=torch.Generator().manual_seed(seed)) * 5
    assert torch.allclose(pattern.probabilities(values), values.softmax(-1), atol=1e-6)
    assert torch.allclose(pattern.total(values), values.sum(-1), atol=1e-5)
    for n in range(1, m):
        kept = torch.zeros_like(values).scatter_(-1, values.topk(n, dim=-1).indices, 1.0)
        assert torch.equal(pattern.top_n(values, n), kept)


def test_of_equal_scores_the_first_is_kept():
    assert pattern.top_n(torch.zeros(1, 4), 2).tolist() == [[1, 1, 0, 0]]
    assert pattern.top_n(torch.tensor([[0.0, 1, 1, 1]]), 2).tolist() == [[0, 1, 1, 0]]


def test_ineligible_says_why():
    assert pattern.ineligible((8, 6, 3, 3), 4) == "6 input channels are not a multiple of M=4"
    assert pattern.ineligible((8, 1, 3, 3), 4) == "1 input channels are fewer than M=4"
    assert pattern.ineligible((8, 8), 4) is None
    with pytest.raises(ValueError, match="not a multiple of M=4"):
        pattern.group(torch.zeros(2, 6), 4)


def test_tensor_core_rule():
    assert pattern.tensor_core_ready((8, 16, 3, 3))
    assert not pattern.tensor_core_ready((8, 8, 3, 3)) and not pattern.tensor_core_ready((4, 16))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_shares_of_kept_sets_are_those_of_counting_one_by_one(n, m):
    scores = torch.rand(500, m, generator=torch.Generator().manual_seed(0))
    mask = pattern.keep(scores, n)
    names = Pattern(n, m).kept_sets
    counted = collections.Counter("".join("1" if kept else "0" for kept in row) for row in mask.tolist())
    assert pattern.set_shares(mask, n).tolist() == pytest.approx([counted[name] / 500 for name in names])
    assert names[0] == "1" * n + "0" * (m - n) and len(names) == math.comb(m, n)


def test_groups_that_keep_less_are_of_no_set_and_too_many_sets_are_not_counted():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert pattern.set_shares(mask, 2).tolist() == [0.5, 0, 0, 0, 0, 0]
    assert pattern.set_shares(torch.ones(2, 16), 8) is None
