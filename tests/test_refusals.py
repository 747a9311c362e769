"""Bad input gets one sentence and exit code 2, and changes nothing; a fault in mid-run gets one and exit code 1."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Refused
from tests import runs
from tests.runs import TINY
from train import rundir
from train.config import read

ROOT = Path(__file__).parents[1]
HEAD = 12  # bytes at the front of a file that a truncation leaves


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a finished run of eight steps in `done`."""
    folder = tmp_path_factory.mktemp("refusals")
    runs.write_text(folder)
    runs.train(folder, [*TINY, "train.steps=8", "run.dir=done"])
    (folder / "rank_0.txt").unlink()
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(place, tmp_path / "here"))


def refusal(folder: Path, *arguments: str, ranks: int = 1) -> str:
    """The sentence; nothing below `folder` may have changed."""
    before = runs.tree(folder)
    job = runs.start(folder, [*TINY, *arguments], ranks)
    code, printed = job.end(), job.printed()
    for path in job.output:
        path.unlink()
    assert code == 2, printed
    after = runs.tree(folder)
    assert after.keys() == before.keys()
    assert after == before
    assert re.fullmatch(r"refused: [^\n]+\.\n|refused: [^\n]+\?\n", printed), printed
    return printed


CONFIGURATIONS = [
    pytest.param(["train.stepz=3"], "train.stepz .* did you mean 'steps'", id="misspelt key"),
    pytest.param(["trian.steps=3"], "trian .* did you mean 'train'", id="misspelt section"),
    pytest.param(["+train.stepz=3"], "train.stepz .* did you mean 'steps'", id="misspelt key behind a plus"),
    pytest.param(["optimizer.learning_rat=1"], "did you mean 'learning_rate'", id="misspelt key of the optimizer"),
    pytest.param(["attention.head=4"], "did you mean 'heads'", id="misspelt key of the attention"),
    pytest.param(["moe.router.afinity=softmax"], "did you mean 'affinity'", id="misspelt key of the router"),
    pytest.param(["data.train.paht=x"], "did you mean 'path'", id="misspelt key of the data"),
    pytest.param(["attention=mlaa"], "attention is 'mlaa'.* did you mean 'mla'", id="unknown choice of a group"),
    pytest.param(["experiment=smok"], "did you mean 'smoke'", id="unknown experiment"),
    pytest.param(["atention=mla"], "atention .* did you mean", id="misspelt group"),
    pytest.param(["train.steps=many"], "train.steps is 'many'.* a whole number is needed", id="text for a number"),
    pytest.param(["train.steps=1.5"], "train.steps is 1.5.* a whole number is needed", id="fraction for a count"),
    pytest.param(["train.compile=1"], "train.compile is 1.* true or false is needed", id="number for a truth value"),
    pytest.param(["train.steps=null"], "train.steps is None", id="null for a number"),
    pytest.param(["train=5"], "train", id="number for a section"),
    pytest.param(["train.compute=fp16"], "train.compute is 'fp16'.*", id="unknown dtype"),
    pytest.param(["train.core=flash"], "core: flash needs compute: bf16", id="FlashAttention of 32-bit numbers"),
    pytest.param(["train.steps"], "an override cannot be read", id="an override without a value"),
    pytest.param(["train.steps=[1"], "an override cannot be read", id="an override that does not parse"),
    pytest.param(["train.steps=0"], r"steps \(0\) must be at least 1", id="no steps"),
    pytest.param(["run.dir="], "run: dir is empty", id="no directory"),
    pytest.param(["run.dir=${run.nothing}"], "run.nothing", id="a reference to nothing"),
    pytest.param(["train.clip=0"], "clip", id="clipping to nothing"),
    pytest.param(["attention.heads=3", "attention.kv_heads=2"], "heads", id="heads not a multiple of kv heads"),
    pytest.param(["attention.heads=0"], "heads", id="no heads"),
    pytest.param(["attention.head_dim=7"], "head_dim", id="odd head dim"),
    pytest.param(
        ["moe.top_k=9"], r"top_k \(9\) must lie between 1 and experts \(4\)", id="more experts chosen than there are"
    ),
    pytest.param(["moe.experts=0"], "experts", id="no experts"),
    pytest.param(["moe.router.groups=3"], r"experts \(4\) must be a multiple", id="groups that do not divide experts"),
    pytest.param(
        ["model.vocab=63"], "the data has token ids up to 63, but model.vocab is 63", id="vocabulary too small"
    ),
    pytest.param(["train.batch_tokens=60"], r"batch_tokens \(60\) is not a multiple", id="batch of broken windows"),
    pytest.param(
        ["train.phases=[{start: 3, sequence_length: 24}]"], "from step 3 on", id="batch of broken windows in a phase"
    ),
    pytest.param(
        [f"train.{key}={10**12}" for key in ("sequence_length", "batch_tokens")],
        "tokens, fewer than a sequence of 1,000,000,000,000",
        id="a window longer than all data",
    ),
    pytest.param(["parallel.replicate=2"], "does not divide 1 ranks", id="more replicas than ranks"),
    pytest.param(["data.train.path=nowhere"], "nowhere holds no prepared corpus", id="no corpus"),
    pytest.param(["data.train.split=valid"], "empty split 'valid'", id="empty corpus"),
    pytest.param(["run.device=cuda"], "finds no GPU", id="no GPU"),
    pytest.param(
        ["run.device=cpu", "train.core=flash", "train.compute=bf16"],
        "train.core is flash, but this run computes on cpu.* take train.core=blockwise",
        id="FlashAttention without a GPU",
    ),
    pytest.param(["run.threads=1000000"], "run.threads is 1000000, but this machine has", id="more threads than cores"),
    pytest.param(["run.dir=corpus/train.bin"], "corpus/train.bin cannot be written", id="a file for a run directory"),
    pytest.param([f"run.dir={'x' * 300}"], "cannot be written .File name too long", id="a name too long"),
    pytest.param(["run.dir=/proc/run"], "/proc/run cannot be written", id="a run directory that cannot be made"),
    pytest.param(["train.init="], "init is empty", id="weights of no name"),
    pytest.param(["train.init=nowhere"], "no checkpoint at nowhere; name a run", id="no weights to start from"),
    pytest.param(
        ["train.init=done", "moe.experts=8"],
        r"does not fit this run: .*\[4.* there but .*\[8",
        id="weights of another model",
    ),
    pytest.param(
        ["run.dir=done", "attention.kv_heads=2"], "kv_heads=1, and now it is 2", id="another model in a used directory"
    ),
    pytest.param(
        ["run.dir=done", "model.width=32"], "width=16, and now it is 32", id="another width in a used directory"
    ),
    pytest.param(["run.dir=done", "train.seed=1"], "seed=0, and now it is 1", id="another seed in a used directory"),
]


