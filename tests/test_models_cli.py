"""What `python -m models` says of models without their weights: lists, pictures, costs; and refusals in a sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from models import catalog, cost
from models.commands.cost_tables import tables
from models.commands.describe import as_mapping, picture
from models.commands.named import named
from tests.command_line import ROOT, refused, said, typed


def test_list_names_every_model_and_loads_no_other_library() -> None:
    check = (
        "import sys; from models.__main__ import main; code = main(['list']); "
        "heavy = {'transformers', 'megatron', 'hydra', 'datasets', 'wandb'} & set(sys.modules); "
        "print(heavy, file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [name for name in catalog.names() if name not in done.stdout] == []


@pytest.mark.parametrize("name", catalog.names())
def test_every_shipped_model_is_described(name: str) -> None:
    (found,) = named([name])
    model = cost.meta(found.config)
    described = as_mapping(found, model)
    assert [layer["layer"] for layer in described["layers"]] == list(range(len(described["layers"])))
    grows = sum(
        slot["entry_bytes"] / slot["stride"]
        for layer in described["layers"]
        for slot in layer["slots"]
        if layer["writes"] and slot["kind"] == "entry" and slot["reach"] is None
    )
    assert grows == described["kv_bytes_per_token"]
    last = len(described["layers"]) - 1
    assert re.search(rf"(–|layer ){last}  ×", picture(found, model))


def test_what_stands_around_the_layers_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = said(capsys, "describe", "gpt2")
    assert "learned positions for 1024 tokens, added to the embedding, layer norms\n" in gpt2
    assert json.loads(said(capsys, "describe", "gpt2", "--json"))["positions"] == 1024
    gemma = said(capsys, "describe", "gemma4_e2b")
    assert "a norm after each sublayer too, each layer scaled, logits within ± 30\n" in gemma
    assert "positions" not in gemma


def test_a_layer_of_deepseek_v3_leaves_a_latent_and_a_rotated_key(capsys: pytest.CaptureFixture[str]) -> None:
    layer = json.loads(said(capsys, "describe", "deepseek_v3", "--json"))["layers"][60]
    (slot,) = layer["slots"]
    assert {part["name"]: (part["dims"], part["format"]) for part in slot["parts"]} == {
        "latent": ({"latent": 512}, "bf16"),
        "rope": ({"rope_dim": 64}, "bf16"),
    }
    assert layer["reads"] == 60 and slot["entry_bytes"] == 1152


def test_costs_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes and GFLOP by hand: DeepSeek-V3 and Kimi K2.6 keep 61 × 1152 bytes a token."""
    costs = json.loads(said(capsys, "cost", "deepseek_v3", "kimi_k2_6", "--baseline", "deepseek_v3", "--json"))
    deepseek, kimi = costs["deepseek_v3"], costs["kimi_k2_6"]
    assert deepseek["kv_bytes_per_token"] == kimi["kv_bytes_per_token"] == 70272
    assert deepseek["kv_bytes"] == {"4096": 287834112, "131072": 9210691584, "1048576": 73685532672}
    assert deepseek["read_bytes_per_step"] == deepseek["kv_bytes"]
    gflop = {context: deepseek["decode_flops"][context] / 1e9 for context in deepseek["decode_flops"]}
    assert gflop == pytest.approx({"4096": 73.3 + 69.6, "131072": 73.3 + 2227, "1048576": 73.3 + 17816}, rel=1e-3)
    assert kimi["decode_flops"]["4096"] / 1e9 == pytest.approx(63.4 + 34.8, rel=1e-3)
    percent = kimi["percent_of_baseline"]
    assert percent["kv_bytes"]["4096"] == 100 and percent["total"] == pytest.approx(100 * 1026.408 / 671.026, abs=0.01)


