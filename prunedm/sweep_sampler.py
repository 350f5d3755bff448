"""What Optuna is asked to do in a sweep: samplers that depend on nothing but the study, and pruners.

Imports Optuna, so it is imported late.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

from .recipe import RecipeError
from .sweep_spec import Sweep
from .sweep_trials import slot

POINTS = 12  # intermediate values of a whole run: a quarter of each of three stages


class Slots(BaseSampler):
    """Suggestions that follow from the sweep's seed, the trials before and the slot that a trial fills.

    Optuna's samplers draw from one stream for as long as their process lives: a resumed sweep, or a second
    worker, would draw the same values again. Here each slot has a stream of its own.
    """

    def __init__(self, spec: Sweep, study: optuna.Study) -> None:
        self.spec, self.study = spec, study
        self.grid = spec.grid() if spec.sampler == "grid" else []
        self.inner: BaseSampler = RandomSampler()

    def before_trial(self, study: optuna.Study, trial: Any) -> None:
        place = slot(trial, self.study.get_trials(deepcopy=False))
        if self.grid:
            self.inner = GridPoint(self.grid[place % len(self.grid)])
        else:
            seed = int(np.random.SeedSequence([self.spec.seed, place]).generate_state(1)[0])
            self.inner = {"tpe": TPESampler, "random": RandomSampler, "nsga2": NSGAIISampler}[self.spec.sampler](
                seed=seed
            )
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.inner.after_trial(study, trial, state, values)


class GridPoint(BaseSampler):
    """One point of a grid."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self.values[param_name]


def pruner(spec: Sweep) -> BasePruner:
    """The pruner that the sweep asks for. It compares trials at the same point of their runs, from 1 to POINTS."""
    if spec.pruner == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    if spec.pruner == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=POINTS, reduction_factor=3)
    return NopPruner()


def first_trials(spec: Sweep, most: int) -> list[dict[str, Any]]:
    """What the first trials would be as long as no result is known: values, the recipe, or why there is none."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize"] * len(spec.objectives.figures))
    study.sampler = Slots(spec, study)
    found = []
    for number in range(min(most, spec.total)):
        values = spec.suggest(study.ask())
        try:
            recipe, cause = spec.recipe_of(values, f"{spec.name}-{number:03d}").model_dump(), ""
        except RecipeError as error:
            recipe, cause = None, str(error)
        found.append({"params": values, "recipe": recipe, "cause": cause})
    return found
