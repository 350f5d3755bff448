"""Step records as columns of numbers: 100,000 steps take megabytes instead of a hundred, and curves milliseconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from .store import StoreError

FIRST_ROOM = 1024  # records


@dataclass(frozen=True)
class Stretch:
    """Consecutive records of one stage. A figure that a record lacks is NaN there."""

    stage: str
    steps: np.ndarray
    times: np.ndarray
    figures: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Steps:
    """The step records of a run at one moment, stretch by stretch."""

    stretches: tuple[Stretch, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.stretches))

    @property
    def names(self) -> set[str]:
        """Figures that any record has."""
        return {name for stretch in self.stretches for name in stretch.figures}

    @property
    def times(self) -> list[float]:
        return [time for stretch in self.stretches for time in stretch.times.tolist()]

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> Steps:
        """These records; StoreError for one that is no step record."""
        columns = Columns()
        columns.add(records)
        return columns.now()


class Columns:
    """Grows by step records. What :meth:`now` gave before stays as it was: only room behind it is written."""

    def __init__(self) -> None:
        self._stretches: list[_Growing] = []

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records; StoreError for one that is no step record."""
        try:
            for stage, group in itertools.groupby(records, key=itemgetter("stage")):
                if not self._stretches or self._stretches[-1].stage != stage:
                    self._stretches.append(_Growing(stage))
                self._stretches[-1].add(list(group))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise StoreError(
                f"metrics.jsonl is damaged: a line is no step record ({error}); restore it or delete the run"
            ) from error

    def now(self) -> Steps:
        return Steps(tuple(stretch.now() for stretch in self._stretches if stretch.count))


class _Growing:
    """One stretch: an array a column, with room to grow."""

    def __init__(self, stage: str) -> None:
        if not isinstance(stage, str):
            raise TypeError(f"stage {stage!r}")
        self.stage, self.count, self._room = stage, 0, FIRST_ROOM
        self._columns = {name: self._empty() for name in ("step", "time")}

    def _empty(self) -> np.ndarray:
        return np.full(self._room, np.nan)

    def add(self, records: list[dict[str, Any]]) -> None:
        for names, group in itertools.groupby(records, key=dict.keys):
            self._append([name for name in names if name != "stage"], list(group))

    def _append(self, names: list[str], records: list[dict[str, Any]]) -> None:
        """Records that all have these columns."""
        if "step" not in names:
            raise KeyError("step")
        values = np.array(list(map(itemgetter(*names, "step"), records)), dtype=float)  # "step": two names at least
        self._make_room(len(records))
        for name, column in zip(names, values.T):
            if name not in self._columns:
                self._columns = self._columns | {name: self._empty()}
            self._columns[name][self.count : self.count + len(records)] = column
        self.count += len(records)

    def _make_room(self, count: int) -> None:
        if self.count + count > self._room:
            self._room = max(2 * self._room, self.count + count)
            wider = {name: self._empty() for name in self._columns}
            for name, column in self._columns.items():
                wider[name][: self.count] = column[: self.count]
            self._columns = wider

    def now(self) -> Stretch:
        columns = {name: column[: self.count] for name, column in self._columns.items()}
        return Stretch(self.stage, columns.pop("step"), columns.pop("time"), columns)
