"""A run that is killed, stopped or moved to another number of ranks goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.loader import Loader
from data.recall import Config as RecallConfig
from tests import runs
from tests.held_disk import held_by, held_by_for_interpreters
from tests.ranks import PATIENCE
from tests.runs import TASK, TINY

ROOT = Path(__file__).parents[1]
STEPS = 32
PHASES = "train.phases=[{start: 9, sequence_length: 16}, {start: 17, batch_tokens: 128, learning_rate: 1e-3}]"
RAMP = "train.ramp={batch_tokens: 16, increment: 16, steps: 8}"
COURSE = [f"train.steps={STEPS}", PHASES, RAMP]
BASE = [*TINY, *COURSE]
KINDS = {"adamw": [*BASE, "optimizer=adamw"], "muon": [*BASE, "optimizer=muon"], "task": [*TASK, *COURSE]}

Reference = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """`reference(ranks, kind)`: the directory of an uninterrupted run; its corpus lies beside it."""
    folder = tmp_path_factory.mktemp("reference")
    runs.write_text(folder)
    made: dict[tuple[int, str], Path] = {}

    def get(ranks: int, kind: str) -> Path:
        key = (ranks, kind)
        if key not in made:
            runs.train(folder, [*KINDS[kind], f"run.dir={kind}_{ranks}"], ranks)
            made[key] = folder / f"{kind}_{ranks}"
        return made[key]

    return get


def assert_same_run(run: Path, expected: Path) -> None:
    assert runs.course(run) == runs.course(expected)
    assert runs.validations(run) == runs.validations(expected)
    assert runs.saved(run) == runs.saved(expected)
    runs.assert_same_state(runs.state(run, STEPS), runs.state(expected, STEPS))


def steps_made(run: Path) -> int:
    return int(max((record["step"] for record in runs.records(run)), default=0))


def starting_steps(run: Path) -> list[int]:
    """Where each start of the run stood, by its log."""
    return [int(step) for step in re.findall(rf"steps (\d+) to {STEPS}\n", (run / "log.txt").read_text())]


def unfinished(run: Path) -> list[str]:
    return [name for name in runs.saved(run) if name.endswith(".partial")]


@pytest.mark.parametrize("ranks", [pytest.param(1, id="1 rank"), pytest.param(2, id="2 ranks")])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_at_random_moments(reference: Reference, ranks: int, optimizer: str) -> None:
    expected = reference(ranks, optimizer)
    folder, draw = expected.parent, random.Random(f"{ranks} {optimizer}")
    arguments = [*KINDS[optimizer], "run.dir=killed"]
    run = folder / "killed"

    # inside a save, once there is a checkpoint to go back to
    held = folder / "held"
    job = runs.start(folder, arguments, ranks, variables=held_by(held))
    assert runs.wait_until(lambda: "step_00000004" in runs.saved(run), job)
    held.touch()
    assert runs.wait_until(lambda: bool(unfinished(run)), job)
    job.kill()
    held.unlink()
    assert unfinished(run)
    about_saves = [line for line in (run / "log.txt").read_text().splitlines() if "checkpoint of step" in line]
    assert about_saves[-1].endswith(": writing")

    for _ in range(3):
        starts, further = len(starting_steps(run)), draw.randint(1, 6)
        job = runs.start(folder, arguments, ranks)
        assert runs.wait_until(lambda starts=starts: len(starting_steps(run)) > starts, job)  # type: ignore[misc]
        target = starting_steps(run)[-1] + further
        assert runs.wait_until(lambda target=target: steps_made(run) >= target, job)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.02))
        job.kill()
        assert [process.exitcode for process in job.processes] == [-signal.SIGKILL] * ranks

    runs.train(folder, arguments, ranks)
    log = (run / "log.txt").read_text()
    assert re.search(r"removed \.step_\d+\.partial", log)
    assert sum(step > 0 for step in starting_steps(run)) >= 4
    assert_same_run(run, expected)
    run.rename(folder / f"killed_{optimizer}_{ranks}")


def test_asked_to_stop_by_signals_and_by_a_file(reference: Reference) -> None:
    """Every way once, one after the other, each on one of two ranks."""
    expected = reference(2, "adamw")
    folder, run = expected.parent, expected.parent / "stopped"
    arguments = [*BASE, "run.dir=stopped"]
    ways: list[tuple[str, Callable[[runs.Job], object]]] = [
        ("SIGTERM", lambda job: job.signal(signal.SIGTERM, rank=0)),
        ("SIGUSR1", lambda job: job.signal(signal.SIGUSR1, rank=1)),
        ("stop", lambda job: (run / "stop").touch()),
    ]
    for by, stop in ways:
        job = runs.start(folder, arguments, 2)
        before = steps_made(run)
        assert runs.wait_until(lambda before=before: steps_made(run) > before, job)  # type: ignore[misc]
        stop(job)
        assert job.end() == 75
        step = steps_made(run)
        assert before < step < STEPS
        assert runs.saved(run)[-1] == f"step_{step:08d}"
        assert not (run / "stop").exists()
        exit_note = json.loads((run / "exit.json").read_text())
        assert exit_note["code"] == 75
        assert by in exit_note["reason"]
        assert "the same command resumes" in job.printed()
    runs.train(folder, arguments, 2)
    assert json.loads((run / "exit.json").read_text()) == {"code": 0, "reason": "done"}
    assert runs.course(run) == runs.course(expected)
    runs.assert_same_state(runs.state(run, STEPS), runs.state(expected, STEPS))


# Another order of summation in float32, over 32 steps; losses are about 4.
LOSS_TOLERANCE = 1e-5


def test_another_number_of_ranks_goes_on(reference: Reference) -> None:
    expected = reference(1, "adamw")
    folder, run = expected.parent, expected.parent / "moved"
    for ranks in (1, 2):
        before = steps_made(run)
        job = runs.start(folder, [*BASE, "run.dir=moved"], ranks)
        assert runs.wait_until(lambda before=before: steps_made(run) > before + 3, job)  # type: ignore[misc]
        (run / "stop").touch()
        assert job.end() == 75, job.printed()
        assert before + 3 < steps_made(run) < STEPS
    runs.train(folder, [*BASE, "run.dir=moved"], 1)
    log = (run / "log.txt").read_text()
    assert "resumed with another layout.ranks: 2, before 1" in log
    assert "resumed with another layout.ranks: 1, before 2" in log
    pairs = list(zip(runs.records(run), runs.records(expected), strict=True))
    for key in ("step", "tokens", "lr", "batch"):
        assert [one[key] for one, _ in pairs] == [other[key] for _, other in pairs]
    assert max(abs(one["loss"] - other["loss"]) for one, other in pairs) < LOSS_TOLERANCE


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_stream_of_samples(world_size: int) -> None:
    source = RecallConfig().open()

    def digest(rank: int, size: int) -> int:
        return int(Loader(source, sequence_length=32, rank=rank, world_size=size).batch(12, 8).digest, 16)

    assert sum(digest(rank, world_size) for rank in range(world_size)) % 2**64 == digest(0, 1)
    assert digest(0, 1) != int(Loader(source, sequence_length=32).batch(13, 8).digest, 16)


TORCHRUN = ("torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def spawn(folder: Path, arguments: list[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
    """As a user would, from a shell."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with output.open("w") as file:
        return subprocess.Popen(arguments, cwd=folder, stdout=file, stderr=file, env=variables)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while steps_made(run) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_asked_to_stop_in_the_middle_of_a_validation(tmp_path: Path) -> None:
    """Which may last longer than a launcher waits: it is broken off, and owed."""
    run = tmp_path / "run"
    sizes = ["train.sequence_length=64", "train.batch_tokens=512", "train.micro_batch=8", "train.steps=4"]
    arguments = ["experiment=recall", *sizes, "evaluate.every=2", "run.dir=run", "run.threads=1", "run.device=cpu"]
    (run / "stop").mkdir(parents=True)  # asks for nothing, and is in nobody's way
    job = runs.start(tmp_path, [*arguments, "evaluate.samples=1000000"], 2)
    assert runs.wait_until(lambda: steps_made(run) == 2, job)
    job.signal(signal.SIGTERM, rank=1)
    assert job.end() == 75
    assert runs.saved(run) == ["step_00000002"]
    job = runs.start(tmp_path, [*arguments, "evaluate.samples=1000000"], 2)
    assert runs.wait_until(lambda: "resumed from step 2" in job.printed(), job)
    job.signal(signal.SIGTERM, rank=1)  # before the validation that is owed, or in it
    assert job.end() == 75
    assert "asked to stop by SIGTERM: saved step 2; the same command resumes\n" in job.printed()
    assert not runs.records(run, "val_loss")
    runs.train(tmp_path, [*arguments, "evaluate.samples=16"], 2)
    assert [record["step"] for record in runs.records(run, "val_loss")] == [2, 4]


