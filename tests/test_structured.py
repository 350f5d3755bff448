"""Stage 1: targets met, shapes predicted, function kept, saved and loaded without loss."""

import copy
import math

import pytest
import torch
from conftest import make_unet

from prunedm import masked_unet, sizing, structured
from prunedm import unet as unets
from prunedm.channel_groups import channel_groups
from prunedm.channel_scores import scoring
from prunedm.pruned_unet import attentions, sync_attributes
from prunedm.stage_recipes import Prune
from prunedm.structured import TOLERANCE


def cut(unet, method="magnitude", target=0.4, m=4, seed=0, task=None, **more):
    """(pruned UNet, report)"""
    return structured.prune(unet, Prune(method=method, target=target, **more), m, seed, task)


def channels(unet, method="magnitude", seed=0, m=4):
    """(dependency graph, channel groups)"""
    with scoring(unet, Prune(method=method), None, seed) as score:
        return channel_groups(unet, score, m)


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
    report = cut(unet, method, target)[1]
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
def test_the_predicted_parameters_and_macs_are_the_true_ones(changes):
    unet = make_unet(**changes)
    before = unets.parameters(unet)
    _, groups = channels(unet)
    positions, macs = sizing.layer_positions(unet), unets.macs(unet)
    widths = sizing.choose_widths(
        groups, sizing.plan(groups, "local"), lambda w: sizing.removed_parameters(groups, w) / before, 0.4
    )
    predicted = before - sizing.removed_parameters(groups, widths)
    predicted_macs = macs - sizing.removed_macs(unet, groups, widths, positions)
    report = cut(unet)[1]
    assert report.parameters_after == predicted < before
    assert report.macs_after == predicted_macs < macs
    assert call(unet).isfinite().all()


def test_an_unreachable_target_says_why():
    report = cut(make_unet(), target=0.9, m=16)[1]
    assert report.reduction < 0.9 - TOLERANCE
    assert f"at most {report.reduction:.1%} of the parameters can go" in report.reason


def test_the_least_important_channels_go_and_groups_of_groupnorm_stay_equal():
    unet = make_unet()
    _, groups = channels(unet)
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
    graph, groups = channels(unet)
    group = next(g for g in groups if g.layer == "mid_block.resnets.0.conv1")
    dropped = group.dropped(16)
    graph.get_pruning_group(group.root, group.prune_fn, dropped).prune()
    sync_attributes(unet)
    keep = [i for i in range(32) if i not in dropped]
    resnet = by_hand.mid_block.resnets[0]
    for layer in (resnet.conv1, resnet.time_emb_proj, resnet.norm2):
        layer.weight = torch.nn.Parameter(layer.weight[keep])
        layer.bias = torch.nn.Parameter(layer.bias[keep])
    resnet.conv2.weight = torch.nn.Parameter(resnet.conv2.weight[:, keep])
    sync_attributes(by_hand)
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
    graph, groups = channels(unet)
    group = next(g for g in groups if g.layer == "mid_block.attentions.0.to_v")
    assert sorted(group.dropped(16)) == gone
    graph.get_pruning_group(group.root, group.prune_fn, group.dropped(16)).prune()
    sync_attributes(unet)
    assert not torch.allclose(call(unet), before, atol=1e-4), "the scale matters"
    structured._keep_attention_scale(attention, 32)
    assert torch.allclose(call(unet), before, atol=1e-5)


def test_heads_go_whole(bundled):
    unet = copy.deepcopy(bundled.unet)
    cut(unet, target=0.5)
    for module in unet.modules():
        if module.__class__.__name__ == "Attention":
            assert module.to_q.out_features == module.heads * 8
            assert module.scale == pytest.approx(1 / math.sqrt(8))


@pytest.mark.parametrize("changes", [{}, {"attention_head_dim": None}])
def test_save_and_load_give_the_same_outputs_bit_for_bit(tmp_path, changes):
    from diffusers import DDPMScheduler

    unet = make_unet(**changes)
    cut(unet)
    unets.save(unet, DDPMScheduler(), tmp_path / "v", {})
    assert torch.equal(call(unets.load(str(tmp_path / "v")).unet), call(unet))


def test_random_scores_come_from_the_seed():
    def scores(seed):
        return torch.cat([g.scores for g in channels(make_unet(), "random", seed)[1]])

    assert torch.equal(scores(1), scores(1)) and not torch.equal(scores(1), scores(2))


KINDS = [
    {},
    {"block_out_channels": (32, 64), "attention_head_dim": 32},  # two heads, of which one may stay
    {"downsample_type": "resnet", "upsample_type": "resnet"},
    {"attention_head_dim": None},
    {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
     "add_attention": False},
    {"resnet_time_scale_shift": "scale_shift"},
    {"layers_per_block": 2, "block_out_channels": (16, 32, 32),
     "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
     "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D")},
]  # fmt: skip


