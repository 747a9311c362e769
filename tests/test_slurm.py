"""Runs as jobs of a real SLURM with two nodes: signalled, cancelled, requeued, killed, shrunk, and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import runs, slurm_cluster
from tests.runs import TASK, TINY
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import attempt_log, launch, status, submit, verdict, verdicts

ROOT = Path(__file__).parents[1]
STEPS = 80
BASE = [*TASK, f"train.steps={STEPS}"]
ON_CORPUS = [*TINY, f"train.steps={STEPS}"]
TWO_NODES = ["cluster=cpu", "nodes=2"]  # of two ranks each
TWO_RANKS = [*TWO_NODES, "cluster.tasks_per_node=1"]

pytestmark = pytest.mark.skipif(slurm_cluster.missing(), reason="needs SLURM (Debian: slurm-wlm and munge)")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), [])
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on two ranks that nothing interrupted, without SLURM."""
    folder = tmp_path_factory.mktemp("reference")
    runs.train(folder, [*BASE, "run.dir=reference"], 2)
    return folder / "reference"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a corpus."""
    runs.write_text(tmp_path)
    return tmp_path


def started(run: Path) -> list[int]:
    """The steps from which the run was started and resumed, by its log."""
    text = (run / "log.txt").read_text() if (run / "log.txt").exists() else ""
    return [int(step) for step in re.findall(rf"steps (\d+) to {STEPS}\n", text)]


def steps_made(run: Path) -> int:
    return int(max((record["step"] for record in runs.records(run)), default=0))


def wait_for_steps(slurm: SlurmCluster, run: Path, further: int, starts: int) -> None:
    """Until the run was started so often, and has made so many steps since; it must be far from its end."""
    slurm.wait(lambda: len(started(run)) == starts, f"start {starts} of the run")
    slurm.wait(lambda: steps_made(run) >= started(run)[-1] + further, f"step {further} of start {starts}")
    assert steps_made(run) < STEPS - 10


def assert_same_run(run: Path, expected: Path) -> None:
    assert runs.course(run) == runs.course(expected)
    assert runs.validations(run) == runs.validations(expected)
    runs.assert_same_state(runs.state(run, STEPS), runs.state(expected, STEPS))


def test_a_signalled_job_saves_requeues_and_finishes_as_if_nothing_had_happened(
    slurm: SlurmCluster, reference: Path, place: Path
) -> None:
    """Submitted from a copy of the code that is then broken: the job runs what was frozen."""
    code = place / "code"
    for package in ("conf", "data", "launch", "models", "parallel", "slurm", "train"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "launch", "submit", *BASE, *TWO_RANKS, "run.dir=runs/a"],
        cwd=place,
        env={**os.environ, **slurm.environment, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job = int(re.findall(r"^job (\d+); `python -m launch status runs/a`", done.stdout)[0])
    for broken in (
        code / "train",
        place / "train",
    ):  # what PYTHONPATH still names, and what the working directory holds
        broken.mkdir(exist_ok=True)
        (broken / "__init__.py").write_text("raise RuntimeError('this code is not frozen')\n")
    for file in (code / "conf").rglob("*.yaml"):
        file.unlink()

    run = place / "runs" / "a"
    wait_for_steps(slurm, run, 6, starts=1)
    assert re.fullmatch(rf"runs job {job}, attempt 0, on n\[1-2\]; step \d+ of {STEPS}", status(slurm, place, "runs/a"))
    slurm.run("scancel", "--signal=USR1", str(job))
    slurm.wait(lambda: slurm.state(job) == "PENDING", "the job to be requeued")
    saved = steps_made(run)
    assert saved < STEPS
    assert f"step_{saved:08d}" in runs.saved(run)
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    assert re.fullmatch(r"exit 75: saved, as it was asked to; requeued", verdict(run, job, 0))
    # SLURM gives no reason until its scheduler has looked at the job
    slurm.wait(lambda: "not said why" not in status(slurm, place, "runs/a"), "SLURM to say why the job waits")
    said = status(slurm, place, "runs/a")
    assert re.fullmatch(rf"waits job {job}: it was requeued, .* two minutes .*; step {saved} of {STEPS}", said)

    slurm.start_now(job)
    slurm.wait(lambda: slurm.ended(job), "the job to end")
    assert verdict(run, job, 1) == "exit 0: done"
    assert started(run) == [0, saved]
    assert "this code is not frozen" not in attempt_log(run, job, 1)
    assert_same_run(run, reference)
    assert status(slurm, place, "runs/a") == f"done step {STEPS} of {STEPS}"


def test_a_job_that_is_requeued_during_a_save_and_then_cancelled_by_its_user(
    slurm: SlurmCluster, reference: Path, place: Path
) -> None:
    job = submit(slurm, place, *BASE, *TWO_RANKS, "run.dir=b")
    run = place / "b"
    wait_for_steps(slurm, run, 5, starts=1)
    slurm.wait(lambda: bool(unfinished(run)), "a save")
    slurm.run("scontrol", "requeue", str(job))
    slurm.wait(lambda: slurm.state(job) == "PENDING", "the job to be requeued")
    first = steps_made(run)
    assert first < STEPS
    assert not unfinished(run)
    assert f"step_{first:08d}" in runs.saved(run)
    assert verdict(run, job, 0).startswith("exit 75: saved, because SLURM ended it")

    slurm.start_now(job)
    wait_for_steps(slurm, run, 3, starts=2)
    slurm.run("scancel", str(job))
    slurm.wait(lambda: slurm.ended(job), "the job to end")
    second = steps_made(run)
    assert started(run) == [0, first]
    assert first < second < STEPS
    assert f"step_{second:08d}" in runs.saved(run)
    assert json.loads((run / "exit.json").read_text()) == {"code": 75, "reason": "asked to stop by SIGTERM"}
    assert verdict(run, job, 1).startswith("exit 75: saved, because SLURM ended it")
    assert "scontrol" not in attempt_log(run, job, 1)
    assert status(slurm, place, "b").startswith(f"stopped job {job}, attempt 1: saved, because SLURM ended it")
    assert status(slurm, place, "b").endswith(f"it resumes from step {second} of {STEPS}")

    runs.train(place, [*BASE, "run.dir=b"], 2)  # the same command without SLURM takes it up
    assert started(run) == [0, first, second]
    assert_same_run(run, reference)
    assert status(slurm, place, "b") == f"done step {STEPS} of {STEPS}"


def unfinished(run: Path) -> list[str]:
    return [name for name in runs.saved(run) if name.endswith(".partial")]


def test_a_killed_rank_ends_the_job_which_resumes_on_one_node(
    slurm: SlurmCluster, reference: Path, place: Path
) -> None:
    job = submit(slurm, place, *BASE, *TWO_NODES, "run.dir=c")
    run = place / "c"
    wait_for_steps(slurm, run, 9, starts=1)  # the second save begins at step 8, when the first one is finished
    os.kill(process_of(job, rank=3), signal.SIGKILL)
    killed = time.monotonic()
    slurm.wait(lambda: slurm.state(job) != "RUNNING", "the job to end", timeout=60)
    slurm.wait(lambda: slurm.state(job) == "PENDING", "the job to be requeued", timeout=60)
    assert time.monotonic() - killed < 60
    assert verdict(run, job, 0) == "exit 137: rank 3 on node n2: Killed; requeued"

    slurm.run("scontrol", "update", f"JobId={job}", "NumNodes=1-1", "NumTasks=2", "NumCPUs=2")
    slurm.start_now(job)
    slurm.wait(lambda: slurm.ended(job), "the job to end")
    assert verdict(run, job, 1) == "exit 0: done"
    first, resumed = started(run)
    assert first == 0 < resumed
    assert re.search(r"another layout.ranks: 2, before 4", (run / "log.txt").read_text())
    losses, expected = ([float(record["loss"]) for record in runs.records(one)] for one in (run, reference))
    assert losses == pytest.approx(expected, abs=1e-4)


def process_of(job: int, rank: int) -> int:
    """Of the training process of a rank."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            variables = {*(folder / "environ").read_bytes().split(b"\0")}
            if command[1:3] == [b"-m", b"train"] and wanted <= variables:
                return int(folder.name)
        except OSError:  # ended since it was listed, or another user's
            continue
    raise AssertionError(f"no process trains as rank {rank} of job {job}")


