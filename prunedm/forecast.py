"""What a recipe will take, before it starts: bytes and MACs from its layers, time from finished runs.

Times are never guessed: they rest on the step records and events of finished runs of this machine that trained
the same model at the same batch size and precision, scaled by MACs. Where no such run is there, so is no figure.
Imports no torch; only :func:`look_up`, which loads a model, needs the engine.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from . import store
from .recipe import Recipe
from .records import STAGES
from .stage_recipes import FIXED_METHODS, parse_pattern
from .store import Run

FEWEST_STEPS = 3  # differences of time that a stage's rate rests on at least
MOST_RUNS = 8  # the newest ones count
FP16 = 2  # bytes


# --- bytes and MACs ------------------------------------------------------------------------------
def stored_bytes(parameters: int, layers: list[dict[str, Any]], chosen_later: bool = False) -> dict[str, int | None]:
    """Bytes of the tensors in fp16: ``dense``, and ``packed`` as packed.py stores them (values and codes).

    ``layers``: those of ``inputs.preview``. ``chosen_later``: the patterns come from a budget when the run begins,
    so that the size of their codes is not known, and ``packed`` is None.
    """
    dense = parameters * FP16
    if chosen_later:
        return {"dense": dense, "packed": None}
    packed = dense
    for layer in (layer for layer in layers if layer["eligible"]):
        found, groups = parse_pattern(layer["pattern"]), layer["groups"]
        bits = (math.comb(found.m, found.n) - 1).bit_length()
        packed += bits * -(-groups // 8) - groups * (found.m - found.n) * FP16
    return {"dense": dense, "packed": packed}


def sparse_macs(macs: int, layers: list[dict[str, Any]], positions: dict[str, int]) -> int:
    """Theoretical MACs of one image where hardware skips the pruned weights: ``evaluate.sparse_macs``, predicted.

    ``positions``: how often each layer's weight is used for one image (:func:`look_up`).
    """
    skipped = 0.0
    for layer in (layer for layer in layers if layer["eligible"]):
        share = 1 - parse_pattern(layer["pattern"]).density
        skipped += math.prod(layer["shape"]) * positions[layer["layer"]] * share
    return round(macs - skipped)


def look_up(source: str, runs_dir: Path) -> dict[str, Any]:
    """A model's image ``shape``, and the ``positions`` at which each layer's weight is used for one image.

    Positions depend on the image size alone: pruning does not change them. ValueError when there is no such model.
    """
    from . import inputs, unet

    model = unet.load(inputs.resolve_source(source, runs_dir))
    positions: dict[str, int] = {}

    def counter(name: str):
        def count(module: Any, given: tuple, output: Any) -> None:
            positions[name] = output[0].numel() // module.weight.shape[0]

        return count

    for name, module in model.unet.named_modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) >= 2:
            module.register_forward_hook(counter(name))
    unet.macs(model.unet)
    return {"shape": model.image_shape, "positions": positions}


# --- time ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Past:
    """What one finished run tells of time. ``pace``: seconds a step and MAC by stage; ``rest``: seconds of a stage
    beside its steps, such as the cut, samples and figures; ``macs``: of the model that its stages trained."""

    run: str
    recipe: Recipe
    pace: dict[str, float]
    rest: dict[str, float]
    macs: int


@dataclass(frozen=True)
class Forecast:
    """Seconds by stage, the runs that they rest on (newest first), and the stages that no run tells of."""

    stages: dict[str, float]
    runs: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


def past(run: Run) -> Past | None:
    """What a run tells of time; None unless it is done, of this machine, and has its figures.

    StoreError or RecipeError for a damaged folder.
    """
    state = run.state()
    if state.status != "done" or state.host != socket.gethostname():
        return None
    recipe, found = run.recipe(), run.evaluation()
    name = "structured" if recipe.prune.target > 0 else "dense"
    if name not in found:
        return None
    dense, macs = found.get("dense", found[name])["macs"], found[name]["macs"]
    seconds = step_seconds(run.metrics())
    pace = {stage: value / stage_macs(stage, dense, macs) for stage, value in seconds.items()}
    return Past(run.id, recipe, pace, _rest(run.events(), recipe, seconds), macs)


def step_seconds(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Stage to the median time between neighbouring steps: pauses, samples and checkpoints do not move it."""
    gaps: dict[str, list[float]] = {}
    before: dict[str, Any] = {}
    for record in records:
        if before.get("stage") == record["stage"] and record["step"] == before["step"] + 1:
            gaps.setdefault(record["stage"], []).append(record["time"] - before["time"])
        before = record
    return {stage: median(found) for stage, found in gaps.items() if len(found) >= FEWEST_STEPS}


