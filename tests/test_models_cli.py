"""python -m models, as a user types it."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from conf.schema import build
from models import catalog, cost
from models.__main__ import main
from models.commands.cost_tables import tables
from models.commands.describe import as_mapping, picture
from models.commands.named import named
from models.config import ModelConfig
from models.model import Model
from models.shards import WHOLE
from models.weights import load_model, open_weights, save_model
from train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
VOCAB, LATENT, ROPE, LAYERS = 300, 12, 4, 2


def typed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "models", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command in this process: what it prints, where it must succeed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformers directory whose vocabulary holds bytes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=LATENT,
        q_lora_rank=10,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=6,
        v_head_dim=8,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("models") / "hf"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCAB, (2, 11)))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of two steps, which hold different weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    section = catalog.section("backbone_tiny", {"attention": "mla"})
    model = Model(build(ModelConfig, section, "model"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (5, 10):
        model.initialise(step)
        checkpoints.save(step, {"model": model.state_dict(), "step": step}, wait=True)
    checkpoints.close()
    torch.distributed.destroy_process_group()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": section, "train": {"seed": 0}}))
    return folder


def test_list_names_every_model_and_loads_no_other_library() -> None:
    check = (
        "import sys; from models.__main__ import main; code = main(['list']); "
        "heavy = {'transformers', 'megatron', 'hydra', 'datasets', 'wandb'} & set(sys.modules); "
        "print(heavy, file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=120)
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


def test_a_layer_of_deepseek_v3_leaves_a_latent_and_a_rotated_key(said: Callable[..., str]) -> None:
    layer = json.loads(said("describe", "deepseek_v3", "--json"))["layers"][60]
    (slot,) = layer["slots"]
    assert {part["name"]: (part["dims"], part["format"]) for part in slot["parts"]} == {
        "latent": ({"latent": 512}, "bf16"),
        "rope": ({"rope_dim": 64}, "bf16"),
    }
    assert layer["reads"] == 60 and slot["entry_bytes"] == 1152


def test_costs_are_the_published_ones(said: Callable[..., str]) -> None:
    """Bytes and GFLOP by hand: DeepSeek-V3 and Kimi K2.6 keep 61 × 1152 bytes a token."""
    words = ["deepseek_v3", "kimi_k2_6", "--context", "4096,131072,1048576", "--baseline", "deepseek_v3", "--json"]
    costs = json.loads(said("cost", *words))
    deepseek, kimi = costs["deepseek_v3"], costs["kimi_k2_6"]
    assert deepseek["kv_bytes_per_token"] == kimi["kv_bytes_per_token"] == 70272
    assert deepseek["kv_bytes"] == {"4096": 287834112, "131072": 9210691584, "1048576": 73685532672}
    assert deepseek["read_bytes_per_step"] == deepseek["kv_bytes"]
    gflop = {context: deepseek["decode_flops"][context] / 1e9 for context in deepseek["decode_flops"]}
    assert gflop == pytest.approx({"4096": 73.3 + 69.6, "131072": 73.3 + 2227, "1048576": 73.3 + 17816}, rel=1e-3)
    assert kimi["decode_flops"]["4096"] / 1e9 == pytest.approx(63.4 + 34.8, rel=1e-3)
    percent = kimi["percent_of_baseline"]
    assert percent["kv_bytes"]["4096"] == 100 and percent["total"] == pytest.approx(100 * 1026.408 / 671.026, abs=0.01)


def test_totals_by_part(said: Callable[..., str]) -> None:
    """By hand: 61 layers of attention, 58 of 256 experts, tables of 129,280 rows; Gemma's table is its injections'."""
    costs = json.loads(said("cost", "deepseek_v3", "gemma4_e2b", "--context", "1", "--json"))
    deepseek, gemma = (costs[name]["total_by_part"] for name in ("deepseek_v3", "gemma4_e2b"))
    for name in costs:
        assert sum(costs[name]["total_by_part"].values()) == costs[name]["total"]
    assert deepseek["embedding"] == deepseek["head"] == 129_280 * 7168
    assert deepseek["experts"] == 58 * 256 * 3 * 7168 * 2048 and deepseek["routers"] == 58 * 256 * 7168
    assert deepseek["feedforward"] == 3 * 7168 * (3 * 18432 + 58 * 2048)
    assert deepseek["attention"] / 61e6 == pytest.approx(187.107, abs=1e-3)
    assert "head" not in gemma and gemma["injection"] / 1e6 == pytest.approx(2348.8 + 41.3, abs=0.06)


def test_caches_as_their_authors_pack_them(said: Callable[..., str]) -> None:
    """48,068 bytes a token of DeepSeek-V3.2: 656 and 132 for each of 61 layers; 3,514.25 of V4-Flash."""
    words = ["deepseek_v4_pro", "deepseek_v4_flash", "deepseek_v32", "--baseline", "deepseek_v32", "--json"]
    asked = ["--context", "1000000,1048576", "--weights", "fp8", "--store", "packed"]
    packed = json.loads(said("cost", *words, *asked))
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
def test_formats_of_a_cache(store: str, bytes_per_layer: int, said: Callable[..., str]) -> None:
    """DeepSeek-V3.2: a latent of 512, a rotated key of 64, an index key of 128."""
    costs = json.loads(said("cost", "deepseek_v32", "--store", store, "--context", "4096", "--json"))["deepseek_v32"]
    assert costs["kv_bytes_per_token"] == 61 * bytes_per_layer
    assert costs["kv_bytes"]["4096"] == 4096 * 61 * bytes_per_layer


def test_what_fits_a_gpu(said: Callable[..., str]) -> None:
    """Qwen3-30B-A3B on 80 GB: 61.06 GB of weights leave 18.94 GB, at 2 × 4 × 128 × 2 × 48 bytes a token."""
    words = ["qwen3_30b_a3b", "deepseek_v3", "--gpu", "h100", "--context", "4096"]
    costs = json.loads(said("cost", *words, "--json"))
    fits = costs["qwen3_30b_a3b"]["gpu"]
    assert fits["longest_context"] == (80_000_000_000 - fits["weight_bytes"]) // 98304
    assert fits["sessions"] == {"4096": fits["longest_context"] // 4096}
    assert costs["deepseek_v3"]["gpu"]["longest_context"] == 0
    assert "do not fit h100" in said("cost", *words)
    # 8 query heads read each KV head: 2 × 2 × 8 × 128 operations for 2 × 128 × 2 bytes, far below 989 / 3.35
    assert costs["qwen3_30b_a3b"]["flop_per_byte"]["4096"] == 8
    assert fits["ridge"] == 295.2 and fits["bound"]["4096"] == "memory"
    # absorbed, all 128 heads read one latent: 2 × 128 × (2 × 512 + 64) for 1,152 bytes
    assert costs["deepseek_v3"]["flop_per_byte"]["4096"] == pytest.approx(241.778, abs=1e-3)
    eight = json.loads(said("cost", "qwen3_30b_a3b", "--gpu", "8xh100", "--weights", "fp4", "--json"))
    assert eight["qwen3_30b_a3b"]["gpu"]["memory_bytes"] == 640_000_000_000
    assert eight["qwen3_30b_a3b"]["gpu"]["weight_bytes"] == fits["weight_bytes"] / 4


def test_arms_of_one_backbone_side_by_side(said: Callable[..., str]) -> None:
    costs = json.loads(said("cost", "backbone_tiny", "attention=gqa", "backbone_tiny", "attention=hca", "--json"))
    gqa, hca = costs["backbone_tiny attention=gqa"], costs["backbone_tiny attention=hca"]
    assert hca["kv_bytes"]["131072"] < gqa["kv_bytes"]["131072"]
    assert hca["kv_bytes_by_kind"]["4096"]["windows"] and hca["kv_bytes_by_kind"]["4096"]["tails"]


def test_the_table_has_a_row_for_each_model(said: Callable[..., str]) -> None:
    table = said("cost", "deepseek_v3", "kimi_k2_6", "--baseline", "deepseek_v3")
    assert table.count("kimi_k2_6 ") == 4 and "152.96%" in table and "287.83 MB" in table


def test_there_and_back_again(hf: Path, ids: Path, tmp_path: Path) -> None:
    """Import, score both ways, export; each command in a process of its own."""
    assert typed("import", "--from", hf, "--to", tmp_path / "ours").returncode == 0
    scored = typed("score", "--model", tmp_path / "ours", "--tokens", ids, "--out", tmp_path / "whole.npy")
    assert scored.returncode == 0, scored.stderr
    decoded = typed("score", "--model", hf, "--tokens", ids, "--out", tmp_path / "step.npy", "--decode")
    assert decoded.returncode == 0, decoded.stderr
    measured = json.loads(decoded.stdout)
    assert measured["cache_bytes"]["total"] == 2 * 11 * LAYERS * (LATENT + ROPE) * 4
    assert typed("export", "--from", tmp_path / "ours", "--to", tmp_path / "back").returncode == 0

    with torch.no_grad():
        tokens = torch.from_numpy(np.load(ids))
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits.numpy()
    whole, step = np.load(tmp_path / "whole.npy"), np.load(tmp_path / "step.npy")
    assert whole.dtype == np.float32 and whole.shape == (2, 11, VOCAB)
    assert np.linalg.norm(whole - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(step - expected) <= 1e-5 * np.linalg.norm(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "step.npy", "whole.npy"]


@pytest.mark.parametrize(("dtype", "near"), [("float64", 1e-5), ("bfloat16", 0.1)])
def test_scores_in_other_precisions(
    dtype: str, near: float, hf: Path, ids: Path, tmp_path: Path, said: Callable[..., str]
) -> None:
    for name in ("float32", dtype):
        said("score", "--model", hf, "--tokens", ids, "--out", tmp_path / name, "--dtype", name)
    base, other = np.load(tmp_path / "float32"), np.load(tmp_path / dtype)
    assert other.dtype == (np.float64 if dtype == "float64" else np.float32)
    error = np.linalg.norm(base - other) / np.linalg.norm(base)
    assert 0 < error < near


def test_weights_in_several_files_come_back_the_same(hf: Path, tmp_path: Path) -> None:
    from models import shards

    weights = open_weights(hf)
    folder = tmp_path / "ours"
    save_model(folder, weights.config, weights.tensors)
    one = load_model(folder).state_dict()
    (folder / WHOLE).unlink()
    shards.write(folder, one.items(), shard_bytes=4096)
    assert len(list(folder.glob("*.safetensors"))) > 3
    several = load_model(folder).state_dict()
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_a_run_gives_its_newest_whole_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = load_model(run / "checkpoints" / "step_00000010").state_dict()
    older = load_model(run / "checkpoints" / "step_00000005").state_dict()
    assert all(torch.equal(newest[name], tensor) for name, tensor in load_model(run).state_dict().items())

    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    (bad,) = (copy / "checkpoints" / "step_00000010").glob("rank_0.bin")
    content = bytearray(bad.read_bytes())
    content[1000] ^= 1
    bad.write_bytes(content)
    fallen_back = load_model(copy).state_dict()
    assert (
        "step_00000010 is not whole (rank_0.bin is damaged). step_00000005 is used instead." in capsys.readouterr().err
    )
    assert all(torch.equal(older[name], tensor) for name, tensor in fallen_back.items())


def test_generate_from_a_run(run: Path, said: Callable[..., str]) -> None:
    words = ["generate", "--model", run, "--prompt", "def f(", "--tokens", 12, "--temperature", 1, "--seed"]
    first = said(*words, 1)
    assert first.startswith("def f(") and first == said(*words, 1) != said(*words, 2)
    assert said("generate", "--model", run / "checkpoints" / "step_00000005", "--prompt", "", "--tokens", 3)


def test_generate_uses_the_tokenizer_beside_the_model(hf: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    said("import", "--from", hf, "--to", tmp_path / "ours")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "ours" / "tokenizer.json"))
    text = said("generate", "--model", tmp_path / "ours", "--prompt", "w5 w7", "--tokens", 4)
    assert text.startswith("w5 w7") and text.count("w") == 6


def _array(**arrays: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        np.save(folder / "bad.npy", arrays["ids"])
        return folder / "bad.npy"

    return save


def _text(folder: Path) -> Path:
    (folder / "bad.npy").write_text("1 2 3")
    return folder / "bad.npy"


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        pytest.param(_array(ids=np.array([[1, VOCAB]])), f"token id {VOCAB}", id="beyond the vocabulary"),
        pytest.param(_array(ids=np.array([[1, -1]])), "token id -1", id="negative"),
        pytest.param(_array(ids=np.ones((1, 2))), "holds float64", id="not whole numbers"),
        pytest.param(_array(ids=np.ones(3, np.int64)), "shape [3]", id="one dim"),
        pytest.param(_array(ids=np.ones((0, 3), np.int64)), "shape [0, 3]", id="empty"),
        pytest.param(_array(ids=np.array([[{}]])), "no .npy file", id="pickled"),
        pytest.param(_text, "no .npy file", id="a text"),
        pytest.param(lambda folder: folder / "absent.npy", "is missing", id="missing"),
    ],
)
def test_tokens_that_cannot_be_scored(
    tokens: Callable[[Path], Path], reason: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tokens(tmp_path)
    before = sorted(tmp_path.iterdir())
    refused(["score", "--model", hf, "--tokens", path, "--out", tmp_path / "out.npy"], reason, capsys)
    assert sorted(tmp_path.iterdir()) == before


def refused(arguments: list[object], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert reason in err and err.count("\n") == 1 and err.rstrip().endswith((".", "?"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["describe", "deepsek_v3"], "did you mean 'deepseek_v3'?", id="misspelt model"),
        pytest.param(["describe", "backbone_tiny", "attention=mlaa"], "did you mean 'mla'?", id="misspelt choice"),
        pytest.param(["describe", "deepseek_v3", "attention=mla"], "leaves nothing open", id="nothing to choose"),
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
    assert done.stderr.endswith("did you mean 'mixtral_8x7b'?\n")


def _truncate(folder: Path) -> None:
    path = folder / WHOLE
    path.write_bytes(path.read_bytes()[:-100])


def _other_width(folder: Path) -> None:
    path = folder / "model.yaml"
    path.write_text(path.read_text().replace("width: 16", "width: 32"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(_truncate, "cannot be read", id="truncated"),
        pytest.param(lambda folder: (folder / WHOLE).unlink(), "is missing", id="no weights"),
        pytest.param(_other_width, "another architecture", id="another architecture"),
        pytest.param(lambda folder: (folder / "model.yaml").write_text("vocab: ["), "cannot be read", id="broken YAML"),
        pytest.param(lambda folder: (folder / "model.yaml").write_text("- 1"), "no mapping", id="no mapping"),
        pytest.param(
            lambda folder: (folder / f"{WHOLE}.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            "no file beside it",
            id="an index that leads elsewhere",
        ),
    ],
)
def test_a_damaged_directory(
    damage: Callable[[Path], object],
    reason: str,
    hf: Path,
    ids: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = open_weights(hf)
    save_model(tmp_path / "ours", weights.config, weights.tensors)
    damage(tmp_path / "ours")
    words = ["score", "--model", tmp_path / "ours", "--tokens", ids, "--out", tmp_path / "out.npy"]
    refused([*words], reason, capsys)
    assert not (tmp_path / "out.npy").exists()
    assert main(["export", "--from", str(tmp_path / "ours"), "--to", str(tmp_path / "hf")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_a_damaged_checkpoint_that_is_named_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    step = copy / "checkpoints" / "step_00000010"
    (step / "rank_0.bin").write_bytes(b"")
    refused(["generate", "--model", step, "--prompt", "a"], "rank_0.bin has 0 bytes instead of", capsys)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("heads: 4", "heads: 2"))
    refused(["generate", "--model", copy, "--prompt", "a"], "not whole", capsys)


def test_a_full_disk_leaves_nothing_behind(hf: Path, tmp_path: Path) -> None:
    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [sys.executable, "-m", "models", "import", "--from", str(hf), "--to", str(tmp_path / "ours")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=no_large_files)
    assert done.returncode == 1 and done.stdout == ""
    assert "cannot be written" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
