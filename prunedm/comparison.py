"""Any set of judged models side by side: differences from dense, efficiency, Pareto fronts.

Two figures are compared only where they hold for the same conditions: the same extractor, number of images,
sampler, steps and seed and the same real images for quality; the same machine, device, dtype and batch for time.
Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .records import VARIANT_LABELS
from .store import Run, find, is_run

SAMPLED = ("sampler", "steps", "eta", "seed", "extractor")
TIMED = ("device", "dtype", "batch")


@dataclass
class Judged:
    """One model with all that was found of it.

    figures: ``records.Evaluation`` as a dict. layers: ``records.LayerReport`` as dicts; empty where none
    were looked at. dense: the figures that differences are taken from, its own dense model's; None for a dense one.

    How to judge it again, where a run did not record it itself. source: what the commands find the model by, from any
    folder. asked: their options beside those that the figures record; None where nothing was asked for. beside: the
    run whose real images it was judged by.
    """

    label: str
    figures: dict[str, Any]
    variant: str | None = None
    run: Run | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    sheet: Path | None = None
    dense: dict[str, Any] | None = None
    source: str = ""
    asked: tuple[str, ...] | None = None
    beside: Run | None = None

    def get(self, key: str) -> Any:
        """A figure by its name, ``sizes.packed_fp16`` for a nested one; None when absent."""
        return figure(self.figures, key)


def figure(figures: dict[str, Any], key: str) -> Any:
    """A figure by its name, with a dot into a nested table; None when absent."""
    found: Any = figures
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def of_run(
    run: Run, results: dict[str, dict[str, Any]] | None = None, layers: list[dict[str, Any]] | None = None
) -> list[Judged]:
    """The variants of a run, dense first, from its own records or from those given in their place."""
    results = run.evaluation() if results is None else results
    dense = results.get("dense")
    found = []
    for name, figures in results.items():
        sheet = run.sheet(name)
        known = (run.layers() if layers is None else layers) if name == "nm" else []
        own = None if name == "dense" else dense
        label = f"{run.id} {VARIANT_LABELS[name]}"
        found.append(Judged(label, figures, name, run, known, sheet if sheet.exists() else None, own))
    return found


def recorded(sources: Sequence[str], runs_dir: Path) -> list[Judged] | None:
    """The figures that runs recorded themselves, where all sources are runs that were judged alike; else None."""
    found: list[Judged] = []
    settings: set[str] = set()
    for source in sources:
        run_id, _, variant = source.partition("/")
        if not is_run(runs_dir, run_id):
            return None
        run = find(runs_dir, run_id)
        own = [one for one in of_run(run) if variant in ("", one.variant)]
        if not own or any(one.get("sizes") is None or one.get("latency_ms") is None for one in own):
            return None
        settings.add(run.recipe().eval.model_dump_json())
        found += own
    return without_repeats(found) if len(settings) == 1 else None


def without_repeats(judged: Sequence[Judged]) -> list[Judged]:
    """The dense model once for runs that share it: the first of those with the same quality figures."""
    found: list[Judged] = []
    seen: list[tuple] = []
    for one in judged:
        if one.variant == "dense":
            same = (one.get("validation_loss"), one.get("fid"), one.get("parameters"), _sampled(one))
            if same in seen:
                continue
            seen.append(same)
        found.append(one)
    return found


# --- Pareto fronts ---------------------------------------------------------------------------
@dataclass
class Axis:
    """A figure to make small, its name in words, and the conditions under which it may be compared."""

    key: str
    short: str
    label: str
    conditions: Callable[[Judged], tuple]


@dataclass(frozen=True, eq=False)
class Told:
    """A condition that older records only name: alike if ``sure`` is, or, where one lacks it, if ``said`` is.

    An older record may be like two that differ, so this is no key: :func:`grouped` compares each with each.
    """

    sure: Any
    said: Any = None

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Told):
            return NotImplemented
        return self.said == other.said if None in (self.sure, other.sure) else self.sure == other.sure


def real_images(one: Judged) -> Told:
    """The real images by their content, else by the name of the data set: two folders may share one."""
    return Told(one.get("sampling.digest"), one.get("sampling.data"))


def machine(one: Judged) -> Told:
    """Where a model was timed."""
    return Told((one.get("host"), one.get("processor")) if one.get("host") else None)


def _sampled(one: Judged) -> tuple:
    sampling = one.get("sampling") or {}
    how = (sampling.get(key) for key in SAMPLED)
    return (one.get("fid_extractor"), one.get("fid_images"), *how, real_images(one))


def _timed(one: Judged) -> tuple:
    return (*(one.get(key) for key in TIMED), machine(one))


def _validated(one: Judged) -> tuple:
    """Another target of the prediction, or other trained timesteps, is another task with losses of its own.

    Records from before it was kept are of models that predict the noise.
    """
    task = (one.get("timesteps"), one.get("prediction_type") or "epsilon")
    return (one.get("validation_images"), one.get("sampling.seed"), *task, real_images(one))


def _always(one: Judged) -> tuple:
    return ()


QUALITIES = (
    Axis("fid", "FD", "Frechet distance", _sampled),
    Axis("validation_loss", "loss", "validation loss", _validated),
)
COSTS = (
    Axis("macs", "MACs", "MACs an image (dense arithmetic)", _always),
    Axis("nonzero_parameters", "parameters", "parameters that are not zero", _always),
    Axis("sizes.packed_fp16", "bytes", "bytes, packed fp16", _always),
    Axis("latency_ms", "ms", "latency of a UNet call, ms (measured)", _timed),
)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: none is at most as large in both and smaller in one."""
    return [
        not any(a <= x and b <= y and (a < x or b < y) for a, b in points)  # itself and its equals do not beat it
        for x, y in points
    ]


