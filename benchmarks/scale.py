"""What many processes and machines cost, and what they give.

    .venv/bin/python benchmarks/scale.py ranks [--steps 12] [--rounds 3] [--batch 64]
    .venv/bin/python benchmarks/scale.py ray [--runs 5] [--queued 200]

ranks: steps per second of mask learning by two ranks on two cores against one rank on one core (targets: 1.6x for
reinforce, 1.5x for gumbel). ray: what Ray adds to a run once the cluster is up (target: under 1 s), and how long it
takes to submit, list and cancel runs that queue.
"""

from __future__ import annotations

import argparse

import scale_ranks
import scale_ray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(required=True)
    for part in (scale_ranks, scale_ray):
        part.add_to(parts)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