def test_the_command_itself_resumes(reference: Reference) -> None:
    expected = reference(1, "adamw")
    folder, run, output = expected.parent, expected.parent / "command", expected.parent / "command.txt"
    arguments = command("train", *BASE, "run.dir=command")
    process = spawn(folder, arguments, output)
    wait_for_step(run, 6, process)
    while process.poll() is None:  # SLURM asks a rank, and srun too, which passes it on; that may come late
        process.terminate()
        time.sleep(0.001)
    assert process.returncode == 75, output.read_text()
    assert spawn(folder, arguments, output).wait(PATIENCE) == 0, output.read_text()
    assert_same_run(run, expected)


def test_under_torchrun_a_killed_rank_ends_the_others_and_a_file_stops_them(reference: Reference) -> None:
    expected = reference(2, "task")
    folder, run, output = expected.parent, expected.parent / "torchrun", expected.parent / "torchrun.txt"
    arguments = command(*TORCHRUN, "-m", "train", *KINDS["task"], "run.dir=torchrun")
    agent = spawn(folder, arguments, output)
    wait_for_step(run, 6, agent)
    workers = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
    ranks = [pid for pid in workers if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(ranks[0], signal.SIGKILL)
    assert agent.wait(PATIENCE) == 1
    causes = [line for line in output.read_text().splitlines() if line.startswith("failed: ")]
    assert causes == ["failed: another rank ended and left this one waiting; its own log or the launcher's says why."]
    assert json.loads((run / "exit.json").read_text())["code"] == 1

    agent = spawn(folder, arguments, output)
    wait_for_step(run, steps_made(run) + 3, agent)
    (run / "stop").touch()
    assert agent.wait(PATIENCE) == 1
    assert json.loads((run / "exit.json").read_text()) == {
        "code": 75,
        "reason": "asked to stop by the file torchrun/stop",
    }
    runs.train(folder, [*KINDS["task"], "run.dir=torchrun"], 2)
    assert runs.course(run) == runs.course(expected)
    runs.assert_same_state(runs.state(run, STEPS), runs.state(expected, STEPS))


def test_torchrun_asked_to_stop(reference: Reference) -> None:
    """By SIGTERM to its agent, first while the disk is too slow for its grace."""
    expected = reference(2, "task")
    folder, run, output = expected.parent, expected.parent / "asked", expected.parent / "asked.txt"
    held = folder / "held"
    variables = held_by_for_interpreters(held, folder / "disk")
    arguments = command(*TORCHRUN, "-m", "train", *KINDS["task"], "run.dir=asked")

    def ask(slow: bool) -> dict[str, Any]:
        before = steps_made(run)
        # a busy machine needs seconds to end its step; an older torch, which does not know this variable, waits 30 s
        grace = "8" if slow else "120"
        agent = spawn(folder, arguments, output, **variables, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=grace)
        # at step 8 the second save begins, and before it the first one is finished
        wait_for_step(run, before + (9 if slow else 2), agent)
        if slow:
            held.touch()
        agent.terminate()
        assert agent.wait(PATIENCE) == 1
        held.unlink(missing_ok=True)
        note: dict[str, Any] = json.loads((run / "exit.json").read_text())
        return note

    note = ask(slow=True)
    killed_at = steps_made(run)
    assert note == {
        "code": 1,
        "reason": f"killed while saving step {killed_at}: the same command resumes from the checkpoint before",
    }
    assert unfinished(run)
    last_good = max(int(name[5:]) for name in runs.saved(run) if name.startswith("step_"))
    assert 0 < last_good < killed_at

    note = ask(slow=False)
    assert starting_steps(run) == [0, last_good]
    assert note == {"code": 75, "reason": "asked to stop by SIGTERM"}
    assert runs.saved(run)[-1] == f"step_{steps_made(run):08d}"

    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == starting_steps(run)
    assert {start["archive"] for start in starts} == {path.name for path in run.glob("*.tar.gz")}

    runs.train(folder, [*KINDS["task"], "run.dir=asked"], 2)
    assert runs.course(run) == runs.course(expected)
    runs.assert_same_state(runs.state(run, STEPS), runs.state(expected, STEPS))
