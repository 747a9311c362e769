"""The process that talks to wandb for a run: JSON lines on standard input, first how to start, then what was measured.

It is a program of its own, and imports nothing of ours. What wandb does to its process (threads, hooks at exit, waiting
for a server) stays here, and at the end of the input, however that comes about, the run is finished in order. It prints
one sentence and returns 1 where wandb fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

NOT_MEASURED = ("facts", "edges")
"""What describes a validation and would be a constant curve."""


def main() -> int:
    """Returns 0, or 1 where wandb cannot be used any more."""
    try:
        import wandb

        lines = map(json.loads, sys.stdin)
        start = next(lines)
        run = wandb.init(**start["run"], resume="allow", settings=wandb.Settings(silent=True, console="off"))
        run.config.update(start["config"], allow_val_change=True)  # a resumed run may be longer, say
        for record in lines:
            run.log(dict(numbers(record)), record["step"])
        run.finish()
    except Exception as error:
        print(" ".join(str(error).split()) or type(error).__name__)
        return 1
    return 0


def numbers(record: Mapping[str, Any] | list[Any], path: str = "") -> Iterator[tuple[str, float]]:
    """By path: `val_sources/code/loss`, `load/3`."""
    for key, value in record.items() if isinstance(record, Mapping) else enumerate(record):
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping | list) and key not in NOT_MEASURED:
            yield from numbers(value, name)
        elif isinstance(value, int | float):
            yield name, value


if __name__ == "__main__":
    sys.exit(main())
