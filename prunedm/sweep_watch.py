"""A sweep's look at a run that is under way: intermediate values, and whether to end it early.

Reported is the ``validation_loss`` at the end of each quarter of fine-tuning, mask learning and recovery: a sweep that
prunes has its runs measure them. In runs that measure none it is the mean training loss of the quarter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .jobs import Stop
from .records import STAGE_LABELS, Step
from .store import Run
from .sweep_spec import QUARTERS, Sweep
from .sweep_trials import SEEN

if TYPE_CHECKING:
    from optuna import Trial

VALIDATION, TRAINING = "validation loss", "mean training loss of a quarter of a stage"


class Watch:
    """Reports the run of one trial to the study. ``on_step`` and ``stop`` are for ``pipeline.execute``."""

    def __init__(self, trial: Trial, run: Run, spec: Sweep, stop: Stop) -> None:
        self.trial, self.run, self.pruner, self._stop = trial, run, spec.pruner, stop
        self.reports = len(spec.objectives.figures) == 1  # Optuna takes intermediate values of one objective alone
        recipe = run.recipe()
        self.steps = {
            "finetune": recipe.prune.finetune_steps,
            "mask": recipe.mask.steps,
            "recover": recipe.mask.recover_steps,
        }
        self.losses: list[float] = []
        self.validated: float | None = None
        self.asked = False  # whether someone asked the sweep to stop
        self.lost = False  # whether the trial was taken from this worker
        self.pruned = ""  # why the run is to end early, in one line
        for record in run.metrics():  # of a run that is gone on with
            self._add(record["stage"], record["step"], record, live=False)

    def on_step(self, step: Step) -> None:
        """Take one step of the run in."""
        self._add(step.stage, step.step, step.values, live=True)

    def stop(self) -> bool:
        """Whether the run is to end after this step."""
        self.asked = self.asked or self._stop()
        return self.asked or self.lost or bool(self.pruned)

    def _add(self, stage: str, step: int, values: dict[str, Any], live: bool) -> None:
        of = self.steps.get(stage, 0)
        if not self.reports or "loss" not in values or not 0 < step <= of:
            return
        self.losses.append(values["loss"])
        self.validated = values.get("validation_loss", self.validated)
        done = step * QUARTERS // of
        if done > (step - 1) * QUARTERS // of:
            value = sum(self.losses) / len(self.losses) if self.validated is None else self.validated
            what = TRAINING if self.validated is None else VALIDATION
            self.losses, self.validated = [], None
            self._report(list(self.steps).index(stage) * QUARTERS + done, value, what, f"{stage} {step}/{of}", live)

    def _report(self, point: int, value: float, what: str, place: str, live: bool) -> None:
        """Tell the study, and ask its pruner. A database that does not answer costs no run."""
        from optuna.exceptions import OptunaError, UpdateFinishedTrialError

        try:
            self.trial.report(value, point)
            if SEEN not in self.trial.user_attrs:
                self.trial.set_user_attr(SEEN, what)
            if live and self.pruner != "none" and not self.pruned and self.trial.should_prune():
                stage, _, steps = place.partition(" ")
                self.pruned = f"pruned ({self.pruner}) at {STAGE_LABELS[stage]} {steps}: {what} {value:.5g}"
        except UpdateFinishedTrialError:
            self.lost = True
        except OptunaError as error:
            self.run.log(f"the sweep could not be told of {place}: {' '.join(str(error).split())[:200]}")
