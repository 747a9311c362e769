"""One run from its command to its directory: what it writes, prints and starts from."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from conf.compose import choices, compose, groups
from tests import runs
from tests.runs import MTP, TASK, TINY
from tests.test_engine import this_rank
from train import run as running
from train.__main__ import main
from train.config import read
from train.metrics import Metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a finished run of eight steps in `done`."""
    folder = tmp_path_factory.mktemp("run")
    runs.write_text(folder)
    runs.train(folder, [*TINY, "train.steps=8", "run.dir=done"])
    return folder


def test_the_directory_holds_what_scripts_rely_on(place: Path) -> None:
    run = place / "done"
    environment = json.loads((run / "environment.json").read_text())
    written = f"checkpoints {environment['archive']} config.yaml environment.json exit.json log.txt metrics.jsonl"
    assert sorted(path.name for path in run.iterdir()) == [".lock", *written.split(), "starts.jsonl"]
    expected = read(compose([*TINY, "train.steps=8", "run.dir=done"]))
    assert read(yaml.safe_load((run / "config.yaml").read_text())) == expected
    assert json.loads((run / "exit.json").read_text()) == {"code": 0, "reason": "done"}
    assert environment["layout"]["ranks"] == 1
    assert environment["layout"]["device"]
    assert environment["packages"]["torch"] == torch.__version__
    with tarfile.open(run / environment["archive"]) as archive:
        assert {"train/loop.py", "conf/train.yaml", "models/model.py"} <= set(archive.getnames())


def _revisions_asked(folder: Path) -> int:
    os.chdir(folder)
    asked: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.rundir.revision", lambda: asked.append(None))
        assert running.run(read(compose([*TASK, "train.steps=1", "run.dir=asked"])), this_rank()) == 0
    return len(asked)


def test_one_rank_asks_git(ranks: Callable[..., list[int]], tmp_path: Path) -> None:
    assert ranks(2, _revisions_asked, tmp_path) == [1, 0]


def test_metrics_have_each_step_once_and_whole(place: Path) -> None:
    records = runs.records(place / "done")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["tokens"] for record in records] == [64 * step for step in range(1, 9)]
    needed = {"lr", "grad_norm", "tokens_per_second", "extra", "batch", "load", "peak_memory"}
    times = {"seconds_data", "seconds_compute", "seconds_optimizer"}
    assert all(needed | times <= record.keys() for record in records)
    assert [record["lr"] for record in records][:4] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])
    assert len({record["batch"] for record in records}) == 8
    assert [record["step"] for record in runs.records(place / "done", "val_bpb")] == [6, 8]
    assert [record["step"] for record in runs.records(place / "done", "seconds_save")] == [4, 8]


