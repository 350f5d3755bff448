"""What `prunedm plan` predicts against what is measured here, and how cost grows: the tables of docs/PLANNING.md.

    .venv/bin/python benchmarks/plan.py [--model bundled cifar10] [--batch 64 16] [--rounds 7] [--precision auto]
                                        [--device cpu]
    .venv/bin/python benchmarks/plan.py --ranks [--device cpu]

Steps are those of the engine's own trainers on a model of the widths that the plan supposes, with random weights.
All kinds of steps are interleaved, and the device is calibrated in the same minutes. Peaks are of one step with its
model, optimiser and masks, each in a process of its own. ``--ranks`` only predicts what scale.py measures of ranks,
from the calibration that is kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import architectures  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from prunedm import (  # noqa: E402
    calibration,
    data,
    devices,
    diffusion,
    latency,
    learn,
    masked_unet,
    memory,
    outline,
    plan,
    plan_command,
    plan_model,
    recipe,
    stage_recipes,
    training,
    unet,
)  # fmt: skip

CPU = torch.device("cpu")
FOREVER = 10**6
STEPS = {  # the plan's stage -> the mask method that its steps use, and whether weights train
    "finetune": (None, True),
    "mask, gumbel": ("gumbel", False),
    "mask, reinforce": ("reinforce", False),
    "mask, sr-ste": ("sr-ste", True),
    "mask, offset": ("offset", True),
    "recover": ("fixed", True),
    "evaluate": (None, False),
}
HANDED_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SIZES = ("bundled", "cifar10", "celebahq", "sd15", "sdxl")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", default=["bundled", "cifar10"], choices=("bundled", "cifar10"))
    parser.add_argument("--batch", nargs="*", type=int, default=[64, 16], help="one for each model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu, cuda or cuda:1: where steps are timed")
    parser.add_argument(
        "--ranks", action="store_true", help="only predict the steps of `scale.py ranks`; times nothing"
    )
    given = parser.parse_args()
    if given.ranks:
        torch.set_num_threads(1)  # as each rank there has
        print(ranks(calibration.here(given.device)))
        return
    if len(given.model) != len(given.batch):
        parser.error("give one batch size for each model")
    here = calibration.here(given.device, again=True)
    print(calibrated(here))
    for name, batch in zip(given.model, given.batch):
        print(compared(name, batch, given, here))
    print(grown("bundled", given, here))
    print(large())


def asked(name: str, batch: int, precision: str, method: str = "gumbel", device: str = "cpu") -> recipe.Recipe:
    """The recipe that is planned: every stage, bundled images or as many."""
    mask = {"method": method, "train_weights": method in ("sr-ste", "offset")}
    fields = {"data": {"batch_size": batch}, "mask": mask, "train": {"precision": precision}}
    return recipe.build({"name": name, "device": device, **fields})


def dense(name: str) -> outline.Outline:
    if name == "bundled":
        return outline.find("bundled")
    if name in architectures.CONDITIONED:
        return outline.build(architectures.conditioned(name))
    return outline.build(architectures.CONFIGS[name] | {"_class_name": "UNet2DModel"})


# --- predicted and measured ------------------------------------------------------------------------
def predicted(
    name: str, batch: int, precision: str, here: devices.Device, labels: Iterable[str] = tuple(STEPS)
) -> dict[str, plan_model.Stage]:
    """The plan's stage for each kind of step."""
    found: dict[str, plan_model.Stage] = {}
    start = dense(name)
    for method in sorted({STEPS[label][0] if label.startswith("mask") else "gumbel" for label in labels}):
        setting = plan_model.Setting(here)
        for stage in plan.Planner(asked(name, batch, precision, method, here.kind), start, setting).stages():
            label = f"mask, {method}" if stage.what.startswith("masks by") else stage.stage
            if label in labels and stage.what != "validation losses":
                found.setdefault(label, stage)
    return found


def step_of(label: str, name: str, batch: int, precision: str, device: torch.device = CPU) -> Callable[[], object]:
    """One step of this kind on a real model of random weights; of `evaluate`, one call."""
    start = dense(name)
    torch.manual_seed(0)
    model = type(start.unet).from_config(outline.narrowed(start, 0.4).unet.config).eval().to(device)
    if label == "evaluate":
        size = diffusion.call_size(start.image_shape, device)
        x, t = torch.randn(size, *start.image_shape, device=device), torch.full((size,), 500, device=device)
        return lambda: training_free(model, x, t)
    return iter(trainer(label, model, batch, precision, device)).__next__


def training_free(model: torch.nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x, t).sample


