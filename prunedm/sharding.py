"""Fine-tuning whose weights, gradients, moments and average are shared out over the ranks: PyTorch's FSDP2
(``fully_shard``, arXiv 2304.11277), where one copy a rank takes too much memory.

Stage 1's training alone: masks, their logits and statistics work on whole layers, in flat tensors of their own. What
gathers here has to be called by all ranks at the same place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import parallel

if TYPE_CHECKING:
    from torch import Tensor, nn


def shard(model: nn.Module) -> None:
    """Leave each rank its part of every parameter, in place; a block's parameters are gathered when it runs.

    Every rank has to call the model as often as the others. Gradients are summed over the ranks, not averaged.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    with parallel.talking():
        mesh = init_device_mesh(next(model.parameters()).device.type, (parallel.size(),))
        for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
            if block is not None:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum of multiples


def is_shard(tensor: Tensor) -> bool:
    """Whether a rank holds a part of it alone (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks share this model."""
    return any(map(is_shard, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from the ranks; any other tensor as it is."""
    if not is_shard(tensor):
        return tensor
    with parallel.talking():
        return tensor.full_tensor()


def whole_on_rank_0(tensor: Tensor) -> Tensor:
    """:func:`whole`, kept by rank 0 on its CPU; the other ranks keep nothing but a shape. What is in no shard stays as
    it is."""
    if not is_shard(tensor):
        return tensor
    found = whole(tensor.detach())
    found = found.cpu() if parallel.is_writer() else found.to("meta")
    found.is_gathered = True
    return found


def is_gathered(tensor: Tensor) -> bool:
    """Whether this came of :func:`whole_on_rank_0` out of shards."""
    return getattr(tensor, "is_gathered", False)


def as_held_by(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as a parameter holds its own: on its device, and this rank's part of it where that is a shard.
    What is of another shape than the parameter, as an optimiser's counter is, is no such tensor."""
    moved = tensor.to(parameter.device)
    if not is_shard(parameter) or tensor.shape != parameter.shape:
        return moved
    from torch.distributed.tensor import distribute_tensor

    with parallel.talking():
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
