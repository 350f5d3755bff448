"""``python -m prunedm masks extract|show|verify|baseline``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .terminal import AsJson, RunsDir

Source = Annotated[str, typer.Argument(help="a run, an nm variant's folder or a masks file")]

app = typer.Typer(help="Masks as files: packed bits in safetensors, with a JSON manifest.", rich_markup_mode=None)


def locate(source: str, runs_dir: Path) -> Path:
    """The masks file of a run's id, of a folder, or the file itself."""
    from . import maskfile, store

    is_run = store.is_run(runs_dir, source)
    return maskfile.locate(runs_dir / source if is_run else Path(source).expanduser())


@app.command()
def extract(
    source: Source,
    out: Annotated[Path, typer.Option(help="file to write; its manifest goes beside it")] = Path("masks.safetensors"),
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Copy the masks of a run to a file that another recipe can start from (mask.initial)."""
    from . import maskfile

    if out.suffix != ".safetensors":
        raise maskfile.MaskFileError(f"--out {out} must end in .safetensors")
    path = locate(source, runs_dir)
    masks, record = maskfile.read(path), maskfile.manifest(path)
    origin = {key: value for key, value in record.items() if key not in ("schema", "sha256", "layers")}
    patterns = {name: layer["pattern"] for name, layer in record["layers"].items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    maskfile.write(out, masks, patterns, origin)
    print(f"{len(masks)} masks written to {out} and {maskfile.manifest_path(out)}")


@app.command()
def show(source: Source, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Show the layers of a masks file: pattern, density and how evenly the positions are used."""
    from . import maskfile, pattern
    from .stage_recipes import parse_pattern

    path = locate(source, runs_dir)
    masks, record = maskfile.read(path), maskfile.manifest(path)
    rows = []
    for name, mask in masks.items():
        layer = record["layers"][name]
        balance = pattern.position_balance(pattern.group(mask, parse_pattern(layer["pattern"]).m)).tolist()
        shares = [round(share, 4) for share in balance]
        rows.append({"layer": name, **layer, "density": layer["kept"] / mask.numel(), "position_balance": shares})
    if as_json:
        print(json.dumps({key: value for key, value in record.items() if key != "layers"} | {"layers": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "shape", "pattern", "kept", "density", "kept on each position", title=str(path))
    for row in rows:
        shape, balance = "x".join(map(str, row["shape"])), " ".join(f"{s:.1%}" for s in row["position_balance"])
        table.add_row(row["layer"], shape, row["pattern"], f"{row['kept']:,}", f"{row['density']:.1%}", balance)
    Console(width=140).print(table)


@app.command()
def verify(
    source: Source,
    model: Annotated[Path | None, typer.Option(help="UNet folder whose pruned weights must be zero")] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Check a masks file: hash, exactly N of M in every group, and zeros in the model that wears it."""
    from . import maskfile

    path = locate(source, runs_dir)
    beside = path.parent / "unet"
    model = model or (beside if beside.is_dir() else None)
    problems = maskfile.verify(path, model)
    for problem in problems:
        print(f"PROBLEM: {problem}")
    if problems:
        raise typer.Exit(1)
    against = f", and every pruned weight of {model} is zero" if model else ""
    print(f"{path}: every group keeps exactly its N of M{against}")


@app.command()
def baseline(
    recipe_file: Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", show_default=False)] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="change one field")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Loss under the recipe's initial mask for each timestep bin, on model.source as it is (no stage 1)."""
    from . import inputs, mask_stage, unet
    from . import recipe as recipes
    from .masked_unet import MaskedUNet
    from .training import Task

    if recipes.resolve(recipe_file, None, assignments).mask.density is not None:
        raise inputs.InputError("masks baseline measures mask.n, mask.m and mask.layers; set mask.density to null")
    recipe = inputs.absolute(recipes.resolve(recipe_file, None, assignments), runs_dir)
    model, images = inputs.load_inputs(recipe, runs_dir)
    device = unet.resolve_device(recipe.device)
    base = model.unet.requires_grad_(False).to(device)
    spec = recipe.mask
    masked = MaskedUNet(base, spec.n, spec.m, inputs.overrides(recipe))
    mask_stage.set_initial(masked, recipe, Task.of(recipe, model.scheduler, images.train, device))
    found = mask_stage.baseline(masked, model.scheduler, images.held_out, recipe.eval.seed)
    label = f"{mask_stage.initial_kind(recipe)} {mask_stage.pattern_label(masked)}"
    if as_json:
        print(json.dumps({"initial": label, **found}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("timesteps", "dense", "m0", "m0 / dense", title=f"{label}, {found['images']} held-out images")
    width = found["timesteps"] // len(found["dense"])
    names = [f"{i * width} to {(i + 1) * width - 1}" for i in range(len(found["dense"]))]
    pairs = zip([*names, "all"], [*found["dense"], found["dense_mean"]], [*found["m0"], found["m0_mean"]])
    for name, dense, m0 in pairs:
        cells = ("n/a",) * 3 if dense is None else (f"{dense:.5f}", f"{m0:.5f}", f"{m0 / dense:.2f}")
        table.add_row(name, *cells)
    Console(width=120).print(table)