def trainer(
    label: str, model: torch.nn.Module, batch: int, precision: str, device: torch.device = CPU
) -> training.Trainer:
    """The engine's own, on noise for images."""
    method, train = STEPS[label]
    images = torch.randint(0, 256, (2 * batch, *unet.image_shape(model)), dtype=torch.uint8)
    bf16 = training.use_bf16(device, precision)
    scheduler = unet.load("bundled").scheduler
    task = training.Task(scheduler, data.Batches(images, batch, 0), 0, device, bf16)
    window, spec = training.Window.of(FOREVER), recipe.Train(lr=1e-6)
    if method is None:
        weights = training.Weights(model.parameters(), spec, window)
        return training.Trainer("finetune", FOREVER, task, training.DenseLoss(model), weights)
    masked = masked_unet.MaskedUNet(model.requires_grad_(False), 2, 4)
    mask = stage_recipes.Mask(method=method, train_weights=train)
    weights = training.Weights(masked.trainable(), spec, window) if train else None
    learner = learn.METHODS[method](masked, mask, FOREVER, 0)
    return training.Trainer("mask", FOREVER, task, learner, weights)


def step_seconds(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, interleaved; the first round does not count."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    for round_ in range(rounds + 1):
        for label, step in steps.items():
            latency.synchronize(device)
            began = time.perf_counter()
            step()
            latency.synchronize(device)
            if round_:
                times[label].append(time.perf_counter() - began)
    return {label: statistics.median(values) for label, values in times.items()}


def peaks(label: str, name: str, batch: int, precision: str, returned: bool, device: torch.device = CPU) -> int:
    """:func:`_peak` in a process of its own. returned: glibc hands freed memory back at once, so that what counts is
    what tensors hold; without, what it keeps counts too."""
    with patched_environment(HANDED_BACK if returned else {}):
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        return pool.apply(_peak, (label, name, batch, precision, device))


@contextmanager
def patched_environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _peak(label: str, name: str, batch: int, precision: str, device: torch.device) -> int:
    """Bytes by which memory grows from before the model is built to the most of three steps."""
    step_of(label, "bundled", 2, precision, device)()  # libraries are loaded and kernels chosen
    with memory.PeakMemory(device) as watched:
        step = step_of(label, name, batch, precision, device)
        for _ in range(3):
            step()
    return watched.growth


def compared(name: str, batch: int, given: argparse.Namespace, here: devices.Device) -> str:
    stages = predicted(name, batch, given.precision, here)
    with training.memory_kept():
        steps = {label: step_of(label, name, batch, given.precision, given.device) for label in STEPS}
        took = step_seconds(steps, given.rounds, given.device)
    rows = []
    for label in STEPS:
        held, kept = (peaks(label, name, batch, given.precision, back, given.device) for back in (True, False))
        stage = stages[label]
        row = [label, f"{stage.compute:.3g}", f"{took[label]:.3g}", f"{stage.compute / took[label]:.2f}"]
        rows.append([*row, mib(stage.memory.total), mib(held), f"{stage.memory.total / held:.2f}", mib(kept)])
    head = [
        "step",
        "s predicted",
        "s measured",
        "ratio",
        "MiB predicted",
        "MiB measured",
        "ratio",
        "MiB with what glibc keeps",
    ]
    counted = f"{dense(name).parameters:,} parameters before stage 1, batch {batch}, {given.precision}"
    return f"\n{name}: {counted}\n\n{table(head, rows)}"


# --- how cost grows ----------------------------------------------------------------------------------
def grown(name: str, given: argparse.Namespace, here: devices.Device) -> str:
    """A fine-tuning step over images (measured too), over ranks and over parameters (predicted)."""
    rows = []
    for batch in (8, 16, 32, 64, 128):
        stage = predicted(name, batch, given.precision, here, ["finetune"])["finetune"]
        with training.memory_kept():
            step = step_of("finetune", name, batch, given.precision, given.device)
            took = step_seconds({"f": step}, given.rounds, given.device)["f"]
        rows.append([str(batch), f"{stage.compute:.3g}", f"{took:.3g}", mib(stage.memory.activations)])
    images = table(["images", "s predicted", "s measured", "MiB of activations, predicted"], rows)
    return f"\n{name}, a fine-tuning step by images\n\n{images}"


def ranks(here: devices.Device) -> str:
    """A mask step of the whole bundled model in fp32, 64 images over one rank and over two, each with the device that
    was calibrated: steps a second, and what two ranks send. Time on the link is in it where the link is known."""
    rows, start = [], dense("bundled")
    for method in ("reinforce", "gumbel"):
        one, two = (_mask_stage(method, start, plan_model.Setting(here, count)) for count in (1, 2))
        rates = [1 / (stage.compute + (stage.communication or 0.0)) for stage in (one, two)]
        figures = (f"{rates[0]:.2f}", f"{rates[1]:.2f}", f"{rates[1] / rates[0]:.2f}", plan_command.size(two.sent))
        rows.append([method, *figures])
    head = ["masks by", "steps/s of one rank", "of two", "ratio", "sent by a rank of two"]
    link = "time on the link is in it" if here.interconnect else "the link is not known and takes no time"
    return f"{here.name}, {here.source}; {link}\n\n{table(head, rows)}"


def _mask_stage(method: str, start: outline.Outline, setting: plan_model.Setting) -> plan_model.Stage:
    whole = asked("bundled", 64, "fp32", method, setting.device.kind).model_dump() | {"prune": {"target": 0}}
    stages = plan.Planner(recipe.build(whole), start, setting).stages()
    return next(stage for stage in stages if stage.what.startswith("masks by"))


def large() -> str:
    """Models of all sizes on eight H100: predicted from published peaks, and what the planning itself took."""
    plans, rows = {}, []
    for name in SIZES:
        before, began = psutil.Process().memory_info().rss, time.perf_counter()
        plans[name] = plan.make(
            asked(name, 64, "auto"), dense(name), plan_model.Setting(devices.published("h100"), 8)
        )  # fmt: skip
        took, grew = time.perf_counter() - began, psutil.Process().memory_info().rss - before
        rows.append([*sized(name, plans[name]), f"{took:.1f}", mib(grew)])
    head = ["model", "parameters", "G MACs", "s a step at least", "+ communication", "sent", "memory: fine-tuning",
            "gumbel", "s to plan", "MiB more to plan"]  # fmt: skip
    return f"\nSizes, 64 images on 8 H100, after stage 1\n\n{table(head, rows)}\n\nsd15\n\n{described(plans['sd15'])}"


def sized(name: str, found: dict) -> list[str]:
    """A model's fine-tuning step, and the memory of its mask step."""
    model, by_stage = found["model"], {row["stage"]: row for row in found["stages"] if "loss under" not in row["what"]}
    step = by_stage["finetune"]
    held = (plan_command.size(by_stage[stage]["memory_bytes"]) for stage in ("finetune", "mask"))
    counts = f"{model['structured_parameters']:,}", f"{model['structured_macs'] / 1e9:.4g}"
    times = f"{step['compute']:.3g}", f"{step['communication']:.2g}"
    return [name, *counts, *times, plan_command.size(step["sent"]), *held]


def described(found: dict) -> str:
    rows = [
        [row["what"], str(row["batch"]), f"{row['compute']:.3g}", f"{row['communication']:.2g}",
         plan_command.size(row["sent"]), plan_command.size(row["memory_bytes"]), "yes" if row["fits"] else "no"]
        for row in found["stages"]
    ]  # fmt: skip
    head = ["stage", "images", "s a step at least", "+ communication", "sent", "memory", "fits"]
    by_ranks = [
        [str(row["ranks"]), f"{row['compute']:.3g}", f"{row['communication']:.2g}",
         *(plan_command.size(row[f"sent_{kind}"]) for kind in ("finetune", "gumbel", "reinforce"))]
        for row in found["growth"]["ranks"]
    ]  # fmt: skip
    ranks = ["ranks", "s a step at least", "+ communication", "sent: fine-tuning", "gumbel", "reinforce"]
    return f"{table(head, rows)}\n\n{table(ranks, by_ranks)}"


def calibrated(here: devices.Device) -> str:
    """The rates, each with its 10th and 90th percentile."""
    rows = [[kind, f"{rate / 1e9:.3g} GFLOP/s", *(f"{v / 1e9:.3g}" for v in here.spread[kind])]
            for kind, rate in here.flops.items()]  # fmt: skip
    rows.append(["memory", f"{here.bandwidth / 1e9:.3g} GB/s", *(f"{v / 1e9:.3g}" for v in here.spread["bandwidth"])])
    rows.append(["reached by a network", f"{here.efficiency:.3g}", *(f"{v:.3g}" for v in here.spread["efficiency"])])
    rows.append(["an operation", f"{here.overhead * 1e6:.3g} us", *(f"{v * 1e6:.3g}" for v in here.spread["overhead"])])
    return f"{here.name}\n\n{table(['figure', 'measured', '10 %', '90 %'], rows)}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mib(count: float) -> str:
    return f"{count / MIB:.1f}"


if __name__ == "__main__":
    main()