def test_totals_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: 61 layers of attention, 58 of 256 experts, tables of 129,280 rows; Gemma's table is its injections'."""
    costs = json.loads(said(capsys, "cost", "deepseek_v3", "gemma4_e2b", "--context", "1", "--json"))
    deepseek, gemma = (costs[name]["total_by_part"] for name in ("deepseek_v3", "gemma4_e2b"))
    for name in costs:
        assert sum(costs[name]["total_by_part"].values()) == costs[name]["total"]
    assert deepseek["embedding"] == deepseek["head"] == 129_280 * 7168
    assert deepseek["experts"] == 58 * 256 * 3 * 7168 * 2048 and deepseek["routers"] == 58 * 256 * 7168
    assert deepseek["feedforward"] == 3 * 7168 * (3 * 18432 + 58 * 2048)
    assert deepseek["attention"] / 61e6 == pytest.approx(187.107, abs=1e-3)
    assert "head" not in gemma and gemma["injection"] / 1e6 == pytest.approx(2348.8 + 41.3, abs=0.06)


def test_caches_as_their_authors_pack_them(capsys: pytest.CaptureFixture[str]) -> None:
    """48,068 bytes a token of DeepSeek-V3.2: 656 and 132 for each of 61 layers; 3,514.25 of V4-Flash."""
    words = ["deepseek_v4_pro", "deepseek_v4_flash", "deepseek_v32", "--baseline", "deepseek_v32", "--json"]
    asked = ["--context", "1000000,1048576", "--weights", "fp8", "--store", "packed"]
    packed = json.loads(said(capsys, "cost", *words, *asked))
    pro, flash = packed["deepseek_v4_pro"], packed["deepseek_v4_flash"]
    assert packed["deepseek_v32"]["kv_bytes_per_token"] == 48068
    assert flash["kv_bytes_per_token"] == 3514.25
    assert flash["percent_of_baseline"]["kv_bytes_per_token"] == 7.311
    # published, at a million tokens: 10 and 7 % of the cache, 27 and 10 % of the operations
    for costs, kv, weighted, plain in ((pro, 10.48, 27.07, 26.5), (flash, 7.32, 10.17, 12.2)):
        percent = costs["percent_of_baseline"]
        assert percent["kv_bytes"]["1048576"] == pytest.approx(kv, abs=5e-3)
        assert percent["weighted_decode_flops"]["1000000"] == pytest.approx(weighted, abs=5e-3)
        assert percent["decode_flops"]["1000000"] == pytest.approx(plain, abs=0.05)
    shown = tables(packed, [1_000_000, 1_048_576])
    assert all(f" {percent}%" in shown for percent in ("10.48", "7.32", "27.07", "10.17"))


@pytest.mark.parametrize(
    ("store", "bytes_per_layer"),
    [
        pytest.param("declared", 1024 + 128 + 256, id="as declared"),
        pytest.param("packed", 656 + 132, id="as packed"),
        pytest.param("fp8", 512 + 64 + 128, id="one format"),
        pytest.param("packed,index=fp4", 656 + 64, id="another for a slot"),
        pytest.param("packed,latent=bf16", 1152 + 132, id="no packing for a slot"),
        pytest.param("latent=fp8,latent.rope=bf16", 512 + 128 + 256, id="another for a part"),
        pytest.param("latent.rope=bf16,latent=fp8", 512 + 128 + 256, id="the exacter name in front"),
    ],
)
def test_formats_of_a_cache(store: str, bytes_per_layer: int, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3.2: a latent of 512, a rotated key of 64, an index key of 128."""
    costs = json.loads(said(capsys, "cost", "deepseek_v32", "--store", store, "--context", "4096", "--json"))[
        "deepseek_v32"
    ]
    assert costs["kv_bytes_per_token"] == 61 * bytes_per_layer
    assert costs["kv_bytes"]["4096"] == 4096 * 61 * bytes_per_layer


