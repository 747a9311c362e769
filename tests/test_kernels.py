"""What will compute a run's layers is said before its first step, and nothing falls back in silence."""

from __future__ import annotations

import pytest
import torch

from conf.compose import choices, compose
from models import cost
from train import kernels
from train.config import read

FUSED = "packed, all tokens by FlexAttention; of one document, all tokens by scaled_dot_product_attention"
OTHERS = "other entries by the blockwise core (not the tokens in hand)"
MERGED = (
    "packed, all tokens by FlexAttention; "
    "of one document, all tokens by the blockwise core (its softmax is merged, with a sink or with other entries)"
)


def told(overrides: list[str], dtype: torch.dtype = torch.bfloat16, mode: str = "sparse") -> list[str]:
    config = read(compose(["run.dir=unused", "train.core=fused", "train.sequence_length=256", *overrides]))
    return kernels.told(cost.meta(config.model), config.train.core, dtype, [(mode, 256)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["attention=gqa"], FUSED),
        (["attention=gqa", "+attention.window=32"], "the last 32 tokens by FlexAttention"),
        (["attention=gqa", "+attention.sink=true"], MERGED),
        (["attention=mla"], FUSED),
        (["attention=mla", "+attention.sink=true"], MERGED),
        (["attention=swa"], "the last 32 tokens by FlexAttention"),
        (["attention=hca"], f"the last 32 tokens by FlexAttention, {OTHERS}"),
        (["attention=csa"], "the last 32 tokens by FlexAttention, what it chooses by the gathered core"),
        (["attention=dsa"], "what it chooses by the gathered core"),
        (["attention=dsa", "attention.indexer.top_k=256"], FUSED),
    ],
    ids=" ".join,
)
def test_the_fused_core_says_what_serves_each_layer(overrides: list[str], wanted: str) -> None:
    scheme = overrides[0].partition("=")[2]
    assert told(overrides)[1:] == [f"{scheme} ×4, sparse, rows of 256 tokens: {wanted}"]


def test_a_phase_in_which_nothing_is_chosen_is_told_by_itself() -> None:
    assert told(["attention=csa"], mode="dense")[1:] == [
        f"csa ×4, dense, rows of 256 tokens: the last 32 tokens by FlexAttention, {OTHERS}"
    ]


@pytest.mark.parametrize("scheme", choices("attention"))
def test_a_long_row_is_told_by_a_short_one(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(compose(["run.dir=unused", f"attention={scheme}"]))
    lines = [kernels.told(cost.meta(config.model), "fused", torch.bfloat16, [("sparse", 10**9)])]
    monkeypatch.setattr(kernels, "_telling", lambda slots: 300)
    lines.append(kernels.told(cost.meta(config.model), "fused", torch.bfloat16, [("sparse", 10**9)]))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", [name for name in choices("model") if name.endswith("_tiny")])
def test_every_model_says_it_of_every_layer(name: str) -> None:
    config = read(compose(["run.dir=unused", f"model={name}"]))
    layers = len(cost.meta(config.model).trained_attentions())
    lines = [line for line in told([f"model={name}"]) if not line.startswith("experts")]
    assert sum(int(line.partition("×")[2].partition(",")[0]) for line in lines) == layers
    assert all(" by " in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "dtype", "wanted"),
    [
        ([], torch.bfloat16, "grouped GEMM"),
        ([], torch.float32, "one after the other, as PyTorch compiles its grouped GEMM in bf16 alone"),
        (
            ["moe.hidden=60"],
            torch.bfloat16,
            "one after the other, as a grouped GEMM needs rows of whole 16 bytes, not 128 and 60 bf16 numbers",
        ),
    ],
    ids=["bf16", "fp32", "odd width"],
)
def test_experts_say_how_they_are_multiplied(overrides: list[str], dtype: torch.dtype, wanted: str) -> None:
    assert told([*overrides, "train.core=plain"], dtype) == [f"experts ×4: {wanted}"]