def distinct(unet):
    """Every parameter at random, so that each channel is known by its bias."""
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=gen) * (0.5 / max(1, parameter[0].numel()) ** 0.5))
        for attention in attentions(unet):  # attention that is nearly even would hide a wrong scale
            for layer in (attention.to_q, attention.to_k, attention.to_v):
                layer.weight.mul_(8)
    return unet


def kept_channels(dense, pruned):
    """Layer name -> the dense model's channels that the pruned layer still has, found by their biases."""
    found = {}
    for name, module in dense.named_modules():
        if getattr(module, "bias", None) is None or not isinstance(module.bias, torch.nn.Parameter):
            continue
        source = name.replace("to_q", "to_k") if name.endswith("to_q") else name  # to_q is scaled
        before, after = dense.get_submodule(source).bias, pruned.get_submodule(source).bias
        found[name] = [int((before == value).nonzero().item()) for value in after]
    return found


def simulate(dense, pruned):
    """The dense model made to compute the sub-network: what was dropped is held at zero, and GroupNorm looks
    at kept channels only. Knows nothing of how layers are coupled: a wrong coupling changes the output."""
    kept = kept_channels(dense, pruned)
    for name, module in dense.named_modules():
        if name not in kept:
            continue
        keep = torch.tensor(kept[name])
        if isinstance(module, torch.nn.GroupNorm):

            def forward(x, module=module, keep=keep):
                weight, bias = module.weight[keep], module.bias[keep]
                part = torch.nn.functional.group_norm(x[:, keep], module.num_groups, weight, bias, module.eps)
                return torch.zeros_like(x).index_copy(1, keep, part)

            module.forward = forward
        elif len(keep) < len(module.bias):

            def hook(module, inputs, output, keep=keep):
                dim = 1 if isinstance(module, torch.nn.Conv2d) else output.dim() - 1
                return torch.zeros_like(output).index_copy(dim, keep, output.index_select(dim, keep))

            module.register_forward_hook(hook)
    return dense


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("more", [{}, {"ranking": "global"}, {"layout": "uniform"}])
def test_pruned_equals_the_sub_network_of_the_dense_model(changes, more):
    dense = distinct(make_unet(**changes))
    pruned, report = cut(copy.deepcopy(dense), target=0.45, **more)
    assert report.parameters_after < 0.8 * report.parameters_before
    wanted = call(simulate(dense, pruned))
    assert torch.allclose(call(pruned), wanted, atol=1e-5 * wanted.abs().max())


def test_the_simulation_of_a_sub_network_notices_one_wrong_channel():
    dense = distinct(make_unet())
    pruned, _ = cut(copy.deepcopy(dense))
    with torch.no_grad():
        weight = pruned.mid_block.resnets[0].conv2.weight
        weight[:, [0, 1]] = weight[:, [1, 0]].clone()
    wanted = call(simulate(dense, pruned))
    assert not torch.allclose(call(pruned), wanted, atol=1e-4 * wanted.abs().max())


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_a_target_of_macs_is_met(bundled, target):
    _, report = cut(copy.deepcopy(bundled.unet), target=target, of="macs")
    assert abs(1 - report.macs_after / report.macs_before - target) <= TOLERANCE
    assert report.achieved == 1 - report.macs_after / report.macs_before and report.reason == ""


def test_a_target_of_latency_is_bisected_on_measured_time(bundled, monkeypatch):
    """With a clock that counts MACs the bisection must find that share of them."""
    from prunedm import latency

    dense = bundled.unet

    def compare(a, b):
        return {"dense": 1.0, "pruned": unets.macs(b) / unets.macs(a), "ratio": unets.macs(b) / unets.macs(a)}

    monkeypatch.setattr(latency, "compare", compare)
    _, report = cut(copy.deepcopy(dense), target=0.4, of="latency")
    assert abs(report.achieved - 0.4) <= 0.04
    assert report.achieved == pytest.approx(1 - report.macs_after / report.macs_before)
    assert set(report.details["latency"]) == {"dense", "pruned", "ratio"}


def test_a_measured_latency_target_runs_on_this_machine():
    _, report = cut(make_unet(), target=0.2, of="latency")
    assert report.details["latency"]["dense"] > 0 and report.parameters_after <= report.parameters_before


def test_shrunk_has_the_shapes_of_the_cut():
    unet = make_unet()
    graph, groups = channels(unet)
    widths = [group.width_at(0.5) for group in groups]
    trial = sizing.shrunk(unet, groups, widths)
    structured.cut(unet, graph, groups, widths)
    assert {n: p.shape for n, p in trial.named_parameters()} == {n: p.shape for n, p in unet.named_parameters()}
    assert call(trial).isfinite().all()


