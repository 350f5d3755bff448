"""What torch's operations cost, written down as they pass: products, bytes moved, memory held.

Works on real tensors and on fake ones (torch's meta tensors that remember a device), so that the cost of a model
can be counted without its weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .devices import CONVOLUTIONS


class Ledger(TorchDispatchMode):
    """Inside the block, one line an operation that computes; views and empty tensors cost nothing.

    live: bytes of the storages made inside the block that are still there. Lines: floating-point operations of
    matrix products (torch's own formulas), bytes read and written, the kind of product (its place in
    devices.PRODUCTS), and ``live`` after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, int, int, int]] = []
        self.live = 0
        self._made: dict[int, int] = {}  # storage -> the line that made it

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func.namespace != "aten":  # questions about a tensor's device or shape
            return found
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        before = {_key(tensor) for tensor in inputs}
        fresh = [tensor for tensor in outputs if _key(tensor) not in before]
        for tensor in fresh:
            self._open(tensor)
        changes = func._schema.is_mutable
        if (fresh or changes) and not func.__name__.startswith(("empty", "new_empty")):
            self._write(func, args, kwargs, found, inputs, fresh, changes)
        return found

    def _write(self, func, args, kwargs, found, inputs: list[Tensor], fresh: list[Tensor], changes: bool) -> None:
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=found) if formula else 0
        written = sum(map(_bytes, fresh))
        if changes:
            written += sum(_bytes(t) for t in _mutated(func, args, kwargs))
        kind = CONVOLUTIONS * ("convolution" in func.__name__)
        if formula and inputs[0].element_size() == 2:
            kind += 1
        self.lines.append((flops, sum(map(_bytes, inputs)) + written, kind, self.live))

    def _open(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = _key(tensor), storage.nbytes()
        if key not in self._made:
            self._made[key] = len(self.lines)
            self.live += size
            weakref.finalize(storage, self._close, key, size)

    def _close(self, key: int, size: int) -> None:
        self.live -= size
        self._made.pop(key, None)

    def made(self, tensors: Iterable[Tensor]) -> np.ndarray:
        """Bytes of these tensors, all made inside the block, that were there after each line, ``[lines]``."""
        found = np.zeros(len(self.lines), np.int64)
        for tensor in tensors:
            at = self._made.get(_key(tensor))
            if at is not None:
                found[at:] += tensor.untyped_storage().nbytes()
        return found

    def table(self) -> np.ndarray:
        """The lines: FLOPs, bytes moved, kind of product, bytes live; ``[lines, 4]`` of int64."""
        return np.array(self.lines, np.int64).reshape(-1, 4)


@contextmanager
def saved_tensors(beside: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for backward inside the block, and their bytes; those of ``beside`` (the weights,
    which are there anyway) are left out, and what several operations keep counts once."""
    known = {_key(tensor) for tensor in beside}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in known:
            found[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """What reading or writing it moves: an expanded tensor no more than its storage holds."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _mutated(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The tensors that an operation writes into, by its schema."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
