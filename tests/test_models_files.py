"""Models and their weights through `python -m models`: imported, exported, scored, generated from; and damaged."""

from __future__ import annotations

import json
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

from conf.schema import Refused, build
from models import catalog
from models.__main__ import main
from models.checkpoint import read_table
from models.config import ModelConfig
from models.model import Model
from models.shards import WHOLE
from models.weights import load_model, open_weights, save_model
from tests.command_line import ROOT, refused, said, typed
from train.checkpoint import Checkpoints

VOCAB, LATENT, ROPE, LAYERS = 300, 12, 4, 2


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
        optimizer = {"moment": torch.full((10_000_000,), float(step))}
        checkpoints.save(step, {"model": model.state_dict(), "optimizer": optimizer, "step": step}, wait=True)
    checkpoints.close()
    torch.distributed.destroy_process_group()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": section, "train": {"seed": 0}}))
    return folder


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
    dtype: str, near: float, hf: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("float32", dtype):
        said(capsys, "score", "--model", hf, "--tokens", ids, "--out", tmp_path / name, "--dtype", name)
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
    said = capsys.readouterr().err
    assert "step_00000010 is not whole (rank_0.bin is damaged between bytes 0 and 16777216)." in said
    assert "step_00000005 is used instead." in said
    assert all(torch.equal(older[name], tensor) for name, tensor in fallen_back.items())


def test_the_optimizers_state_is_not_looked_at(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    step = copy / "checkpoints" / "step_00000010"
    table = read_table(step)
    with (step / "rank_0.bin").open("r+b") as file:
        file.seek(table["optimizer.moment"].parts[0].offset + 39_999_999)
        file.write(b"?")
    assert load_model(step)
    with (step / "rank_0.bin").open("r+b") as file:
        file.seek(table["model.head.weight"].parts[0].offset)
        file.write(b"?")
    with pytest.raises(Refused, match=r"rank_0.bin is damaged between bytes 0 and"):
        load_model(step)


def test_generate_from_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", run, "--prompt", "def f(", "--tokens", 12, "--temperature", 1, "--seed"]
    first = said(capsys, *words, 1)
    assert first.startswith("def f(") and first == said(capsys, *words, 1) != said(capsys, *words, 2)
    assert said(capsys, "generate", "--model", run / "checkpoints" / "step_00000005", "--prompt", "", "--tokens", 3)


def test_generate_uses_the_tokenizer_beside_the_model(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    said(capsys, "import", "--from", hf, "--to", tmp_path / "ours")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "ours" / "tokenizer.json"))
    text = said(capsys, "generate", "--model", tmp_path / "ours", "--prompt", "w5 w7", "--tokens", 4)
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
        pytest.param(_array(ids=np.array([[{}]])), "is no whole .npy file; --tokens names one", id="pickled"),
        pytest.param(_text, "is no whole .npy file; --tokens names one", id="a text"),
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
    (step / "manifest.json").unlink()
    refused(["generate", "--model", step, "--prompt", "a"], "is not whole (manifest.json is missing)", capsys)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("heads: 4", "heads: 2"))
    refused(["generate", "--model", copy, "--prompt", "a"], "not whole", capsys)


def test_a_full_disk_leaves_nothing_behind(hf: Path, tmp_path: Path) -> None:
    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [sys.executable, "-m", "models", "import", "--from", str(hf), "--to", str(tmp_path / "ours")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, preexec_fn=no_large_files)
    assert done.returncode == 1 and done.stdout == ""
    assert "cannot be written" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
