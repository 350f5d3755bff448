"""One run on many processes, called ranks: torch.distributed, set up by Hugging Face accelerate.

Every rank runs the same program from the same seeds, so that all hold the same weights, logits and masks at
each step; what differs is the slice of a batch that a rank passes through the network. So ranks send one
another sums only: of gradients, of statistics, of the loss residual. Rank 0 alone writes and decides. Where stage 1
is to share its training state, sharding.py has FSDP keep, gather and sum a part of it on each rank.

The road not taken: DistributedDataParallel. Gradients of masked weights lie in a few flat tensors already
(masked_unet.py), which weights have gradients changes within a stage, and ``reinforce`` has none at all.

With one process each function returns at once what it is given. Launchers set RANK, WORLD_SIZE and the rest;
this module only reads them.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from . import failure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMEOUT = datetime.timedelta(minutes=30)  # of a rank that lives and does not answer; one that dies is seen at once
SMALL = 1 << 16  # numbers: shorter tensors are summed in one message
OF_A_CONNECTION = ("gloo", "NCCL", "Connection closed by peer")  # in the errors of torch's backends
LONGEST = 8  # dimensions of a tensor in a message
LAUNCH = "torchrun --standalone --nproc_per_node=N -m prunedm"
RANKS_HERE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")  # torchrun's, Open MPI's, MPICH's
UNSUPPORTED = {  # what accelerate launch sets -> what it is asked for by
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
}
IN_RECIPE = {  # variable -> (value that asks for nothing, what the recipe has in its place)
    "ACCELERATE_USE_FSDP": ("false", "train.shard: true"),
    "ACCELERATE_MIXED_PRECISION": ("no", "train.precision: bf16"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "train.compile: true"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.accumulate"),
}


class LaunchError(ValueError):
    """Processes that were started in a way that a run cannot work in, in one line."""


class RankLost(ConnectionError):
    """Another rank has ended, or does not answer."""


class _Ranks:
    """What this process knows of the others."""

    size, rank, local = 1, 0, 0
    sent = 0  # bytes handed to collectives
    is_lost = False  # whether a collective has failed


def size() -> int:
    """How many ranks work on the run; 1 without a launcher."""
    return _Ranks.size


def rank() -> int:
    """This process's number, from 0."""
    return _Ranks.rank


def is_writer() -> bool:
    """Whether this is rank 0, which alone writes, prints and decides."""
    return _Ranks.rank == 0


def is_lost() -> bool:
    """Whether the others can be reached no more."""
    return _Ranks.is_lost


def bytes_sent() -> int:
    """Bytes that this rank has given to others' sums and broadcasts so far (what it adds or tells, not copies)."""
    return _Ranks.sent


# --- coming and going ------------------------------------------------------------------------
def launched() -> int:
    """How many processes the launcher says it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_here() -> int:
    """How many of them are on this machine, as the launcher says; all of them where it does not."""
    return int(next(filter(None, map(os.environ.get, RANKS_HERE)), launched()))


def join() -> None:
    """Meet the other ranks, where a launcher has started any. LaunchError when it asks for what is not supported."""
    _require_supported()
    if launched() == 1 or _Ranks.size > 1:
        return
    import torch
    from accelerate import PartialState

    on_gpu = torch.cuda.device_count() >= ranks_here()  # else they work on the CPU, where the recipe lets them
    # What ranks decide together stays on the CPU, whatever the gradients lie on.
    state = PartialState(cpu=not on_gpu, backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    _Ranks.size, _Ranks.rank, _Ranks.local = state.num_processes, state.process_index, state.local_process_index


def _require_supported() -> None:
    for variable, option in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise LaunchError(
                f"{option} is not supported; launch without it, and set train.shard (FSDP) or train.accumulate where "
                "memory is short"
            )
    for variable, (nothing, instead) in IN_RECIPE.items():
        found = os.environ.get(variable, nothing).lower()
        if found != nothing:
            raise LaunchError(f"{variable}={found} is the recipe's to say; launch without it and set {instead}")


def lonely() -> str:
    """One line where a launcher was asked for several processes and started this one alone, else nothing.

    ``accelerate launch --cpu`` starts many by mpirun only; without it, it names a meeting place for them, starts
    one, and says nothing.
    """
    env = os.environ
    if launched() > 1 or "ACCELERATE_MIXED_PRECISION" not in env or "MASTER_PORT" not in env or "RANK" in env:
        return ""
    return f"accelerate launch was asked for several processes and has started one, which goes on alone; use {LAUNCH}"


def leave(status: int) -> None:
    """End the process with this exit status, after the others where all is well.

    Left to the interpreter's end, gloo's threads now and then abort a process whose work is done.
    """
    if _Ranks.size > 1:
        from accelerate import PartialState

        if status == 0:
            with suppress(RankLost):  # what this one had to do is done
                meet()
                PartialState().destroy_process_group()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # of whoever read it and is gone
                stream.flush()
        os._exit(status)
    sys.exit(status)


# --- shares of the work ----------------------------------------------------------------------
def own_slice(count: int) -> tuple[int, int]:
    """The first and last (less one) of ``count`` images that are this rank's; ValueError when some rank has none."""
    if count < _Ranks.size:
        raise ValueError(
            f"a batch of {count} images is too small for {_Ranks.size} ranks; set data.batch_size (calibrating: "
            f"prune.calibration_images) to {_Ranks.size} or more"
        )
    return count * _Ranks.rank // _Ranks.size, count * (_Ranks.rank + 1) // _Ranks.size


