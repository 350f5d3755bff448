"""A run folder that several ranks work on: rank 0 writes, all read, and they meet around what is read later.

Ranks on several machines need a folder that all of them see.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from . import parallel, sharding
from .records import ACTIVE, RunState, Status
from .store import EVENTS, Busy, Run, StoreError

if TYPE_CHECKING:
    from torch import Tensor

LAST_WORDS = 2.0  # seconds that rank 0 has to record its own ending
LAST_COPIES = 600.0  # seconds that it has for what it copies after that
RANK_FAILED = "rank_failed"  # an event of the rank that failed, not of rank 0


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
        """As Run does, once all ranks are seen to hold the same; of what is in shards, rank 0 has gathered all."""
        held = [tensor for tensor in tensors.values() if not sharding.is_gathered(tensor)]
        parallel.require_same(f"tensors at the checkpoint {name}", held)
        self._write_checkpoint(name, tensors, meta)

    def end(self, state: RunState, status: Status, error: str | None, remedy: dict[str, Any] | None = None) -> None:
        """As Run does. A rank that failed by itself leaves its reason, as rank 0 only sees that it is gone; ranks that
        lost rank 0 say so in its place."""
        super().end(state, status, error, remedy)
        if parallel.is_writer():
            return
        if parallel.is_lost():
            self._tell_of_rank_0()
        elif error is not None:
            record = {"time": round(time.time(), 3), "kind": RANK_FAILED, "rank": parallel.rank()}
            with suppress(OSError):  # it is said
                Run.append(self, EVENTS, [record | {"error": error, "remedy": remedy or {}}])
            if self._is_said_by_rank_0(error):
                self._wait_for_rank_0()
            else:
                _say(error)

    def ending(self, status: Status, error: str | None, remedy: dict[str, Any]) -> tuple[Status, str | None, Any]:
        """As rank 0 records it that lost another: for that one's reason, left since the run was begun. One that left
        none was killed, and the run is interrupted."""
        if not (parallel.is_lost() and parallel.is_writer()):
            return status, error, remedy
        events = self.events()
        began = max((i for i, event in enumerate(events) if event["kind"] == "started"), default=0)
        for event in events[began:]:
            if event["kind"] == RANK_FAILED:
                return "failed", f"rank {event['rank']}: {event['error']}", event["remedy"]
        return "interrupted", error, remedy

    def _last_words(self) -> RunState:
        """What rank 0 has recorded once it had time to."""
        deadline = time.monotonic() + LAST_WORDS
        while (state := self.state()).status in ACTIVE and time.monotonic() < deadline:
            time.sleep(0.1)
        return state

    def _is_said_by_rank_0(self, error: str) -> bool:
        """Whether all failed alike, as where a loss is no number: one of them says so."""
        with suppress(StoreError, OSError):
            return self._last_words().error == error
        return False

    def _wait_for_rank_0(self) -> None:
        """Until it gives the run back: a launcher that sees a rank fail would end it in its last copies."""
        with suppress(StoreError, OSError), Run.lock(self, LAST_COPIES):
            pass

    def _tell_of_rank_0(self) -> None:
        """Where rank 0 is dead nobody else says how the run ended; one that lives does so itself."""
        state = self._last_words()
        if state.status == "interrupted" and state.ended is None:  # a rank 0 that lives has written how it ended
            remedy = f"go on with python -m prunedm resume {self.id} --runs-dir {self.folder.parent}"
            _say(f"rank 0 has died; run {self.id} is interrupted and its last checkpoint is kept: {remedy}")


def _say(line: str) -> None:
    with suppress(OSError):  # of whoever read it and is gone
        print(f"rank {parallel.rank()}: {line}", file=sys.stderr, flush=True)
