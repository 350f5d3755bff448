"""Layers stand as data flows through them: as a UNet calls them."""

import torch
from conftest import make_unet

from prunedm.layer_order import flow, in_order


def test_layers_stand_in_the_order_in_which_a_unet_calls_them():
    model, called = make_unet(layers_per_block=2), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        model(torch.zeros(1, 1, 8, 8), 1)
    called = ["conv_in", *(name for name in called if name != "conv_in")]  # called after the embedding of the time
    assert {"mid_block.attentions.0.to_out.0", "down_blocks.0.downsamplers.0.conv"} < set(called)
    assert sorted(called, key=flow) == called
    own = [name for name, _ in model.named_modules() if name in set(called)]
    assert [record["layer"] for record in in_order([{"layer": name} for name in own])] == called != own


def test_the_middle_is_a_resnet_an_attention_and_a_resnet():
    names = ["mid_block.attentions.0.to_q", "mid_block.resnets.1.conv1", "mid_block.resnets.0.conv2"]
    assert sorted(names, key=flow) == [names[2], names[0], names[1]]


def test_blocks_beyond_nine_stand_in_their_order_and_foreign_names_last():
    names = [f"down_blocks.{i}.resnets.{j}.conv1" for i in (10, 9, 2) for j in (11, 3)]
    ordered = sorted([*names, "other.x", "other.2.a", "other", "resnets.²", "conv_in"], key=flow)
    assert ordered[0] == "conv_in" and {name.split(".")[0] for name in ordered[-4:]} == {"other", "resnets"}
    assert [n.split(".")[1] for n in ordered[1:7]] == ["2", "2", "9", "9", "10", "10"]
    assert [n.split(".")[3] for n in ordered[1:3]] == ["3", "11"]