def _rest(events: list[dict[str, Any]], recipe: Recipe, seconds: dict[str, float]) -> dict[str, float]:
    """Time of each stage beside its steps; nothing of a run that was resumed, whose stages are in parts."""
    if sum(event["kind"] == "started" for event in events) != 1:
        return {}
    rest, began, held = {}, 0.0, 0.0
    steps = planned(recipe)
    for event in events:
        if event["kind"] == "stage":
            began, held = event["time"], 0.0
        elif event["kind"] == "continued":
            held += event["seconds"]
        elif event["kind"] == "stage_done":
            stage = event["stage"]
            trained = steps.get(stage, 0) * seconds.get(stage, 0.0)
            rest[stage] = max(0.0, event["time"] - began - held - trained)
    return rest


def planned(recipe: Recipe) -> dict[str, int]:
    """Training steps of each stage."""
    prune, mask = recipe.prune, recipe.mask
    steps = {"prune": 0, "finetune": 0, "mask": 0, "recover": 0}
    if prune.target > 0:
        steps |= {"prune": (prune.rounds - 1) * prune.round_steps, "finetune": prune.finetune_steps}
    if mask.method != "none":
        still = mask.method in FIXED_METHODS and not mask.train_weights
        steps |= {"mask": 0 if still else mask.steps, "recover": mask.recover_steps}
    return steps


def stage_macs(stage: str, dense: int, structured: int) -> float:
    """MACs of the model that a stage trains: between two cuts, half-way from dense to pruned."""
    return (dense + structured) / 2 if stage == "prune" else structured


def comparable(a: Recipe, b: Recipe) -> bool:
    """Whether a step of one recipe costs what a step of the other does, MACs aside."""
    return _setup(a) == _setup(b)


def _setup(recipe: Recipe) -> tuple:
    source = Path(recipe.model.source).expanduser()
    model = str(source.absolute()) if source.is_dir() else recipe.model.source
    train = recipe.train
    return model, recipe.data.batch_size, train.precision, recipe.device, train.distill > 0


def _work(recipe: Recipe, stage: str) -> tuple:
    """What the cost of a stage's step depends on beside the setup."""
    mask = recipe.mask
    return (mask.method, mask.samples, mask.antithetic, mask.train_weights) if stage == "mask" else ()


def _beside(recipe: Recipe, stage: str) -> tuple:
    """What the rest of a stage's time depends on."""
    prune, mask = recipe.prune, recipe.mask
    skipped = {"prune": prune.target == 0, "finetune": prune.target == 0}
    found: dict[str, tuple] = {
        "prune": (prune.method, prune.of, prune.layout, prune.ranking, prune.rounds),
        "mask": (mask.method, mask.initial, mask.density is None),
        "recover": (mask.method == "none",),
        "evaluate": (
            tuple(recipe.eval.model_dump(exclude={"seed"}).values()), recipe.data.source, recipe.data.limit,
            prune.target == 0, mask.method == "none",
        ),
    }  # fmt: skip
    return (skipped.get(stage, False), *found.get(stage, ()))


def forecast(recipe: Recipe, dense: int, structured: int, known: Iterable[Past]) -> Forecast | None:
    """Time by stage of a recipe whose model has so many MACs before and after stage 1.

    ``known``: newest first. None where no run tells of any of its training.
    """
    like = [one for one in known if comparable(one.recipe, recipe)][:MOST_RUNS]
    stages: dict[str, float] = {}
    used: set[str] = set()
    unknown = []
    for stage in STAGES:
        paces, rests = _telling(recipe, stage, like)
        steps = planned(recipe).get(stage, 0)
        if (steps and not paces) or (not rests and _is_long(recipe, stage)):
            unknown.append(stage)
        macs = stage_macs(stage, dense, structured)
        seconds = steps * macs * median(p.pace[stage] for p in paces) if steps and paces else 0.0
        if rests and (paces or not steps):
            seconds += median(p.rest[stage] * (structured / p.macs if stage == "evaluate" else 1) for p in rests)
        if seconds:
            stages[stage] = seconds
            used |= {p.run for p in (*(paces if steps else ()), *rests)}
    trained = [stage for stage, steps in planned(recipe).items() if steps and stage in stages]
    return Forecast(stages, tuple(p.run for p in like if p.run in used), tuple(unknown)) if trained else None


def _telling(recipe: Recipe, stage: str, like: list[Past]) -> tuple[list[Past], list[Past]]:
    """The runs that tell how long a step of the stage takes, and those that tell of the rest of it."""
    paces = [p for p in like if stage in p.pace and _work(p.recipe, stage) == _work(recipe, stage)]
    rests = [p for p in like if stage in p.rest and _beside(p.recipe, stage) == _beside(recipe, stage)]
    return paces, rests


def _is_long(recipe: Recipe, stage: str) -> bool:
    """Whether a stage takes long beside its steps, so that not to know it must be said."""
    return stage == "evaluate" or (stage == "prune" and recipe.prune.target > 0)


def all_past(runs_dir: Path) -> list[Past]:
    """What all runs of a folder tell, newest first; damaged ones tell nothing."""
    found = []
    for run in store.all_runs(runs_dir):
        try:
            one = past(run)
        except (ValueError, OSError, KeyError, TypeError):
            continue
        if one is not None:
            found.append(one)
    return found
