"""A study: arms of one size, differences with their noise, runs that go on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.compose import typed
from conf.schema import Refused, build
from launch.study import command, config, results
from launch.study.config import Interaction, Study
from launch.study.contrasts import Difference, interaction, paired, pairs_asked, recall, text_loss
from launch.study.matching import match, multiplied
from launch.study.plan import TRIAL_SEED, Command, Plan
from launch.study.queue import Job, Queue, visible_gpus
from launch.study.results import Arm, CacheSize, Results, Run, Trial
from launch.study.tables import document

TOY = """
experiment: recall
knob: moe.shared_hidden
anchor: mha
baseline: mha
seeds: 2
context: 64
arms:
  mha: {attention.kv_heads: 2, moe.shared_hidden: 24}
  mqa: {attention.kv_heads: 1}
curves: {fewer KV heads: [mqa]}
"""
TUNED = TOY + "tuning: {key: optimizer.learning_rate, values: [0.001, 0.01]}\n"
SMALL = (
    "model.width=16", "attention.head_dim=8", "moe.hidden=8", "moe.experts=4", "train.steps=6", "train.micro_batch=4",
    "train.batch_tokens=256", "checkpoint.every=2", "evaluate.samples=4", "run.threads=1", "run.device=cpu",
)  # fmt: skip


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    file = tmp_path / "toy.yaml"
    file.write_text(TOY)
    return file


def test_the_shipped_arms_have_the_anchors_parameters() -> None:
    study = config.load("cpu")
    arms = match(study, ())
    anchor = arms[study.anchor]
    assert anchor.off == 0 and anchor.width == study.arms[study.anchor][study.knob]
    for name, arm in arms.items():
        assert arm.parameters.active - anchor.parameters.active == arm.off, name
        assert multiplied(arm.parameters) - multiplied(anchor.parameters) == arm.off, name
        assert 2 * abs(arm.off) <= arm.unit, name
        assert arm.settings[study.knob] == arm.width, name


def test_an_arms_cache_is_weighed(toy: Path) -> None:
    known, commands = command._prepare(config.load(str(toy)), SMALL)
    assert known.arms["mha"].cache == CacheSize(64, 64 * 128.0, 64 * 128.0, 128.0)  # 2 layers × 2 × 2 heads × 8 × 2 B
    assert known.arms["mqa"].cache.growth == 64.0
    assert [job.name for job in Plan(known, commands, toy.parent).ready()] == [
        "mha, seed 0",
        "mqa, seed 0",
        "mha, seed 1",
        "mqa, seed 1",
    ]


@pytest.mark.parametrize(
    "change, sentence",
    [
        pytest.param({"baseline": "mla"}, "baseline is 'mla'", id="an unknown baseline"),
        pytest.param({"curves": {"x": ["mka"]}}, "did you mean 'mqa'", id="an unknown arm in a curve"),
        pytest.param({"tuning": {"key": "optimizer.learning_rate", "values": [0.1]}}, "at least two",
                     id="one value to choose from"),
        pytest.param({"tuning": {"key": "attention.kv_heads", "values": [1, 2]}}, "sets itself",
                     id="an arm that sets what is tuned"),
        pytest.param({"seeds": 0}, "must be at least 1", id="no seed"),
        pytest.param({"knob": "moe.hidden"}, "has to set moe.hidden", id="an anchor without the knob"),
        pytest.param({"arms": {"mha": {"moe.shared_hidden": 8}, "mqa": {"run.dir": "x"}}}, "sets itself",
                     id="an arm that says where it runs"),
        pytest.param({"arms": {"mha": {"moe.shared_hidden": 8}, "m/a": {}}}, "a folder's name", id="a slash in a name"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_is_refused(change: dict[str, object], sentence: str) -> None:
    import yaml

    with pytest.raises(Refused, match=sentence):
        build(Study, {**yaml.safe_load(TOY), **change}, "study")


@pytest.mark.parametrize(
    "arms, knob, sentence",
    [
        pytest.param({"mha": {"moe.shared_hidden": 8}, "wide": {"attention.heads": 16}}, "moe.shared_hidden",
                     "give the anchor more room", id="an arm larger than the anchor"),
        pytest.param({"mha": {"moe.hidden": 8}}, "moe.hidden", "every token passes", id="the width of routed experts"),
        pytest.param({"mha": {"moe.shared_hidden": 32}, "many": {"moe.experts": 5}}, "moe.shared_hidden",
                     "idle", id="more experts"),
        pytest.param({"mha": {"moe.shared_hidden": 8}, "odd": {"attention.head_dim": 7}}, "moe.shared_hidden",
                     "study.arms.odd: .*must be even", id="an arm that no model can be"),
    ],
)  # fmt: skip
def test_arms_that_cannot_be_matched_are_refused(arms: dict[str, dict[str, int]], knob: str, sentence: str) -> None:
    study = Study("recall", arms, knob, "mha", "mha")
    with pytest.raises(Refused, match=sentence):
        match(study, SMALL)


def test_a_plan_of_layers_is_typed_as_it_stands_in_yaml() -> None:
    value = [{"of": [{"attention": {"scheme": "gqa", "window": None}, "feedforward": "${moe}"}], "repeat": 2}]
    assert typed(value) == "[{of: [{attention: {scheme: gqa, window: null}, feedforward: ${moe}}], repeat: 2}]"


def run(arm: str, seed: int, bpb: float | None, answers: float = 0.5) -> Run:
    sources: dict[str, dict[str, Any]] = {
        "text": {"bpb": bpb},
        "r": {"accuracy": answers, "facts": {"task": "recall", "pairs": 8}},
    }
    return Run(arm, seed, 10, 1000, 1.0, 100.0, sources, [[10, 2.0]], "cpu", "2")


def made_up(values: dict[str, list[float]]) -> Results:
    arms = {name: Arm([], 8, 100, 80, 10, 4, 0, CacheSize(64, 64.0 * (i + 1), 64.0 * (i + 1), i + 1.0), {})
            for i, name in enumerate(values)}  # fmt: skip
    first = next(iter(values))
    study = Study("recall", {name: {"k": 1} if name == first else {} for name in values}, "k", first, first, context=64,
                  interactions=[Interaction("two", *list(values)[:4])] if len(values) > 3 else [],
                  curves={"all": list(values)[1:]})  # fmt: skip
    runs = [run(name, seed, v, v / 10) for name, several in values.items() for seed, v in enumerate(several)]
    return Results(study, [], arms, runs)


@pytest.mark.parametrize(
    "values, mean, sd, error, verdict",
    [
        pytest.param((1.0, 2.0, 3.0), 2.0, 1.0, 0.5773503, "beyond 2 s.e.", id="3.5 standard errors"),
        pytest.param((1.9, 2.0, 2.1), 2.0, 0.1, 0.0577350, "beyond 95 %", id="35 standard errors"),
        pytest.param((-1.0, 2.0, 3.0), 1.3333333, 2.0816660, 1.2018504, "within noise", id="1.1 standard errors"),
        pytest.param((0.0, 0.0, 0.0), 0.0, 0.0, 0.0, "within noise", id="no difference at all"),
        pytest.param((0.7,), 0.7, None, None, "one seed", id="one seed"),
    ],
)
def test_a_difference_and_its_noise(
    values: tuple[float, ...], mean: float, sd: float | None, error: float | None, verdict: str
) -> None:
    found = Difference(values)
    assert found.mean == pytest.approx(mean)
    assert found.sd == (None if sd is None else pytest.approx(sd))
    assert found.error == (None if error is None else pytest.approx(error))
    assert found.verdict == verdict


def test_differences_are_paired_by_seed() -> None:
    known = made_up({"base": [1.0, 2.0, 3.0], "other": [1.5, 2.5, 3.5]})
    found = paired(known, "other", "base", text_loss)
    assert found is not None and found.values == (0.5, 0.5, 0.5) and found.sd == 0.0
    known.runs = [run for run in known.runs if (run.arm, run.seed) != ("base", 1)]
    found = paired(known, "other", "base", text_loss)
    assert found is not None and len(found.values) == 2, "a seed that one of them lacks is in no difference"
    assert paired(known, "base", "base", text_loss) is None
    assert pairs_asked(known.runs) == [8] and recall(8)(known.runs[0]) == pytest.approx(0.1)
    assert recall(4)(known.runs[0]) is None


def test_an_interaction_is_what_both_do_beyond_each() -> None:
    known = made_up({"neither": [4.0, 5.0], "first": [3.0, 4.0], "second": [3.5, 4.5], "both": [3.0, 3.5]})
    found = interaction(known, "neither", "first", "second", "both", text_loss)
    assert found is not None
    assert found.values == pytest.approx((0.5, 0.0))  # (3 − 3.5) − (3 − 4), (3.5 − 4.5) − (4 − 5)


def test_a_document_says_noise_as_noise_and_names_what_failed() -> None:
    known = made_up({"base": [1.0, 2.0, 3.0], "other": [1.5, 1.5, 3.2], "far": [2.0, 3.0, 4.0]})
    known.failed["far, seed 3"] = "failed: it burst."
    text = document(known)
    assert "(within noise)" in text and "(beyond 95 %)" in text and "far, seed 3: failed: it burst." in text
    assert "1.00×" not in text and "| other | 0.5× |" in text
    assert "3 seeds each" in text
    once = replace(known, study=replace(known.study, seeds=1), runs=[run for run in known.runs if run.seed == 0])
    assert "3 of 3 runs: 3 arms, 1 seed each" in document(once)
    assert "9 of 9 runs: 3 arms, 3 seeds each" in document(replace(known, study=once.study)), "as many as there are"


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    known = made_up({"base": [1.0, float("nan")], "other": [2.0, 3.0]})
    known.write(tmp_path)
    again = results.load(tmp_path / results.NAME)
    assert again.runs[0] == known.runs[0] and again.study == known.study
    assert text_loss(again.runs[1]) is None, "what is not finite is not known"
    known.arms["base"] = Arm(["train.steps=9"], 8, 100, 80, 10, 4, 0, known.arms["base"].cache, {})
    with pytest.raises(Refused, match="results of base with other settings"):
        results.go_on(tmp_path, known)


def test_plots_are_made_of_what_there_is() -> None:
    from matplotlib.figure import Figure

    from launch.report.plots.canvas import LIGHT
    from launch.study.plots import draw, two_by_two

    known = made_up({"neither": [4.0, 5.0], "first": [3.0, 4.0], "second": [3.5, 4.5], "both": [3.0, 3.5]})
    assert [picture.plot.file for picture in draw(known)] == [
        "quality.png", "recall.png", "ratios.png", "interaction.png"]  # fmt: skip
    known.runs = [run for run in known.runs if run.arm != "both"]
    assert two_by_two(known, Figure(), LIGHT) is None, "one corner of the 2×2 is open"
    known.runs = []
    assert draw(known) == []


def test_bars_end_where_a_share_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from launch.report.plots.canvas import LIGHT
    from launch.study.plots import two_by_two

    draw_bars, drawn = Axes.errorbar, []

    def errorbar(axes: Axes, x: Any, y: Any, yerr: Any, **more: Any) -> Any:
        drawn.append(yerr)
        return draw_bars(axes, x, y, yerr, **more)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    known = made_up({name: [0.0, 10.0] for name in ("neither", "first", "second", "both")})
    two_by_two(known, Figure(), LIGHT)
    losses, _, shares, _ = drawn
    assert shares == [[0.5, 0.5], [0.5, 0.5]], "the mean is 50 %, the standard deviation 71 %"
    assert losses[0] == losses[1] == [pytest.approx(7.07, abs=0.01)] * 2


@pytest.fixture
def tuned(tmp_path: Path) -> Results:
    """Two arms and two values, of which nothing is known."""
    file = tmp_path / "tuned.yaml"
    file.write_text(TUNED)
    return Results(config.load(str(file)), [], {name: made_up({name: []}).arms[name] for name in ("mha", "mqa")})


def test_an_arms_runs_follow_its_trials(tuned: Results, tmp_path: Path) -> None:
    plan = Plan(tuned, {name: Command([f"arm={name}"], 6) for name in ("mha", "mqa")}, tmp_path)
    first = plan.ready()
    assert [job.name for job in first] == [
        "mha, trial of 0.001", "mqa, trial of 0.001", "mha, trial of 0.01", "mqa, trial of 0.01"]  # fmt: skip
    assert len({job.said for job in first}) == len(first), "each writes to a file of its own, which it locks"
    assert {job.seed for job in first} == {TRIAL_SEED} and plan.ready() == []
    assert "optimizer.learning_rate=0.001" in first[0].command and (plan.num_runs, plan.left()) == (8, 8)
    tuned.trials += [Trial("mha", 0.001, 3.0), Trial("mqa", 0.001, 2.5)]
    assert plan.ready() == [], "one value is not tried yet"
    tuned.trials += [Trial("mha", 0.01, 2.0)]
    mha = plan.ready()
    assert [(job.name, job.tuned) for job in mha] == [("mha, seed 0", 0.01), ("mha, seed 1", 0.01)]
    assert "optimizer.learning_rate=0.01" in mha[0].command
    tuned.trials += [Trial("mqa", 0.01, None)]
    assert [(job.name, job.tuned) for job in plan.ready()] == [("mqa, seed 0", 0.001), ("mqa, seed 1", 0.001)]
    tuned.runs += [run("mha", 0, 1.0), run("mha", 1, 1.0), run("mqa", 0, 1.0)]
    tuned.failed["mqa, seed 1"] = "failed: it burst."
    assert plan.left() == 0
    text = document(tuned)
    assert "Chosen: 0.001 by 1, 0.01 by 1." in text and "| mqa | 2.500 | — |" in text


def test_an_arm_whose_every_trial_failed_is_given_up(tuned: Results, tmp_path: Path) -> None:
    plan = Plan(tuned, {"mha": Command([], 6)}, tmp_path)
    plan.ready()
    tuned.trials += [Trial("mha", 0.001, None), Trial("mha", 0.01, None)]
    assert plan.ready() == [] and plan.left() == 0


def test_results_tuned_otherwise_are_refused(tuned: Results, tmp_path: Path) -> None:
    tuned.trials += [Trial("mha", 0.001, 3.0), Trial("mha", 0.01, None)]
    tuned.write(tmp_path)
    again = Results(tuned.study, [], tuned.arms)
    results.go_on(tmp_path, again)
    Plan(again, {}, tmp_path)
    assert again.trials == [Trial("mha", 0.001, 3.0)], "what failed is tried again"
    (tmp_path / "runs" / "mha" / "seed_0").mkdir(parents=True)
    again = Results(tuned.study, [], tuned.arms)
    results.go_on(tmp_path, again)
    Plan(again, {}, tmp_path)
    assert again.tuned("mha") == 0.001, "its runs have begun with this value, and could not go on with another"
    other = Results(replace(tuned.study, tuning=None), [], tuned.arms)
    with pytest.raises(Refused, match="tuned otherwise"):
        results.go_on(tmp_path, other)


def test_settings_may_be_typed_in_another_order_but_not_changed(toy: Path, tmp_path: Path) -> None:
    study = config.load(str(toy))
    known, _ = command._prepare(study, SMALL)
    known.runs.append(run("mqa", 0, 1.0))
    known.write(tmp_path)
    again, _ = command._prepare(study, SMALL[::-1])
    results.go_on(tmp_path, again)
    assert again.runs == known.runs
    for given, changed in ((("train.seed=1",), "train.seed=1"), ((), "in a file of conf")):
        other, _ = command._prepare(study, (*SMALL, *given))
        if not given:  # as where the experiment's file is another
            other.arms["mqa"] = replace(other.arms["mqa"], configuration="other")
        with pytest.raises(Refused, match=rf"results of mqa with other settings \({changed}\)"):
            results.go_on(tmp_path, other)


@pytest.mark.parametrize("setting", ["train.seed=1", "moe.shared_hidden=8", "~attention.kv_heads"])
def test_what_arms_set_cannot_be_set_for_all(toy: Path, tmp_path: Path, setting: str) -> None:
    with pytest.raises(Refused, match="is set by the study itself"):
        command.main([f"study={toy}", f"out={tmp_path / 'out'}", setting])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused(toy: Path) -> None:
    with pytest.raises(Refused, match=r"^out=\S+/toy.yaml/out cannot be written \(Not a directory\)"):
        command.main([f"study={toy}", f"out={toy / 'out'}", *SMALL])


@pytest.mark.parametrize("number", ["[1", "many"])
def test_a_number_of_workers_that_is_none_is_refused(number: str) -> None:
    with pytest.raises(Refused, match=rf"workers is '{re.escape(number)}'"):
        command.main(["out=nowhere", f"workers={number}"])


def test_a_tuned_setting_that_nothing_reads_is_refused_before_any_run(toy: Path) -> None:
    toy.write_text(TUNED.replace("learning_rate", "learnin_rate"))
    with pytest.raises(Refused, match="did you mean 'learning_rate'"):
        command._prepare(config.load(str(toy)), SMALL)


def test_runs_are_shared_out_among_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    shows = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(f"a{i}", 0, tmp_path / f"a{i}" / "seed_0", [sys.executable, "-c", shows], 1) for i in range(4)]
    with Queue(4, visible_gpus()) as queue:
        queue.add(jobs)
        assert sum(ended is not None for ended in queue.ended(time.monotonic() + 300)) == 4
    assert [job.said.read_text().strip() for job in jobs] == ["4", "7", "4", "7"]


POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
if sys.argv[1] == "-1":
    signal.raise_signal(signal.SIGKILL)
time.sleep(float(sys.argv[1]))
sys.exit(print("failed: it burst.") or 1 if sys.argv[1] == "0" else 0)
"""


