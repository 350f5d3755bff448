"""Further sheets of samples from numbered seeds: of a run's variants beside its figures, of folders in the cache.

Imports torch late, so that a page can ask what lies there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import bundled, cache, store
from .recipe import Eval

SHEET = 64  # samples


@dataclass(frozen=True)
class Sheets:
    """Where the sheets of one model under one way of sampling lie."""

    folder: Path
    stem: str

    def path(self, start: int) -> Path:
        """The sheet from the seed at place ``start`` on (it may not exist yet)."""
        return self.folder / f"{self.stem}-{start}.png"

    def drawn(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.stem}-*.png"))


def of_variant(run: store.Run, variant: str) -> Sheets:
    """Of a run's variant by its recipe's settings; the evaluation's own sheet has the first SHEET samples."""
    return Sheets(run.folder / "evaluations", f"seeds-{variant}-{bundled.settings_key(run.recipe().eval)}")


def of_folder(fingerprint: str, settings: Eval) -> Sheets:
    """Of a model that is of no run, known by the digest of its files (``subject.fingerprint``)."""
    s = settings
    return Sheets(cache.folder("evaluations") / fingerprint, f"seeds-{s.sampler}-{s.steps}-{s.seed}-eta{s.eta}")


def draw(source: str, start: int, runs_dir: Path, settings: Eval) -> Path:
    """One more sheet of ``RUN/variant``, by its recipe's settings, or of a model folder by those given.

    ValueError in one line for what is not there or cannot be loaded.
    """
    from . import subject, unet

    run_id, _, variant = source.partition("/")
    if store.is_run(runs_dir, run_id):
        run = subject.run_of(runs_dir, run_id)
        if variant not in run.variants():
            known = ", ".join(run.variants()) or "none yet"
            raise ValueError(f"{source}: run {run_id} has the variants {known}; name one of them")
        recipe, place = run.recipe(), run.variant(variant)
        info = {"run": run.id, "variant": variant, "recipe": recipe.to_yaml()}
        return _draw(of_variant(run, variant), start, place, info, recipe.eval, recipe.device)
    place = unet.locate(source)
    return _draw(of_folder(subject.fingerprint(place), settings), start, place, {"model": place.name}, settings, "auto")


def _draw(sheets: Sheets, start: int, place: Path, info: dict, settings: Eval, device: str) -> Path:
    from . import pictures, subject, unet
    from .quality import how
    from .samples import SampleSet

    path = sheets.path(start)
    if not path.exists():
        model = unet.load(str(place))
        model.unet.to(unet.resolve_device(device))
        images = SampleSet(model, subject.fingerprint(place), settings).images(start, start + SHEET)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomic(path, pictures.sheet_png(images, info | {"start": start} | how(settings)))
    return path
