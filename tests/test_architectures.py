"""The architectures of google/ddpm-cifar10-32 (35.7 M) and ddpm-celebahq-256 (113.7 M), with random weights."""

import sys

import pytest
import torch

from prunedm import structured
from prunedm import unet as unets
from prunedm.stage_recipes import Prune

sys.path.insert(0, str(unets.bundled.ASSETS.parent / "benchmarks"))
import architectures  # noqa: E402


@pytest.mark.parametrize("target", [0.3, 0.44, 0.6])
def test_targets_of_the_cifar_architecture_are_met(target):
    unet = architectures.build("cifar10")
    assert unets.parameters(unet) == 35_746_307
    pruned, report = structured.prune(unet, Prune(target=target), 4, 0)
    assert abs(report.reduction - target) <= 0.02 and report.reason == ""
    with torch.no_grad():
        assert pruned(torch.zeros(1, 3, 32, 32), torch.tensor([500])).sample.isfinite().all()


def test_the_celebahq_architecture_is_pruned():
    """At 64 pixels, where a forward pass costs a sixteenth; its channels are the same."""
    unet = architectures.build("celebahq")
    assert unets.parameters(unet) == 113_673_219
    unet.register_to_config(sample_size=64)
    pruned, report = structured.prune(unet, Prune(target=0.4, layout="uniform"), 4, 0)
    assert abs(report.reduction - 0.4) <= 0.02
    assert unets.follows_config(pruned)
    with torch.no_grad():
        assert pruned(torch.zeros(1, 3, 64, 64), torch.tensor([500])).sample.isfinite().all()