def test_the_script_by_hand_and_a_stop_file(slurm: SlurmCluster, place: Path) -> None:
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sbatch", "--parsable", "--ntasks-per-node=1", str(ROOT / "slurm/train.sbatch"), *ON_CORPUS, "run.dir=d"],
        cwd=place,
        env={**os.environ, **slurm.environment, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job, run = int(done.stdout), place / "d"
    wait_for_steps(slurm, run, 3, starts=1)
    (run / "stop").touch()
    slurm.wait(lambda: slurm.ended(job), "the job to end")
    assert verdict(run, job, 0) == "exit 75: saved, as it was asked to, by the file stop"
    assert not (run / "stop").exists()
    assert f"step_{steps_made(run):08d}" in runs.saved(run)


def stand_in(folder: Path, body: str) -> str:
    """An interpreter that does `body`, in bash, where it is asked to train."""
    file = folder / "python"
    file.write_text(
        f'#!/bin/bash\nif [[ "$2" == train ]]; then\n{body}\nfi\nexec {sys.executable} "$@"\n', newline="\n"
    )
    file.chmod(0o755)
    return f"cluster.python={file}"


ENDS = [
    pytest.param(["exit 0"], [], ["exit 0: done"], id="done"),
    pytest.param(
        ['echo "refused: the sentence." >&2; exit 2'], [], ["exit 2: refused: the sentence."], id="refused: not again"
    ),
    pytest.param(
        ["exit 75"],
        ["cluster.options.no-requeue=null"],
        ["exit 75: saved, as it was asked to; but SLURM does not requeue it: .+"],
        id="a job that may not be requeued",
    ),
    pytest.param(
        ["exit 75", "exit 75"],
        ["cluster.attempts=2"],
        [
            "exit 75: saved, as it was asked to; requeued",
            "exit 75: saved, as it was asked to; given up, because all 2 attempts are used",
        ],
        id="as many attempts as were allowed",
    ),
    pytest.param(
        ["exit 75", "((SLURM_PROCID == 2)) && kill -SEGV $$; exit 0", "exit 1"],
        ["cluster.crashes=2"],
        [
            "exit 75: .* requeued",
            r"exit 139: rank 2 on node n2: Segmentation fault; requeued",
            r"exit 1: ranks? \S+ on node n\d: Exited with exit code 1; given up after 2 failures .*",
        ],
        id="as many failures as were allowed",
    ),
    pytest.param(
        ["exit 1", "mkdir -p crash/checkpoints/step_00000004; exit 1", "exit 1"],
        ["cluster.crashes=2"],
        [
            "exit 1: .* requeued",
            "exit 1: .* requeued",
            "exit 1: .*; given up after 2 failures without a new checkpoint",
        ],
        id="a new checkpoint starts the count anew",
    ),
    pytest.param(
        ['((SLURM_PROCID == 1)) || sleep 300; echo "failed: the disk is full" >&2; exit 1'],
        ["cluster.wait=2", "cluster.crashes=1"],
        [r"exit \d+: rank 1 on node n1: Exited with exit code 1 1: failed: the disk is full; given up after 1 .*"],
        id="others that would wait without end",
    ),
]


@pytest.mark.parametrize(("bodies", "settings", "expected"), ENDS)
def test_what_comes_of_an_end(
    slurm: SlurmCluster, place: Path, bodies: list[str], settings: list[str], expected: list[str]
) -> None:
    """What each attempt does stands in `bodies`."""
    cases = "\n".join(f"{attempt}) {body};;" for attempt, body in enumerate(bodies))
    python = stand_in(place, f"case ${{SLURM_RESTART_COUNT:-0}} in\n{cases}\nesac")
    job, run = submit(slurm, place, *BASE, *TWO_NODES, "run.dir=crash", python, *settings), place / "crash"
    for attempt, end in enumerate(expected):
        if attempt:
            slurm.start_now(job)
        if attempt == len(expected) - 1:
            slurm.wait(lambda: slurm.ended(job), "the job to end")
        slurm.wait(lambda attempt=attempt: bool(verdicts(run, job, attempt)), f"attempt {attempt}")  # type: ignore[misc]
        assert re.fullmatch(end, verdict(run, job, attempt))
    assert not attempt_log(run, job, len(expected))


def other_packages(place: Path) -> list[str]:
    """A Python that on one node has another version of a package."""
    (place / "other" / "torch-0.1.dist-info").mkdir(parents=True)
    (place / "other" / "torch-0.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 0.1\n")
    file = place / "python"
    other = f"export PYTHONPATH={place}/other:$PYTHONPATH"
    file.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME == n2 ]] && {other}\nexec {sys.executable} "$@"\n')
    file.chmod(0o755)
    return [f"cluster.python={file}"]


