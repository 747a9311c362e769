"""The comparison of runs: its numbers against other ways to them, its pictures, its page, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml
from matplotlib.colors import to_rgb

from data.prepare import Prepare, prepare
from launch.__main__ import main
from launch.report.command import write
from launch.report.compare import Arm, Comparison, compare, names
from launch.report.missing import missing as lacking
from launch.report.plots.canvas import LIGHT, styled
from launch.report.plots.curves import smooth
from launch.report.plots.menu import PLOTS
from launch.report.record import read
from models.config import ModelConfig
from models.model import Model
from tests import runs as start
from tests.once import once

ROOT = Path(__file__).parent.parent
STEPS = 24
SMALL = [
    "model.width=32", "model.layers.0.repeat=2", "moe.hidden=16", "moe.shared_hidden=16", "train.sequence_length=32",
    "train.batch_tokens=128", "train.micro_batch=4", f"train.steps={STEPS}", "evaluate.every=8", "evaluate.samples=4",
    "checkpoint.every=12", "schedule.warmup_steps=2", "optimizer.learning_rate=3e-3", "run.device=cpu", "run.threads=1",
]  # fmt: skip

RUNS = {
    "gqa_0": ["attention=gqa"],
    "gqa_1": ["attention=gqa", "train.seed=1"],
    "mla": ["attention=mla"],
    "hca": ["attention=hca", "attention.window=8", "attention.rate=4"],
    "recall": ["attention=gqa", "data=recall"],
}

# bytes by hand: layers × numbers × 2 bytes of bf16 ÷ stride
KV_BYTES = {
    "gqa_0": 2 * (2 * 2 * 32) * 2,  # 2 KV heads of 32, keys and values
    "mla": 2 * (32 + 16) * 2,  # one latent of 32 and one rotated key of 16
    "hca": 2 * 64 * 2 / 4,  # one entry of 64 for 4 tokens
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real runs, trained on a small text."""
    return once(tmp_path_factory, "report_runs", train_all)


def train_all(folder: Path) -> None:
    text = folder / "text"
    text.mkdir()
    for index in range(6):
        (text / f"{index}.txt").write_text(" ".join(f"{n} times {index} is {n * index}." for n in range(150)))
    prepare(Prepare(source=str(text), out=str(folder / "corpus"), held_out=0.3, processes=1))
    text_corpus = f"data.train.path={folder / 'corpus'}"
    for name, overrides in RUNS.items():
        corpus = [] if "data=recall" in overrides else [text_corpus]
        start.train(folder, [*SMALL, f"run.dir={folder / name}", *overrides, *corpus])


@pytest.fixture(scope="session")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on all arms that have text."""
    arms = [runs / name for name in ("gqa_0", "mla", "gqa_1", "hca")]
    return once(tmp_path_factory, "report", lambda folder: write(arms, folder))


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """A run of one's own to damage."""
    return Path(shutil.copytree(runs / "mla", tmp_path / "mine"))


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have the key."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def arms(out: Path) -> dict[str, Any]:
    return {arm["name"]: arm for arm in json.loads((out / "report.json").read_text())["arms"]}


def notes(out: Path) -> str:
    return "\n".join(json.loads((out / "report.json").read_text())["notes"])


def missing(out: Path) -> list[str]:
    found: list[str] = json.loads((out / "report.json").read_text())["missing"]
    return found


def notes_on(*directories: Path) -> str:
    return "\n".join(compare(directories).notes)


