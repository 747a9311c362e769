"""The pieces of the demonstration; the whole of it is run by `make demo`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from conf.schema import Refused
from launch.demo.arm import Arm, Interruption
from launch.demo.command import ARMS, KILLED
from launch.demo.processes import Launched, tree, typed
from launch.demo.story import LEARNT, failures, took
from launch.report.compare import Arm as Compared
from launch.report.compare import Comparison, Spread, flat

# a parent whose child has a session of its own and does not mind being asked to stop, as a rank that hangs
STUBBORN = """
import signal, subprocess, sys, time
if sys.argv[1:] == ["child"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("child", __import__("os").getpid(), flush=True)
    time.sleep(600)
child = subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
print("parent", __import__("os").getpid(), flush=True)
child.wait()
"""

POLITE = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""


def start(folder: Path, source: str) -> Launched:
    script = folder / "script.py"
    script.write_text(source)
    return Launched("arm", [sys.executable, str(script)])


def wait_for(capfd: pytest.CaptureFixture[str], words: set[str]) -> str:
    seen = ""
    deadline = time.monotonic() + 300
    while not all(word in seen for word in words):
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
        seen += capfd.readouterr().out
    return seen


def is_alive(process: int) -> bool:
    """A zombie has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killing_reaches_a_child_in_a_session_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with start(tmp_path, STUBBORN) as launched:
        seen = wait_for(capfd, {"parent", "child"})
        pids = [int(line.split()[-1]) for line in seen.splitlines()]
        assert set(tree(launched.process.pid)) == set(pids)
        assert tree(launched.process.pid)[0] == launched.process.pid
        launched.kill()
        deadline = time.monotonic() + 300
        while any(map(is_alive, pids)):  # a killed process closes its files, which `kill` waits for, before it ends
            assert time.monotonic() < deadline, "a process outlived its SIGKILL"
            time.sleep(0.01)
    assert all(line.startswith("arm | ") for line in seen.splitlines())


def test_leaving_early_asks_to_save_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(KeyboardInterrupt), start(tmp_path, POLITE) as launched:
        wait_for(capfd, {"ready"})
        raise KeyboardInterrupt
    assert launched.process.returncode == 75
    assert "arm | saved" in capfd.readouterr().out


def test_the_exit_code_of_a_command_is_its_own(tmp_path: Path) -> None:
    with start(tmp_path, "import sys; sys.exit(3)") as launched:
        assert launched.wait(300) == 3


def test_a_command_is_shown_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed([str(tmp_path / ".venv/bin/python"), "-m", "train", "a b"]) == ".venv/bin/python -m train 'a b'"
    assert typed(["/elsewhere/python3", "-m", "train"]) == "python3 -m train"


def test_arms_differ_in_their_attention_alone(tmp_path: Path) -> None:
    from dataclasses import asdict

    settings = [dict(flat(asdict(Arm(name, tmp_path / name, ()).config()))) for name in ARMS]
    differing = {key for key in set().union(*settings) if len({str(values.get(key)) for values in settings}) > 1}
    assert {key for key in differing if ".attention." not in key} == {"run.dir"}
    assert KILLED in ARMS


def test_an_arm_can_be_killed_between_two_checkpoints_and_before_its_end(tmp_path: Path) -> None:
    config = Arm(KILLED, tmp_path / KILLED, ()).config()
    assert config.checkpoint.every * 3 // 2 < config.train.steps


def test_a_misspelt_setting_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="stpes"):
        Arm("mla", tmp_path / "mla", ("train.stpes=3",)).config()
    assert not os.listdir(tmp_path)


def test_an_interruption_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "interruption.json"
    assert Interruption.load(file) is None
    interruption = Interruption(7, {6: 0.1 + 0.2, 7: 1e-9})
    interruption.save(file)
    assert Interruption.load(file) == interruption


@pytest.mark.parametrize(
    ("here", "sentence"),
    [
        pytest.param([], "It took 10 s.", id="nothing"),
        pytest.param(["the text"], "It took 10 s, because the text was there already.", id="text"),
        pytest.param(
            ["the text", "gqa", "mla"], "It took 10 s, because the text, gqa and mla were there already.", id="arms"
        ),
    ],
)
def test_what_was_there_before_is_why_it_took_so_little(here: list[str], sentence: str) -> None:
    assert took(9.6, here) == sentence


@pytest.mark.parametrize(
    ("ratio", "learnt"),
    [
        pytest.param(0.5, True, id="below"),
        pytest.param(LEARNT, True, id="at-the-limit"),
        pytest.param(LEARNT + 1e-9, False, id="above"),
        pytest.param(float("nan"), False, id="not-a-number"),
        pytest.param(None, False, id="not-measured"),
    ],
)
def test_an_arm_has_learnt_if_its_loss_is_low_enough(ratio: float | None, learnt: bool) -> None:
    spread = None if ratio is None else Spread(ratio, None, [ratio])
    wrong = failures(Comparison([Compared("mla", [], {"entropy_ratio": spread})], [], {}, None))
    assert not wrong if learnt else [sentence for sentence in wrong if sentence.startswith("mla has not learnt")]