def test_a_queue_runs_names_what_failed_and_asks_the_rest_to_save(tmp_path: Path) -> None:
    def job(name: str, seconds: str) -> Job:
        return Job(name, 0, tmp_path / name / "seed_0", [sys.executable, "-c", POLITE, seconds], 1)

    codes = {}
    with Queue(workers=2) as queue:
        queue.add([job("bursts", "0"), job("ends", "0.01"), job("is killed", "-1"), job("sleeps", "600")])
        for ended in queue.ended(time.monotonic() + 300):
            if ended is not None:
                codes[ended.job.arm] = (ended.code, ended.job.why(ended.code))
            if len(codes) == 3 and any("ready" in running.why() for running in queue.running.values()):
                break
        (sleeper,) = queue.running
    assert codes == {
        "bursts": (1, "failed: it burst."),
        "ends": (0, "ready"),
        "is killed": (-9, "its process was killed by signal 9, perhaps for want of memory."),
    }
    assert sleeper.returncode == 75


def test_a_run_that_outlived_its_queue_is_not_begun_twice(tmp_path: Path) -> None:
    """Not even before it has locked its directory: two processes in one directory fail each other."""
    alone = "import os, sys, time; os.mkdir(sys.argv[1]); time.sleep(1); os.rmdir(sys.argv[1])"
    job = Job("mha", 0, tmp_path / "mha" / "seed_0", [sys.executable, "-c", alone, str(tmp_path / "here")], 1)
    codes = []
    with Queue(1) as first, Queue(1) as second:
        for queue in (first, second):
            queue.add([job])
        for ends in zip(first.ended(time.monotonic() + 300), second.ended(time.monotonic() + 300), strict=False):
            codes += [ended.code for ended in ends if ended is not None]
            assert not (first.running and second.running)
        codes += [ended.code for ended in second.ended(time.monotonic() + 300) if ended is not None]
    assert codes == [0, 0]


