"""A run folder that several ranks work on: rank 0 writes, all read, and they meet around what is read later.

Ranks on several machines need a folder that all of them see.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from . import parallel
from .records import RunState, Status
from .store import Busy, Run, StoreError

if TYPE_CHECKING:
    from torch import Tensor


def of(run: Run) -> Run:
    """The run as this rank works on it; one process works on the run as it is."""
    return run if parallel.size() == 1 else SharedRun(run.folder)


def _by_rank_0(method: Callable[..., None]) -> Callable[..., None]:
    """What the other ranks leave to rank 0, and need not wait for."""

    @functools.wraps(method)
    def wrapped(*given: Any, **named: Any) -> None:
        if parallel.is_writer():
            method(*given, **named)

    return wrapped


def _met(method: Callable[..., None]) -> Callable[..., None]:
    """What rank 0 does while the others wait: they have read what was there, and will read what is there then."""

    @functools.wraps(method)
    def wrapped(*given: Any, **named: Any) -> None:
        with parallel.one_writer() as writes:
            if writes:
                method(*given, **named)

    return wrapped


class SharedRun(Run):
    """The run of all ranks. Its methods are those of Run, and every rank calls them at the same places."""

    write_state, append, log = _by_rank_0(Run.write_state), _by_rank_0(Run.append), _by_rank_0(Run.log)
    forget_after, clear_stop, clear_pause = map(_by_rank_0, (Run.forget_after, Run.clear_stop, Run.clear_pause))
    write_layers, write_allocation = _by_rank_0(Run.write_layers), _by_rank_0(Run.write_allocation)
    event_anew = _by_rank_0(Run.event_anew)
    write_evaluation, beat = _by_rank_0(Run.write_evaluation), _by_rank_0(Run.beat)
    claim, drop_checkpoint, _write_checkpoint = map(_met, (Run.claim, Run.drop_checkpoint, Run.save_checkpoint))

    def lock(self, patience: float = 0.0) -> AbstractContextManager[None]:
        if not (self.folder / "recipe.yaml").is_file():
            raise StoreError(f"rank {parallel.rank()} sees no {self.folder}; give all machines one --runs-dir")
        return super().lock(patience) if parallel.is_writer() else nullcontext()

    def require_free(self, state: RunState) -> None:
        """As rank 0 finds it: the claim on a run that is resumed is that process's."""

        def refusal() -> str:
            try:
                Run.require_free(self, state)
            except Busy as error:
                return str(error)
            return ""

        if refused := parallel.shared(refusal):
            raise Busy(refused)

    def save_checkpoint(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """As Run does, once all ranks are seen to hold the same."""
        parallel.require_same(f"tensors at the checkpoint {name}", tensors.values())
        self._write_checkpoint(name, tensors, meta)

    def end(self, state: RunState, status: Status, error: str | None, remedy: dict[str, Any] | None = None) -> None:
        """As Run does; a rank that failed by itself says so, as rank 0 only sees that it is gone."""
        super().end(state, status, error, remedy)
        if not parallel.is_writer() and error is not None and not parallel.is_lost():
            print(f"rank {parallel.rank()}: {error}", file=sys.stderr, flush=True)
