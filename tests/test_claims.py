"""What the press says, judged: every verdict against numbers typed in by hand, and the page against the code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Refused
from launch.study.config import Study, Tuning
from launch.study.results import NAME, Arm, CacheSize, Results, Run
from models import catalog
from models.__main__ import main, parser
from models.claims import study
from models.claims.claim import Claim, Judgement
from models.claims.document import page
from models.claims.table import CLAIMS

ROOT = Path(__file__).parent.parent

REPRODUCED, REFUTED, ASSUMING, OPEN = "reproduced", "refuted", "true under an assumption", "to be measured"


@pytest.fixture(scope="module")
def judged() -> dict[Claim, Judgement]:
    return {claim: claim.judge() for claim in CLAIMS}


def test_the_page_says_what_the_code_measures(judged: dict[Claim, Judgement]) -> None:
    written = (ROOT / "docs" / "claims.md").read_text()
    assert page(judged) == written, "write it anew: python -m models claims --out docs/claims.md"


# by claim: the verdict, and what was measured, typed in from papers, model cards and arithmetic; the ninth is judged by
# what a study has found so far
BY_HAND: dict[int, tuple[str, dict[str, float]]] = {
    1: (REPRODUCED, {"e2b": 15, "e2b readers": 20, "e4b": 24, "e4b readers": 18}),
    2: (ASSUMING, {"windowed": 1_082_130_432, "naive": 3_221_225_472, "recipe": 2_684_354_560}),
    3: (ASSUMING, {"windowed": 1_626_341_376, "naive": 5_637_144_576, "recipe": 4_831_838_208}),
    4: (REPRODUCED, {"e2b": 57.1, "e4b": 42.9, "e2b naive": 57.1, "e4b naive": 42.9}),
    5: (ASSUMING, {"effective": 2_279_759_104, "total": 4_628_569_344, "dead": 18_880_512}),
    6: (
        ASSUMING,
        {
            "gemma4_26b_a4b total": 25.23e9,
            "gemma4_26b_a4b active": 3.82e9,
            "laguna_xs2 total": 33.44e9,
            "laguna_xs2 active": 3.017e9 - 0.2055e9,
            "zaya1_8b total": 8.84e9,
            "zaya1_8b without embedding": 8.303e9,
            "deepseek_v4_pro total": 1573.0e9,
            "deepseek_v4_pro with prediction": 1598.8e9,
            "deepseek_v4_pro active": 48.9e9,
            "deepseek_v4_flash total": 284.3e9,
            "deepseek_v4_flash active": 13.27e9,
        },
    ),
    7: (
        ASSUMING,
        {
            "deepseek_v4_pro weighted": 27.07,
            "deepseek_v4_pro packed": 10.48,
            "deepseek_v4_pro plain": 26.5,
            "deepseek_v4_pro bf16": 11.5,
            "deepseek_v4_flash weighted": 10.17,
            "deepseek_v4_flash packed": 7.32,
            "deepseek_v4_flash plain": 12.2,
            "deepseek_v4_flash bf16": 8.0,
        },
    ),
    8: (
        ASSUMING,
        {
            "deepseek_v3 against its heads": 81_920 / 1152,
            "kimi_k2_6 against its heads": 40_960 / 1152,
            "against GQA-8": 4096 / 1152,
            "latent": 1152,
            "GQA-2": 1024,
        },
    ),
    10: (REFUTED, {"parameters": 2 * 43 * (24 * 4 * 4096 + 27) + 4 * 4 * 4096 + 4 + 1}),
    11: (REFUTED, {"common": 0, "tokens of what V4 chooses": 4, "tokens of what V3.2 chooses": 1}),
    12: (ASSUMING, {"bf16 latents": 100 * 132 / 1152, "fp8": 100 * 132 / 656, "kept": (584 + 68) / 4, "whole": 584}),
    13: (REFUTED, {"full": 1.0, "entries": 1.0, "scores": 2.0, "windows": 0.0}),
    14: (REFUTED, {"scoring": 40, "layers": 40, "in attention": 0, "in feed-forward": 40 * 201_326_592}),
    15: (ASSUMING, {"Qwen3, GQA": 8, "DeepSeek-V3, MLA, bf16": 278_528 / 1152}),
    16: (
        REFUTED,
        {
            "even": 10 * 4096 * 131_072 + 30 * 4096 * 512,
            "budgeted": 10 * 4096 * 131_072 + 30 * 4096 * 512,
            "budgeted scores": 32.2e9 + 0.5e9,
            "even scores": 42.95e9 + 0.5e9,
        },
    ),
    17: (REFUTED, {"pro": 122, "pro sublayers": 122, "flash": 86, "flash sublayers": 86}),
    18: (
        ASSUMING,
        {
            "GQA-8 × 128, 61 layers, bf16 1M": 262e9,
            "DeepSeek-V3, bf16 1M": 73.7e9,
            "DeepSeek-V3.2, packed 1M": 50.4e9,
            "DeepSeek-V3.2, packed 10M": 504e9,
            "DeepSeek-V4-Pro, packed 1M": 5.30e9,
            "DeepSeek-V4-Flash, packed 1M": 3.70e9,
            "DeepSeek-V3, bf16 longest": (1128e9 - 671.026e9 / 2) / 70_272,
        },
    ),
    19: (
        ASSUMING,
        {
            # 12.58 MB stay in windows
            "gemma4_e2b bf16": (24e9 - 2 * 4_628_569_379 - 12 * 1024 * 512) / 6144,
            "gemma4_e2b needed": (640e9 - 2 * 4.6286e9) / (16 * 2 * (28 * 256 + 7 * 512)),
            "qwen3_30b_a3b bf16": 0,
            "qwen3_30b_a3b fp4": (24e9 - 30.532e9 / 2) / 98_304,
        },
    ),
    20: ("untestable here", {}),
}


@pytest.mark.parametrize("number", BY_HAND, ids=lambda number: f"claim {number}")
def test_verdicts_and_numbers(number: int, judged: dict[Claim, Judgement]) -> None:
    (judgement,) = (found for claim, found in judged.items() if claim.number == number)
    verdict, by_hand = BY_HAND[number]
    assert judgement.verdict == verdict
    for name, value in by_hand.items():
        assert judgement.measured[name] == pytest.approx(value, rel=0 if isinstance(value, int) else 3e-3), name


def test_every_claim_is_judged_once() -> None:
    assert [claim.number for claim in CLAIMS] == list(range(1, 21))
    assert list(BY_HAND) == [number for number in range(1, 21) if number != 9]


def test_commands_that_the_page_shows_can_be_typed() -> None:
    for claim in CLAIMS:
        for command in claim.shown_by:
            asked = parser().parse_args(command.split())
            assert set(asked.model) <= set(catalog.names()), command


# bytes of a cache at 4,096 tokens
CACHES = {"plain": 8192, "two": 4096, "four": 2048, "eight": 1024, "sixteen": 512}
LONE = (3.0, 3.001, 2.999)


def written(directory: Path, losses: dict[str, tuple[float, ...]], measured: dict[str, int]) -> Path:
    """The file of a study whose arms had these losses on text, in nats a token, one a seed."""

    def run(arm: str, seed: int, nats: float) -> Run:
        text = {"name": "text", "loss": nats, "bpb": nats / math.log(2), "accuracy": 0.5, "tokens": 9, "facts": {}}
        recall = {**text, "name": "recall", "loss": 7.0, "bpb": None}
        return Run(arm, seed, 300, 1000, 1.0, 1.0, {"recall": recall, "text": text}, [], "one core", "2.11.0")

    latents = [arm for arm in measured if arm != "plain"]
    settings: dict[str, dict[str, Any]] = {arm: {"knob": 1} if arm == "plain" else {} for arm in measured}
    found = Results(
        Study(
            "study",
            settings,
            "knob",
            "plain",
            "plain",
            tuning=Tuning("optimizer.learning_rate", [1e-3, 2e-3]),
            curves={"per-head latent": latents, "another": ["plain"]},
        ),
        [],
        {
            arm: Arm([], 64, 100_000, 50_000, 0, 1, 10, CacheSize(4096, held, held, 1.0), {})
            for arm, held in measured.items()
        },
        [run(arm, seed, nats) for arm, of_seeds in losses.items() for seed, nats in enumerate(of_seeds)],
    )
    found.write(directory)
    return directory / NAME


@pytest.mark.parametrize(
    ("four", "eight", "verdict"),
    [
        pytest.param((3.000, 3.002, 2.998), (3.001, 3.003, 2.999), REPRODUCED, id="within noise"),
        pytest.param((3.005, 3.006, 3.004), (3.006, 3.007, 3.005), REPRODUCED, id="beyond noise, below 1 %"),
        pytest.param((3.05, 2.97, 3.04), (3.02, 2.98, 3.06), OPEN, id="beyond 1 %, within noise"),
        pytest.param((3.05, 3.052, 3.048), (3.02, 2.98, 3.06), REFUTED, id="one spikes, one within noise"),
        pytest.param((3.000, 3.002, 2.998), (3.05, 3.052, 3.048), ASSUMING, id="at one ratio of two"),
        pytest.param((3.02, 3.022, 3.018), (3.05, 3.052, 3.048), REFUTED, id="at both"),
        pytest.param((2.9, 2.902, 2.898), (2.9, 2.9, 2.9), REPRODUCED, id="better than without"),
    ],
)
def test_a_spike_is_beyond_noise_and_one_percent(
    four: tuple[float, ...], eight: tuple[float, ...], verdict: str, tmp_path: Path
) -> None:
    losses = {"plain": LONE, "two": LONE, "four": four, "eight": eight, "sixteen": (9.0, 9.0, 9.0)}
    judgement = study.ratio_of_compression(written(tmp_path, losses, CACHES))
    assert judgement.verdict == verdict
    assert [row[1] for row in judgement.table[1:]] == ["1×", "2×", "4×", "8×", "16×"]
    assert judgement.measured["8× percent"] == pytest.approx(100 * (math.exp(sum(eight) / 3 - 3) - 1))
    assert "`optimizer.learning_rate` chosen for each arm" in judgement.paragraph
    assert judgement.table[1][3:5] == (f"{3 / math.log(2):.4f}", "3.0000")


@pytest.mark.parametrize(
    ("losses", "caches", "said"),
    [
        pytest.param({arm: LONE for arm in CACHES} | {"two": LONE[:2]}, CACHES, "`two` 2 at 2×", id="two seeds"),
        pytest.param(
            {arm: LONE for arm in CACHES} | {"plain": LONE[:2]}, CACHES, "`plain` 2 at 1×", id="a baseline of two"
        ),
        pytest.param({"plain": LONE, "four": LONE}, CACHES, "`sixteen` 0 at 16×", id="no run"),
        pytest.param(
            {arm: LONE for arm in CACHES} | {"four": (3.0, math.nan, 3.0)}, CACHES, "`four` 2 at 4×", id="no number"
        ),
        pytest.param(
            {"plain": LONE, "two": LONE}, {"plain": 8192, "two": 4096}, "no latent a head at 4×", id="no ratio"
        ),
    ],
)
def test_without_three_seeds_it_stays_to_be_measured(
    losses: dict[str, tuple[float, ...]], caches: dict[str, int], said: str, tmp_path: Path
) -> None:
    judgement = study.ratio_of_compression(written(tmp_path, losses, caches))
    assert judgement.verdict == OPEN and said in judgement.paragraph
    assert study.ratio_of_compression(tmp_path / "absent").verdict == OPEN


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("[", "is no JSON", id="no JSON"),
        pytest.param("[]", "a mapping", id="a list"),
        pytest.param('{"arms": {}, "runs": []}', "results.json.study is missing", id="no study"),
        pytest.param(
            '{"study": {"baseline": "x", "curves": {}}, "arms": {}, "runs": []}', "arms has no x", id="no baseline"
        ),
        pytest.param(
            '{"study": {"baseline": "x", "curves": {}}, "runs": [], '
            '"arms": {"x": {"total": 1, "looked_up": 0, "off": 0, "cache": {"context": 1, "measured": 0}}}}',
            "a cache has bytes",
            id="nothing cached",
        ),
    ],
)
def test_results_that_cannot_be_judged(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(Refused, match=reason):
        study.ratio_of_compression(tmp_path / "results.json")


def test_one_claim_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["claims", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["2"]["measured"]["windowed"] == 1_082_130_432
    assert main(["claims", "2", "20"]) == 0
    shown = capsys.readouterr().out
    assert "1,082,130,432 B" in shown and "Untestable here" in shown
    for arguments, reason in (
        (["21"], "numbered from 1 to 20"),
        (["2", "--out", str(tmp_path / "page")], "whole page"),
    ):
        assert main(["claims", *arguments]) == 2
        assert reason in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
