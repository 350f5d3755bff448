"""Trains the feature network and writes ``assets/feature-network.safetensors`` and
``assets/reference-statistics.npz`` (features of the 12,000 real training images).

    .venv/bin/python assets/build/train_features.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from prunedm import bundled, data, extractors, metrics
from prunedm.seeds import generator

SEED, EPOCHS, BATCH, PEAK_RATE = 0, 16, 128, 4e-3


def augment(images: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
    """Random mirror, and a shift of up to 2 pixels, for each image."""
    count = len(images)
    mirrored = torch.rand(count, generator=gen) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    dy, dx = torch.randint(0, 5, (2, count), generator=gen)
    rows = dy[:, None, None] + torch.arange(28)[None, :, None]
    columns = dx[:, None, None] + torch.arange(28)[None, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


@torch.no_grad()
def accuracy(network: extractors.FeatureNetwork, images: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    hits = [(network(x).argmax(1) == y).float().sum() for x, y in zip(images.split(500), labels.split(500))]
    return (torch.stack(hits).sum() / len(images)).item()


def train() -> extractors.FeatureNetwork:
    torch.manual_seed(SEED)
    images, (labels, held_labels) = data.load_bundled(), data.load_bundled_labels()
    network = extractors.FeatureNetwork()
    per_epoch = len(images.train) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, EPOCHS * per_epoch)
    for epoch in range(EPOCHS):
        network.train()
        gen = generator(SEED, "features", epoch)
        order = torch.randperm(len(images.train), generator=gen)
        for chosen in order[: per_epoch * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(augment(images.train[chosen], gen))
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        held_out = accuracy(network, images.held_out, held_labels)
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, held-out accuracy {held_out:.4f}", flush=True)
    return network.eval()


if __name__ == "__main__":
    trained = train()
    save_file(trained.state_dict(), bundled.FEATURE_NETWORK)
    extractors.feature_network.cache_clear()
    real = metrics.extract(data.load_bundled().train.split(500))
    metrics.write_statistics(bundled.REFERENCE, metrics.statistics(real))
    print(f"written: {bundled.FEATURE_NETWORK}, {bundled.REFERENCE}")
