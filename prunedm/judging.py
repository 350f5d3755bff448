"""Any models judged alike: runs, model folders, packed files, hub ids; at one setting, results kept.

Quality and sizes are kept by the digest of all that they depend on: in a run's own folder (``evaluations/``), for
other models in the cache. Speed belongs to a machine and a moment, and is kept for a set that was timed in turn.
"""

from __future__ import annotations

import copy
import dataclasses
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import (
    bundled,
    cache,
    data,
    evaluate,
    extractors,
    latency,
    onnx_export,
    provenance,
    semi_structured,
    unet,
)
from .comparison import Judged
from .extractors import Extractor
from .judge_entries import Entry, JudgeError
from .judge_entries import entries as entries  # the first of two calls: judge(entries(...), ...)
from .quality import Judge, Target
from .recipe import Data, Eval, merge
from .recipe import build as build_recipe
from .subject import Subject

VERSION = 1
MODES = ("standard", "quick", "full")
QUICK, FULL = {"images": 128, "steps": 10, "noise_floor": False}, {"images": 2048}
QUICK_ROUNDS = 9
SPEED_VERSION, SEMI_STRUCTURED = 2, "semi-structured"
CPU_ONLY = "ONNX Runtime is timed on the CPU only; judge with --device cpu"
WAYS = (*latency.WAYS, SEMI_STRUCTURED)
BATCHES = {"quick": (latency.BATCH,), "standard": latency.BATCHES, "full": latency.BATCHES}
DEFAULT_WAYS = {"quick": ("eager",), "standard": ("eager",), "full": ("eager", "channels_last")}

Progress = Callable[[str, int, int], None]


@dataclass
class Request:
    """What to judge by. ``changes``: fields of Eval that were asked for; they win over the mode's."""

    mode: str = "standard"
    changes: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    dense: str | None = None
    device: str = "auto"
    ways: tuple[str, ...] = ()
    fresh_speed: bool = False

    def __post_init__(self) -> None:
        unknown = [way for way in self.ways if way not in WAYS]
        if unknown:
            raise JudgeError(f"--ways {unknown[0]} is not known; use some of {', '.join(WAYS)}")
        if SEMI_STRUCTURED in self.ways:
            if self.device != "auto" and not self.device.startswith("cuda"):
                raise JudgeError(f"--ways {SEMI_STRUCTURED} runs on CUDA only; leave it out, or --device {self.device}")
            semi_structured.require_cuda("leave it out of --ways, or judge on the machine that has one")

    def settings(self, base: Eval) -> Eval:
        """The settings on top of a run's own, or of the defaults; RecipeError for values that cannot be."""
        mode = {"quick": QUICK, "full": FULL}.get(self.mode, {})
        return build_recipe({"eval": merge(merge(base.model_dump(), mode), self.changes)}).eval

    def options(self, entry: Entry) -> tuple[str, ...]:
        """What the commands must be given to judge the model so again, beside what its figures record."""
        dense = entry.dense.source if entry.run is None and entry.dense is not None else ""
        images = data.absolute(Data(source=self.data)) if self.data else ""
        given = {"--data": images, "--dense": dense, "--ways": ",".join(self.ways)}
        given["--device"] = "" if self.device == "auto" else self.device
        mode = () if self.mode == "standard" else (f"--{self.mode}",)
        return (*mode, *(word for name, value in given.items() if value for word in (name, value)))


# --- judging -----------------------------------------------------------------------------------
def common_settings(found: list[Entry], request: Request) -> Eval:
    """One setting for all: that of the runs' recipes where they agree, else the defaults, with what was asked for."""
    known = {entry.run.id: entry.run.recipe().eval for entry in found if entry.run is not None}
    agree = len({spec.model_dump_json() for spec in known.values()}) == 1
    return request.settings(next(iter(known.values())) if agree else Eval())


def judge(found: list[Entry], request: Request, tell: Progress = lambda text, done, of: None) -> list[Judged]:
    """Every figure of every model, from what is kept or measured now. ``tell``: what is done, steps of steps."""
    session = Session(common_settings(found, request), request, unet.resolve_device(request.device), tell)
    results: dict[int, Judged] = {}
    for entry in found:
        for one in (entry.dense, entry):  # a dense model that is not listed is judged too: it is the yardstick
            if one is not None and id(one) not in results:
                results[id(one)] = session.judged(one, results.get(id(one.dense)))
    listed = [results[id(entry)] for entry in found]
    timed = _with_dense(found)
    speeds = measure_speed(timed, request, session.device, tell)
    for entry in timed:
        results[id(entry)].figures |= speeds[entry.label]
    for entry, one in zip(found, listed):
        one.dense = results[id(entry.dense)].figures if entry.dense is not None else None
    if all(session.holds(entry) for entry in found):  # no speed of another device or model beside a run's figures
        _into_runs(found, speeds, request)
    return listed


