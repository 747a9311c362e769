"""`python -m train [overrides]`, also under torchrun and srun: one run; the same command again resumes it."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict

import yaml

from conf.compose import choices, compose, groups
from conf.schema import Refused
from train import config as run_config

FAILED, REFUSED, KEYBOARD = 1, 2, 130

USAGE = """usage: python -m train [group=choice] [key=value] ...

One run, resumed by the same command. Keys follow Hydra's grammar: train.steps=500, attention=mla, run.dir=runs/mine.
`python -m train --show [overrides]` prints the resolved configuration and stops.
"""


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 refused input, 75 interrupted after saving."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        for group in groups():
            print(f"  {group:12} {' '.join(choices(group))}")
        return 0
    try:
        config = run_config.read(compose([a for a in arguments if a != "--show"]))
        if "--show" in arguments:
            print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
            return 0
        return _run(config)
    except Refused as refusal:
        if _speaks():
            print(f"refused: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        if _speaks():
            print("interrupted at the keyboard; the same command resumes from the last checkpoint", file=sys.stderr)
        return KEYBOARD


def _run(config: run_config.Config) -> int:
    # here: these take torch, whose import takes seconds, and a mistake is told before
    from train.failure import tell
    from train.ranks import join, leave
    from train.run import run

    try:
        return run(config, join(config.run))
    except Refused:
        raise
    except Exception as error:
        tell(error)
        return FAILED
    finally:
        leave()


def _speaks() -> bool:
    """All ranks refuse together, and one of them says so."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    sys.exit(code)
