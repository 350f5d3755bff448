"""Evaluates the bundled dense model once for each preset's settings, so that no run has to.

    .venv/bin/python assets/build/evaluate_dense.py

Writes ``assets/dense-evaluations.json`` and the sample sheets beside it. Latency is left out: it
belongs to the machine at hand and is measured there.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from prunedm import bundled, data, quality, unet  # noqa: E402
from prunedm import recipe as recipes  # noqa: E402
from prunedm.store import write_json  # noqa: E402


def main() -> None:
    model, images = unet.load(bundled.NAME), data.load_bundled()
    weights = bundled.MODEL / "unet" / unet.WEIGHTS
    sizes = {"parameters": unet.parameters(model.unet), "macs": unet.macs(model.unet)}
    found = {}
    for preset in (*recipes.PRESETS, None):
        settings = recipes.build(recipes.preset(preset) if preset else {}).eval
        key = bundled.settings_key(settings)
        if key in found:
            continue
        info = {"variant": "dense", "model": "assets/fashion-ddpm"}
        target = quality.Target(model, bundled.MODEL, bundled.sheet(settings), is_dense=True, info=info)
        *_, figures = quality.Judge.of(settings, images, torch.device("cpu")).quality(target)
        found[key] = sizes | figures
        print(key, figures, flush=True)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    write_json(bundled.EVALUATIONS, {"weights_sha256": digest, "evaluations": found})


if __name__ == "__main__":
    main()
