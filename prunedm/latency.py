"""Measured time of one UNet call, interleaved between variants so that drift falls on all alike.

Each round calls every variant once and begins with the next one, so that no variant always follows a pause or
the same neighbour's heat. Ways of running a UNet: ``eager``; ``channels_last``; ``compile``, torch.compile of
the channels_last model, for each batch size anew; ``onnxruntime``, where a file or session is given. Modules
that were converted before (semi_structured.py) are variants like any other, and run ``eager``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import giveway
from .memory import CUDA, RESIDENT, peak_growth
from .seeds import generator
from .unet import image_shape

BATCH, ROUNDS, WARMUP = 8, 15, 2
BATCHES = (1, 8, 64)
WAYS = ("eager", "channels_last", "compile", "onnxruntime")


@dataclass
class Latency:
    """Milliseconds of one UNet call: median, 10th and 90th percentile, with what they hold for."""

    median: float
    p10: float
    p90: float
    device: str
    dtype: str
    batch: int

    @property
    def per_image(self) -> float:
        """Milliseconds of one call for each image of its batch."""
        return self.median / self.batch


@dataclass
class Speed:
    """What :func:`benchmark` measured of one variant, run one way, at one batch size.

    call: milliseconds, None where it could not run, and ``absent`` says why. threads: of a CPU, else None.
    memory: bytes that a call adds at its peak to what the process held, ``memory_of`` says by whose count;
    None where it was not measured or the device keeps no peak.
    """

    variant: str
    way: str
    batch: int
    rounds: int
    threads: int | None
    call: Latency | None = None
    memory: int | None = None
    memory_of: str | None = None
    absent: str = ""

    def as_dict(self) -> dict[str, Any]:
        per_image = {"per_image": self.call.per_image if self.call else None}
        return asdict(self) | per_image


@torch.no_grad()
def measure(unets: dict[str, nn.Module], batch: int = BATCH, rounds: int = ROUNDS) -> Iterator[dict[str, Latency]]:
    """Time each UNet once a round; yields the figures so far after each round."""
    times: dict[str, list[float]] = {name: [] for name in unets}
    inputs = {name: example(unet, batch) for name, unet in unets.items()}
    for name, unet in unets.items():
        for _ in giveway.between(range(WARMUP)):
            unet(*inputs[name])
    names = list(unets)
    for at in range(rounds):
        first = at % len(names)
        for name in giveway.between(names[first:] + names[:first]):
            times[name].append(_once(unets[name], inputs[name]))
        yield {name: _summary(times[name], inputs[name][0]) for name in names}


def compare(dense: nn.Module, pruned: nn.Module, batch: int = BATCH, rounds: int = ROUNDS) -> dict[str, Any]:
    """Interleaved times of two UNets, milliseconds, and ``ratio``: the median of pruned over dense."""
    *_, found = measure({"dense": dense, "pruned": pruned}, batch, rounds)
    a, b = found["dense"], found["pruned"]
    return {"dense": a.median, "pruned": b.median, "ratio": b.median / a.median, "device": a.device, "batch": batch}


@torch.no_grad()
def benchmark(
    variants: dict[str, nn.Module],
    ways: tuple[str, ...] = ("eager",),
    batches: tuple[int, ...] = BATCHES,
    rounds: int = ROUNDS,
    onnx: dict[str, Path | nn.Module] | None = None,
    memory: bool = True,
    as_is: Collection[str] = (),
) -> Iterator[list[Speed]]:
    """Time and peak memory of each variant, run each way, at each batch size: all interleaved at a batch size.

    onnx: for the way ``onnxruntime``, a file or a session called like a UNet for some of the variants; the
    others' rows are absent. as_is: variants that were converted before and only run eager, whatever the ways. Yields
    the finished rows after each round, and all of them last. What cannot run
    (no compiler, too little memory) is a row without figures. ValueError for ways or batches that are not known.
    """
    _require(variants, ways, batches, rounds)
    found = contenders(variants, ways, onnx or {}, as_is)
    rows: list[Speed] = []
    for batch in batches:
        absent = {key: _fault(found[key], batch, key[1]) for key in giveway.between(found)}
        running = {key: found[key] for key, fault in absent.items() if not fault}
        timed: dict = {}
        if running:
            for timed in measure(running, batch, rounds):
                yield list(rows)
        for key, module in found.items():
            row = Speed(*key, batch, rounds, _threads(module), timed.get(key), absent=absent[key])
            if memory and key in running:
                row.memory, row.memory_of = _memory(module, batch)
            rows.append(row)
    yield rows


def benchmark_steps(batches: tuple[int, ...] = BATCHES, rounds: int = ROUNDS) -> int:
    """How many times :func:`benchmark` yields when something can run at each batch size."""
    return len(batches) * rounds + 1


def contenders(
    variants: dict[str, nn.Module],
    ways: tuple[str, ...],
    onnx: dict[str, Path | nn.Module],
    as_is: Collection[str] = (),
) -> dict[tuple[str, str], nn.Module | None]:
    """(variant, way) -> what is called; None where that cannot be made. The variants stay as they are."""
    found: dict[tuple[str, str], nn.Module | None] = {}
    for name, unet in variants.items():
        if "eager" in ways or name in as_is:
            found[name, "eager"] = unet
        if name in as_is:
            continue
        if {"channels_last", "compile"} & set(ways):
            laid = _channels_last(unet)
            if "channels_last" in ways:
                found[name, "channels_last"] = laid
            if "compile" in ways:  # each batch size gets code of its own
                found[name, "compile"] = None if laid is None else torch.compile(laid, dynamic=False)
        if "onnxruntime" in ways:
            given = onnx.get(name)
            found[name, "onnxruntime"] = (
                OnnxModel(given, image_shape(unet)) if isinstance(given, (str, Path)) else given
            )
    return found


class OnnxModel(nn.Module):
    """An ONNX model in ONNX Runtime on the CPU, called like a UNet; as many threads as torch has.

    source: its file, or its bytes. shape: (C, H, W) of its images. Its first input is the image, its second the
    timesteps. ValueError when the file is missing or is no ONNX model.
    """

    def __init__(self, source: str | Path | bytes, shape: tuple[int, int, int]) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        given, name = (source, "the file") if isinstance(source, bytes) else (str(source), source)
        try:
            self.session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except _onnx_errors() as error:
            raise ValueError(f"{name} is not a readable ONNX model; export it again ({_line(error)})") from error
        self.names = [value.name for value in self.session.get_inputs()]
        self.config = SimpleNamespace(in_channels=shape[0], sample_size=shape[1:])
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``[B, C, H, W]`` and ``[B]`` to ``[B, C', H, W]``."""
        return torch.from_numpy(self.session.run(None, dict(zip(self.names, (x.numpy(), t.numpy()))))[0])


