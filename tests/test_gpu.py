"""What only a GPU can show: each fast path against its plain twin in bf16, decode, and a run that resumes bitwise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf import schema
from conf.compose import compose
from launch.speed import random_batch
from models.config import ModelConfig
from models.contract import Slot, Visibility, at_tokens
from models.cores import flash, fused, merge, plain
from models.cores.merge import Core
from models.decode import score
from models.model import Losses, Model
from models.moe import experts
from models.sequence import Whole
from tests.skips import lacks_flash
from train.config import RunSection, read
from train.engines.torch import Engine, Step
from train.meter import Clock
from train.ranks import Ranks, join, leave

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

FLASH = pytest.mark.skipif(lacks_flash(), reason="needs FlashAttention (pip install flash-attn-4 or flash-attn)")
CORES = [pytest.param(fused, id="fused"), pytest.param(flash, id="flash", marks=FLASH)]

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable]
BF16 = 1e-2  # norm-wise; products of bf16 operands err by 2⁻⁹ each


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def rows(documents: list[list[int]]) -> Whole:
    """Documents of these lengths in each row."""
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    document = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in documents])
    return Whole(position.cuda(), document.cuda(), documents=max(map(len, documents)))


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    dims: tuple[int, int]
    documents: list[list[int]]
    reach: int | None = None


CASES = [
    pytest.param(Case(16, 4, (128, 128), [[1024], [1024]]), id="gqa one document"),
    pytest.param(Case(16, 4, (128, 128), [[700, 324], [1, 1023]]), id="gqa packed"),
    pytest.param(Case(16, 4, (128, 128), [[1000], [1000]], 130), id="gqa window odd length"),
    pytest.param(Case(16, 16, (192, 128), [[1024], [1024]]), id="mla one document"),
    pytest.param(Case(16, 16, (192, 128), [[77, 947], [512, 512]]), id="mla packed"),
    pytest.param(Case(16, 1, (64, 64), [[300, 724], [1024 - 9, 9]], 257), id="mqa packed window"),
]


@pytest.mark.parametrize("sink", [False, True], ids=["no sink", "sink"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("case", CASES)
def test_a_fast_core_equals_the_plain_one(case: Case, core: Any, sink: bool) -> None:
    """With a sink the log-sum-exp is read too."""
    sequence = rows(case.documents)
    core.prepare(sequence, [Slot("kv", (), reach=case.reach)])
    visibility = Visibility.of(at_tokens(sequence, {}), sequence, case.reach)
    num_rows, length = sequence.position.shape
    shapes = [(case.heads, case.dims[0]), (case.kv_heads, case.dims[0]), (case.kv_heads, case.dims[1])]
    inputs = [torch.randn(num_rows, length, *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    logits = [torch.randn(case.heads, device="cuda")] if sink else []
    probe = torch.randn(num_rows, length, case.heads, case.dims[1], device="cuda")
    if core is flash and flash.library() is flash.FOUR:
        q, k, v = inputs
        assert flash.kernel(q, k, v, visibility, lse=sink) == flash.FOUR.name
    results = []
    both: list[tuple[Core, torch.dtype]] = [(core.core, torch.bfloat16), (plain.core, torch.float64)]
    for computes, dtype in both:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs] + [x.clone().requires_grad_() for x in logits]
        q, k, v, *sinks = leaves
        out = merge.read(computes, q, [(k, v, visibility)], case.dims[0] ** -0.5, *sinks)
        (out.double() * probe).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    errors = [error(got, wanted) for got, wanted in zip(*results, strict=True)]
    assert max(errors) < BF16, errors


def test_many_kinds_of_layers_stay_compiled() -> None:
    sequence = rows([[70, 58]])
    fused.prepare(sequence, [Slot("kv", (), reach=reach) for reach in range(20, 30)])
    for kind, reach in enumerate(range(20, 30), 1):
        q = torch.randn(1, 128, kind, 16 * (1 + kind % 3), device="cuda", dtype=torch.bfloat16)
        visibility = Visibility.of(at_tokens(sequence, {}), sequence, reach)
        got, wanted = (core(q, q, q, visibility, 0.25)[0] for core in (fused.core, plain.core))
        assert error(got, wanted) < BF16


@pytest.mark.parametrize(
    "loads", [[256] * 4, [0, 1000, 23, 1], [0, 0, 1024, 0]], ids=["even", "uneven", "one takes all"]
)
def test_the_grouped_gemm_equals_the_loop(loads: list[int]) -> None:
    load = torch.tensor(loads, device="cuda")
    shapes = [(sum(loads), 256), (4, 2 * 384, 256), (4, 256, 384)]
    inputs = [torch.randn(shape, device="cuda") / shape[-1] ** 0.5 for shape in shapes]
    results = []
    for function, dtype in ((experts.grouped, torch.bfloat16), (experts.loop, torch.float64)):
        x, gate_up, down = (value.to(torch.bfloat16).detach().to(dtype).requires_grad_() for value in inputs)
        out = function(x, load, gate_up, down)
        out.square().sum().backward()
        results.append([out, x.grad, gate_up.grad, down.grad])
    errors = [error(got, wanted) for got, wanted in zip(*results, strict=True)]
    assert max(errors) < BF16, errors


MOE = {"scheme": "moe", "experts": 8, "top_k": 2, "hidden": 128, "shared_hidden": 128, "balance_loss": 0.01}
ATTENTION = {
    "gqa": {"scheme": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 64, "qk_norm": True},
    "gqa window": {"scheme": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 64, "window": 50},
    "mla": {"scheme": "mla", "heads": 4, "latent": 64, "nope_dim": 64, "rope_dim": 32, "value_dim": 64},
    "hca": {"scheme": "hca", "heads": 4, "head_dim": 64, "rope_dim": 32, "query_latent": 64, "window": 32, "rate": 16,
            "output": {"groups": 2, "rank": 64}},
}  # fmt: skip


def model(name: str, compute: torch.dtype) -> Model:
    layers = [{"repeat": 2, "of": [{"attention": ATTENTION[name], "feedforward": MOE}]}]
    values = {"vocab": 512, "width": 256, "layers": layers}
    built = Model(schema.build(ModelConfig, values, "model"), compute)
    built.initialise(0)
    return built.cuda()


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", ATTENTION)
def test_a_compiled_bf16_model_is_near_the_plain_fp32_one(name: str, core: Any) -> None:
    sequence = rows([[300, 212], [512]])
    fast, slow = model(name, torch.bfloat16), model(name, torch.float32)
    for attention in slow.attentions():
        attention.core = plain.core
    for attention in fast.attentions():
        attention.core = core.core
    core.prepare(sequence, [slot for attention in fast.attentions() for slot in attention.slots()])
    for block in fast.blocks:
        block.compile(fullgraph=True)
    ids = torch.randint(512, (2, 512), device="cuda")
    gradients = []
    for built in (fast, slow):
        losses = built(ids, sequence, ids.roll(-1, 1))
        assert isinstance(losses, Losses)
        (losses.cross_entropy / ids.numel() + losses.extra).backward()
        gradients.append(
            torch.cat(
                [p.grad.flatten() for n, p in built.named_parameters() if p.grad is not None and "router" not in n]
            )
        )
    assert error(*gradients) < 0.1  # routing near a tie flips under bf16: a few tokens' experts differ


@pytest.mark.parametrize("name", ATTENTION)
def test_decode_through_the_cache_equals_the_whole(name: str) -> None:
    built = model(name, torch.float32)
    ids = torch.randint(512, (2, 100), device="cuda")
    whole = built(ids, Whole.rows(2, 100, "cuda"))
    assert error(score(built, ids, 7)[0], whole) < 1e-4


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """The only rank, on the GPU."""
    yield join(RunSection("unused", device="cuda"))
    leave()


TINY = sorted(file.stem for file in (ROOT / "conf/model").glob("*_tiny.yaml"))
COMPILED = [name for name in TINY if "v32" in name or "flash" in name]


@pytest.mark.parametrize(
    ("name", "core", "compiled"),
    [
        *((name, "fused", "false") for name in TINY),
        *((name, "fused", "true") for name in COMPILED),
        *(pytest.param(name, "flash", "true", marks=FLASH) for name in ("gemma4_e2b_tiny", "mixtral_8x7b_tiny")),
    ],
)
def test_steps_of_a_published_model_in_miniature_never_wait_for_the_gpu(
    name: str, core: str, compiled: str, alone: Ranks
) -> None:
    def steps(number: int, *settings: str) -> list[Step]:
        """All after the first with every wait for the device an error."""
        sizes = ["train.sequence_length=256", "train.batch_tokens=1024", "train.micro_batch=4"]
        config = read(compose([f"model={name}", "run.dir=unused", *sizes, *settings]))
        engine, clock = Engine(config, alone), Clock(alone.device)
        engine.initialise()
        torch.manual_seed(1)
        vocab, depth = config.model.vocab, engine.model.mtp_depth
        batches = [random_batch(4, 256, vocab, documents=3, depth=depth) for _ in range(number)]
        done = [engine.step(batches[0], 1e-3, clock)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            return done + [engine.step(batch, 1e-3, clock) for batch in batches[1:]]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    fast = steps(3, "train.compute=bf16", f"train.core={core}", f"train.compile={compiled}")
    (plain_step,) = steps(1, "train.core=plain")
    assert all(bool(step.loss.isfinite()) and 0 < float(step.grad_norm) < float("inf") for step in fast)
    assert float(fast[0].loss) == pytest.approx(float(plain_step.loss), rel=BF16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text, corpus = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("corpus")
    for file in sorted(ROOT.glob("models/**/*.py")):
        (text / f"{file.stem}.txt").write_text(file.read_text())
    subprocess.run([*PYTHON, "-m", "data", "prepare", f"source={text}", f"out={corpus}"], check=True, cwd=ROOT)
    return corpus


@pytest.mark.parametrize(("core", "attention"), [("fused", "mla"), pytest.param("flash", "gqa", marks=FLASH)])
def test_a_run_on_the_gpu_resumes_bitwise(core: str, attention: str, corpus: Path, tmp_path: Path) -> None:
    losses = []
    for name, stop_at in (("whole", None), ("stopped", 12)):
        settings = [
            "experiment=smoke", "train.steps=40", f"attention={attention}",
            f"run.dir={tmp_path / name}", f"data.train.path={corpus}", "run.device=cuda",
            "run.deterministic=true", "train.compute=bf16", f"train.core={core}", "train.compile=true",
        ]  # fmt: skip
        if stop_at is not None:
            first = subprocess.Popen([*PYTHON, "-m", "train", *settings], cwd=ROOT)
            while first.poll() is None and len(steps(tmp_path / name)) < stop_at:
                pass
            (tmp_path / name / "stop").touch()
            assert first.wait() == 75
        subprocess.run([*PYTHON, "-m", "train", *settings], check=True, cwd=ROOT)
        losses.append([(record["step"], record["loss"], record["grad_norm"]) for record in steps(tmp_path / name)])
    assert len(losses[0]) == 40
    assert losses[0] == losses[1]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two CUDA GPUs")
def test_two_gpus_train_as_one(corpus: Path, tmp_path: Path) -> None:
    """And a run that two of them began goes on with one."""
    two = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for name, starts in (("one", {8: PYTHON}), ("two", {8: two}), ("two then one", {4: two, 8: PYTHON})):
        settings = [
            "experiment=smoke", "schedule.decay_fraction=0", "train.compute=fp32", "run.device=cuda",
            f"run.dir={tmp_path / name}", f"data.train.path={corpus}",
        ]  # fmt: skip
        for until, start in starts.items():
            subprocess.run([*start, "-m", "train", *settings, f"train.steps={until}"], check=True, cwd=ROOT)
        found.append([[record[name] for name in ("step", "loss", "grad_norm")] for record in steps(tmp_path / name)])
    assert len(found[0]) == 8
    assert found[1] == [pytest.approx(numbers, rel=1e-4) for numbers in found[0]]
    assert found[2] == [pytest.approx(numbers, rel=1e-4) for numbers in found[0]]


def steps(directory: Path) -> list[dict[str, float]]:
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "loss" in record]  # a validation's sources have a loss each, inside