def test_a_study_goes_on_where_it_was_killed(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "where it's kept"
    arguments = [f"study={toy}", f"out={out}", "workers=2", *SMALL]
    with subprocess.Popen([sys.executable, "-m", "launch", "study", *arguments], stderr=subprocess.PIPE) as first:
        deadline = time.monotonic() + 300
        while not (out / "runs").exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)  # its two runs outlive it, and hold their directories
    assert command.main(arguments) == 0
    known = json.loads((out / results.NAME).read_text())
    assert sorted((run["arm"], run["seed"]) for run in known["runs"]) == [
        ("mha", 0), ("mha", 1), ("mqa", 0), ("mqa", 1)]  # fmt: skip
    assert all(run["steps"] == 6 and run["sources"] for run in known["runs"])
    by_seed = {(r["arm"], r["seed"]): (out / "runs" / r["arm"] / f"seed_{r['seed']}" / "metrics.jsonl").read_text()
               for r in known["runs"]}  # fmt: skip
    batches = {key: [json.loads(line).get("batch") for line in text.splitlines()] for key, text in by_seed.items()}
    assert batches["mha", 0] == batches["mqa", 0] != batches["mha", 1] == batches["mqa", 1]
    assert command.main(arguments) == 0, "what is done is not done again"
    assert command.main([f"from={out / results.NAME}", f"out={tmp_path / 'shown'}"]) == 0
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {"study.md", "recall.png", "ratios.png"}
