"""What a report says of held-out sources, tasks and positions, and its page in a real browser, from phone to desktop.

The runs are real; their validation lines are given the sources that a run with several would have measured.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from launch.report.command import write
from launch.report.compare import compare
from launch.report.content import Content, content
from launch.report.heldout import held_out
from launch.report.plots import curves
from launch.report.plots.canvas import HEIGHT, LIGHT, WIDTH, draw, level, name_level, spaced
from launch.report.plots.load import layer_map, names_of_rows
from launch.report.plots.menu import PLOTS
from launch.report.record import Record, read
from tests import browser, runs
from tests.browser import Browser
from tests.once import once
from tests.runs import MTP, TINY

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # of a picture whose parts have no room

needs_browser = pytest.mark.skipif(not browser.is_here(), reason="needs Chromium and its driver")

ARMS = {
    "gqa_0": [],
    "gqa_1": ["train.seed=1"],
    "mha": ["attention.kv_heads=2", MTP],
}
SKILL = {"gqa_0": 0.9, "gqa_1": 0.7, "mha": 0.5}
LENGTHS, DEPTHS, PAIRS, HOPS = (64, 128, 256), (0, 0.5, 1), (4, 8), (0, 1, 2)
CHANCE = 1 / 64


def sources(skill: float) -> dict[str, Any]:
    """Two corpora, needles by length and depth, recall by pairs with its null, variables by hops."""
    found: dict[str, Any] = {
        name: {"loss": loss - skill, "bpb": (loss - skill) / math.log(2), "accuracy": skill, "tokens": 64}
        for name, loss in (("prose", 3.0), ("code", 2.0))
    }
    for length in LENGTHS:
        for depth in DEPTHS:
            facts = {"task": "niah", "length": length, "depth": depth, "keys": 1, "chance": CHANCE}
            right = skill - 0.001 * length + 0.1 * depth
            found[f"niah_{length}_{depth}"] = {"loss": 1.0, "accuracy": right, "tokens": 8, "facts": facts}
    for pairs in PAIRS:
        facts = {"task": "recall", "pairs": pairs, "chance": CHANCE}
        found[f"recall_{pairs}"] = {"loss": 1.0, "accuracy": skill - 0.01 * pairs, "tokens": 8, "facts": facts}
        null = {"loss": 4.2, "accuracy": CHANCE, "tokens": 8, "facts": {**facts, "null": True}}
        found[f"recall_{pairs}_null"] = null
    for hops in HOPS:
        facts = {"task": "variable_tracking", "hops": hops, "depth": None, "null": False, "chance": CHANCE}
        found[f"hops_{hops}"] = {"loss": 1.0, "accuracy": skill - 0.2 * hops, "tokens": 8, "facts": facts}
    return found


def extend(run: Path, additions: dict[str, Any]) -> None:
    """Every validation line of the run says this too."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [{**line, **additions} if "val_loss" in line else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs as they are."""

    def make(folder: Path) -> None:
        runs.write_text(folder)
        for name, overrides in ARMS.items():
            runs.train(folder, [*TINY, *overrides, f"run.dir={name}"])

    return once(tmp_path_factory, "page_runs", make)