def own_device(device: torch.device) -> torch.device:
    """A rank's own GPU where all ask for CUDA; ValueError where the recipe names a single one, or there are too few."""
    if _Ranks.size == 1 or device.type != "cuda":
        return device
    import torch

    if device.index is not None:
        raise ValueError(f"device={device} is one GPU and {_Ranks.size} ranks need one each; use device: cuda")
    there = torch.cuda.device_count()
    if there < ranks_here():
        raise ValueError(
            f"each rank needs a GPU of its own, and {ranks_here()} ranks share {there} on this machine; launch {there} "
            "a machine, or set device: cpu"
        )
    return type(device)("cuda", _Ranks.local)


def dealt(count: int, work: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """``work(i)`` for i = 0, 1, ... in order, on every rank; each rank does every size-th of them."""
    for first in range(0, count, _Ranks.size):
        mine = first + _Ranks.rank
        own = work(mine) if mine < count else None
        for i in range(first, min(first + _Ranks.size, count)):
            yield _told(own if i == mine else None, i - first)


def of_rank_0(find: Callable[[], Tensor]) -> Tensor:
    """A tensor that ``find()`` gives on rank 0, on every rank."""
    return next(dealt(1, lambda _: find()))


# --- what ranks tell one another ---------------------------------------------------------------
def sum_(tensors: Iterable[Tensor]) -> None:
    """Each tensor, in place, becomes its sum over the ranks: the same bits on all of them."""
    if _Ranks.size == 1:
        return
    import torch

    short: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() < SMALL or not tensor.is_contiguous():
            short.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        else:
            _all_reduce(tensor)
    for some in short.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        _all_reduce(flat)
        for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some])):
            tensor.copy_(part.view_as(tensor))


def decide(answer: int) -> int:
    """Rank 0's answer, on every rank."""
    if _Ranks.size == 1:
        return answer
    import torch

    told = torch.tensor([int(answer)])
    _broadcast(told, 0)
    return int(told)


def shared(find: Callable[[], Any]) -> Any:
    """What ``find()`` gives on rank 0, on every rank; something that JSON can say."""
    if _Ranks.size == 1:
        return find()
    import torch

    content = bytearray(json.dumps(find() if is_writer() else None).encode())
    length = decide(len(content))
    told = torch.frombuffer(content, dtype=torch.uint8) if is_writer() else torch.empty(length, dtype=torch.uint8)
    _broadcast(told, 0)
    return json.loads(bytes(told.tolist()))


def require_same(what: str, tensors: Iterable[Tensor]) -> None:
    """RuntimeError unless all ranks hold the same bits."""
    if _Ranks.size == 1:
        return
    import torch

    sums = [t.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64).cpu() for t in tensors]
    own = torch.stack([*sums, torch.tensor(len(sums))])
    total = own.clone()
    _all_reduce(total)
    if not bool(decide(int(torch.equal(total, own * _Ranks.size)))):
        raise RuntimeError(f"ranks hold different {what}; they must run on devices of one kind: resume on such")


@contextmanager
def one_writer() -> Iterator[bool]:
    """Ranks meet before and after; whether this one writes what all may read next."""
    meet()
    yield is_writer()
    meet()


def meet() -> None:
    """Wait for all ranks."""
    if _Ranks.size > 1:
        import torch

        _all_reduce(torch.zeros(1))


def _told(own: Tensor | None, owner: int) -> Tensor:
    """A tensor of one rank, on every rank: on the CPU where it came from another."""
    if _Ranks.size == 1:
        return own
    import torch

    kinds = [torch.uint8, torch.float32, torch.float64]
    header = torch.zeros(LONGEST + 2, dtype=torch.int64)
    if own is not None:
        header[: own.dim() + 2] = torch.tensor([kinds.index(own.dtype), own.dim(), *own.shape])
    _broadcast(header, owner)
    kind, dimensions, *shape = header.tolist()
    found = torch.empty(shape[:dimensions], dtype=kinds[kind]) if own is None else own.detach().cpu().contiguous()
    _broadcast(found, owner)
    return found


def _all_reduce(tensor: Tensor) -> None:
    import torch.distributed

    _Ranks.sent += tensor.numel() * tensor.element_size()
    with talking(alone=True):
        torch.distributed.all_reduce(tensor)


def _broadcast(tensor: Tensor, owner: int) -> None:
    import torch.distributed

    if _Ranks.rank == owner:
        _Ranks.sent += tensor.numel() * tensor.element_size()
    with talking(alone=True):
        torch.distributed.broadcast(tensor, owner)


@contextmanager
def talking(alone: bool = False) -> Iterator[None]:
    """RankLost where torch raises of a connection that is closed, or of a time that is over. ``alone``: nothing but
    talking is done inside, so that what torch raises is of that, but for memory that this rank could not get; else
    what has other reasons passes."""
    try:
        yield
    except RuntimeError as error:
        if failure.out_of_memory(error) or not (alone or any(words in str(error) for words in OF_A_CONNECTION)):
            raise
        _Ranks.is_lost = True
        raise RankLost(
            f"another of the {_Ranks.size} ranks has ended or does not answer; the last checkpoint is kept: resume "
            f"with any number of ranks ({' '.join(str(error).split())[:120]})"
        ) from error
