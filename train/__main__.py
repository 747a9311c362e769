"""`python -m train [overrides]`, also under torchrun and srun: one run; the same command again resumes it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from conf.compose import choices, compose, groups
from conf.schema import Refused, fault
from train import config as run_config

FAILED, REFUSED, KEYBOARD = 1, 2, 130

USAGE = """usage: python -m train [group=choice] [key=value] ...

One run, resumed by the same command. Keys follow Hydra's grammar: train.steps=500, attention=mla, run.dir=runs/mine;
of a key that is given twice the last counts.
`python -m train --show [overrides]` lists every key with its value and stops. Of a scheme, a data source or an
optimizer it lists the keys that are set; all of them stand in its file, at `Config`: models/attention/mla.py.
`python -m train --config FILE` runs a resolved configuration, such as the config.yaml of a run, as it is.
"""


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 refused input, 75 interrupted after saving, 130 by Ctrl-C without."""
    if "--help" in arguments or "-h" in arguments:
        _say("\n".join([USAGE, *(f"  {group:12} {' '.join(choices(group))}" for group in groups())]))
        return 0
    try:
        config = run_config.read(_values([a for a in arguments if a != "--show"]))
        if "--show" in arguments:
            _say(yaml.safe_dump(asdict(config), sort_keys=False).rstrip())
            return 0
        return _run(config)
    except Refused as refusal:  # before the ranks met: what one node lacks the others may have
        if _rank_on_node() == "0":
            print(f"refused: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        if _rank_on_node() == "0":
            print("interrupted at the keyboard; the same command resumes from the last checkpoint", file=sys.stderr)
        return KEYBOARD


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _values(arguments: list[str]) -> dict[str, Any]:
    if "--config" not in arguments:
        return compose(arguments)
    if len(arguments) != 2 or arguments[0] != "--config":
        raise Refused("--config takes one file and nothing beside it; give overrides alone, or edit the file.")
    file = Path(arguments[1])
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"--config {file} cannot be read ({fault(error)}); name a resolved configuration.") from None
    if not isinstance(values, dict):
        raise Refused(f"--config {file} holds no configuration; name a resolved one, such as a run's config.yaml.")
    return values


def _run(config: run_config.Config) -> int:
    # here: these take torch, whose import takes seconds, and a mistake is told before
    from train.failure import tell
    from train.ranks import join, leave
    from train.run import run

    try:
        ranks = join(config.run)
        try:
            return run(config, ranks)
        except Refused as refusal:  # on all ranks together, and one of them says so
            if ranks.first:
                print(f"refused: {refusal}", file=sys.stderr)
            return REFUSED
    except Refused:
        raise
    except Exception as error:
        tell(error)
        return FAILED
    finally:
        leave()


def _rank_on_node() -> str:
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code != KEYBOARD:  # it is said how the run ended; a background save that is not waited for may still be left
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.shutdown()
    sys.exit(code)