def test_runs_that_differ_in_the_seed_are_one_arm(report: Path, runs: Path) -> None:
    found = arms(report)
    assert list(found) == ["gqa", "mla", "hca"]
    assert [run["seed"] for run in found["gqa"]["runs"]] == [0, 1]
    values = [lines(runs / name, "val_loss")[-1]["val_loss"] for name in ("gqa_0", "gqa_1")]
    assert found["gqa"]["val_loss"]["values"] == values
    assert found["gqa"]["val_loss"]["mean"] == pytest.approx(sum(values) / 2)
    assert found["gqa"]["val_loss"]["sd"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert found["mla"]["val_loss"]["sd"] is None
    assert " ± " in (report / "report.md").read_text()


@pytest.mark.parametrize("name", ["mla", "hca"])
def test_numbers_of_a_run_are_those_in_its_metrics(report: Path, runs: Path, name: str) -> None:
    steps, validations = lines(runs / name, "loss"), lines(runs / name, "val_loss")
    expected = {
        "train_loss": sum(line["loss"] for line in steps[-2:]) / 2,  # a twentieth of 24 steps, rounded up
        "val_loss": validations[-1]["val_loss"],
        "val_bpb": validations[-1]["val_bpb"],
        "val_accuracy": validations[-1]["val_accuracy"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps),
        "peak_memory": max(line["peak_memory"] for line in steps),
        "load": statistics.fmean(value for line in steps[-2:] for value in line["load"]),
        "steps": STEPS,
        "tokens": STEPS * 128,
        "seconds": sum(line["seconds_data"] + line["seconds_compute"] + line["seconds_optimizer"] for line in steps)
        + sum(line["seconds_save"] for line in lines(runs / name, "seconds_save")),
    }
    found = arms(report)[name]
    assert {key: found[key]["mean"] for key in expected} == pytest.approx(expected)
    assert found["mfu"] is None


@pytest.mark.parametrize("name", list(KV_BYTES))
def test_cache_bytes_are_those_counted_by_hand(report: Path, name: str) -> None:
    arm = arms(report)[name.removesuffix("_0")]
    assert arm["kv_declared"]["mean"] == arm["kv_measured"]["mean"] == KV_BYTES[name]


def test_windows_and_tails_are_told_apart(report: Path) -> None:
    found = arms(report)
    assert found["hca"]["kv_windows"]["mean"] == 2 * 8 * 64 * 2  # layers × window × head × bf16
    assert found["hca"]["kv_tails"]["mean"] > 0
    assert found["mla"]["kv_windows"]["mean"] == found["mla"]["kv_tails"]["mean"] == 0


@pytest.mark.parametrize("name", ["mla", "hca"])
def test_parameters_are_those_of_the_model(report: Path, runs: Path, name: str) -> None:
    config = read(runs / name).config.model
    assert isinstance(config, ModelConfig)
    model = Model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    found = arms(report)[name]
    assert found["parameters_total"]["mean"] == total
    # two of eight experts, and no lookup of the embedding
    assert found["parameters_active"]["mean"] == total - experts * 6 // 8 - config.vocab * config.width


def test_entropy_is_that_of_the_held_out_bytes(report: Path, runs: Path) -> None:
    counts = Counter(np.fromfile(runs / "corpus" / "valid.bin", np.uint16).tolist())
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    found = arms(report)["mla"]
    assert found["entropy_ratio"]["mean"] == pytest.approx(found["val_loss"]["mean"] / entropy)


def test_settings_that_differ_are_listed_and_no_others(report: Path) -> None:
    differences = json.loads((report / "report.json").read_text())["differences"]
    assert differences["model.layers[0].of[0].attention.scheme"] == {"gqa": "gqa", "mla": "mla", "hca": "hca"}
    assert all(".attention." in key for key in differences)


def test_a_fair_comparison_is_not_called_unfair(report: Path) -> None:
    said = notes(report)
    assert "Different seeds" in said and "chance" in said  # what is true of it
    assert not any(word in said for word in ("Unequal", "training data", "held-out data", "machines", "Not finished"))


DRAWN = {"loss.png", "loss_time.png", "quality.png", "load.png", "load_layers.png", "position.png", "speed.png"}
"""What three finished runs on one text have numbers for."""


def test_plots_without_numbers_are_left_out_and_named_in_one_sentence(report: Path) -> None:
    assert {path.name for path in report.glob("*.png")} == DRAWN
    sentences = json.loads((report / "report.json").read_text())["missing"]
    told = [sentence for sentence in sentences if sentence.startswith("Not drawn")]
    assert len(told) == 1
    assert all((plot.title.lower() in told[0]) == (plot.file not in DRAWN) for plot in PLOTS)


@pytest.mark.parametrize("file", sorted(DRAWN - {"load_layers.png"}))  # whose arms are named, not coloured
def test_every_plot_shows_every_arm_in_its_colour(report: Path, file: str) -> None:
    pixels = matplotlib.image.imread(report / file)[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    for colour in LIGHT.arms[:3]:
        near = np.abs(pixels - np.array(to_rgb(colour))).max(-1) < 0.3
        assert near.sum() > 50, colour
    assert np.abs(pixels - np.array(to_rgb(LIGHT.arms[3]))).max(-1).min() > 0.1  # there is no fourth arm


def test_numbers_that_lack_are_named_with_their_reason(report: Path, runs: Path) -> None:
    assert "MFU: not known of any arm, because the peak of its device is not listed." in missing(report)
    found = lacking(compare([runs / "gqa_0", runs / "recall"]), [])
    assert "held-out bits/byte: not known of recall, because it takes a validation on text." in found


def test_an_arm_says_what_it_was(report: Path) -> None:
    text = (report / "report.md").read_text()
    arm = next(line for line in text.splitlines() if line.startswith("| hca | attention"))
    config = "attention hca × 2, feed-forward moe × 2, residual plain"
    assert all(words in arm for words in (config, "of them active", "3.07k in 24 steps", "finished"))


def test_markdown_refers_to_the_plots_that_are_there(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert all(f"({file})" in text for file in DRAWN)
    widths = {line.count("|") for line in text.split("\n\n")[2].splitlines()}
    assert widths == {5}  # the table: one heading and three arms


def test_a_task_without_text_is_judged_by_its_accuracy(runs: Path, tmp_path: Path) -> None:
    write([runs / "recall"], tmp_path)
    found = arms(tmp_path)["recall"]
    assert found["val_bpb"] is None and found["val_accuracy"] is not None
    assert "| held-out bits/byte" not in (tmp_path / "report.md").read_text()
    assert (tmp_path / "quality.png").exists()


def test_an_interrupted_run_is_reported_with_what_it_has(copy: Path, runs: Path, tmp_path: Path) -> None:
    metrics = copy / "metrics.jsonl"
    whole = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(whole[:12]) + whole[12][:30])
    last = lines(runs / "mla", "loss")[10]["step"] if len(whole) > 12 else 0
    write([runs / "hca", copy], tmp_path / "out")
    said = notes(tmp_path / "out")
    arm = arms(tmp_path / "out")["mine"]
    assert 0 < arm["runs"][0]["steps"] <= last and not arm["runs"][0]["finished"]
    assert "Unequal budgets" in said and "hca 3,072" in said
    assert f"Not finished: mine is stopped at step {arm['runs'][0]['steps']} of {STEPS}" in said
    assert "1 line(s) of metrics.jsonl cannot be read" in said


def test_a_run_that_is_going_on_is_said_to(copy: Path) -> None:
    metrics = copy / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:12]) + '{"step": 12, "to')
    with open(copy / ".lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        said = notes_on(copy)
    assert "still going at step" in said and "cannot be read" not in said
    with open(copy / ".lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the report holds nothing


def test_a_run_before_its_first_step_has_no_plots_and_says_so(copy: Path, tmp_path: Path) -> None:
    (copy / "metrics.jsonl").unlink()
    (copy / "environment.json").write_text("{")
    out = tmp_path / "out"
    out.mkdir()
    (out / "loss.png").write_bytes(b"of an earlier report")
    write([copy], out)
    assert not [plot for plot in PLOTS if (out / plot.file).exists()]
    assert arms(out)["mine"]["val_loss"] is None and arms(out)["mine"]["kv_measured"]["mean"] == KV_BYTES["mla"]
    assert "no step in metrics.jsonl" in notes(out) and "environment.json is missing" in notes(out)


def test_a_loss_that_is_not_a_number_breaks_neither_json_nor_plots(copy: Path, runs: Path, tmp_path: Path) -> None:
    with open(copy / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps({"step": STEPS, "val_loss": "nan", "val_accuracy": 0.0, "val_bpb": "nan"}) + "\n")
    write([runs / "hca", copy], tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert arms(tmp_path / "out")["mine"]["val_loss"]["mean"] is None
    assert "nan" in (tmp_path / "out" / "report.md").read_text()


def edit_config(run: Path, section: str, key: str, value: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def edit_batches(run: Path) -> None:
    changed = [{**line, "batch": "0" * 16} if line.get("step") == 7 else line for line in lines(run, "step")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def edit_ranks(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    environment["layout"]["ranks"] = 64
    (run / "environment.json").write_text(json.dumps(environment))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        pytest.param(
            lambda run: edit_config(run, "data", "train", {"source": "recall"}), "data.train differs", id="data"
        ),
        pytest.param(edit_batches, "saw other batches at step 7", id="data-order"),
        pytest.param(lambda run: edit_config(run, "evaluate", "samples", 2), "Different held-out data", id="held-out"),
        pytest.param(lambda run: edit_config(run, "train", "batch_tokens", 64), "Unequal batches", id="batch"),
        pytest.param(lambda run: edit_config(run, "train", "steps", 99), f"stopped at step {STEPS} of 99", id="steps"),
        pytest.param(lambda run: edit_config(run, "train", "seed", 5), "Different seeds: hca 0, mine 5", id="seeds"),
        pytest.param(edit_ranks, "tokens/s, time and memory do not compare", id="machine"),
        pytest.param(
            lambda run: edit_config(run, "data", "validation", {"source": "corpus", "path": "gone", "split": "valid"}),
            "cannot be read from here",
            id="corpus-gone",
        ),
    ],
)
def test_what_makes_a_comparison_unfair_is_said(copy: Path, runs: Path, edit: Any, said: str) -> None:
    assert said not in notes_on(runs / "hca", copy)
    edit(copy)
    assert said in notes_on(runs / "hca", copy)


def test_two_runs_of_one_seed_are_no_evidence_about_seeds(copy: Path, runs: Path) -> None:
    assert "several runs have the same seed" in notes_on(runs / "mla", copy)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        pytest.param([["a/gqa"], ["a/mla"]], ["gqa", "mla"], id="directory"),
        pytest.param([["a/gqa_0", "a/gqa_1"], ["a/mla_0"]], ["gqa", "mla_0"], id="seeds-in-the-name"),
        pytest.param([["gqa/seed1", "gqa/seed2"], ["mla/seed1", "mla/seed2"]], ["gqa", "mla"], id="seeds-in-folders"),
        pytest.param([["x/run"], ["y/run"]], ["x/run", "y/run"], id="same-name"),
    ],
)
def test_an_arm_has_the_shortest_name_that_tells_it(
    runs: Path, tmp_path: Path, groups: list[list[str]], expected: list[str]
) -> None:
    made = []
    for group in groups:
        for path in group:
            (tmp_path / path).mkdir(parents=True)
            shutil.copy(runs / "mla" / "config.yaml", tmp_path / path)
        made.append([read(tmp_path / path) for path in group])
    assert names(made) == expected


def test_many_arms_are_told_apart() -> None:
    many = Comparison([Arm(str(number), [], {}) for number in range(28)], [], {}, None)
    assert len({(colour, dash) for _, colour, dash in styled(many, LIGHT)}) == 28


def test_a_name_is_never_taken_for_markup(runs: Path, tmp_path: Path) -> None:
    strange = tmp_path / "<img src=x>|$\\frac$"
    shutil.copytree(runs / "mla", strange)
    write([strange, runs / "hca"], tmp_path / "out")
    assert "<img src=x>" not in (tmp_path / "out" / "index.html").read_text()
    head = next(line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "<img" in line)
    assert head.replace("\\|", "").count("|") == 4
    assert strange.name in arms(tmp_path / "out")


@pytest.mark.parametrize("length", [1, 39, 40, 400])
def test_smoothing_is_a_mean_over_neighbours(length: int) -> None:
    values = np.random.default_rng(0).normal(size=length)
    reach = length // 40
    expected = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(length)]
    assert smooth(list(values)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["report", "{runs}/corpus", "--out", "{out}"], "corpus is not a run", id="no-run"),
        pytest.param(["report", "{runs}/nowhere", "--out", "{out}"], "nowhere is not there", id="missing"),
        pytest.param(["report", "{runs}/mla/config.yaml", "--out", "{out}"], "config.yaml is a file", id="file"),
        pytest.param(
            ["report", "{runs}", "--out", "{out}"], "the runs in it are gqa_0, gqa_1, hca", id="folder-of-runs"
        ),
        pytest.param(["report", "{runs}/mla", "{runs}/../{name}/mla/", "--out", "{out}"], "named twice", id="twice"),
        pytest.param(["report", "{runs}/mla", "--out", "{runs}/mla/log.txt"], "cannot be made", id="out-is-a-file"),
        pytest.param(["report", "{runs}/mla", "--out", "{runs}/hca"], "is the directory of a run", id="out-is-a-run"),
        pytest.param(["report", "{runs}/mla"], "--out", id="no-out"),
        pytest.param(["report", "--out", "{out}"], "RUN", id="no-runs"),
        pytest.param(["reprot"], "did you mean 'report'", id="command"),
    ],
)
def test_refused_in_one_sentence(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    out = tmp_path / "out"
    code = main([text.format(runs=runs, out=out, name=runs.name) for text in arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err and captured.err.count("\n") == 1
    assert not captured.out and not out.exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"- a\n- list\n", b"a: [", b"run: {dir: x}\n"])
def test_a_damaged_configuration_is_refused_by_name(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (copy / "config.yaml").write_bytes(content)
    assert main(["report", str(copy), "--out", str(tmp_path / "out")]) == 2
    assert f"{copy}/config.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table_and_where_the_page_is(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs / "gqa_0"), str(runs / "mla"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "out" / "index.html") in printed
    row = next(line for line in printed.splitlines() if line.startswith("KV/token measured"))
    assert row.split()[-2:] == [str(KV_BYTES["gqa_0"]), str(KV_BYTES["mla"])]


def test_a_report_reads_runs_and_changes_nothing_in_them(runs: Path, tmp_path: Path) -> None:
    def content() -> dict[str, tuple[int, int]]:
        stats = {str(path): path.stat() for path in (runs / "mla").rglob("*")}
        return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}

    before = content()
    write([runs / "mla"], tmp_path / "out")
    assert content() == before
    assert not [path for path in os.listdir(tmp_path / "out") if path.endswith(".partial")]
