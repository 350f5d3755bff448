"""Step records on their way to the run folder: buffered, with rate and time left in the state."""

from __future__ import annotations

import time
from typing import Any

from .records import RunState, Step
from .store import Run


class MetricsWriter:
    """Buffers step records and writes them, with the state's progress, about once a second."""

    def __init__(self, run: Run, state: RunState, every: float = 1.0) -> None:
        self.run, self.state, self.every = run, state, every
        self.lines: list[dict[str, Any]] = []
        self.written = self.stage_began = time.monotonic()
        self.stage_first = 0

    def begin(self, stage: str, step: int, of: int) -> None:
        """A stage starts at ``step`` (not 0 when resumed)."""
        self.stage_began, self.stage_first = time.monotonic(), step
        self.state.stage, self.state.step, self.state.of = stage, step, of
        self.state.rate = self.state.eta = None
        self.flush()

    def add(self, record: Step) -> None:
        state, now = self.state, time.monotonic()
        state.step, state.of = record.step, record.of
        elapsed = now - self.stage_began
        if elapsed > 0 and record.step > self.stage_first:
            state.rate = (record.step - self.stage_first) / elapsed
            state.eta = (record.of - record.step) / state.rate
        if record.values:
            stamp = {"stage": record.stage, "step": record.step, "time": round(time.time(), 3)}
            self.lines.append(stamp | record.values)
        if now - self.written >= self.every:
            self.flush()

    def held(self, seconds: float) -> None:
        """The run was paused for so long: rate and time left do not count it."""
        self.stage_began += seconds

    def flush(self) -> None:
        """Write all lines and the state; lines that a full disk refuses are kept for the next time."""
        self.written = time.monotonic()
        self.run.append("metrics.jsonl", self.lines)
        self.lines = []
        self.run.write_state(self.state)