@pytest.mark.parametrize(("arguments", "sentence"), CONFIGURATIONS)
def test_refused(place: Path, arguments: list[str], sentence: str) -> None:
    folder = [] if any(argument.startswith("run.dir") for argument in arguments) else ["run.dir=new/run"]
    assert re.search(sentence, refusal(place, *folder, *arguments))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(["attention=mla"], "attention.scheme=gqa, and now it is mla", id="a scheme with other keys"),
        pytest.param(["data=recall"], "data.train.source=corpus, and now it is recall", id="a source with other keys"),
        pytest.param([*TINY, "attention.window=4"], "no .*attention.window, and now it is 4", id="one key more"),
        pytest.param([*TINY, "~attention.qk_norm"], "attention.qk_norm=True, and now there is none", id="one key less"),
        pytest.param(
            [*TINY, "train.phases=[{start: 2, learning_rate: 0.1}]"],
            r"no train.phases\[0\].* and now",
            id="a phase gone by",
        ),
    ],
)
def test_what_decides_the_other_keys_is_told_first(place: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(Refused, match=f"holds a run with .*{sentence}"):
        rundir.refuse_changes(place / "done", read(compose([*arguments, "train.steps=16", "run.dir=done"])))


def flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_all(folder: Path) -> None:
    for checkpoint in (folder / "done/checkpoints").iterdir():
        flip(checkpoint / "rank_0.bin")


def other_corpus(folder: Path) -> None:
    """Another one of the same name."""
    shutil.rmtree(folder / "corpus")
    runs.write_corpus(folder / "corpus", [[*range(64)]] * 60, vocab=64)


DAMAGES = [
    pytest.param(
        lambda f: os.truncate(f / "corpus/train.bin", HEAD), "train.bin is truncated: 12 bytes", id="truncated bin"
    ),
    pytest.param(
        lambda f: os.truncate(f / "corpus/train.idx", HEAD), "train.idx is truncated: 12 bytes", id="truncated idx"
    ),
    pytest.param(lambda f: flip(f / "corpus/train.bin"), "is damaged", id="flipped byte in the corpus"),
    pytest.param(lambda f: (f / "corpus/train.idx").unlink(), "train.idx is missing", id="no index"),
    pytest.param(
        lambda f: (f / "corpus/manifest.json").write_text("{"), "manifest.json cannot be read", id="broken manifest"
    ),
    pytest.param(other_corpus, "was trained on other data", id="another corpus under the same name"),
    pytest.param(
        lambda f: (f / "done/config.yaml").write_text("a: ["), "config.yaml cannot be read", id="broken record"
    ),
    pytest.param(
        lambda f: (f / "done/config.yaml").write_bytes(b"\xff"), "config.yaml cannot be read", id="no text for a record"
    ),
    pytest.param(
        lambda f: (f / "done/config.yaml").write_text("train: 3"),
        "config.yaml is of another version or was edited.*",
        id="a record of no run",
    ),
    pytest.param(
        flip_all,
        r"no good checkpoint is left at done/checkpoints \(.*rank_0.bin is damaged.*;.*\)",
        id="every checkpoint damaged",
    ),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_damaged_files_are_refused(here: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(here)
    assert re.search(sentence, refusal(here, "run.dir=done"))


def test_ranks_that_cannot_share_are_refused_in_one_sentence(place: Path) -> None:
    sentence = refusal(place, "run.dir=new", "train.batch_tokens=24", ranks=2)
    assert "a step has 3 windows, which 2 ranks cannot share" in sentence
    assert "does not divide 2 ranks" in refusal(place, "run.dir=new", "parallel.replicate=4", ranks=2)
    assert "did you mean 'steps'" in refusal(place, "run.dir=new", "train.stepz=4", ranks=2)
    assert "seed=0, and now it is 1" in refusal(place, "run.dir=done", "train.seed=1", ranks=2)


def test_a_directory_in_use_is_refused(here: Path) -> None:
    arguments = [*TINY, "train.steps=100000", "run.dir=busy"]
    job = runs.start(here, arguments)
    assert runs.wait_until(lambda: len(runs.records(here / "busy")) > 2, job)
    stopped = job.processes[0]
    job.signal(signal.SIGSTOP)  # so that nothing of its own changes
    other = runs.start(here / "corpus", [*TINY, "data.train.path=.", "run.dir=../busy", "train.steps=100000"])
    before = runs.tree(here / "busy")
    assert other.end() == 2
    assert runs.tree(here / "busy") == before
    assert re.fullmatch(rf"refused: run.dir \S+ is in use by process {stopped.pid} on .*\n", other.printed())
    job.kill()
    (here / "corpus/rank_0.txt").unlink()
    job = runs.start(here, arguments)  # the lock went with its process
    assert runs.wait_until(lambda: "resumed" in job.printed() or len(runs.records(here / "busy")) > 2, job)
    job.kill()


def test_a_misspelt_key_is_told_before_torch_is_imported(place: Path) -> None:
    script = (
        "import sys; from train.__main__ import main; "
        "code = main(['train.stepz=3']); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert done.stderr == "refused: train.stepz is not a key that anything reads; did you mean 'steps'?\n"


# Faults in mid-run.


def test_a_flipped_byte_in_the_newest_checkpoint(here: Path, place: Path) -> None:
    run = here / "done"
    flip(run / "checkpoints/step_00000008/rank_0.bin")
    printed = runs.train(here, [*TINY, "train.steps=8", "run.dir=done"])
    assert re.search(r"step_00000008 is bad: rank_0.bin is damaged.*set aside as step_00000008.bad", printed)
    assert "resumed from step 4" in printed
    assert runs.course(run) == runs.course(place / "done")
    runs.assert_same_state(runs.state(run, 8), runs.state(place / "done", 8))
    assert runs.saved(run) == ["step_00000004", "step_00000008", "step_00000008.bad"]


def test_a_full_disk_in_a_save(here: Path) -> None:
    """No file may grow beyond the size that the next checkpoint's would have."""
    arguments = [*TINY, "moe.hidden=96", "run.dir=full"]
    runs.train(here, [*arguments, "train.steps=8"])
    size = (here / "full/checkpoints/step_00000008/rank_0.bin").stat().st_size
    job = runs.start(here, [*arguments, "train.steps=40"], largest_file=size - 1)
    assert job.end() == 1
    failures = [line for line in job.printed().splitlines() if line.startswith("failed: ")]
    assert len(failures) == 1
    assert re.search("checkpoint of step 12 was not written.*File too large.*the one before it is kept", failures[0])
    assert "Traceback" not in job.printed()
    assert json.loads((here / "full/exit.json").read_text())["code"] == 1
    assert runs.saved(here / "full") == ["step_00000004", "step_00000008"]
    assert "resumed from step 8" in runs.train(here, [*arguments, "train.steps=10"])


@pytest.mark.parametrize(
    ("rate", "sentence"),
    [
        pytest.param(
            "1e30",
            r"the loss \(.*\) or the gradient norm \(.*\) is not finite at step 2, samples 8 to 15, batch \w{16}",
            id="in the loss",
        ),
        pytest.param(
            "1e300", "the update of step 1 left weights or optimizer state that are not finite", id="in the weights"
        ),
    ],
)
def test_divergence(here: Path, rate: str, sentence: str) -> None:
    arguments = [
        *TINY,
        "run.dir=diverged",
        f"optimizer.learning_rate={rate}",
        "schedule.warmup_steps=0",
        "checkpoint.every=1",
    ]
    job = runs.start(here, arguments)
    assert job.end() == 1, job.printed()
    failures = [line for line in job.printed().splitlines() if line.startswith("failed: ")]
    assert len(failures) == 1
    assert re.search(sentence, failures[0])
    assert "Traceback" not in job.printed()
    for name in runs.saved(here / "diverged"):
        state = runs.state(here / "diverged", int(name.removeprefix("step_")))
        assert [key for key, tensor in state.items() if not tensor.isfinite().all()] == []


def test_a_file_that_cannot_be_written_is_named(here: Path) -> None:
    (here / "done/metrics.jsonl").unlink()
    (here / "done/metrics.jsonl").mkdir()
    job = runs.start(here, [*TINY, "train.steps=10", "run.dir=done"])
    assert job.end() == 1
    assert "failed: done/metrics.jsonl: Is a directory; mend that" in job.printed()
    assert "Traceback" not in job.printed()


def test_a_killed_rank_ends_the_other(here: Path) -> None:
    """Without torchrun, rank 0 also holds the store through which the ranks met."""
    job = runs.start(here, [*TINY, "train.steps=100000", "run.dir=killed"], ranks=2)
    assert runs.wait_until(lambda: len(runs.records(here / "killed")) > 2, job)
    job.processes[0].kill()
    job.processes[1].join(300)
    assert job.processes[1].exitcode == 1
    failures = [line for line in job.output[1].read_text().splitlines() if "failed: " in line]
    assert failures == [
        "rank 1: failed: another rank ended and left this one waiting; its own log or the launcher's says why."
    ]
    assert "Traceback" not in job.output[1].read_text()