def test_ratios_of_single_layers_are_kept_and_unknown_names_refused():
    unet = make_unet()
    layers = [{"match": "mid_block.*", "ratio": 0.5}, {"match": "mid_block.resnets.1.*", "ratio": 0}]
    _, report = cut(unet, target=0.3, layers=layers)
    widths = {g["layer"]: (g["before"], g["after"]) for g in report.groups}
    assert widths["mid_block.resnets.0.conv1"] == (32, 16)
    assert widths["mid_block.resnets.1.conv1"] == (32, 32)
    with pytest.raises(ValueError, match=r"'midblock.\*' matches no prunable layer; names look like"):
        cut(make_unet(), layers=[{"match": "midblock.*", "ratio": 0.5}])


@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
def test_channels_of_different_groups_compete(ranking):
    """A group whose weights are ten times as large keeps its channels; alike groups are compared by isomorphic."""
    unet = make_unet()
    with torch.no_grad():
        for layer in (unet.mid_block.resnets[0].conv1, unet.mid_block.resnets[0].time_emb_proj):
            layer.weight.mul_(10)
    _, report = cut(unet, target=0.3, ranking=ranking, normalizer="lamp")
    _, local = cut(make_unet(), target=0.3)
    assert {g["layer"]: g["after"] for g in report.groups} != {g["layer"]: g["after"] for g in local.groups}
    loud = copy.deepcopy(make_unet())
    _, groups = channels(loud)
    for group in groups:
        group.scores = torch.full_like(group.scores, 1.0) + torch.linspace(0, 0.1, group.width)
    strong = next(g for g in groups if g.layer == "mid_block.resnets.0.conv1")
    strong.scores = strong.scores + 10
    widths = sizing.plan(groups, ranking)(0.5)
    assert widths[groups.index(strong)] == strong.width
    if ranking == "isomorphic":  # another kind of group is cut by half all the same
        other = next(g for g in groups if g.kind != strong.kind)
        assert widths[groups.index(other)] < other.width


def test_tensor_core_rounding_keeps_layers_ready(bundled):
    _, plain = cut(copy.deepcopy(bundled.unet))
    pruned, rounded = cut(copy.deepcopy(bundled.unet), round_for="tensor-core")
    before, after = (rounded.eligibility[k]["tensor_core_ready"] for k in ("before", "after"))
    assert after == before > plain.eligibility["after"]["tensor_core_ready"]
    assert all(g["after"] % 16 == 0 for g in rounded.groups)
    ready = [r for r in masked_unet.layer_reports(pruned, 2, 4) if r.tensor_core_ready]
    assert len(ready) == after


def test_what_a_latency_or_calibrated_preview_stands_for():
    from prunedm.inputs import predictable

    assert predictable(Prune(method="taylor", of="latency")) == Prune(method="magnitude", of="macs").model_copy(
        update={"method": "magnitude"}
    )
    assert predictable(Prune()) == Prune()


@pytest.mark.parametrize("changes", KINDS)
def test_a_pruned_model_is_pruned_again_rightly(changes, tmp_path):
    from diffusers import DDPMScheduler

    dense = distinct(make_unet(**changes))
    once, _ = cut(copy.deepcopy(dense), target=0.3)
    twice, _ = cut(copy.deepcopy(once), target=0.3)
    wanted = call(simulate(once, twice))
    assert torch.allclose(call(twice), wanted, atol=1e-5 * wanted.abs().max())
    unets.save(twice, DDPMScheduler(), tmp_path / "v", {})
    assert torch.equal(call(unets.load(str(tmp_path / "v")).unet), call(twice))


@pytest.mark.parametrize("changes", [{"attention_head_dim": None}, {"attention_head_dim": 8}])
def test_every_attention_processor_sees_the_same_scale(changes, tmp_path):
    """bf16 training goes through diffusers' plain processor, which reads the layer's own ``scale``."""
    from diffusers import DDPMScheduler
    from diffusers.models.attention_processor import AttnProcessor

    pruned, _ = cut(distinct(make_unet(**changes)), target=0.45)
    unets.save(pruned, DDPMScheduler(), tmp_path / "v", {})
    for model in (pruned, unets.load(str(tmp_path / "v")).unet):
        wanted = call(model)
        for attention in attentions(model):
            attention.processor = AttnProcessor()
        assert torch.allclose(call(model), wanted, atol=1e-5 * wanted.abs().max())


def test_ratios_of_layers_are_of_the_dense_width_whatever_the_rounds():
    layers = [{"match": "mid_block.resnets.0.*", "ratio": 0.5}]
    spec, unet = Prune(target=0.3, layers=layers, rounds=2), make_unet()
    dense = structured.Dense.of(unet, spec, 4)
    for number in (1, 2):
        unet, report = structured.prune(unet, structured.round_of(spec, number), 4, 0, dense=dense)
    assert unet.mid_block.resnets[0].conv1.out_channels == 16
    assert abs(report.reduction - 0.3) <= TOLERANCE and report.eligibility["before"] == dense.eligibility


def test_a_model_that_cannot_be_narrowed_says_so():
    _, report = cut(make_unet(), m=16, round_for="tensor-core", layers=[{"match": "*", "ratio": 0}])
    assert "no channel group may be narrowed" in report.reason
