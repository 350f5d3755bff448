"""Stage 1: targets met, shapes predicted, function kept, saved and loaded without loss."""

import copy
import math

import pytest
import torch
from conftest import make_unet

from prunedm import masked_unet, structured
from prunedm import unet as unets
from prunedm.structured import TOLERANCE


def call(unet, seed=0):
    channels, height, width = unets.image_shape(unet)
    x = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700])).sample


@pytest.fixture(scope="module")
def bundled():
    return unets.load("bundled")


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("target", [0.2, 0.4, 0.6, 0.8])
def test_the_bundled_model_meets_its_target_and_keeps_its_constraints(bundled, method, target):
    unet = copy.deepcopy(bundled.unet)
    report = structured.prune(unet, method, target, 4, seed=0)
    assert abs(report.reduction - target) <= TOLERANCE and report.reason == ""
    assert report.parameters_after == unets.parameters(unet)
    assert call(unet).isfinite().all()
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert module.num_channels % module.num_groups == 0
    eligible = {r.layer for r in masked_unet.layer_reports(unet, 2, 4) if r.eligible}
    assert eligible == {r.layer for r in masked_unet.layer_reports(bundled.unet, 2, 4) if r.eligible}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_head_dim": None},
        {"resnet_time_scale_shift": "scale_shift"},
        {"layers_per_block": 2, "block_out_channels": (16, 32, 32),
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
         "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D")},
    ],
)  # fmt: skip
def test_the_predicted_parameters_are_the_true_ones(changes):
    unet = make_unet(**changes)
    before = unets.parameters(unet)
    _, groups = structured.channel_groups(unet, "magnitude", 4, seed=0)
    widths = structured.choose_widths(groups, before, 0.4)
    predicted = before - structured.removed_parameters(groups, widths)
    report = structured.prune(unet, "magnitude", 0.4, 4, seed=0)
    assert report.parameters_after == predicted < before
    assert call(unet).isfinite().all()


def test_an_unreachable_target_says_why():
    report = structured.prune(make_unet(), "magnitude", 0.9, 16, seed=0)
    assert report.reduction < 0.9 - TOLERANCE
    assert "at most" in report.reason


def test_the_least_important_channels_go_and_groups_of_groupnorm_stay_equal():
    unet = make_unet()
    _, groups = structured.channel_groups(unet, "magnitude", 4, seed=0)
    group = next(g for g in groups if g.layer == "mid_block.resnets.0.conv1")
    assert group.blocks == 4 and group.width == 32
    dropped = group.dropped(16)
    for block in range(4):
        members = set(range(block * 8, block * 8 + 8))
        gone = members & set(dropped)
        assert len(gone) == 4
        assert group.scores[sorted(gone)].max() <= group.scores[sorted(members - gone)].min()


def test_pruned_equals_a_network_cut_by_hand():
    """Cut one group by hand with plain indexing: the same outputs as torch-pruning's cut."""
    unet, by_hand = make_unet(), make_unet()
    graph, groups = structured.channel_groups(unet, "magnitude", 4, seed=0)
    group = next(g for g in groups if g.layer == "mid_block.resnets.0.conv1")
    dropped = group.dropped(16)
    graph.get_pruning_group(group.root, group.prune_fn, dropped).prune()
    unets.sync_attributes(unet)
    keep = [i for i in range(32) if i not in dropped]
    resnet = by_hand.mid_block.resnets[0]
    for layer in (resnet.conv1, resnet.time_emb_proj, resnet.norm2):
        layer.weight = torch.nn.Parameter(layer.weight[keep])
        layer.bias = torch.nn.Parameter(layer.bias[keep])
    resnet.conv2.weight = torch.nn.Parameter(resnet.conv2.weight[:, keep])
    unets.sync_attributes(by_hand)
    assert torch.allclose(call(unet), call(by_hand), atol=1e-6)


def test_single_head_attention_keeps_its_scale():
    """Channels of q and k that are zero change nothing when they go, if the scale is put right."""
    unet = make_unet(attention_head_dim=None)
    attention = unet.mid_block.attentions[0]
    gone = list(range(0, 32, 2))
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            layer.weight[gone] = 0
            layer.bias[gone] = 0
    before = call(unet)
    graph, groups = structured.channel_groups(unet, "magnitude", 4, seed=0)
    group = next(g for g in groups if g.layer == "mid_block.attentions.0.to_v")
    assert sorted(group.dropped(16)) == gone
    graph.get_pruning_group(group.root, group.prune_fn, group.dropped(16)).prune()
    unets.sync_attributes(unet)
    assert not torch.allclose(call(unet), before, atol=1e-4), "the scale matters"
    structured._keep_attention_scale(attention, 32)
    assert torch.allclose(call(unet), before, atol=1e-5)


def test_heads_go_whole(bundled):
    unet = copy.deepcopy(bundled.unet)
    structured.prune(unet, "magnitude", 0.5, 4, seed=0)
    for module in unet.modules():
        if module.__class__.__name__ == "Attention":
            assert module.to_q.out_features == module.heads * 8
            assert module.scale == pytest.approx(1 / math.sqrt(8))


@pytest.mark.parametrize("changes", [{}, {"attention_head_dim": None}])
def test_save_and_load_give_the_same_outputs_bit_for_bit(tmp_path, changes):
    from diffusers import DDPMScheduler

    unet = make_unet(**changes)
    structured.prune(unet, "magnitude", 0.4, 4, seed=0)
    unets.save(unet, DDPMScheduler(), tmp_path / "v", {})
    assert torch.equal(call(unets.load(str(tmp_path / "v")).unet), call(unet))


def test_random_scores_come_from_the_seed():
    def scores(seed):
        return torch.cat([g.scores for g in structured.channel_groups(make_unet(), "random", 4, seed)[1]])

    assert torch.equal(scores(1), scores(1)) and not torch.equal(scores(1), scores(2))
