"""What is judged or exported: a model, and all that is known of it, found by one name.

A name is a run (its last finished variant), ``RUN/variant``, a model folder, a packed file, 'bundled' or a hub id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import bundled, cache, maskfile, packed, pattern, store, unet, verify
from .recipe import Data
from .stage_recipes import Pattern
from .store import MASKS, VARIANT_RECORD


class SubjectError(ValueError):
    """A model that is not there or breaks what it claims, in one line."""


@dataclass
class Subject:
    """A model, float32 on the CPU, and all that is known of it. ``place`` is its folder or file."""

    model: unet.Diffusion
    name: str
    place: Path
    record: dict[str, Any] = field(default_factory=dict)  # prunedm.json
    patterns: dict[str, str] = field(default_factory=dict)  # layer to "N:M"
    masks: Path | None = None
    base: str | None = None  # the dense model, as the recipe names it
    data: Data | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def origin(self) -> dict[str, Any]:
        """Where the model comes from, for the records of files."""
        known = {key: self.record[key] for key in ("run", "variant", "parent", "method") if key in self.record}
        return {"source": self.name} | known


def find(source: str, variant: str | None, runs_dir: Path, read_as: Pattern, strict: bool = True) -> Subject:
    """The model of a run (its last finished variant unless told), a model folder, 'bundled' or a hub id.

    Patterns come from its masks manifest, else every layer that keeps ``read_as`` is one of that pattern.
    SubjectError where a variant is missing or, if ``strict``, a claimed pattern is not kept.
    """
    run_id, _, tail = source.partition("/")
    if store.is_run(runs_dir, run_id):
        found = _of_run(run_of(runs_dir, run_id), variant or tail or None)
    elif variant is not None:
        raise SubjectError(f"--variant {variant} is for runs and no run {source!r} is in {runs_dir}; leave it out")
    else:
        found = _of_folder(source)
    _take_patterns(found, read_as)
    broken = verify.broken_claims(layer_weights(found.model.unet), found.patterns) if strict else []
    if broken:
        raise SubjectError(f"{found.name}: {broken[0]}; restore the model or delete its {MASKS}")
    return found


def run_of(runs_dir: Path, run_id: str) -> store.Run:
    """A run whose models and masks are to be read; StoreError for one of a later version, where these may differ."""
    run = store.find(runs_dir, run_id)
    run.state()
    return run


def _of_run(run: store.Run, variant: str | None) -> Subject:
    finished = run.variants()
    if not finished or (variant and variant not in finished):
        known = ", ".join(finished) or "none yet"
        raise SubjectError(f"--variant {variant or 'nm'}: run {run.id} has the variants {known}; name one of them")
    name = variant or finished[-1]
    found = _of_folder(str(run.variant(name)))
    recipe = run.recipe()
    found.name, found.base, found.data = f"{run.id}/{name}", recipe.model.source, recipe.data
    found.record = {"run": run.id} | found.record
    found.results = run.evaluation()
    return found


def _of_folder(source: str) -> Subject:
    model = unet.load(source)
    folder = unet.locate(source)
    if folder.is_file():
        found = packed.manifest(folder)
        patterns = {n.removesuffix(".weight"): e["pattern"] for n, e in found["tensors"].items() if "pattern" in e}
        known = found["config"].get("record")
        return Subject(model, source, folder, known if isinstance(known, dict) else {}, patterns)
    record = folder / VARIANT_RECORD
    known = store.read_json(record) if record.is_file() else {}
    if not isinstance(known, dict):
        raise SubjectError(f"{record} holds no JSON object; delete it or restore the model")
    earlier = known.pop("export", None)  # the entry of the export that made this folder
    claimed = earlier.get("patterns") if isinstance(earlier, dict) else None
    masks = folder / MASKS
    base = source if source == bundled.NAME or not Path(source).expanduser().is_dir() else None
    patterns = verify.checked_claims(claimed, record)
    return Subject(model, source, folder, known, patterns, masks if masks.is_file() else None, base)


def _take_patterns(found: Subject, read_as: Pattern) -> None:
    """Patterns by the masks manifest, else as the record says, else what the weights keep."""
    if found.masks is not None:
        maskfile.read(found.masks)  # torn or altered: refused here
        layers = maskfile.manifest(found.masks)["layers"]
        found.patterns = {name: layer["pattern"] for name, layer in layers.items()}
    elif not found.patterns:
        found.patterns = {
            name: str(read_as) for name, weight in layer_weights(found.model.unet).items() if keeps(weight, read_as)
        }


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """Layer name to weight of each convolution and linear layer."""
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def keeps(weight: Tensor, wanted: Pattern) -> bool:
    """Whether every group of a weight has at most N non-zero values."""
    return not pattern.ineligible(weight.shape, wanted.m) and pattern.compliance(weight, *wanted) == 1


def fingerprint(place: Path) -> str:
    """Digest of a model on disk: its weights and the configs of UNet and scheduler, whatever its name and place."""
    if place.is_file():
        return cache.digest(cache.sha256(place))
    configs = [unet.unet_folder(place) / "config.json", place / "scheduler" / "scheduler_config.json"]
    files = [*unet.weight_files(unet.unet_folder(place)), *configs, place / "scheduler_config.json"]
    return cache.digest([(file.name, cache.sha256(file)) for file in files if file.is_file()])
