"""DeepSeek-V4 against Transformers' own implementation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.weights import load_model
from tests import draw_v4
from tests.schemes import packed
from tests.test_families import SEEDS, assert_equal, common, loaded, reference


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed:02}")
def test_equals_transformers(seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"deepseek_v4 {seed}")
    torch.manual_seed(seed)
    theirs = reference("deepseek_v4", **draw_v4.deepseek_v4(draw, common(draw)))
    assert_equal(theirs, draw, tmp_path, 1e-4)


def test_an_exact_ramp_is_told_and_rounded_as_transformers_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "num_experts_per_tok": 2, "head_dim": 12}
    theirs = reference(
        "deepseek_v4", **(draw_v4.TINY | sizes | {"rope_parameters": exact, "compress_rope_theta": 100.0})
    )
    capsys.readouterr()
    assert_equal(theirs, random.Random(5), tmp_path, 1e-4)
    assert "truncate is a key that nothing reads" in capsys.readouterr().err


def test_packed_documents_leak_in_transformers_and_not_here(tmp_path: Path) -> None:
    """Its compressors take a row for one document: what the first says is heard in the second."""
    kinds = {"num_hidden_layers": 2, "layer_types": draw_v4.KINDS[1:], "mlp_layer_types": ["moe", "moe"]}
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "num_experts_per_tok": 2}
    reference("deepseek_v4", **(sizes | draw_v4.TINY | kinds)).save_pretrained(tmp_path)
    theirs, ours = loaded(tmp_path), load_model(tmp_path)
    sequence = packed([[7, 9]])
    ids = torch.randint(11, (1, 16))
    other = torch.cat(((ids[:, :7] + 1) % 11, ids[:, 7:]), 1)

    @torch.no_grad()
    def difference(logits: Callable[[Tensor], Tensor]) -> float:
        return (logits(ids) - logits(other))[:, 7:].abs().max().item()

    assert difference(lambda row: ours(row, sequence)) < 1e-6
    assert difference(lambda row: theirs(row, position_ids=sequence.position).logits) > 1e-2
