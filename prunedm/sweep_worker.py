"""Work on a sweep: take a trial, run it, note what became of it, until there is nothing left to take.

Any number of workers share a study. Each slot of the sweep is filled once: a worker takes trials under a lock (or
row locks), and goes on with the runs of workers that were stopped or killed.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import comparison, store, sweep, sweep_trials
from .cluster_link import Unreachable
from .cluster_task import died_too_often
from .jobs import Execute, Stop, here, load_engine
from .recipe import Recipe, RecipeError
from .store import Run
from .sweep_spec import Sweep, SweepError
from .sweep_trials import CAUSE, EXCESS, FIGURES, RESUMES, RUN, SECONDS, STATUS, STOPPED
from .sweep_watch import Watch

if TYPE_CHECKING:
    from optuna import Study, Trial

NOTED = (  # figures of a trial's model that are kept in the study
    *("validation_loss", "validation_loss_low", "validation_loss_high", "fid", "fid_std", "fid_extractor"),
    *("fid_images", "sizes.packed_fp16", "parameters", "nonzero_parameters", "macs", "latency_ms", "device"),
)
FAILURES = 3  # that a worker sees in a row, with nothing else before, until it asks for help
POLL = 2.0  # seconds between looks at the trials of other workers


class Unfinished(Exception):  # noqa: N818
    """A trial that ends here without a value; why is noted at it."""


class Worker:
    """One worker on a study of ``sweep.start`` or ``sweep.join``. ``tell`` gets a line for each trial that begins or
    ends.

    ``run`` ends when all slots are filled and no other worker's trial may still have to be taken over, when ``stop``
    says so, or when someone asked the sweep to stop.
    """

    def __init__(
        self,
        study: Study,
        runs_dir: Path,
        storage: str | None = None,
        execute: Execute = here,
        stop: Stop = lambda: False,
        tell: Callable[[str], None] = lambda line: None,
        poll: float = POLL,
    ) -> None:
        self.study, self.runs_dir, self.execute = study, runs_dir, execute
        self.stop, self.tell, self.poll = stop, tell, poll
        self.spec: Sweep = sweep.spec_of(study)
        self.url = storage or sweep.default_storage(runs_dir, self.spec.name)
        self.stop_before, self.looked, self.ended = sweep.last_stop(study), 0.0, False
        self.is_lost = False  # whether the trial at hand was taken over by another worker
        self.failures: int | None = 0  # None once a trial was complete or pruned
        self.said: set[str] = set()
        self._taking = ExitStack()

    def run(self) -> str:
        """Work; returns ``done``, or ``stopped`` where the sweep can be gone on with.

        :class:`SweepError` when the first few trials fail or the database is gone; StoreError or OSError when runs
        cannot be kept.
        """
        from optuna.exceptions import OptunaError

        try:
            return self._work()
        except OptunaError as error:
            text = f"the study's database answers no more ({' '.join(str(error).split())[:200]})"
            raise SweepError(f"{text}; start the sweep again once it does") from error

    def _work(self) -> str:
        while not self._is_stopped():
            if not self._take():
                if not self._others_run():
                    break
                self._say_once("waiting for trials of other workers, to take over those that are killed")
                time.sleep(self.poll)
            if self.failures == FAILURES:
                last = next(row for row in reversed(sweep.trials(self.study)) if row["state"] == "failed")
                raise SweepError(
                    f"the first {FAILURES} trials failed, the last with: {last['cause']}; mend that and give the "
                    "command again (it goes on with the next trials)"
                )
        return "stopped" if self._is_stopped() else "done"

    def _is_stopped(self, surely: bool = False) -> bool:
        """Asked after each step: the database is looked at now and then, or ``surely``."""
        from optuna.exceptions import OptunaError

        if not self.ended and (surely or time.monotonic() - self.looked > self.poll):
            with suppress(OptunaError):  # a database that does not answer now costs no run
                self.ended = sweep.last_stop(self.study) != self.stop_before
            self.looked = time.monotonic()
        self.ended = self.ended or self.stop()
        return self.ended

    def _say_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.tell(line)

    def _others_run(self) -> bool:
        found = sweep_trials.outcomes(self.study.get_trials(deepcopy=False))
        return any(state in ("running", "waiting", "interrupted") for state in found.values())

    # --- taking trials -------------------------------------------------------------------------
    def _take(self) -> bool:
        """Work on one more trial, if there is one to take. The lock is given back when its values are drawn."""
        from optuna.exceptions import UpdateFinishedTrialError

        self._taking.enter_context(sweep.locked(self.url))
        with self._taking:
            self._recover_lost()
            trials = self.study.get_trials(deepcopy=False)
            waits = any(one.state.name == "WAITING" for one in trials)
            if not waits and sweep_trials.slots_taken(trials) >= sweep.total(self.study):
                return False
            self.is_lost = False
            try:
                self.study.optimize(self._objective, n_trials=1, catch=(Unfinished,))
            except (UpdateFinishedTrialError, ValueError):
                if not self.is_lost:  # Optuna's word for a trial that another worker took over meanwhile
                    raise
        return True

    def _recover_lost(self) -> None:
        """Have trials of killed workers fail, and queue others in the place of those that were lost."""
        import optuna

        optuna.storages.fail_stale_trials(self.study)  # those without a sign of life
        for one in self.study.get_trials(deepcopy=False):
            if one.state.name == "RUNNING" and self._died_here(one):
                with suppress(ValueError, RuntimeError):  # another worker was faster
                    self.study.tell(one.number, state=optuna.trial.TrialState.FAIL)
        trials = self.study.get_trials(deepcopy=False)
        states = sweep_trials.outcomes(trials)
        for one in (one for one in trials if states[one.number] == "interrupted"):
            again = optuna.create_trial(
                state=optuna.trial.TrialState.WAITING,
                params=one.params,
                distributions=one.distributions,
                user_attrs=sweep_trials.notes_of_retry(one),
                system_attrs=one.system_attrs,
            )
            self.study.add_trial(again)

    def _died_here(self, trial: Any) -> bool:
        """Whether a trial's run was left by a process of this machine: known at once, where signs of life take time."""
        run = self._run_here(trial.user_attrs.get(RUN))
        if run is None:
            return False
        with suppress(store.StoreError):
            state = run.state()
            return state.status == "interrupted" and state.host == socket.gethostname()
        return False

    def _run_here(self, known: str | None) -> Run | None:
        """A run by its id, if it is in this runs folder."""
        with suppress(store.StoreError):
            return store.find(self.runs_dir, known) if known else None
        return None

    # --- one trial -----------------------------------------------------------------------------
    def _objective(self, trial: Trial) -> list[float]:
        from optuna import TrialPruned
        from optuna.exceptions import UpdateFinishedTrialError

        if sweep_trials.is_excess(trial, self.study.get_trials(deepcopy=False), sweep.total(self.study)):
            trial.set_user_attr(EXCESS, True)
            raise Unfinished
        values = self.spec.suggest(trial)
        self._taking.close()
        try:
            recipe = self.spec.recipe_of(values, f"{self.spec.name}-{trial.number:03d}")
        except RecipeError as error:
            self._note_end(trial, "pruned", str(error))
            raise TrialPruned(str(error)) from error
        try:
            return self._run(trial, recipe, values)
        except UpdateFinishedTrialError as error:
            self.is_lost = True
            self.tell(f"trial {trial.number}: another worker took it over")
            raise Unfinished from error

    def _run(self, trial: Trial, recipe: Recipe, values: dict[str, Any]) -> list[float]:
        try:
            run = self._run_of(trial, recipe)
        except store.StoreError:
            raise
        except ValueError as error:  # what the recipe asks for is not there
            self._fail(trial, str(error))
        trial.set_user_attr(RUN, run.id)
        words = ", ".join(f"{key}={sweep_trials.short(value)}" for key, value in values.items())
        self.tell(f"trial {trial.number}: {words} (run {run.id})")
        watch = Watch(trial, run, self.spec, self._is_stopped)
        status = run.state().status
        if status != "done":
            try:
                status = self._executed(trial, run, watch)
            except Unfinished:
                raise
            except Exception as error:  # noqa: BLE001  (the sweep goes on whatever one run does)
                self._fail(trial, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        trial.set_user_attr(STATUS, status)
        trial.set_user_attr(SECONDS, round(run.state().seconds, 2))
        if status == "done":
            return self._values(trial, run)
        raise self._conclusion(trial, run, watch, status)

    def _executed(self, trial: Trial, run: Run, watch: Watch) -> str:
        """A run's status at its end. A cluster that does not answer is waited for, until the sweep is stopped."""
        while True:
            try:
                return self.execute(run, watch.on_step, watch.stop)
            except Unreachable as error:
                self._say_once(f"trial {trial.number} waits: {error}")
                if self._is_stopped(surely=True):
                    raise self._stopped(trial) from error
                time.sleep(self.poll)

    def _run_of(self, trial: Trial, recipe: Recipe) -> Run:
        """The run that a worker before this one began, or a new one."""
        load_engine()
        from . import inputs

        recipe = inputs.absolute(recipe, self.runs_dir)
        known = self._run_here(trial.user_attrs.get(RESUMES))
        if known is not None and self._takes(trial, known):
            return known
        return store.create(self.runs_dir, recipe)

    def _takes(self, trial: Trial, known: Run) -> bool:
        """Make a run that another worker began this one's, or find it done; False where it cannot be read, and is begun
        anew.

        A worker that lost its trial, as the database had no sign of life of it, may be at work on the run all the same:
        what it makes of it is waited for, so that no trial runs twice.
        """
        while True:
            try:
                if known.state().status != "done":
                    known.take()  # or other workers would take it for that of a dead one
                return True
            except store.Busy as error:
                self._say_once(f"trial {trial.number} waits: {error}")
                if self._is_stopped(surely=True):
                    raise self._stopped(trial) from error
                time.sleep(self.poll)
            except store.StoreError as error:
                if not self._is_done(known):  # it may have come to its end just now
                    self.tell(f"trial {trial.number}: {error}; its run is begun anew")
                    return False

    @staticmethod
    def _is_done(run: Run) -> bool:
        with suppress(store.StoreError):
            return run.state().status == "done"
        return False

    def _values(self, trial: Trial, run: Run) -> list[float]:
        """The objectives, from the figures of the run's last model."""
        results = run.evaluation()
        last = results.get("nm") or results.get("structured") or results.get("dense") or {}
        figures = {key: comparison.figure(last, key) for key in NOTED}
        trial.set_user_attr(FIGURES, figures)
        found = {name: comparison.figure(last, key) for name, key in self.spec.objectives.figures.items()}
        missing = [name for name, value in found.items() if value is None or not math.isfinite(value)]
        if missing:
            self._fail(trial, f"run {run.id} has no {missing[0]}; see its log, or choose another objective")
        self.failures = None
        self.tell(
            f"trial {trial.number} complete: " + ", ".join(f"{k} {sweep_trials.short(v)}" for k, v in found.items())
        )
        return list(found.values())

    def _conclusion(self, trial: Trial, run: Run, watch: Watch, status: str) -> Exception:
        """What a run that is not done means for its trial: Unfinished, or that it is pruned."""
        from optuna import TrialPruned

        if watch.lost:
            self.is_lost = True
            return Unfinished()
        if status == "failed":
            self._fail(trial, run.state().error or "the run failed; see its log")
        if watch.pruned and not watch.asked:
            run.log(f"stopped by the sweep {self.spec.name}: {watch.pruned}")
            self._note_end(trial, "pruned", watch.pruned)
            return TrialPruned(watch.pruned)
        by_ctrl_c = status == "interrupted" and self.execute is here
        if by_ctrl_c or watch.asked or self._is_stopped(surely=True):
            self.ended = True
            return self._stopped(trial)
        if status == "interrupted":
            cause = run.state().error or "it was interrupted; see its log"
            if died_too_often(run):
                self._fail(trial, cause)
            self._stopped(trial)
            raise SweepError(f"run {run.id}: {cause}; after that, start the sweep again")
        self._fail(trial, f"run {run.id} was {status} by hand; start the sweep again with more trials to make up")

    def _stopped(self, trial: Trial) -> Unfinished:
        """Note at a trial that its worker was stopped, and did not die."""
        trial.set_user_attr(STOPPED, True)
        self.tell(f"trial {trial.number} stopped; the sweep goes on with it")
        return Unfinished()

    def _fail(self, trial: Trial, cause: str) -> NoReturn:
        self._note_end(trial, "failed", cause)
        raise Unfinished(cause)

    def _note_end(self, trial: Trial, state: str, cause: str) -> None:
        trial.set_user_attr(CAUSE, cause)
        self.tell(f"trial {trial.number} {state}: {cause}")
        if self.failures is not None:
            self.failures = self.failures + 1 if state == "failed" else None
