"""What a cluster's configuration may say, the script that it makes, and what `launch status` reads from a run's files.

The jobs themselves are submitted in tests/test_slurm.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from conf.compose import choices, compose, groups
from conf.schema import Refused, build
from launch.slurm import environment
from launch.slurm.cluster import Cluster, Submission, seconds
from launch.slurm.scheduler import Queued
from launch.slurm.script import TEMPLATE, Job, render
from launch.slurm.status import main, status
from launch.slurm.submit import main as submit
from tests import runs
from tests.runs import TINY

JOB = Job(Path("/shared/runs/my run"), Path("/shared/it's"))


@pytest.mark.parametrize("name", choices("cluster"))
def test_every_shipped_cluster_makes_a_script_that_bash_reads(name: str) -> None:
    values = compose([f"cluster={name}", "nodes=2"], "submit")
    submission = build(Submission, {key: values[key] for key in ("cluster", "nodes")}, "")
    script = render(JOB, submission, ["/a b/python"])
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert submission.world_size == 2 * submission.cluster.tasks_per_node


def test_a_script_holds_what_the_cluster_says() -> None:
    cluster = Cluster(
        tasks_per_node=8,
        gpus_per_node=8,
        cpus_per_task=12,
        memory="0",
        partition="big",
        account="lab",
        qos="high",
        time="1-12",
        options={"constraint": "h100&nvlink", "exclusive": None},
        setup=["module load cuda"],
        environment={"NCCL_DEBUG": "WARN", "TEXT": "it's"},
        grace=300,
        attempts=7,
        crashes=2,
        wait=30,
    )
    script = render(JOB, Submission(cluster, 4), ["/a b/python"])
    shown = """
        exec 3>&1 >/dev/null
        set -e
        srun() { :; }
        eval "$(sed -n '/^# Settings/,/^# End/p' "$0")"
        printf '%s|' "${python[@]}" "$attempts" "$crashes" "$wait" "$run" "$NCCL_DEBUG" "$TEXT" "$loaded" "$@" >&3
    """
    done = subprocess.run(
        ["bash", "-c", f"module() {{ loaded=$*; }}\n{shown}", "/dev/stdin"],
        input=script,
        capture_output=True,
        text=True,
    )
    config = "/shared/runs/my run/job/config.yaml"
    settings = ["/a b/python", "7", "2", "30", "/shared/runs/my run", "WARN", "it's", "load cuda", "--config", config]
    assert done.stdout == "|".join(settings) + "|", done.stderr
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert options[3:5] == ["--requeue", "--open-mode=append"]
    assert options[5:] == [
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=0", "--partition=big",
        "--account=lab", "--qos=high", "--time=1-12", "--signal=USR1@300", "'--constraint=h100&nvlink'", "--exclusive",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        pytest.param({"tasks_per_node": 0}, r"tasks_per_node \(0\) must be at least 1", id="no tasks"),
        pytest.param({"gpus_per_node": 8}, "must equal gpus_per_node", id="not a GPU for each rank"),
        pytest.param({"partition": "a b"}, "partition .* must be one word", id="two words"),
        pytest.param({"account": ""}, "account .* must be one word; null", id="nothing for a word"),
        pytest.param({"time": "1 day"}, "time .* is no time limit", id="words for a time"),
        pytest.param({"time": 60}, "time is 60 .* a text is needed", id="a number for a time"),
        pytest.param({"time": "2", "grace": 120}, "grace .120 seconds. must be less than time", id="no time but grace"),
        pytest.param({"environment": {"A B": "x"}}, "no name of a variable", id="no variable"),
        pytest.param({"options": {"--mem": "1"}}, "no option of sbatch", id="dashes"),
        pytest.param({"options": {"mem": "1\n#"}}, "no option of sbatch", id="two lines"),
        pytest.param({"attempts": 0}, r"attempts \(0\)", id="no attempts"),
        pytest.param({"partitoin": "x"}, "did you mean 'partition'", id="misspelt"),
    ],
)
def test_mistakes_in_a_cluster_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        build(Submission, {"cluster": {"tasks_per_node": 2, **values}}, "")


def test_a_submission_without_a_cluster_is_refused() -> None:
    with pytest.raises(Refused, match=r"^cluster is missing; a mapping of keys is needed\.$"):
        submit(["~cluster", "run.dir=x", "--dry-run"])


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-0:0:1", 86401),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_as_slurm_reads_them(time: str, expected: int | None) -> None:
    assert seconds(time) == expected


def test_a_run_knows_of_no_cluster() -> None:
    assert groups("submit") == sorted([*groups(), "cluster"])
    run = compose(["experiment=smoke"], "submit")
    assert {key: value for key, value in run.items() if key not in ("cluster", "nodes")} == compose(
        ["experiment=smoke"]
    )


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        pytest.param("Priority", "jobs of higher priority are before it", id="priority"),
        pytest.param("(ReqNodeNotAvail, UnavailableNodes:n2)", "nodes that it needs are down", id="nodes"),
        pytest.param("QOSMaxGRESPerUser", "quality of service is at a limit (QOSMaxGRESPerUser)", id="qos"),
        pytest.param("AssocGrpGRES", "its account is at a limit", id="account"),
        pytest.param("Job's account not known, so it can't use this partition", "will never start", id="no account"),
        pytest.param("SomethingNew", "SLURM says SomethingNew", id="unknown"),
    ],
)
def test_reasons_to_wait_in_plain_words(reason: str, words: str) -> None:
    assert words in Queued(1, "PENDING", reason, "", Path("x")).waits_for


SAVED = "exit 75: saved, as it was asked to; requeued"
ENDED = [
    pytest.param({}, "failed", "it ended without a word .* last line: the end; it has no checkpoint", id="killed"),
    pytest.param({"exit": (0, "done")}, "done", "step 7 of 9", id="done"),
    pytest.param({"exit": (1, "the disk")}, "failed", "the disk; it has no checkpoint", id="failed"),
    pytest.param({"exit": (75, "asked"), "saved": 5}, "stopped", "asked; .* from step 5 of 9", id="saved"),
    pytest.param({"log": ["exit 0: done"]}, "done", "step 7 of 9", id="a job that is done"),
    pytest.param({"config": b"\xff", "exit": (0, "done")}, "done", r"step 7 of \?", id="no text for a configuration"),
    pytest.param(
        {"log": [SAVED, "exit 137: rank 3 on node n2: Killed; given up"], "exit": (1, "another rank"), "saved": 5},
        "failed",
        "job 4, attempt 1: rank 3 on node n2: Killed; given up; started again, it resumes from step 5 of 9",
        id="a job that is given up",
    ),
    pytest.param({"log": [SAVED]}, "stopped", "requeued, and then cancelled", id="a job cancelled while it waited"),
    pytest.param({"log": [SAVED, ""]}, "failed", "job 4 ended without a word .* of attempt 1;", id="a node that died"),
    pytest.param({"log": []}, "failed", "job 4 left no log: .* its node does not see", id="a job that left nothing"),
    pytest.param({"log": [SAVED], "later": (0, "done")}, "done", "step 7 of 9", id="done without SLURM, after a job"),
    pytest.param({"log": [], "later": (1, "it")}, "failed", "it; it has no", id="failed without SLURM, after a job"),
    pytest.param({"log": ["exit 2: refused: no."]}, "refused", "job 4, attempt 0: refused: no.", id="refused"),
]


@pytest.mark.parametrize(("left", "word", "what"), ENDED)
def test_status_of_what_a_run_left(tmp_path: Path, left: dict[str, Any], word: str, what: str) -> None:
    (tmp_path / "config.yaml").write_bytes(left.get("config", b"train: {steps: 9}\n"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n{"of": 1}\n[1]\n{"st')
    (tmp_path / "log.txt").write_text("the beginning\nthe end\n")
    if "exit" in left:
        code, reason = left["exit"]
        (tmp_path / "exit.json").write_text(json.dumps({"code": code, "reason": reason}))
    if "saved" in left:
        (tmp_path / "checkpoints" / f"step_{left['saved']:08d}").mkdir(parents=True)
    if "log" in left:
        (tmp_path / "job").mkdir()
        (tmp_path / "job" / "submitted.jsonl").write_text('{"job": 3}\n{"job": 4}\n')
        (tmp_path / "job" / "3_attempt_9.log").write_text("job 3, attempt 9, exit 0: done\n")
        for attempt, end in enumerate(left["log"]):
            text = f"a line of attempt {attempt}\n" + (f"job 4, attempt {attempt}, {end}\n" if end else "")
            (tmp_path / "job" / f"4_attempt_{attempt}.log").write_text(text)
    if "later" in left:
        code, reason = left["later"]
        (tmp_path / "exit.json").write_text(json.dumps({"code": code, "reason": reason}))
        os.utime(tmp_path / "exit.json", (time.time() + 5,) * 2)
    found = status(tmp_path, [])
    assert found.word == word
    assert re.search(what, found.what), found.what


@pytest.mark.parametrize(
    ("ends", "word"),
    [
        pytest.param([], "unknown", id="no log yet"),
        pytest.param([SAVED], "unknown", id="requeued"),
        pytest.param([SAVED, ""], "unknown", id="started"),
        pytest.param([SAVED, "exit 1: it; given up"], "failed", id="given up"),
    ],
)
def test_status_while_slurm_is_silent_buries_no_job_that_may_live(tmp_path: Path, ends: list[str], word: str) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "submitted.jsonl").write_text('{"job": 4}\n')
    for attempt, end in enumerate(ends):
        (tmp_path / "job" / f"4_attempt_{attempt}.log").write_text(
            f"job 4, attempt {attempt}, {end}\n" if end else "a\n"
        )
    assert status(tmp_path, None).word == word


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        pytest.param(["a/config.yaml", "job/config.yaml"], ["a", "job"], id="a run that is named job"),
        pytest.param(
            ["a/config.yaml", "job/job/config.yaml", "job/job/train.sbatch"], ["a", "job"], id="the same, submitted"
        ),
        pytest.param(["a/config.yaml", "text/train.bin", "b/notes"], ["a"], id="other folders"),
        pytest.param(["config.yaml", "job/config.yaml", "job/train.sbatch"], ["."], id="a run itself"),
        pytest.param(["job/config.yaml", "job/train.sbatch"], ["."], id="a run itself, which has not begun"),
    ],
)
def test_status_tells_runs_from_folders_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], listed: list[str]
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("/")] == [str(tmp_path / name) for name in listed]


def test_status_finds_a_job_whose_run_was_named_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real" / "job").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    for submitted, asked in (("link", "real"), ("real", "link"), ("link", "link")):
        queued = Queued(5, "PENDING", "Priority", "", tmp_path / submitted / "job/train.sbatch")
        assert status(tmp_path / asked, [queued]).word == "waits"


@pytest.mark.parametrize(
    ("code", "full", "requeued"),
    [
        pytest.param(75, False, True, id="saved"),
        pytest.param(0, True, False, id="done on a full disk"),
        pytest.param(2, True, False, id="refused on a full disk"),
        pytest.param(75, True, False, id="saved on a full disk"),
        pytest.param(1, True, False, id="failed on a full disk"),
    ],
)
def test_an_attempt_that_cannot_write_is_its_jobs_last(tmp_path: Path, code: int, full: bool, requeued: bool) -> None:
    """The script itself, with stand-ins for srun and scontrol. A limit on the size of files stands for a full disk."""
    for name, body in (("srun", f"[[ $* == *check_node* ]] || exit {code}"), ("scontrol", 'mkdir "$PWD/$1"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "NNODES": "1", "NTASKS_PER_NODE": "1"}
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURMD_NODENAME": "n1"}
    limit = "trap '' XFSZ; ulimit -f 0; " if full else ""
    done = subprocess.run(
        ["bash", "-c", f'{limit}exec bash "$@"', "bash", str(TEMPLATE), f"run.dir={tmp_path}/run"],
        cwd=tmp_path,
        env={**os.environ, **variables, **{f"SLURM_{name}": value for name, value in slurm.items()}},
    )
    assert done.returncode == code
    assert (tmp_path / "show").exists()
    assert (tmp_path / "requeue").exists() == requeued
    assert ("; requeued" in (tmp_path / "run/job/7_attempt_0.log").read_text()) == requeued


def test_a_resolved_configuration_runs_as_it_is(tmp_path: Path) -> None:
    runs.write_text(tmp_path)
    runs.train(tmp_path, [*TINY, "train.steps=8", "run.dir=a"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text((tmp_path / "a/config.yaml").read_text().replace("dir: a\n", "dir: b\n"))
    runs.train(tmp_path, ["--config", "resolved.yaml"])
    assert runs.course(tmp_path / "b") == runs.course(tmp_path / "a")
    assert (tmp_path / "b/config.yaml").read_text() == resolved.read_text()
    (tmp_path / "rank_0.txt").unlink()
    before = runs.tree(tmp_path)
    for arguments, sentence in (
        (["--config", "gone.yaml"], "--config gone.yaml cannot be read (No such file or directory)"),
        (["--config", "resolved.yaml", "train.steps=9"], "--config takes one file and nothing beside it"),
        (["--config", "corpus/train.bin"], "--config corpus/train.bin cannot be read (unacceptable character"),
    ):
        job = runs.start(tmp_path, arguments)
        assert job.end() == 2
        assert job.printed().startswith(f"refused: {sentence}"), job.printed()
        job.output[0].unlink()
    assert runs.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("here", "sentence"),
    [
        pytest.param({"python": "3.11", "torch": "2"}, None, id="the same"),
        pytest.param({"python": "3.12", "torch": "2"}, "has python 3.12, but 3.11", id="another Python"),
        pytest.param({"python": "3.11"}, "has torch not at all, but 2", id="one package less"),
        pytest.param({"python": "3.11", "torch": "2", "x": "1"}, "has x 1, but none", id="one package more"),
    ],
)
def test_environments_are_compared(here: dict[str, str], sentence: str | None) -> None:
    found = environment.difference({"python": "3.11", "torch": "2"}, here)
    assert found == (sentence and f"{sentence} when it was submitted")
