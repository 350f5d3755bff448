"""A UNet under masks: against functional_call and autograd bit for bit; what is left out, and what is refused."""

import itertools

import pytest
import torch
from conftest import make_unet

from prunedm import pattern
from prunedm.masked_unet import MaskedUNet


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
