"""Which Python and packages a run was submitted with, and whether a node has the same.

`python -m launch.slurm.environment` prints them; with such a file it compares, and refuses in one sentence.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
from pathlib import Path


def describe() -> dict[str, str]:
    """Versions by name, Python's first."""
    packages = {
        distribution.metadata["Name"]: distribution.version
        for distribution in reversed(list(importlib.metadata.distributions()))  # of two, the first is imported
    }
    return {"python": platform.python_version(), **dict(sorted(packages.items()))}


def difference(wanted: dict[str, str], here: dict[str, str]) -> str | None:
    """The first thing that is not the same, in words."""
    for name in [*wanted, *here]:
        if wanted.get(name) != here.get(name):
            return f"has {name} {here.get(name, 'not at all')}, but {wanted.get(name, 'none')} when it was submitted"
    return None


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 2 where they differ."""
    if not arguments:
        print(json.dumps(describe(), indent=1))
        return 0
    found = difference(json.loads(Path(arguments[0]).read_text()), describe())
    if found is None:
        return 0
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    advice = "name a Python that all nodes have as cluster.python, or submit again if it was changed since"
    print(f"refused: {sys.executable} on node {node} {found}; {advice}.", flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