def _with_dense(found: list[Entry]) -> list[Entry]:
    """Each model once, and before it its dense one, listed or not: a ratio needs both timed in one session."""
    return list({id(one): one for entry in found for one in (entry.dense, entry) if one is not None}.values())


def _into_runs(found: list[Entry], speeds: dict[str, dict[str, Any]], request: Request) -> None:
    """A run whose variants were just timed in turn, by themselves, takes the richer figures of speed as its own."""
    runs = {entry.run.folder: entry.run for entry in found if entry.run is not None}
    if len(runs) != 1 or request.mode == "quick":
        return
    run = next(iter(runs.values()))
    results = run.evaluation()
    own = {entry.variant: speeds[entry.label] for entry in found if entry.run is not None}
    if set(own) == set(results) and len(own) == len(found):
        run.write_evaluation({name: figures | own[name] for name, figures in results.items()})


@dataclass
class Session:
    """What all models of one judgement share."""

    settings: Eval
    request: Request
    device: torch.device
    tell: Progress

    @cached_property
    def network(self) -> Extractor:
        """The feature network, loaded once."""
        return extractors.get(self.settings.extractor, str(self.device))

    def judged(self, entry: Entry, dense: Judged | None) -> Judged:
        """Sizes, sparsity and quality of one model; ``dense``: its dense model, for faithfulness."""
        model, patterns = entry.subject.model, entry.subject.patterns
        model.unet.to(self.device)
        figures, sheet = self._known(entry)
        if figures is None:
            figures, sheet = self._kept_or_made(entry, dense)
        layers = [dataclasses.asdict(row) for row in evaluate.layer_rows(model.unet, patterns)]
        one = Judged(entry.label, dict(figures), entry.variant, entry.run, layers, sheet)
        one.source, one.asked, one.beside = entry.source, self.request.options(entry), entry.lender
        return one

    def _known(self, entry: Entry) -> tuple[dict[str, Any] | None, Path | None]:
        """Figures and sheet that are there already: a run's own, or the bundled dense model's shipped ones."""
        wanted, given = _alike(self.settings), self.request.data
        recipe = entry.run.recipe() if entry.run is not None else None
        if recipe is not None and given is None and _alike(recipe.eval) == wanted:
            own, sheet = _own(entry), entry.run.sheet(entry.variant)
            if own.get("sizes") and sheet.exists() and self.holds(entry):
                return own, sheet
        source, images = entry.subject.name, given or (entry.subject.data or Data()).source
        if recipe is not None and entry.variant == "dense" and provenance.is_of(_own(entry), entry.fingerprint):
            source = recipe.model.source
        found = bundled.evaluation(self.settings)
        if found is None or (source, images) != (bundled.NAME, bundled.NAME):
            return None, None
        target = Target(entry.subject.model, entry.subject.place, bundled.sheet(self.settings))
        figures = dataclasses.replace(evaluate.counts(target), **bundled.figures(found))
        return figures.as_dict(), target.sheet

    def holds(self, entry: Entry) -> bool:
        """Whether what a run recorded is still of its files (and its dense model's), on this device and torch."""
        of = [one for one in (entry, entry.dense) if one is not None and one.run is not None]
        return all(provenance.holds(_own(one), one.fingerprint, self.device) for one in of)

    def _kept_or_made(self, entry: Entry, dense: Judged | None) -> tuple[dict[str, Any], Path | None]:
        """Figures and sheet from an earlier judgement of the same, or made now and kept."""
        images, absent = _images(entry, self.request)
        key, patterns = self._key(entry, images), entry.subject.patterns
        sheet = entry.home / f"{key}.png"
        figures = cache.read_record(entry.home, key)
        if figures is None or (images is not None and not sheet.exists()):
            target = Target(entry.subject.model, entry.subject.place, sheet, patterns, dense.sheet if dense else None)
            target.is_dense, target.info = entry.dense is None, {"model": entry.label}
            found = self._quality(entry, target, images) if images is not None else {}
            found |= evaluate.sparsity(entry.subject.model.unet, patterns)
            found |= {"made_by": provenance.of(entry.subject.place, self.device)}
            figures = dataclasses.replace(evaluate.counts(target), **found).as_dict()
            figures |= {"quality_absent": absent} if absent else {}
            cache.write_record(entry.home, key, figures)
        return figures, sheet if images is not None else None

    def _quality(self, entry: Entry, target: Target, images: data.Images) -> dict[str, Any]:
        entry.home.mkdir(parents=True, exist_ok=True)
        judged_by = Judge(self.settings, images, self.network)
        of = judged_by.steps(target)
        for i, found in enumerate(judged_by.quality(target)):
            self.tell(entry.label, i + 1, of)
        return found

    def _key(self, entry: Entry, images: data.Images | None) -> str:
        """Digest of all that the figures of quality and size depend on."""
        judged_by = None
        if images is not None:
            judged_by = (images.digest, self.network.weights, self.settings.model_dump())
        dense = entry.dense.fingerprint if entry.dense else None
        patterns = sorted(entry.subject.patterns.items())
        return cache.digest(VERSION, entry.fingerprint, dense, patterns, judged_by, self.device.type, torch.__version__)


