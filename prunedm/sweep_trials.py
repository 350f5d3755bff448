"""What became of a sweep's trials, from what the workers noted at each; knows no Optuna, only its frozen trials.

A trial fills one of the sweep's slots. When its worker is killed or stopped, Optuna has it fail without a cause,
and another trial takes its slot, its values and its run over. Where a database locks no rows, two workers may
take the same slot: the later one of the two is *excess* and ends at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Notes at a trial, in its user attributes.
RUN = "run"  # id of its run, noted once this trial's worker is the run's owner
RESUMES = "resumes"  # id of the run that it is to go on with
STATUS = "status"  # how its run ended
CAUSE = "cause"  # why it failed or was pruned, in one line; a trial that failed without one was lost
FIGURES = "figures"
SECONDS = "seconds"
SEEN = "intermediate"  # what its intermediate values are
STOPPED = "stopped"  # someone stopped its worker
EXCESS = "excess"
RETRY_OF = "retry_of"  # number of the lost trial that it takes over
KILLS = "kills"  # how often the workers of its slot were killed before
MOST_KILLS = 3  # a trial that ends its worker again and again, by using all memory, is not retried for ever

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "RUNNING": "running", "WAITING": "waiting"}
HIDDEN = ("retried", "excess")  # of no interest: another trial fills the slot


def slot(trial: Any, trials: Sequence[Any]) -> int:
    """Which of the sweep's slots a trial fills, from 0."""
    by_number = {one.number: one for one in trials}
    while trial.user_attrs.get(RETRY_OF) in by_number:
        trial = by_number[trial.user_attrs[RETRY_OF]]
    return sum(one.number < trial.number for one in trials if _is_first(one))


def slots_taken(trials: Sequence[Any]) -> int:
    """How many slots have a trial."""
    return sum(map(_is_first, trials))


def is_excess(trial: Any, trials: Sequence[Any], total: int) -> bool:
    """Whether this trial comes too late: all slots were taken, or another one took over the same lost trial."""
    before = trial.user_attrs.get(RETRY_OF)
    if before is None:
        return slot(trial, trials) >= total
    return any(one.number < trial.number and one.user_attrs.get(RETRY_OF) == before for one in trials)


def outcomes(trials: Sequence[Any]) -> dict[int, str]:
    """Number to one of STATES' values, failed, interrupted (to be gone on with), or HIDDEN."""
    retried = {one.user_attrs.get(RETRY_OF) for one in trials}
    return {one.number: _outcome(one, retried) for one in trials}


def _outcome(trial: Any, retried: set[int | None]) -> str:
    notes = trial.user_attrs
    if notes.get(EXCESS):
        return "excess"
    if trial.state.name in STATES:
        return STATES[trial.state.name]
    if CAUSE in notes:
        return "failed"
    if trial.number in retried:
        return "retried"
    return "failed" if notes_of_retry(trial)[KILLS] > MOST_KILLS else "interrupted"


def notes_of_retry(trial: Any) -> dict[str, Any]:
    """What the trial that takes a lost one over is to know."""
    notes = trial.user_attrs
    killed = 0 if notes.get(STOPPED) else 1
    run = run_of(trial)
    return ({} if run is None else {RESUMES: run}) | {RETRY_OF: trial.number, KILLS: notes.get(KILLS, 0) + killed}


def run_of(trial: Any) -> str | None:
    """Id of a trial's run, or of the one that it goes on with; None before there is one."""
    return trial.user_attrs.get(RUN, trial.user_attrs.get(RESUMES))


def short(value: Any) -> str:
    """A parameter or an objective in few digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1e5 else f"{value:.5g}"
    return "null" if value is None else str(value)


def cause(trial: Any) -> str:
    """Why a trial failed or was pruned; empty for others."""
    found = trial.user_attrs.get(CAUSE, "")
    if not found and trial.state.name == "FAIL" and not trial.user_attrs.get(STOPPED):
        return f"its worker was killed, {notes_of_retry(trial)[KILLS]} times in all"
    return found


def _is_first(trial: Any) -> bool:
    return RETRY_OF not in trial.user_attrs and not trial.user_attrs.get(EXCESS)
