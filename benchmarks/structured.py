"""Stage 1 on the architectures of google/ddpm-cifar10-32 (35.7 M) and google/ddpm-celebahq-256 (113.7 M).

    .venv/bin/python benchmarks/structured.py targets [--model cifar10|celebahq]    # targets, seconds, memory
    .venv/bin/python benchmarks/structured.py latency [--target 0.44] [--rounds 7]  # speed-up against MACs

Random weights: nothing is downloaded. One JSON line a result. Memory is the growth of the process's peak
resident set over what it held before, as a multiple of the model's own bytes. Latency is that of a batch of 8,
interleaved between dense and pruned: eager, channels_last, and torch.compile with channels_last.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import architectures  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from prunedm import structured, unet  # noqa: E402
from prunedm.memory import PeakMemory  # noqa: E402
from prunedm.stage_recipes import Prune  # noqa: E402

BATCH = 8


def targets(name: str) -> None:
    for layout in ("free", "uniform"):
        for target in (0.3, 0.44, 0.6):
            dense = architectures.build(name)
            size = 4 * unet.parameters(dense)
            began = time.perf_counter()
            with PeakMemory(torch.device("cpu")) as memory:
                pruned, report = structured.prune(dense, Prune(target=target, layout=layout), 4, 0)
            seconds = time.perf_counter() - began
            with torch.no_grad():
                out = pruned(torch.zeros(1, *unet.image_shape(pruned)), torch.tensor([500])).sample
            print(
                json.dumps(
                    {
                        **{"model": name, "layout": layout, "target": target, "reduction": round(report.reduction, 4)},
                        **{"macs": round(1 - report.macs_after / report.macs_before, 4), "seconds": round(seconds, 1)},
                        **{"memory": round(memory.growth / size, 2), "finite": bool(out.isfinite().all())},
                        **{"eligible": report.eligibility["after"], "reason": report.reason},
                    }
                ),
                flush=True,
            )


@torch.no_grad()
def latency(name: str, target: float, rounds: int, layout: str) -> None:
    dense = architectures.build(name)
    pruned, report = structured.prune(copy.deepcopy(dense), Prune(target=target, layout=layout), 4, 0)
    x = torch.zeros(BATCH, *unet.image_shape(dense))
    t = torch.zeros(BATCH, dtype=torch.long)
    last = x.contiguous(memory_format=torch.channels_last)
    ways = {"eager": (dense, pruned, x)}
    laid = [net.to(memory_format=torch.channels_last) for net in copy.deepcopy([dense, pruned])]
    ways["channels_last"] = (*laid, last)
    ways["compile"] = (*(torch.compile(net) for net in laid), last)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for at in range(rounds + 2):  # two for warm-up
        for way, (*nets, inputs) in ways.items():
            found = []
            for net in nets:
                began = time.perf_counter()
                net(inputs, t)
                found.append(time.perf_counter() - began)
            if at >= 2:
                times[way].append(tuple(found))
    macs = report.macs_before / report.macs_after
    medians = {way: np.median(np.array(rows), 0) for way, rows in times.items()}
    best = [min(medians[way][i] for way in ways) for i in (0, 1)]
    line = {"model": name, "layout": layout, "reduction": round(report.reduction, 3), "macs_ratio": round(macs, 3)}
    for way, rows in times.items():
        p10, p50, p90 = np.percentile([a / b for a, b in rows], [10, 50, 90]).round(3).tolist()
        line[way] = {"dense_s": round(medians[way][0], 4), "pruned_s": round(medians[way][1], 4)}
        line[way] |= {"speedup": p50, "p10": p10, "p90": p90}
    speedup = best[0] / best[1]
    print(json.dumps(line | {"best_speedup": round(speedup, 3), "share_of_macs": round(speedup / macs, 3)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["targets", "latency"])
    parser.add_argument("--model", choices=list(architectures.CONFIGS), default="cifar10")
    parser.add_argument("--layout", choices=["free", "uniform"], default="free")
    parser.add_argument("--target", type=float, default=0.44)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    if given.what == "targets":
        targets(given.model)
    else:
        latency(given.model, given.target, given.rounds, given.layout)


if __name__ == "__main__":
    main()