def grouped(judged: Sequence[Judged], conditions: Callable[[Judged], Any]) -> list[list[Judged]]:
    """The models in groups within which any two agree in their conditions, in the order given."""
    groups: list[list[Judged]] = []
    for one in judged:
        own = conditions(one)
        group = next((group for group in groups if all(conditions(other) == own for other in group)), None)
        if group is None:
            groups.append(group := [])
        group.append(one)
    return groups


@dataclass
class Plot:
    """Models that may be compared on two axes, and which are on the front."""

    cost: Axis
    quality: Axis
    judged: list[Judged]
    on_front: list[bool]
    conditions: tuple


def pareto(judged: Sequence[Judged]) -> list[Plot]:
    """A plot for each pair of cost and quality and each set of conditions under which two models or more have both."""
    plots = []
    for cost in COSTS:
        for quality in QUALITIES:
            known = [one for one in judged if one.get(cost.key) is not None and one.get(quality.key) is not None]

            def both(one: Judged, axes: tuple[Axis, Axis] = (cost, quality)) -> tuple:
                return tuple(axis.conditions(one) for axis in axes)

            for members in grouped(known, both):
                if len(members) > 1:
                    kept = front([(m.get(cost.key), m.get(quality.key)) for m in members])
                    plots.append(Plot(cost, quality, members, kept, both(members[0])))
    return plots


def fronts(judged: Sequence[Judged]) -> dict[int, list[tuple[Axis, Axis, bool]]]:
    """For each model (by its ``id``) the quality and cost it was compared on, and whether it is on that front."""
    found: dict[int, list[tuple[Axis, Axis, bool]]] = {}
    for plot in pareto(judged):
        for one, is_on in zip(plot.judged, plot.on_front):
            found.setdefault(id(one), []).append((plot.quality, plot.cost, is_on))
    return found


