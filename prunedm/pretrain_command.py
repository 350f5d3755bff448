"""``python -m prunedm pretrain``: a dense model from images of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .interrupts import interruptions
from .terminal import FAILED, INTERRUPTED, AsJson

if TYPE_CHECKING:
    from .data import Images
    from .pretrain import Plan
    from .records import Step

DEFAULT_STEPS = 20_000
SHOWN = 5  # skipped images named on the screen; all are in the folder's log
SECTIONS = ("data", "train")  # of the recipe: what --set may change


def _option(name: str, default: str, text: str) -> Any:
    """An option that may be left empty, with what it then is: --resume must know which ones were given."""
    return typer.Option(name, show_default=default, help=text)


def pretrain(
    out: Annotated[Path, typer.Option(help="folder for the model; unfinished trainings are kept there too")],
    source: Annotated[
        str | None,
        typer.Option("--data", show_default=False, help="a folder of images, or what data.source of a recipe takes"),
    ] = None,
    size: Annotated[int | None, _option("--size", "32", "image side in pixels")] = None,
    channels: Annotated[int | None, _option("--channels", "3", "3: colour, 1: grey")] = None,
    widths: Annotated[str | None, _option("--widths", "64,128,128", "channels of each resolution level")] = None,
    layers_per_block: Annotated[int | None, _option("--layers-per-block", "2", "residual blocks of a level")] = None,
    attention_at: Annotated[
        str | None, _option("--attention-at", "the last level", "levels with attention: 1,2 or none; 0 is the first")
    ] = None,
    steps: Annotated[int | None, _option("--steps", f"{DEFAULT_STEPS}", "training steps")] = None,
    batch_size: Annotated[int | None, _option("--batch-size", "64", "images in a training step")] = None,
    lr: Annotated[float | None, _option("--lr", "0.0002", "peak learning rate")] = None,
    seed: Annotated[int | None, _option("--seed", "0", "seed of weights, batches, timesteps and noise")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="another field of the recipe's data or train"),
    ] = None,
    device: Annotated[str | None, _option("--device", "auto", "auto, cpu, cuda, cuda:1 or mps")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the unfinished training in --out")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a dense UNet on images of your own, as a model to prune. Ctrl-C saves; --resume goes on."""
    shape = {"size": size, "channels": channels, "widths": widths, "layers-per-block": layers_per_block,
             "attention-at": attention_at}  # fmt: skip
    fields = {"data.source": source, "data.batch_size": batch_size, "train.lr": lr, "seed": seed}
    given = shape | {"data": source, "batch-size": batch_size, "lr": lr, "seed": seed, "steps": steps,
                     "set": assignments or None}  # fmt: skip
    if resume:
        _require_none(given)
        plan, begin = _reopened(out, device)
    else:
        plan, begin = _planned(out, shape, fields | {"device": device}, assignments or [], steps)
    _work(plan, begin, out, as_json)


def _require_none(given: dict[str, Any]) -> None:
    from .pretrain import PretrainError

    named = [f"--{name}" for name, value in given.items() if value is not None]
    if named:
        raise PretrainError(f"--resume goes on with the options in the folder; leave out {' '.join(named)}")


def _reopened(out: Path, device: str | None) -> tuple[Plan, Callable[[], Any]]:
    from . import pretrain as engine

    run, plan = engine.reopen(out.expanduser(), device)
    return plan, lambda: run


def _planned(
    out: Path, shape: dict[str, Any], fields: dict[str, Any], assignments: list[str], steps: int | None
) -> tuple[Plan, Callable[[], Any]]:
    """The plan, and what makes its folder once the images are there."""
    from . import data
    from . import pretrain as engine
    from . import recipe as recipes

    if fields["data.source"] is None:
        raise engine.PretrainError("--data is missing; give a folder of images, hf:owner/name or cifar10")
    document: dict[str, Any] = {}
    for path, value in fields.items():
        if value is not None:
            document = recipes.merge(document, _nested(path, value))
    for text in assignments:
        changed = recipes.assignment(text)
        if next(iter(changed)) not in SECTIONS:
            raise engine.PretrainError(f"--set {text}: a pretraining reads data and train only; try data.flip=true")
        document = recipes.merge(document, changed)
    recipe = recipes.build(document)
    recipe.data.source = data.absolute(recipe.data)
    chosen: dict[str, Any] = {}
    for name, value in shape.items():
        if value is not None:
            chosen[name.replace("-", "_")] = _numbers(name, value) if isinstance(value, str) else value
    plan = engine.Plan(recipe, engine.Architecture(**chosen), DEFAULT_STEPS if steps is None else steps)
    return plan, lambda: engine.begin(out.expanduser(), plan)


def _nested(path: str, value: Any) -> dict[str, Any]:
    """``"train.lr", 1`` to ``{"train": {"lr": 1}}``."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """``"64,128"`` to ``(64, 128)``, ``"none"`` to ``()``."""
    from .pretrain import PretrainError

    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PretrainError(f"--{name}={text!r} must be numbers with commas between; try 64,128,128") from None


def _work(plan: Plan, begin: Callable[[], Any], out: Path, as_json: bool) -> None:
    """Load the images, train with a progress bar, say how it ended."""
    from . import data, unet
    from . import pretrain as engine
    from .failure import plain_words

    unet.resolve_device(plan.recipe.device)
    images = data.load(plan.recipe.data, plan.architecture.shape)
    _print_images(images)
    run = begin()
    try:
        with interruptions("training") as stop, _bar(plan.steps) as on_step:
            record = engine.execute(run, plan, images, on_step, stop)
    except (ArithmeticError, RuntimeError, MemoryError) as error:
        print(f"error: {plain_words(error, 'data.batch_size')}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    if record is None:
        print(f"stopped; go on with: python -m prunedm pretrain --out {out} --resume")
        raise typer.Exit(INTERRUPTED)
    loss = record["validation_loss"]
    print(f"validation loss {loss['before']:.5f} before, {loss['after']:.5f} after {plan.steps} steps")
    print(f"{out} holds the model ({record['parameters']:,} parameters, {record['seconds']:.0f} s); prune it with:")
    print(f"python -m prunedm run --set model.source={out} --set data.source={plan.recipe.data.source}")
    if as_json:
        print(json.dumps(record))


def _print_images(images: Images) -> None:
    print(f"{len(images.train):,} images to train on, {len(images.held_out):,} held out")
    if images.skipped:
        print(f"{len(images.skipped)} skipped (log.txt names them all):", file=sys.stderr)
    for line in images.skipped[:SHOWN]:
        print(f"  {line}", file=sys.stderr)


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[Step], None]]:
    """A progress bar with the loss, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    loss = TextColumn("{task.fields[loss]:>13}")
    columns = (TextColumn("Train"), BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def show(step: Step) -> None:
            if not bars.tasks:  # from here on its speed is measured: a resumed training does not begin at 0
                bars.add_task("train", total=steps, completed=step.step, loss="")
            bars.update(bars.tasks[0].id, completed=step.step, loss=f"loss {step.values['loss']:.5f}")

        yield show