def _own(entry: Entry) -> dict[str, Any]:
    """What the model's run recorded of it."""
    return entry.run.evaluation().get(entry.variant, {})


def _alike(settings: Eval) -> Eval:
    """The settings without what changes no figure of the others."""
    return settings.model_copy(update={"noise_floor": True})


def _images(entry: Entry, request: Request) -> tuple[data.Images | None, str]:
    """The real images to judge by, or why there are none: those asked for, the run's own, the bundled ones."""
    spec = Data(source=request.data) if request.data else entry.subject.data or Data()
    try:
        return data.load(spec, entry.subject.model.image_shape), ""
    except ValueError as error:
        if request.data or entry.run is not None:
            raise
        return None, f"no quality figures: {error} (--data)"


# --- speed -------------------------------------------------------------------------------------
def measure_speed(
    found: list[Entry], request: Request, device: torch.device, tell: Progress
) -> dict[str, dict[str, Any]]:
    """Label to the figures of speed of each model; all are timed in turn, unless this very set was timed before."""
    asked, batches = request.ways or DEFAULT_WAYS[request.mode], BATCHES[request.mode]
    ways = tuple(dict.fromkeys(("eager", *asked)))  # always plain calls too: the latency of this session is of them
    rounds = QUICK_ROUNDS if request.mode == "quick" else latency.ROUNDS
    labels = [entry.label for entry in found]
    where = (latency.device_name(device), socket.gethostname(), torch.__version__)
    key = cache.digest(SPEED_VERSION, labels, [entry.fingerprint for entry in found], ways, batches, rounds, where)
    place = cache.folder("speed")
    known = None if request.fresh_speed else cache.read_record(place, key)
    if known is None:
        known = evaluate.speed_figures(list(_timed(found, ways, batches, rounds, device, tell)), evaluate.new_session())
        cache.write_record(place, key, known)
    return known


def _timed(
    found: list[Entry],
    ways: tuple[str, ...],
    batches: tuple[int, ...],
    rounds: int,
    device: torch.device,
    tell: Progress,
) -> Iterator[latency.Speed]:
    """The rows of all models; those of converted copies under their model's name, with a way of their own.

    What was asked for and cannot be timed at all is a row without figures, with the reason.
    """
    copies, absent = _converted(found, device) if SEMI_STRUCTURED in ways else ({}, {})
    plain, graphs = tuple(way for way in ways if way in latency.WAYS), {}
    if "onnxruntime" in ways and device.type == "cpu":
        graphs = {entry.label: _graph(entry.subject) for entry in found}
    elif "onnxruntime" in ways:
        plain = tuple(way for way in plain if way != "onnxruntime")
        absent |= {(entry.label, "onnxruntime"): CPU_ONLY for entry in found}
    names = {"\n".join(key): key for key in copies}  # no model's label has two lines
    variants = {entry.label: entry.subject.model.unet for entry in found} | dict(zip(names, copies.values()))
    of = latency.benchmark_steps(batches, rounds)
    for i, rows in enumerate(latency.benchmark(variants, plain, batches, rounds, graphs, as_is=names)):
        tell("speed", i + 1, of)
    for row in rows:
        name, way = names.get(row.variant, (row.variant, row.way))
        yield dataclasses.replace(row, variant=name, way=way)
    for (name, way), reason in absent.items():
        yield from (latency.Speed(name, way, batch, rounds, None, absent=reason) for batch in batches)


def _graph(model: Subject) -> nn.Module:
    """The model in ONNX Runtime, through a graph in memory."""
    content = onnx_export.build(model.model.unet, {}).SerializeToString()
    return latency.OnnxModel(content, model.model.image_shape)


def _converted(
    found: list[Entry], device: torch.device
) -> tuple[dict[tuple[str, str], nn.Module], dict[tuple[str, str], str]]:
    """Copies in fp16 on a CUDA GPU, plain and with 2:4 layers on the sparse kernels, and the reasons for none.

    Both by label and way.
    """
    made, absent, way = {}, {}, f"{SEMI_STRUCTURED} fp16"
    for entry in found:
        plain, sparse = (copy.deepcopy(entry.subject.model.unet) for _ in range(2))
        made[entry.label, "fp16"] = nn.Module.to(plain, device.type, torch.float16)
        reason = semi_structured.none_fits(semi_structured.convert(sparse, torch.float16))
        if reason:
            absent[entry.label, way] = reason
        else:
            made[entry.label, way] = sparse
    return made, absent