def test_a_run_that_is_looked_into_is_the_same(place: Path) -> None:
    arguments = [*TINY, "train.steps=8", "log.statistics=3", "train.profile={start: 2, stop: 3}", "run.dir=seen"]
    runs.train(place, arguments)
    run = place / "seen"
    assert runs.course(run) == runs.course(place / "done")
    runs.assert_same_state(runs.state(run, 8), runs.state(place / "done", 8))

    lines = [json.loads(line) for line in (run / "statistics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[0]["parameters"]["embedding.weight"].keys() == {"rms", "max", "grad_rms", "update_rms"}
    assert lines[0].keys() == {"step", "parameters", "activations", "experts"}
    with (run / "statistics.jsonl").open("a") as file:
        file.write('{"step": 9}\n{"step"')  # of a run that was killed before it saved that step
    runs.train(place, arguments)
    assert [json.loads(line) for line in (run / "statistics.jsonl").read_text().splitlines()] == lines

    assert sorted(path.name for path in (run / "profile").iterdir()) == [
        "steps_2_to_3_rank_0.json.gz",
        "steps_2_to_3_rank_0.txt",
    ]
    with gzip.open(run / "profile" / "steps_2_to_3_rank_0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "aten::embedding"} <= names
    assert "Self CPU" in (run / "profile" / "steps_2_to_3_rank_0.txt").read_text()


def test_validation_tells_the_loss_by_position(place: Path) -> None:
    for record in runs.records(place / "done", "val_loss"):
        by_position = record["val_position"]
        assert by_position["edges"] == [0, 1, 2, 4, 8]
        assert len(by_position["loss"]) == 4
        assert min(by_position["loss"]) < record["val_loss"] < max(by_position["loss"])


def test_a_finished_run_started_again_does_nothing_more(place: Path) -> None:
    before, state = runs.course(place / "done"), runs.state(place / "done", 8)
    first = (place / "done" / "log.txt").read_text()
    assert "done at step 8: done; `python -m launch report done --out runs/report` shows it\n" in first
    assert "experts ×2: one after the other, as PyTorch compiles its grouped GEMM in bf16 alone\n" in first
    again = runs.train(place, [*TINY, "train.steps=8", "run.dir=done"])
    assert again.endswith("done was finished before, at step 8; a larger train.steps goes on from there\n")
    assert runs.course(place / "done") == before
    runs.assert_same_state(runs.state(place / "done", 8), state)


def test_a_run_can_be_made_longer_and_moved(place: Path, tmp_path: Path) -> None:
    """The constant part of the schedule reaches further; the directory and the corpus lie elsewhere now."""
    arguments = [*TINY, "schedule.decay_fraction=0"]
    runs.train(place, [*arguments, "train.steps=12", "run.dir=long"])
    runs.train(place, [*arguments, "train.steps=6", "run.dir=short"])
    (place / "short").rename(tmp_path / "moved")
    (tmp_path / "text").symlink_to(place / "corpus")
    runs.train(tmp_path, [*arguments, "train.steps=12", "run.dir=moved", "data.train.path=text"])
    runs.assert_same_state(runs.state(tmp_path / "moved", 12), runs.state(place / "long", 12))
    assert runs.course(tmp_path / "moved") == runs.course(place / "long")


@pytest.mark.parametrize("name", ["done", "done/checkpoints/step_00000008"], ids=["of a run", "of a checkpoint"])
def test_weights_alone_are_the_start(place: Path, tmp_path: Path, name: str) -> None:
    """Of an update of size zero nothing is left but the weights; the optimizer, another one, starts anew."""
    arguments = [*TINY, f"train.init={place / name}", "optimizer=muon", "optimizer.learning_rate=0", "train.steps=1"]
    arguments += [f"data.train.path={place / 'corpus'}", "run.dir=branch", "moe.bias_rate=0"]
    printed = runs.train(tmp_path, arguments)
    assert "started from the weights of" in printed
    assert "steps 0 to 1\n" in printed
    before, after = runs.state(place / "done", 8), runs.state(tmp_path / "branch", 1)
    weights = [name for name in before if name.startswith("model.")]
    assert weights == [name for name in after if name.startswith("model.")]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert {after[name].item() for name in after if name.endswith(".step")} == {1.0}
    # once it has a checkpoint of its own it goes on from that, wherever the other is
    arguments = [argument for argument in arguments if not argument.startswith(("train.init", "train.steps"))]
    assert "resumed from step 1" in runs.train(tmp_path, [*arguments, "train.init=nowhere", "train.steps=2"])


def test_multi_token_prediction_can_be_added_and_dropped(place: Path, tmp_path: Path) -> None:
    """All other weights are those of the start, which an update of size zero leaves as they are; a resume is strict."""
    arguments = [*TINY, f"data.train.path={place / 'corpus'}", "optimizer.learning_rate=0", "moe.bias_rate=0"]
    without = [*arguments, "run.dir=without", f"train.init={tmp_path / 'with'}"]
    for run, said in (
        ([*arguments, MTP, "run.dir=with", f"train.init={place / 'done'}"], "has no model.mtp.*, which starts as it"),
        (without, "has model.mtp.*, which this model is without"),
    ):
        assert runs.train(tmp_path, [*run, "train.steps=1"]).count(said) == 1
    states = runs.state(place / "done", 8), runs.state(tmp_path / "with", 1), runs.state(tmp_path / "without", 1)
    first, added, dropped = ({k: v for k, v in state.items() if k.startswith("model.")} for state in states)
    assert dropped.keys() == first.keys() == {name for name in added if not name.startswith("model.mtp.")}
    assert all(torch.equal(first[name], other[name]) for name in first for other in (added, dropped))
    assert 0.1 < added["model.mtp.0.join.projection.weight"].std() / first["model.head.weight"].std() < 10
    shutil.rmtree(tmp_path / "without" / "checkpoints")
    shutil.copytree(tmp_path / "with" / "checkpoints", tmp_path / "without" / "checkpoints")
    resumed = runs.start(tmp_path, [*without, "train.steps=2"])
    assert resumed.end() == 2 and "model.mtp.0" in resumed.printed() and "unknown here" in resumed.printed()


def test_old_checkpoints_go(place: Path) -> None:
    arguments = [*TINY, "checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_every=6", "run.dir=pruned"]
    runs.train(place, [*arguments, "train.steps=10"])
    assert runs.saved(place / "pruned") == ["step_00000006", "step_00000010"]


def test_show_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show", *TINY]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert read(printed) == read(compose(TINY))
    assert printed["data"]["validation"]["path"] == "corpus"


def test_help_names_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: python -m train" in printed
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith("  ")}
    assert lines == {group: choices(group) for group in groups()}


@pytest.mark.parametrize("arguments", [["--help"], ["--show", *TINY]])
def test_a_reader_that_has_seen_enough_is_no_failure(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(arguments) == 0


def test_lines_after_the_resumed_step_and_broken_ones_are_dropped(tmp_path: Path) -> None:
    kept = '{"step": 1, "loss": 1}\n{"step": 2, "val_loss": 1}\n'
    broken = b'{"step": 3}\n3\n{}\n\xff\n{"step": 2\n{"step": 2}'
    (tmp_path / "metrics.jsonl").write_bytes(kept.encode() + broken)
    written = Metrics(tmp_path, read(compose([*TINY, "run.dir=x"])), first_step=2)
    written.write({"step": 3, "loss": float("inf")})
    written.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1},
        {"step": 2, "val_loss": 1},
        {"step": 3, "loss": "inf"},
    ]


def test_a_validation_still_owed_is_written_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val_loss": 3}\n{"step": 2}\n{"step": 2, "val_loss": 1}\n')
    Metrics(tmp_path, read(compose([*TINY, "run.dir=x"])), first_step=2, owes_validation=True).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "val_loss": 3}\n{"step": 2}\n'


