"""`python -m launch speed` on a CPU: what it says of a few steps, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.__main__ import main
from tests import forked

SMALL = ["experiment=smoke", "run.dir=unused", "run.device=cpu", "train.sequence_length=32", "train.batch_tokens=256"]


def test_a_few_steps(tmp_path: Path) -> None:
    process = forked.start("launch", ["speed", "--steps=3", "--documents=3", *SMALL], tmp_path, tmp_path / "said", {})
    process.join(300)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0, said
    assert re.search(r"sequence 32, 8 rows of 3 document\(s\) over 1 rank\(s\): [0-9,]+ tokens/s", said)
    assert re.search(r"; compute [0-9.]+ ms, optimizer [0-9.]+ ms$", said.rstrip())
    assert [file.name for file in tmp_path.iterdir()] == ["said"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(["--stepz=3"], "unrecognized arguments: --stepz=3", id="unknown"),
        pytest.param(["--steps=one"], "invalid int value: 'one'", id="no number"),
        pytest.param(["--steps=1"], "--steps 1 leaves none to count", id="too few steps"),
        pytest.param(["--documents=0"], "--documents 0 do not fit in a row of 32", id="no documents"),
        pytest.param(["--documents=33"], "--documents 33 do not fit in a row of 32", id="too many documents"),
    ],
)
def test_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", *SMALL, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("refused: ") and sentence in err and err.count("\n") == 1
