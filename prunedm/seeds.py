"""Every random number of a run comes from here: a generator named by what it is for.

A generator is a pure function of the recipe's seed and of a name such as ``("finetune", 17)``.
Nothing has to be saved to resume: step 17 draws the same batch, timesteps, noise and masks whether
the process has lived since step 0 or was started a second ago.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for one use of randomness, e.g. ``derive(0, "finetune", "noise", 17)``."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator seeded by ``derive(seed, *names)``."""
    return torch.Generator(device).manual_seed(derive(seed, *names))
