"""All speed ratios of the package in one run: training, CSSN, samplers, LMD, mixing, pre-training.

    python benchmarks/speed.py [--only cssn_step]

Each part can also be run alone, with options of its own. Beside a figure of training stand the
images per second if only kernels ran, and the idle share (see busy.py); what a GPU is held to
prints gpu_bounds.py.
"""

from __future__ import annotations

import argparse
import importlib
import sys

PARTS = (
    "training_speed",
    "cssn_step",
    "sampler_speed",
    "m_step_speed",
    "mixing_and_pretraining_speed",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    sys.argv = sys.argv[:1]
    for part in args.only:
        print(f"\n## {part}", flush=True)
        importlib.import_module(part).main()


if __name__ == "__main__":
    main()