def example(unet: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
    """Noise ``[B, C, H, W]`` in the layout, type and place of the UNet's weights, and timesteps 0 ``[B]``.

    Noise and not zeros, which a GPU multiplies at less power and so at a higher clock.
    """
    parameters = list(unet.parameters())
    first = parameters[0]
    x = torch.randn(batch, *image_shape(unet), generator=generator(0, "latency")).to(first.device, first.dtype)
    if any(p.ndim == 4 and not p.is_contiguous() for p in parameters):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.zeros(batch, device=x.device, dtype=torch.long)


def _require(variants: dict, ways: tuple[str, ...], batches: tuple[int, ...], rounds: int) -> None:
    unknown = [way for way in ways if way not in WAYS]
    if unknown or not ways:
        raise ValueError(f"way {unknown[0] if unknown else 'none'!r} is not known; use one of {', '.join(WAYS)}")
    if not batches or min(batches) < 1 or rounds < 1:
        raise ValueError(f"batches={batches} and rounds={rounds} must be 1 or more; for example {BATCHES}, {ROUNDS}")
    if not variants:
        raise ValueError("variants is empty and there must be one to time; give a model")


def _channels_last(unet: nn.Module) -> nn.Module | None:
    """A copy laid out anew; None where the weights are of a kind (converted to 2:4) that cannot be."""
    try:
        return copy.deepcopy(unet).to(memory_format=torch.channels_last)
    except (RuntimeError, TypeError):
        return None


def _fault(module: nn.Module | None, batch: int, way: str) -> str:
    """Why the module cannot be called at this batch size, in one line; empty when it can. Compiles what must be."""
    if module is None:
        onnx = way == "onnxruntime"
        return "no ONNX model was given for this variant" if onnx else "these weights have no channels_last layout"
    try:
        if not hasattr(module, "_orig_mod"):
            module(*example(module, batch))
            return ""
        import torch._dynamo

        # Variants share the code of their class: past 8 compiled forms of it, dynamo would run eager in silence.
        with torch._dynamo.config.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True):
            module(*example(module, batch))
    except (RuntimeError, MemoryError, *_onnx_errors()) as error:
        return _line(error)
    return ""


def _onnx_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return tuple(getattr(state, name) for name in (*names, "RuntimeException"))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _threads(module: nn.Module | None) -> int | None:
    """Threads of the engine that runs the module; None on a GPU, or where the engine does not say."""
    if module is None or next(module.parameters()).device.type != "cpu":
        return None
    session = getattr(module, "session", None)
    return (session.get_session_options().intra_op_num_threads or None) if session else torch.get_num_threads()


def _memory(module: nn.Module, batch: int) -> tuple[int | None, str | None]:
    """Peak growth in a call, bytes, and by whose count. None for ONNX Runtime, which keeps its memory for itself."""
    if hasattr(module, "session"):
        return None, None
    inputs = example(module, batch)
    device = inputs[0].device
    growth = peak_growth(lambda: module(*inputs), device)
    return growth, None if growth is None else {"cpu": RESIDENT, "cuda": CUDA}[device.type]


def _once(unet: nn.Module, inputs: tuple) -> float:
    """Milliseconds of one call, between two events on a CUDA device's own clock."""
    device = inputs[0].device
    synchronize(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            unet(*inputs)
            end.record()
            end.synchronize()
        return start.elapsed_time(end)
    began = time.perf_counter()
    unet(*inputs)
    synchronize(device)
    return (time.perf_counter() - began) * 1000


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(times: list[float], x: torch.Tensor) -> Latency:
    p10, median, p90 = (float(v) for v in np.percentile(times, [10, 50, 90]))
    dtype = str(x.dtype).removeprefix("torch.")
    return Latency(median, p10, p90, device_name(x.device), dtype, len(x))


def device_name(device: torch.device) -> str:
    """The device in words, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
