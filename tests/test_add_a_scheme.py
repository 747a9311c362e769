"""A scheme is added with one model file, one YAML file and one row of the table; nothing else changes.

The tree is copied, the three are added, and the copy's own property tests run over the new row.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

MODEL_FILE = '''
"""Multi-query attention whose value is half of this token's and half of the one before (CCA, arXiv 2510.04476)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.contract import Attention, Flops, PairCount, Part, Pieces, Result, Sequence, Slot, State, Visibility
from models.contract import at_tokens, visible_pairs
from models.cores import blockwise
from models.cores.merge import Core, read
from models.linear import Linear


@dataclass(frozen=True)
class Config:
    heads: int
    head_dim: int

    def build(self, width: int, *, writes: bool = True) -> Shift:
        return Shift(self, width, writes)


class Shift(Attention):
    core: Core = staticmethod(blockwise.core)

    def __init__(self, config: Config, width: int, writes: bool) -> None:
        super().__init__()
        self.config, self.writes = config, writes
        self.query = Linear(width, config.heads * config.head_dim, ("heads", "width"))
        self.output = Linear(config.heads * config.head_dim, width, ("width", "heads"), "output")
        self.key = Linear(width, config.head_dim, ("latent", "width"))
        self.now = Linear(width, config.head_dim // 2, ("latent", "width"))
        self.earlier = Linear(width, config.head_dim // 2, ("latent", "width"))
        self.declare("first", (config.head_dim // 2,), ("latent",), "bias")

    def slots(self) -> tuple[Slot, ...]:
        def part(name: str, size: int) -> Part:
            return Part(name, (("latent", size),))

        c = self.config
        tail = Slot("previous", (part("value", c.head_dim // 2),), kind="tail", rows=1)
        return Slot("kv", (part("key", c.head_dim), part("value", c.head_dim))), tail

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        earlier = self.earlier(x)
        past, present = sequence.before(self.slots()[1], earlier)
        shifted = torch.cat((torch.where(present[..., None], past, self.first.to(x.dtype)), earlier), 1)[:, :-1]
        shifted = torch.where(sequence.position[..., None] == 0, self.first.to(x.dtype), shifted)
        value = torch.cat((self.now(x), shifted), -1)
        return self.query(x).unflatten(-1, (self.config.heads, -1)), {
            "kv": at_tokens(sequence, {"key": self.key(x), "value": value})
        }

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        readables = []
        for kv in pieces["kv"]:
            key, value = (kv.parts[name].unsqueeze(2) for name in ("key", "value"))
            readables.append((key, value, Visibility.of(kv, sequence)))
        return Result(self.output(read(self.core, query, readables, self.config.head_dim**-0.5).flatten(-2)))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        linear = (self.query, self.output, self.key, self.now, self.earlier)
        per_pair = 4.0 * self.config.heads * self.config.head_dim
        return Flops(queries * sum(one.flops() for one in linear), pairs(self.slots()[0], queries, context) * per_pair)
'''

YAML_FILE = """
scheme: shift
heads: 4
head_dim: 32
"""

ROW = '    "shift": Row((layer({"scheme": "shift", "heads": 3, "head_dim": 8}), layer(gqa()))),\n'

# what a run does with the YAML file, then the properties
COMMANDS = """
import sys
import pytest
from conf import schema
from conf.compose import choices, compose
from models import cost
from models.config import ModelConfig

assert "shift" in choices("attention")
composed = schema.build(ModelConfig, compose(["attention=shift"])["model"], "model")
model = cost.meta(composed)
assert cost.kv_bytes_per_token(model) == len(model.blocks) * 2 * 32 * 2
sys.exit(pytest.main(["tests/test_properties.py", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", sys.argv[1]]))
"""


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


def properties_of(folder: Path, which: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-c", COMMANDS, which],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_one_file_one_yaml_one_row(tmp_path: Path) -> None:
    add(tmp_path, MODEL_FILE)
    result = properties_of(tmp_path, "shift")
    assert result.returncode == 0, result.stdout + result.stderr
    passed = int(result.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 13, result.stdout
    assert "skipped" not in result.stdout


def test_a_wrong_scheme_has_not_the_properties(tmp_path: Path) -> None:
    """The first token of a document reads the last one of the document before."""
    leaks = MODEL_FILE.replace("sequence.position[..., None] == 0", "sequence.position[..., None] < 0")
    assert leaks != MODEL_FILE
    add(tmp_path, leaks)
    result = properties_of(tmp_path, "shift and (packed or causal)")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "test_packed_is_separate[shift]" in result.stdout
    assert "1 failed, 1 passed" in result.stdout