# --- efficiency ------------------------------------------------------------------------------
def efficiency(one: Judged) -> dict[str, float | None]:
    """What was saved and what it cost, as ratios to the model's own dense one; None where either is absent.

    compression: dense fp16 bytes over packed fp16 bytes. macs, macs_sparse, latency: of dense (below 1 is a
    saving). fid, validation_loss: of dense (above 1 is a loss); absent where the conditions differ, as the latency is
    where :func:`timed_apart` says why.
    """
    dense = one.dense
    names = ("compression", "macs", "macs_sparse", "latency", "validation_loss", "fid")
    if dense is None:
        return dict.fromkeys(names)
    base = Judged("", dense)
    found = {
        "compression": _ratio(figure(dense, "sizes.dense_fp16"), one.get("sizes.packed_fp16")),
        "macs": _ratio(one.get("macs"), dense.get("macs")),
        "macs_sparse": _ratio(one.get("macs_sparse"), dense.get("macs")),
        "latency": None if timed_apart(one) else _ratio(one.get("latency_ms"), dense.get("latency_ms")),
    }
    for axis in QUALITIES[::-1]:
        same = axis.conditions(one) == axis.conditions(base)
        found[axis.key] = _ratio(one.get(axis.key), dense.get(axis.key)) if same else None
    return found


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def timed_apart(one: Judged) -> str:
    """Why the latencies of a model and its dense one have no ratio, in words; empty where nothing forbids one.

    A machine drifts between two sessions. Earlier versions recorded no session, and timed a run's models in turn.
    """
    base = Judged("", one.dense or {})
    if None in (one.get("latency_ms"), base.get("latency_ms")):
        return ""
    if _timed(one) != _timed(base):
        return "timed under other conditions than the dense model"
    same = one.get("speed_session") == base.get("speed_session")
    return "" if same else "timed in another session than the dense model"


def loss_change(one: Judged, draws: int = 2000) -> tuple[float, float, float] | None:
    """Change of the validation loss from dense as a share, with its 95 % bootstrap interval over pairs.

    Both models saw the same images, timesteps and noise, so most of what makes the loss itself uncertain cancels.
    None where the pairs are not known or the conditions differ.
    """
    dense = Judged("", one.dense or {})
    pair = (one.get("validation_errors"), dense.get("validation_errors"))
    if None in pair or len(pair[0]) != len(pair[1]) or _validated(one) != _validated(dense):
        return None
    ours, theirs = (np.asarray(errors, np.float64) for errors in pair)
    places = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))
    changes = ours[places].mean(1) / theirs[places].mean(1) - 1
    low, high = np.quantile(changes, [0.025, 0.975])
    return float(ours.mean() / theirs.mean() - 1), float(low), float(high)


def verdict(one: Judged) -> str:
    """How loss and Frechet distance differ from dense, and whether chance alone explains it, in words."""
    found = loss_change(one)
    parts = [_distance_verdict(one)]
    if found is not None:
        mean, low, high = found
        parts.insert(0, f"validation loss changed by {mean:+.1%} (95 % interval over pairs: {low:+.1%} to {high:+.1%})")
    return "; ".join(part for part in parts if part)


def _distance_verdict(one: Judged) -> str:
    dense = one.dense
    if dense is None or one.get("fid") is None or dense.get("fid") is None:
        return ""
    if _sampled(one) != _sampled(Judged("", dense)):
        return ""
    change = one.get("fid") - dense["fid"]
    share = f" ({change / dense['fid']:+.1%})" if dense["fid"] else ""
    text = f"{one.get('fid_extractor')} changed by {change:+.3f}{share}"
    spreads = (one.get("fid_std"), dense.get("fid_std"))
    if None not in spreads:
        noise = 2 * math.hypot(*spreads)
        means = "more than other seeds would" if abs(change) > noise else "no more than other seeds could"
        text += f", {means} (two standard deviations: {noise:.3f})"
    floor = figure(dense, "noise_floor.samples.fid")
    if floor is not None:
        side = "below" if change <= floor else "above"
        text += f"; it is {side} the noise floor, the {floor:.3f} between two sets of dense samples"
    elif None in spreads:
        text += "; no noise was measured, so small changes mean nothing"
    return text
