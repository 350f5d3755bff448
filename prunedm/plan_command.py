"""``python -m prunedm plan``: what a recipe would take on a device that need not be here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .devices import HERE, PUBLISHED
from .terminal import AsJson, RunsDir

GIB = 2**30


def plan(
    recipe_file: Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="a UNet's folder or config.json, 'bundled', a run or a hub id; default: the recipe's"),
    ] = None,
    device: Annotated[str, typer.Option(help=f"{HERE} (measured), {', '.join(PUBLISHED)} (published)")] = HERE,
    gpus: Annotated[int, typer.Option(help="devices that share the batch")] = 1,
    preset: Annotated[str | None, typer.Option(help="smoke, balanced or quality")] = None,
    recipe_option: Annotated[Path | None, typer.Option("--recipe", help="the recipe, as the argument")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="change one field")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", help="of one device, for money beside device-hours")
    ] = None,
    efficiency: Annotated[float, typer.Option(help="share of published peaks that you expect to reach")] = 1.0,
    interconnect: Annotated[float | None, typer.Option(help="GB/s that a device sends to the others, one way")] = None,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help=f"measure {HERE} anew")] = False,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Predict memory, time, communication and cost on a device, without weights, images or the device itself."""
    from . import devices, recipe

    if recipe_file and recipe_option:
        raise recipe.RecipeError(f"recipe {recipe_file} and --recipe {recipe_option} are two; give one of them")
    wanted = recipe.resolve(recipe_file or recipe_option, preset, assignments)
    if model is not None:
        wanted.model.source = model
    known = None if device == HERE else devices.published(device)
    if known is not None and recalibrate:
        raise devices.DeviceError(f"recalibrate measures this machine and device={device} is published; use {HERE}")
    from . import inputs, outline, plan_model, unet
    from . import plan as plans

    if known is None:
        from . import calibration

        known = calibration.here(unet.resolve_device(wanted.device), recalibrate)
    setting = plan_model.Setting(devices.with_link(known, interconnect), gpus, price, efficiency)
    dense = outline.find(inputs.resolve_source(wanted.model.source, runs_dir))
    found = {"model_source": wanted.model.source} | plans.make(wanted, dense, setting)
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    import sys

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False)
    for line in heading(found):
        console.print(line)
    console.print(_stages(found))
    for line in closing(found):
        console.print(line)
    for table in _growth(found["growth"]):
        console.print(table)
    console.print("not counted: " + "; ".join(found["not_counted"]) + ".")


def heading(found: dict[str, Any]) -> list[str]:
    """What is planned and on what figures, in lines."""
    device, model = found["device"], found["model"]
    rates = ", ".join(f"{key} {value / 1e12:.4g} TFLOP/s" for key, value in device["flops"].items())
    if device["basis"] == "measured":
        low, high = device["spread"]["efficiency"]
        rates += f"; a network reaches {device['efficiency']:.2f} of them ({low:.2f} to {high:.2f})"
    link = device["interconnect"]
    return [
        f"{found['model_source']}: {model['parameters']:,} parameters, {model['macs'] / 1e9:.4g} G MACs an image; "
        f"after stage 1 {model['structured_parameters']:,} and {model['structured_macs'] / 1e9:.4g} G",
        f"{found['gpus']} x {device['name']}: {device['basis']} figures ({device['source']})",
        f"  {rates}; memory {device['memory'] / GIB:.1f} GiB at {device['bandwidth'] / 1e9:.4g} GB/s; to other devices "
        + (f"{link / 1e9:.4g} GB/s one way" if link else "unknown (--interconnect)"),
        f"training in {found['precision']}, {found['batch']} images a step in all; times are {found['times_are']}",
    ]


def closing(found: dict[str, Any]) -> list[str]:
    """Whether it fits, how long it takes in all and what that costs, in lines."""
    least = "at least " if found["device"]["basis"] == "published" and found["efficiency"] == 1 else ""
    lines = [f"in all {least}{duration(found['seconds'])} on {found['gpus']} device{'s' * (found['gpus'] > 1)}"]
    if found["communication_unknown"]:
        lines[0] += "; communication is not in it: give --interconnect"
    hours, price = f"cost: {least}{found['device_hours']:.3g} device-hours", found["price"]
    named = f"{price['total']:.3g} at {price['of_an_hour']:g} an hour, as given" if price else "give --price-per-hour"
    lines.append(f"{hours}; {least if price else ''}{named}")
    if not found["fits"]:
        lines.append("it does not fit: take a smaller data.batch_size, more devices or a larger device")
    return lines


def _stages(found: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("stage", "steps", "batch", "s a step", "sent a step", "time", "memory", "fits", "largest batch")
    for row in found["stages"]:
        step = f"{row['compute']:.3g}"
        step += f" + {row['communication']:.2g}" if row["communication"] else ""
        most = row["largest_batch"]
        table.add_row(
            row["what"], f"{row['steps']:,}", str(row["batch"]), step, size(row["sent"]), duration(row["seconds"]),
            size(row["memory_bytes"]), "yes" if row["fits"] else "NO", "none" if most is None else f"{most:,}",
        )  # fmt: skip
    return table


def _growth(growth: dict[str, list[dict[str, Any]]]) -> list[Any]:
    from rich.table import Table

    ranks = Table("ranks", "batch", "compute, s", "communication, s", "sent: fine-tuning", "gumbel", "reinforce")
    for row in growth["ranks"]:
        wait = row["communication"]
        sent = (size(row[f"sent_{name}"]) for name in ("finetune", "gumbel", "reinforce"))
        ranks.add_row(
            str(row["ranks"]), str(row["batch"]), f"{row['compute']:.3g}", "?" if wait is None else f"{wait:.2g}", *sent
        )
    images = Table("images a device", "compute, s", "kept for backward", "peak beside weights and state")
    for row in growth["images"]:
        kept = size(row["saved_activations"]), size(row["peak"])
        images.add_row(str(row["batch"]), f"{row['compute']:.3g}", *kept)
    models = Table("model", "parameters", "G MACs", "weights and training state", "s a call and image", "sent a step")
    for row in growth["parameters"]:
        figures = (
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e9:.4g}",
            size(row["training_state"]),
            f"{row['call']:.3g}",
        )
        models.add_row(row["model"], *figures, size(row["sent_finetune"]))
    return [ranks, images, models]


def size(count: float | None) -> str:
    """Bytes in words; nothing for None."""
    if count is None:
        return ""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def duration(value: float) -> str:
    """Seconds in words."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if value >= 2 * unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} s"
