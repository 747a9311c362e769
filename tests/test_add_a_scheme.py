"""docs/adding_a_scheme.md, done as it says: one model file, one YAML file and one row; nothing else changes.

The tree is copied, the page's blocks are written into it, and its commands run there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

BLOCKS = {
    about: content
    for about, content in re.findall(
        r"^```(\S+(?: \S+)?)\n(.*?)^```$", (ROOT / "docs" / "adding_a_scheme.md").read_text(), re.MULTILINE | re.DOTALL
    )
}
"""What the page shows, by what stands after the opening fence."""

MODEL_FILE, YAML_FILE, ROW = (BLOCKS[about] for about in ("python shift.py", "yaml shift.yaml", "python row"))

PROPERTIES, COST = map(shlex.split, BLOCKS["sh"].splitlines())


def add(folder: Path, model_file: str) -> None:
    """A copy of the tree in `folder`, and the three additions."""
    for part in ("conf", "models", "parallel", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "models/attention/shift.py").write_text(model_file)
    (folder / "conf/attention/shift.yaml").write_text(YAML_FILE)
    table = folder / "tests/schemes.py"
    opening = "TABLE: dict[str, Row] = {\n"
    assert table.read_text().count(opening) == 1
    table.write_text(table.read_text().replace(opening, opening + ROW))


def typed(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the page, in the copied tree, with this interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    return subprocess.run(
        [sys.executable, *command[1:]],
        cwd=folder,
        env={**environment, "PYTEST_ADDOPTS": "-p no:cacheprovider -p no:xdist"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_one_file_one_yaml_one_row(tmp_path: Path) -> None:
    add(tmp_path, MODEL_FILE)
    result = typed(PROPERTIES, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = int(result.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 13, result.stdout
    assert "skipped" not in result.stdout
    result = typed([*COST, "--json"], tmp_path)
    assert result.returncode == 0, result.stderr
    (costs,) = json.loads(result.stdout).values()
    # of four layers a key and a value of 32 numbers, two bytes each; the tail is one row of half a value
    assert costs["kv_bytes_per_token"] == 4 * 2 * 32 * 2 and costs["tail_bytes"] == {"4096": 4 * 16 * 2}
    assert costs["percent_of_baseline"]["kv_bytes_per_token"] == 50


def test_a_wrong_scheme_has_not_the_properties(tmp_path: Path) -> None:
    """The first token of a document reads the last one of the document before."""
    leaks = MODEL_FILE.replace("sequence.position[..., None] == 0", "sequence.position[..., None] < 0")
    assert leaks != MODEL_FILE
    add(tmp_path, leaks)
    result = typed([*PROPERTIES[:-1], "shift and (packed or causal)"], tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "test_packed_is_separate[shift]" in result.stdout
    assert "1 failed, 1 passed" in result.stdout
