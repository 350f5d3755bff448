"""Size of packed N:M files and the speed of reading them, on the architecture of google/ddpm-cifar10-32.

    .venv/bin/python benchmarks/packed.py [--rounds 15] [--threads 1]

Prints one line of JSON. 35.7 M random parameters, 2:4 by magnitude on every layer but the first and last
convolution and the time embedding. ``speed``: seconds of reading the dense file of the same dtype
(safetensors' ``load_file`` and a copy of each tensor; int8 reads back as float32, so against that) over
seconds of reading the packed one, interleaved, median and 10th and 90th percentile of the rounds' ratios.
``first``: each reading is the first of a new process, as when a program loads a model; its memory is
new and must be mapped by the system. ``again``: in a process that has just freed all of it, which spares
the dense file's many small copies the page faults. Files are in the system's cache. ``check`` is the
SHA-256, in a second thread: on a machine whose cores are all busy it adds its whole time.

``pruned``: 2:4 after a structured prune of 44 % (magnitude, free widths), in float16, as a share of the dense
float32 file of the full one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import architectures  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from prunedm import packed, pattern  # noqa: E402

CONFIG = architectures.CONFIGS["cifar10"]
KINDS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float32}


def sparse_model(target: float = 0.0) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A 2:4 state dict with random weights, after a prune to ``target`` of the parameters, and its patterns."""
    unet = architectures.build("cifar10")
    if target:
        from prunedm import structured
        from prunedm.stage_recipes import Prune

        unet, _ = structured.prune(unet, Prune(target=target), 4, 0)
    tensors, patterns = unet.state_dict(), {}
    for name, module in unet.named_modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Linear) or name.startswith(("conv_", "time_embedding")):
            continue
        groups = pattern.group(module.weight.detach(), 4)
        mask = pattern.top_n(groups.abs(), 2)
        tensors[f"{name}.weight"] = pattern.ungroup(groups * mask, module.weight.shape)
        patterns[name] = "2:4"
    return tensors, patterns


def write_all(folder: Path) -> dict[str, object]:
    """Dense and packed files of each kind; their sizes in bytes and over the information limit."""
    tensors, patterns = sparse_model()
    figures: dict[str, object] = {"parameters": sum(tensor.numel() for tensor in tensors.values())}
    for kind, dtype in KINDS.items():
        path = folder / f"packed-{kind}"
        made = packed.write(path, tensors, patterns, CONFIG, dtype=dtype, int8=kind == "int8")
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / f"dense-{kind}")
        size = {"dense": (folder / f"dense-{kind}").stat().st_size, "packed": path.stat().st_size}
        figures[kind] = size | {"to_limit": round(size["packed"] / packed.information_limit(made), 4)}
    narrow, patterns = sparse_model(target=0.44)
    packed.write(folder / "pruned", narrow, patterns, CONFIG, dtype=torch.float16)
    parameters, size = sum(tensor.numel() for tensor in narrow.values()), (folder / "pruned").stat().st_size
    figures["pruned"] = {
        "fewer_parameters": round(1 - parameters / figures["parameters"], 3),
        "packed": size,
        "of_dense_float32": round(size / figures["float32"]["dense"], 4),
    }
    return figures


def readers(folder: Path, kind: str) -> dict[str, Callable[[], object]]:
    return {
        "dense": lambda: {name: tensor.clone() for name, tensor in load_file(folder / f"dense-{kind}").items()},
        "checked": lambda: packed.read(folder / f"packed-{kind}"),
        "unchecked": lambda: packed.read(folder / f"packed-{kind}", check=False),
    }


def seconds(read: Callable[[], object]) -> float:
    start = time.perf_counter()
    held = read()
    taken = time.perf_counter() - start
    del held
    return taken


def first_reading(folder: Path, kind: str, how: str, threads: int) -> float:
    """In a new process: its seconds, after a small file of either sort has loaded all code."""
    torch.set_num_threads(threads)
    small = folder / "small"
    for read in readers(small, "float32").values():
        read()
    return seconds(readers(folder, kind)[how])


def ratios(rounds: list[dict[str, float]]) -> dict[str, object]:
    found: dict[str, object] = {"dense_ms": round(statistics.median(r["dense"] for r in rounds) * 1000, 1)}
    for how in ("checked", "unchecked"):
        ordered = sorted(r["dense"] / r[how] for r in rounds)
        low, high = ordered[round(0.1 * (len(ordered) - 1))], ordered[round(0.9 * (len(ordered) - 1))]
        found[how] = {"median": round(statistics.median(ordered), 2), "p10": round(low, 2), "p90": round(high, 2)}
    return found


def speeds(folder: Path, rounds: int, threads: int) -> dict[str, object]:
    """Of each kind, first and again."""
    context = multiprocessing.get_context("forkserver")  # children of a process that never held a model
    context.set_forkserver_preload(["torch", "safetensors.torch", "scipy.sparse", "prunedm.packed"])
    found: dict[str, object] = {}
    for kind in KINDS:
        ways = readers(folder, kind)
        first = []
        for _ in range(rounds):
            with context.Pool(1, maxtasksperchild=1) as pool:
                first.append({how: pool.apply(first_reading, (folder, kind, how, threads)) for how in ways})
        again = [{how: seconds(read) for how, read in ways.items()} for _ in range(rounds + 1)][1:]
        found[kind] = {"first": ratios(first), "again": ratios(again)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="torch's; two on a busy machine wait for each other")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small").mkdir()
        small = {"a.weight": torch.eye(16)}
        save_file(small, folder / "small" / "dense-float32")
        packed.write(folder / "small" / "packed-float32", small, {"a": "2:4"}, {})
        figures = write_all(folder)
        print(json.dumps(figures | {"speed": speeds(folder, options.rounds, options.threads)}))


if __name__ == "__main__":
    main()