def python_of_the_login_node(place: Path) -> list[str]:
    """A Python that only who submits has."""
    return [stand_in(place, "exit 0"), f"cluster.setup=['mv {place}/python {place}/gone']"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        pytest.param(
            other_packages,
            r"refused: \S+ on node n2 has torch 0\.1, but \S+ when it was submitted; name a Python .*\.",
            id="other packages on a node",
        ),
        pytest.param(
            python_of_the_login_node,
            r"refused: node n\d has no \S+/python; name a Python that all nodes have as cluster.python\.",
            id="no such Python on a node",
        ),
    ],
)
def test_nodes_that_cannot_run_it_are_named_before_anything_starts(
    slurm: SlurmCluster, place: Path, make: object, sentence: str
) -> None:
    assert callable(make)
    job = submit(slurm, place, *BASE, *TWO_NODES, "run.dir=e", *make(place))
    slurm.wait(lambda: slurm.ended(job), "the job to end")
    assert re.fullmatch(f"exit 2: {sentence}", verdict(place / "e", job, 0))
    assert status(slurm, place, "e").startswith(f"refused job {job}, attempt 0: refused: ")


@pytest.mark.skipif(
    not slurm_cluster.missing() and not slurm_cluster.can_hide(), reason="needs root, to hide a folder from one node"
)
def test_a_directory_that_one_node_does_not_see(slurm: SlurmCluster, place: Path) -> None:
    run = slurm.hidden / place.name
    job = submit(slurm, place, *BASE, *TWO_NODES, f"run.dir={run}")
    slurm.wait(lambda: slurm.ended(job), "the job to end")
    assert verdict(run, job, 0).startswith(f"exit 2: refused: node n2 does not see {run} from {place}; ")
    job = submit(slurm, place, *BASE, "cluster=cpu", "nodes=1", f"run.dir={run}", "cluster.options.nodelist=n2")
    slurm.wait(lambda: slurm.ended(job), "the job to end")
    said = status(slurm, place, str(run))
    assert f"job {job} left no log" in said
    assert f"its node does not see {run}" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(["cluster.partition=nope"], "partition nope does not exist; .*: main, paid", id="partition"),
        pytest.param(["cluster.partition=paid"], "account .none given. may not use partition paid", id="no account"),
        pytest.param(["nodes=4", "cluster.tasks_per_node=1"], "no nodes of .* have so much", id="too many nodes"),
        pytest.param(["cluster.cpus_per_task=9"], "no nodes of the partition have so much", id="too many cores"),
        pytest.param(["cluster=gpu", "nodes=1"], "SLURM knows of no GPUs here", id="no GPUs"),
        pytest.param(["cluster.time=9-0"], r"cluster.time \(9-0\) is missing, or more", id="too long"),
        pytest.param(["cluster.options.constraint=h100"], "no node has what a --constraint", id="no such feature"),
        pytest.param(["cluster.options.bogus=1"], "sbatch does not know an option .*--bogus", id="no such option"),
        pytest.param(["cluster.python=nopython"], "cluster.python .nopython. does not run here", id="no such Python"),
        pytest.param(["train.stepz=3"], "did you mean 'steps'", id="a misspelt key of the run"),
        pytest.param(["cluster.partitoin=x"], "did you mean 'partition'", id="a misspelt key of the cluster"),
        pytest.param(["cluster=main"], "cluster is 'main' .*, which does not exist", id="no such cluster"),
        pytest.param(["nodes=0"], r"nodes \(0\) must be at least 1", id="no nodes"),
        pytest.param(["cluster.tasks_per_node=3", "nodes=1"], "which 3 ranks cannot", id="ranks that do not divide"),
        pytest.param(["data.train.path=gone"], "gone holds no prepared corpus", id="no corpus"),
        pytest.param(["run.dir=/proc/run"], "/proc/run cannot be written", id="a directory that cannot be made"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_written(
    slurm: SlurmCluster, place: Path, arguments: Sequence[str], sentence: str
) -> None:
    before = runs.tree(place)
    code, printed = launch(slurm, place, "submit", *ON_CORPUS, *TWO_NODES, "run.dir=new/run", *arguments)
    assert code == 2, printed
    last = printed.splitlines()[-1]
    assert re.match(f"refused: .*{sentence}", last), printed
    assert runs.tree(place) == before
    assert slurm.run("squeue", "--noheader", "--name=run") == ""


def test_a_machine_without_slurm_and_a_second_job(slurm: SlurmCluster, place: Path) -> None:
    arguments = [*BASE, *TWO_NODES, "run.dir=f"]
    before = runs.tree(place)
    code, printed = launch(slurm, place, "submit", *arguments, path="/nowhere")
    assert code == 2
    assert printed.startswith("refused: sbatch is not on this machine; submit from a login node")
    code, printed = launch(slurm, place, "submit", "--dry-run", *arguments, path="/nowhere")
    assert code == 0
    note, script = printed.split("\n", 1)
    assert note.startswith("SLURM was not asked: sbatch is not on this machine")
    assert runs.tree(place) == before

    job = submit(slurm, place, *arguments, "cluster.options.hold=null")
    assert (place / "f/job/train.sbatch").read_text() == script.replace(
        "--signal=USR1@120", "--signal=USR1@120\n#SBATCH --hold"
    )
    assert status(slurm, place, "f").startswith(f"waits job {job}: its user holds it")
    (place / "link").symlink_to(place)
    assert status(slurm, place, "link/f").startswith(f"waits job {job}: its user holds it")
    for again in (arguments, [*arguments, "run.dir=link/f"]):
        code, printed = launch(slurm, place, "submit", *again)
        assert code == 2
        assert f"has job {job} already (pending); wait for it, or end it first with scancel {job}." in printed
    (place / "silent").mkdir()
    (place / "silent" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (place / "silent" / "squeue").chmod(0o755)
    silent = f"{place / 'silent'}:{os.environ['PATH']}"
    code, printed = launch(slurm, place, "submit", *arguments, path=silent)
    assert code == 2
    assert f"refused: squeue does not say whether {place / 'f'} has a job already" in printed
    code, printed = launch(slurm, place, "status", "f", path=silent)
    assert code == 0
    assert re.match(rf"f +unknown +only SLURM knows whether job {job} waits or runs", printed)
    slurm.run("scancel", str(job))
    slurm.wait(lambda: slurm.ended(job), "the job to end")
    assert status(slurm, place, "f").startswith(f"failed job {job} left no log: it was cancelled before it started")


def test_ranks_find_each_other_under_a_bare_srun(slurm: SlurmCluster, place: Path) -> None:
    """By SLURM's variables, and an address, since no name service knows these nodes."""
    script = (
        "from train.config import RunSection; from train.ranks import join, leave, _first_host; "
        "ranks = join(RunSection('x', device='cpu')); "
        "print(ranks.rank, ranks.world_size, ranks.total(1)[0], _first_host('n[1-2]')); leave()"
    )
    variables = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-c", script]
    done = subprocess.run(
        srun, cwd=place, env={**os.environ, **slurm.environment, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 2 2 n1", "1 2 2 n1"]