@pytest.fixture(scope="session")
def folder(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with sources, positions and several training sources."""
    copied = Path(shutil.copytree(plain, tmp_path_factory.mktemp("page") / "runs"))
    for name, skill in SKILL.items():
        position = {"edges": [0, 1, 2, 4, 8], "loss": [4.0, 3.5, None, 3.0 - skill]}
        extend(copied / name, {"val_sources": sources(skill), "val_position": position})
    return copied


@pytest.fixture(scope="session")
def made(folder: Path) -> Content:
    return content(compare([folder / name for name in ARMS]))


@pytest.fixture(scope="session")
def page(folder: Path) -> Path:
    """Of the runs and a name that is long and strange."""
    strange = folder / ("mha <b>" + "_and_a_name_that_never_ends" * 4)
    shutil.copytree(folder / "mha", strange)
    config = (strange / "config.yaml").read_text()
    (strange / "config.yaml").write_text(config.replace("clip: 1.0", "clip: 2.0"))
    write([*(folder / name for name in ARMS), strange], folder / "out")
    return folder / "out" / "index.html"


def test_every_plot_is_drawn_on_both_papers(made: Content) -> None:
    assert [picture.plot.file for picture in made.pictures] == [plot.file for plot in PLOTS]
    for picture in made.pictures:
        assert picture.light.startswith(b"\x89PNG") and picture.dark.startswith(b"\x89PNG")
        assert picture.light != picture.dark


def test_alternative_texts_say_what_is_seen(made: Content) -> None:
    words = {picture.plot.file: picture.alt for picture in made.pictures}
    assert len(set(words.values())) == len(PLOTS)
    assert "niah, keys 1: gqa 79% at 64, 72% at 128, 59% at 256; mha 49% at 64" in words["by_length.png"]
    assert "gqa 65% at 0, 70% at 0.5, 75% at 1" in words["by_depth.png"]
    assert "recall: gqa 76% at 4, 72% at 8; gqa 2% on the null; mha 46% at 4, 42% at 8" in words["by_pairs.png"]
    assert "variable_tracking: gqa 80% at 0, 60% at 1, 40% at 2" in words["by_hops.png"]
    assert "prose: gqa 2.200, mha 2.500; code: gqa 1.200, mha 1.500" in words["sources.png"]
    assert "gqa 4.000 in the first bin, 2.200 in the last" in words["position.png"]
    ahead = [line["mtp_loss"][0] for line in made.comparison.arms[1].records[0].steps]
    gqa, mha = words["loss.png"].split("; mha: ")
    assert f"mtp 1 {ahead[-1]:.3f}" in mha and "mtp" not in gqa
    trained = made.comparison.arms[1].quantities["train_loss"]
    assert trained is not None and mha.startswith(f"training {trained.mean:.3f} after "), "as the table says it"


def test_sources_are_grouped_over_seeds(made: Content) -> None:
    gqa, mha = (held_out(arm) for arm in made.comparison.arms)
    loss = gqa["code"].loss
    assert loss is not None and loss.values == pytest.approx([1.1, 1.3]) and loss.sd == pytest.approx(0.2 / 2**0.5)
    assert mha["niah_64_0"].chance == CHANCE and mha["niah_64_0"].task == "niah" and gqa["code"].task is None
    assert gqa["recall_4_null"].is_null and not gqa["recall_4"].is_null


@pytest.mark.parametrize(
    ("title", "row"),
    [
        pytest.param("Held-out texts", ["code: loss (nats/token)", "1.200 ± 0.141", "1.500"], id="corpus"),
        pytest.param("Tasks: answers right", ["recall_4_null (the null, pairs 4)", *["1.6%"] * 3], id="null"),
        pytest.param("Tasks: answers right", ["recall_8 (pairs 8)", "1.6%", "72.0% ± 14.1%", "42.0%"], id="task"),
    ],
)
def test_tables_hold_every_source(made: Content, title: str, row: list[str]) -> None:
    assert row in next(table.body for table in made.tables if table.title == title)


def test_one_value_is_no_axis(folder: Path, tmp_path: Path) -> None:
    """Needles of one length and depth leave out both plots; so do runs that were never asked."""
    run = Path(shutil.copytree(folder / "mha", tmp_path / "mha"))
    one = {name: values for name, values in sources(0.5).items() if name in ("niah_64_0", "recall_4", "code")}
    extend(run, {"val_sources": one})
    made = content(compare([run]))
    drawn = {picture.plot.file for picture in made.pictures}
    assert not drawn & {"by_length.png", "by_depth.png", "by_pairs.png", "sources.png"}
    assert "accuracy by length needs a validation on a task at two lengths or more" in made.missing[-1]
    assert any(row[0] == "niah_64_0 (length 64, depth 0, keys 1)" for table in made.tables for row in table.body)


@pytest.mark.parametrize(
    "additions",
    [
        pytest.param({"val_sources": {"a": {"accuracy": 1.0, "tokens": 1}}}, id="no-loss"),
        pytest.param({"val_sources": {"a": 3}}, id="no-mapping"),
        pytest.param({"val_sources": [1]}, id="a-list"),
        pytest.param({"val_position": {"edges": [0, 1], "loss": [1.0, 2.0]}}, id="too-few-edges"),
        pytest.param({"val_position": {"edges": [0, 2, 1], "loss": [1.0, 2.0]}}, id="edges-that-fall"),
    ],
)
def test_a_line_that_says_nonsense_is_left_out_and_counted(
    plain: Path, tmp_path: Path, additions: dict[str, Any]
) -> None:
    run = Path(shutil.copytree(plain / "mha", tmp_path / "mha"))
    extend(run, additions)
    record = read(run)
    assert not record.validations and len(record.steps) == 16
    assert any("cannot be read and are left out" in problem for problem in record.problems)


def test_a_source_without_a_finite_loss_is_shown_without_it(plain: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain / "mha", tmp_path / "mha"))
    extend(run, {"val_sources": {"a": {"loss": "nan", "accuracy": 0.0, "tokens": 1}, **sources(0.5)}})
    write([run], tmp_path / "out")
    arm = json.loads((tmp_path / "out" / "report.json").read_text())["arms"][0]
    assert arm["sources"]["a"]["loss"] is None and arm["sources"]["code"]["loss"]["mean"] == 1.5


def test_the_curve_of_an_arm_is_its_seeds_mean_as_far_as_all_went(plain: Path, tmp_path: Path) -> None:
    records: list[Record] = []
    for name in ("gqa_0", "gqa_1"):
        records.append(read(Path(shutil.copytree(plain / name, tmp_path / name))))
    del records[1].steps[10:]
    losses = [[line["loss"] for line in record.steps[:10]] for record in records]
    curve = curves.over_seeds(records, curves.tokens, lambda r: {line["step"]: line["loss"] for line in r.steps})
    assert curve is not None and curve.seeds == 2
    assert list(curve.x) == [64 * step for step in range(1, 11)]
    assert list(curve.mean) == pytest.approx([sum(pair) / 2 for pair in zip(*losses, strict=True)])
    assert list(curve.low) == list(map(min, *losses)) and list(curve.high) == list(map(max, *losses))


def test_seconds_add_up_steps_and_saves(plain: Path) -> None:
    record = read(plain / "mha")
    spent = list(curves.seconds(record).values())
    expected = sum(v for line in [*record.steps, *record.saves] for k, v in line.items() if k.startswith("seconds_"))
    assert spent[-1] == pytest.approx(expected) and all(before < after for before, after in pairwise(spent))


def test_the_load_by_layer_is_the_seeds_mean(plain: Path) -> None:
    arm = compare([plain / "gqa_0", plain / "gqa_1"]).arms[0]
    found = layer_map(arm)
    assert found is not None
    loads = [[line["load"] for line in record.steps] for record in arm.records]
    assert found[0] == 16 * 64
    assert found[1] == pytest.approx(np.mean(loads, axis=0).T)
    with_prediction = read(plain / "mha")
    assert names_of_rows(with_prediction.model) == ["0", "1", "mtp 1"]
    assert all(len(line["load"]) == 3 for line in with_prediction.steps)


def test_an_arm_without_a_validation_does_not_change_what_the_others_are_judged_by(plain: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain / "mha", tmp_path / "begun"))
    (run / "metrics.jsonl").unlink()
    quality = next(plot for plot in PLOTS if plot.file == "quality.png")
    picture = draw(quality, compare([plain / "gqa_0", run]))
    assert picture is not None and "Held-out bits per byte: gqa_0" in picture.alt


@pytest.mark.parametrize("file", ["by_length.png", "by_depth.png", "by_pairs.png", "by_hops.png", "sources.png"])
def test_a_legend_names_the_arms_that_are_drawn(folder: Path, tmp_path: Path, file: str) -> None:
    """And no arm that was never asked."""
    begun = Path(shutil.copytree(folder / "gqa_0", tmp_path / "begun"))
    (begun / "metrics.jsonl").unlink()
    figure = Figure()
    plot = next(plot for plot in PLOTS if plot.file == file)
    assert plot.paint(compare([begun, folder / "mha"]), figure, LIGHT) is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mha"]


@pytest.mark.parametrize(
    ("dots", "place"),
    [
        pytest.param([], (0.99, "bottom"), id="nothing"),
        pytest.param([(9, 5.3)], (0.99, "top"), id="a dot above the right end"),
        pytest.param([(9, 5.3), (9, 4.7)], (0.5, "bottom"), id="dots at the right end"),
        pytest.param([(9, 5.3), (9, 4.7), (5, 5.3), (5, 4.7)], (0.01, "bottom"), id="room at the left alone"),
    ],
)
def test_words_on_a_level_cover_no_dot_where_there_is_room(
    dots: list[tuple[float, float]], place: tuple[float, str]
) -> None:
    axes = Figure(figsize=(WIDTH, HEIGHT)).add_subplot(xlim=(0, 10), ylim=(0, 10))
    axes.plot([x for x, _ in dots], [y for _, y in dots], "o")
    level(axes, LIGHT, 5.0)
    name_level(axes, LIGHT, 5.0, "unigram entropy")
    (words,) = axes.texts
    assert isinstance(words, Annotation) and (words.xy[0], words.get_verticalalignment()) == place


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        pytest.param([0.1, 0.9], [0.1, 0.9], id="apart"),
        pytest.param([0.5, 0.5], [0.45, 0.55], id="alike"),
        pytest.param([0.52, 0.5, 0.51], [0.61, 0.41, 0.51], id="three"),
        pytest.param([0.5, 0.55, 0.64], [0.46333333, 0.56333333, 0.66333333], id="one-pushes-the-next"),
    ],
)
def test_names_beside_lines_keep_apart_and_in_order(heights: list[float], expected: list[float]) -> None:
    assert spaced(heights, 0.1) == pytest.approx(expected)


# In the browser.


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser.browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


BROKEN_IMAGES = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length"
OUTSIDE = """(() => {
    const width = document.documentElement.clientWidth;
    const scrolls = [...document.querySelectorAll('.scroll')];
    return [...document.querySelectorAll('body *')]
        .filter(e => e.getBoundingClientRect().right > width + 0.5 && !scrolls.some(s => s !== e && s.contains(e)))
        .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))
        .concat(document.documentElement.scrollWidth > width ? ['the page scrolls sideways'] : []);
})()"""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll('td, th, dd, li, p, figcaption, code')]
    .map(e => parseFloat(getComputedStyle(e).fontSize)))"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_the_page_shows_everything_and_asks_for_nothing(
    chromium: Browser, page: Path, made: Content, width: int, dark: bool
) -> None:
    chromium.open(page, width, dark=dark)
    chromium.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.value("document.documentElement.clientWidth") <= width
    assert chromium.value("document.images.length") == len(PLOTS)
    assert chromium.value(BROKEN_IMAGES) == 0
    assert chromium.value("[...document.images].every(i => i.alt.length > 40)")
    shown = chromium.value("[...document.querySelectorAll('h2, summary')].map(e => e.innerText)")
    tables = [table.title for table in made.tables]
    assert {*tables, "What is missing, and why"} <= set(shown)
    visible = "[...document.querySelectorAll('table, article')].filter(e => e.offsetHeight > 30).length"
    assert chromium.value(visible) == len(tables) - 1 + 3  # each table, the arms as cards
    assert chromium.value(OUTSIDE) == []
    assert chromium.value(SMALLEST_TEXT) >= 11
    assert chromium.requests() == [page.resolve().as_uri()]
    assert chromium.complaints() == []


@needs_browser
def test_the_page_follows_the_readers_paper(chromium: Browser, page: Path) -> None:
    seen = []
    for dark in (False, True):
        chromium.open(page, 1280, dark=dark)
        paper = chromium.value("getComputedStyle(document.body).backgroundColor")
        seen.append((paper, chromium.value("document.images[0].currentSrc")))
    assert seen[0][0] == "rgb(255, 255, 255)" and seen[1][0] == "rgb(21, 24, 28)"
    assert seen[0][1] != seen[1][1]


@needs_browser
def test_a_page_that_breaks_every_rule_is_caught(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><img src="https://example.org/x.png"><img src="gone.png">'
        '<div style="width:2000px">wide</div><td><p style="font-size:5px">small</p><script>nothing()</script>'
    )
    chromium.open(page, 390)
    assert chromium.value(BROKEN_IMAGES) == 2
    assert any(found.startswith("DIV wide") for found in chromium.value(OUTSIDE))
    assert chromium.value(SMALLEST_TEXT) == 5
    assert "https://example.org/x.png" in chromium.requests()
    complaints = "\n".join(chromium.complaints())
    assert "nothing is not defined" in complaints and "gone.png" in complaints