def test_what_fits_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3-30B-A3B on 80 GB: 61.06 GB of weights leave 18.94 GB, at 2 × 4 × 128 × 2 × 48 bytes a token."""
    words = ["qwen3_30b_a3b", "deepseek_v3", "--gpu", "h100", "--context", "4096"]
    costs = json.loads(said(capsys, "cost", *words, "--json"))
    fits = costs["qwen3_30b_a3b"]["gpu"]
    assert fits["longest_context"] == (80_000_000_000 - fits["weight_bytes"]) // 98304
    assert fits["sessions"] == {"4096": fits["longest_context"] // 4096}
    assert costs["deepseek_v3"]["gpu"]["longest_context"] == 0
    assert "do not fit h100" in said(capsys, "cost", *words)
    # 8 query heads read each KV head: 2 × 2 × 8 × 128 operations for 2 × 128 × 2 bytes, far below 989 / 3.35
    assert costs["qwen3_30b_a3b"]["flop_per_byte"]["4096"] == 8
    assert fits["ridge"] == 295.2 and fits["bound"]["4096"] == "memory"
    # absorbed, all 128 heads read one latent: 2 × 128 × (2 × 512 + 64) for 1,152 bytes
    assert costs["deepseek_v3"]["flop_per_byte"]["4096"] == pytest.approx(241.778, abs=1e-3)
    # GPT-2 has positions for 1,024 tokens, of 36,864 bytes each
    positions = json.loads(said(capsys, "cost", "gpt2", "--gpu", "h100", "--context", "1024,1025", "--json"))["gpt2"]
    left = 80_000_000_000 - 2 * 124_439_808
    assert positions["gpu"]["sessions"] == {"1024": left // (1024 * 36_864), "1025": 0}
    eight = json.loads(said(capsys, "cost", "qwen3_30b_a3b", "--gpu", "8xh100", "--weights", "fp4", "--json"))
    assert eight["qwen3_30b_a3b"]["gpu"]["memory_bytes"] == 640_000_000_000
    assert eight["qwen3_30b_a3b"]["gpu"]["weight_bytes"] == fits["weight_bytes"] / 4


def test_arms_of_one_backbone_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    costs = json.loads(
        said(capsys, "cost", "backbone_tiny", "attention=gqa", "backbone_tiny", "attention=hca", "--json")
    )
    gqa, hca = costs["backbone_tiny attention=gqa"], costs["backbone_tiny attention=hca"]
    assert hca["kv_bytes"]["131072"] < gqa["kv_bytes"]["131072"]
    assert hca["kv_bytes_by_kind"]["4096"]["windows"] and hca["kv_bytes_by_kind"]["4096"]["tails"]


def test_the_table_has_a_row_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    table = said(capsys, "cost", "deepseek_v3", "kimi_k2_6", "--baseline", "deepseek_v3")
    assert table.count("kimi_k2_6 ") == 5 and "152.96%" in table and "287.83 MB" in table


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["describe", "deepsek_v3"], "did you mean 'deepseek_v3'?", id="misspelt model"),
        pytest.param(["describe", "backbone_tiny", "attention=mlaa"], "did you mean 'mla'?", id="misspelt choice"),
        pytest.param(["describe", "deepseek_v3", "attention=mla"], "leaves nothing open", id="nothing to choose"),
        pytest.param(["cost", "backbone_tiny", "attention.heads=0"], "names of whole files alone", id="a number"),
        pytest.param(["describe", "attention=mla"], "comes after the model's name", id="choice before the name"),
        pytest.param(["describe", "deepseek_v3", "kimi_k2_6"], "takes one model", id="two to describe"),
        pytest.param(["cost", "deepseek_v3", "--context", "4k"], "--context is '4k'", id="context"),
        pytest.param(["cost", "deepseek_v3", "--context", "0"], "--context is '0'", id="no context"),
        pytest.param(["cost", "deepseek_v3", "--gpu", "h10"], "did you mean 'h100'?", id="misspelt gpu"),
        pytest.param(
            ["cost", "deepseek_v3", "--gpu", "h100", "--weights", "int3"], "there is: bf16", id="unknown format"
        ),
        pytest.param(["cost", "deepseek_v3", "--store", "int3"], "there is: bf16", id="unknown storage"),
        pytest.param(["cost", "deepseek_v3", "--store", "latnt=fp8"], "did you mean 'latent'?", id="misspelt slot"),
        pytest.param(["cost", "deepseek_v3", "--store", "fp8,"], "--store is ''", id="a format left out"),
        pytest.param(["cost", "deepseek_v3", "--baseline", "gpt9"], "gpt9", id="unknown baseline"),
        pytest.param(["cost"], "NAME", id="no model"),
        pytest.param(["cots", "deepseek_v3"], "invalid choice: 'cots'", id="unknown command"),
        pytest.param(["import", "--from", "absent", "--to", "new"], "absent is no directory", id="missing directory"),
        pytest.param(["import", "--from", "conf", "--to", "new"], "has no config.json", id="nothing to import"),
        pytest.param(["import", "--from", "conf", "--to", "docs"], "docs exists already", id="existing target"),
        pytest.param(["export", "--from", "conf", "--to", "new"], "holds no model", id="nothing to export"),
        pytest.param(["generate", "--model", "conf", "--prompt", "a"], "holds no model", id="nothing to run"),
    ],
)
def test_refused_in_one_sentence(
    arguments: list[object], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    refused(arguments, reason, capsys)
    assert not (ROOT / "new").exists()


def test_refused_in_a_process_of_its_own() -> None:
    done = typed("describe", "mixtral_8x7")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("refused: .* did you mean 'mixtral_8x7b'\\?\n", done.stderr)
