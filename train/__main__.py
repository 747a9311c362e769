"""`python -m train [overrides]`, also under torchrun and srun: one run; the same command again resumes it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from conf.compose import choices, compose, groups
from conf.schema import Refused
from train import config as run_config
from train.failure import is_understood, sentence
from train.ranks import join, leave
from train.run import run

FAILED, REFUSED = 1, 2

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
    directory: Path | None = None
    try:
        config = run_config.read(compose([a for a in arguments if a != "--show"]))
        if "--show" in arguments:
            print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
            return 0
        directory = Path(config.run.dir)
        ranks = join(config.run)
        code, reason = run(config, ranks)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return REFUSED
    except Exception as error:
        code, reason = FAILED, sentence(error)
        logging.getLogger("keyhole").error("failed: %s", reason, exc_info=not is_understood(error))
    finally:
        leave()
    _write_exit(directory, code, reason)
    return code


def _write_exit(directory: Path | None, code: int, reason: str) -> None:
    """torchrun turns every worker's code into 1, so rank 0 leaves its own in exit.json."""
    if directory is None:
        return
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" and directory.is_dir():
        with contextlib.suppress(OSError):
            (directory / "exit.json").write_text(json.dumps({"code": code, "reason": reason}) + "\n")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    sys.exit(code)