def test_ctrl_c_after_the_end_is_too_late(tmp_path: Path) -> None:
    """How the run ended is said by then."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, signal; atexit.register(signal.raise_signal, signal.SIGINT)"
    )
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    command = [sys.executable, "-m", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stderr) == (0, "")


PHASE = "train.phases=[{start: 8, sequence_length: 16, learning_rate: 1e-3}]"


def test_a_phase_that_lies_ahead_can_be_added(place: Path) -> None:
    """A finished run of eight steps goes on with longer windows, as if that had been planned from the start."""
    flat = [*TINY, "schedule.decay_fraction=0"]
    runs.train(place, [*flat, "train.steps=8", "run.dir=extended"])
    runs.train(place, [*flat, "train.steps=12", PHASE, "run.dir=extended"])
    runs.train(place, [*flat, "train.steps=12", PHASE, "run.dir=planned"])
    runs.assert_same_state(runs.state(place / "extended", 12), runs.state(place / "planned", 12))
    losses = [
        [(r["step"], r["loss"], r["batch"]) for r in runs.records(place / name)] for name in ("extended", "planned")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(["train.steps=3"], "is at step 8 already", id="fewer steps than made"),
        pytest.param(["train.phases=[{start: 5, batch_tokens: 128}]"], "train.phases", id="a phase that has passed"),
    ],
)
def test_what_is_done_cannot_be_changed(place: Path, change: list[str], sentence: str) -> None:
    before = runs.tree(place / "done")
    job = runs.start(place, [*TINY, "train.steps=8", *change, "run.dir=done"])
    assert job.end() == 2
    assert sentence in job.printed()
    assert runs.tree(place / "done") == before


def test_a_validation_that_a_stop_put_off_is_made_up_for(place: Path) -> None:
    (place / "put_off").mkdir()
    arguments = [*TINY, "train.steps=8", "evaluate.every=1", "run.dir=put_off"]
    (place / "put_off" / "stop").touch()
    assert runs.start(place, arguments).end() == 75
    assert runs.records(place / "put_off", "val_loss") == []
    runs.train(place, arguments)
    assert [record["step"] for record in runs.records(place / "put_off", "val_loss")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("restarts", "code"), [pytest.param("1", 75, id="started again"), pytest.param("0", 0, id="started anew")]
)
def test_what_was_asked_to_stop_is_not_restarted_by_torchrun(
    place: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, code: int
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    monkeypatch.chdir(place)
    (place / "again").mkdir(exist_ok=True)
    (place / "again" / "exit.json").write_text('{"code": 75, "reason": "asked to stop by SIGTERM"}')
    assert main([*TINY, "train.steps=2", "run.dir=again"]) == code
    assert runs.saved(place / "again") == ([] if code else ["step_00000002"])


def test_a_refusal_under_torchrun_leaves_its_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun returns 1 for it, and the file would tell of the start before."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.chdir(place)
    runs.train(place, [*TINY, "train.steps=8", "run.dir=elastic"])
    assert json.loads((place / "elastic" / "exit.json").read_text())["code"] == 0
    assert main([*TINY, "train.steps=8", "train.seed=9", "run.dir=elastic"]) == 2
    assert json.loads((place / "elastic" / "exit.json").read_text())["code"] == 2
