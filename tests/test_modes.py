"""Dense, warm-up and sparse as phases of one run: who is trained in each, on any ranks, resumed at their borders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conf.compose import compose
from models.mode import Mode
from tests import runs
from tests.runs import TINY
from tests.test_engine import ROWS, assert_equal, loader, this_rank
from tests.toy import everything, whole
from train.config import read
from train.engines.torch import Engine
from train.meter import Clock

DSA = (
    "attention=dsa", "attention.heads=2", "attention.latent=6", "attention.query_latent=5", "attention.nope_dim=4",
    "attention.rope_dim=4", "attention.value_dim=3", "attention.indexer={heads: 3, head_dim: 4, top_k: 3}",
)  # fmt: skip

# one module, applied twice, with an indexer of its own
MTP = "+model.mtp={scheme: concat, depth: 2, shared: true, layer: {attention: '${attention}', feedforward: '${moe}'}}"

CSA = (
    "attention=csa", "attention.heads=2", "attention.head_dim=6", "attention.rope_dim=4", "attention.query_latent=5",
    "attention.window=2", "attention.rate=2", "attention.output={groups: 2, rank: 3}",
    "attention.indexer={heads: 3, head_dim: 4, top_k: 2, kl_loss: 1}",
)  # fmt: skip


def small(attention: tuple[str, ...]) -> list[str]:
    return [*(word for word in TINY if not word.startswith("attention.")), *attention, MTP]


SMALL = small(DSA)

BORDERS = {"dense": 0, "warmup": 4, "sparse": 8}

PHASES = [
    "train.attention=dense", "train.steps=12", "checkpoint.keep=9", "moe.bias_rate=0.01",
    "train.phases=[{start: 4, attention: warmup, learning_rate: 1e-2}, {start: 8, attention: sparse, mtp_weight: 0.1}]",
]  # fmt: skip


class Finished(NamedTuple):
    """A run through all three phases, with a checkpoint at each border."""

    run: Path
    arguments: list[str]
    ranks: int


@pytest.fixture(
    scope="module", params=[(DSA, 1), (DSA, 2), (CSA, 2)], ids=["dsa, 1 rank", "dsa, 2 ranks", "csa, 2 ranks"]
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    attention, ranks = request.param
    folder = tmp_path_factory.mktemp("phased")
    runs.write_text(folder)
    arguments = [*small(attention), *PHASES]
    runs.train(folder, [*arguments, "run.dir=whole"], ranks)
    return Finished(folder / "whole", arguments, ranks)


def is_index(name: str) -> bool:
    return ".index_" in name


def changed(run: Path, before: int, after: int) -> set[str]:
    """Weights, buffers and optimizer state that differ between two checkpoints."""
    one, other = runs.state(run, before), runs.state(run, after)
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_each_phase_trains_its_own(finished: Finished) -> None:
    run = finished.run
    weights = {name for name in runs.state(run, 4) if not name.startswith("progress")}
    of_index = {name for name in weights if is_index(name)}
    of_trunk = {name for name in weights if not is_index(name)}
    warm, sparse = (changed(run, *span) & weights for span in ((4, 8), (8, 12)))
    untouched = {name for name in of_index if name.startswith("optimizer.")}
    first = runs.state(run, 4)
    assert untouched and not any(first[name].any() for name in untouched)
    assert warm == of_index
    assert sparse >= of_index
    assert len(sparse & of_trunk) > 0.9 * len(of_trunk)


def test_the_lessons_are_told(finished: Finished) -> None:
    by_step = {record["step"]: record for record in runs.records(finished.run)}
    for step, record in by_step.items():
        assert ("kl" in record) == ("recall" in record) == (step > BORDERS["warmup"])
        if "kl" in record:
            assert len(record["kl"]) == len(record["recall"]) == 2 + 1
            assert all(0 < share <= 1 for share in record["recall"])
            assert 0 < sum(record["kl"]) <= record["extra"] * (1 + 1e-5)
        if "loss" in record:
            assert len(record["mtp_loss"]) == 2
            assert all(0 < loss < 10 for loss in record["mtp_loss"])


@pytest.mark.parametrize("step", [4, 8])
def test_resumed_at_a_border(finished: Finished, step: int) -> None:
    """From the checkpoint of the border alone, whose next step belongs to another phase."""
    expected, arguments, ranks = finished
    run = expected.with_name(f"from_{step}")
    shutil.copytree(expected, run)
    for later in sorted((run / "checkpoints").iterdir()):
        if later.name > f"step_{step:08d}":
            shutil.rmtree(later)
    runs.train(run.parent, [*arguments, f"run.dir={run.name}"], ranks)
    assert runs.course(run) == runs.course(expected)
    assert runs.validations(run) == runs.validations(expected)
    runs.assert_same_state(runs.state(run, 12), runs.state(expected, 12))


def _steps(modes: list[Mode]) -> dict[str, Tensor]:
    overrides = [*SMALL, "train.sequence_length=12", f"train.batch_tokens={12 * ROWS}", "train.micro_batch=2"]
    config = read(compose([*overrides, "train.compute=fp64", "train.clip=0.01", "moe.balance_loss=0.1"]))
    engine, data = Engine(config, this_rank()), loader(depth=2)
    engine.initialise()
    results: dict[str, Tensor] = {}
    for step, mode in enumerate(modes):
        engine.set_mode(mode)
        result = engine.step(data.batch(step * ROWS, ROWS), 1e-2, Clock(torch.device("cpu")))
        results |= {f"step {step} loss": result.loss, f"step {step} norm": result.grad_norm}
        results |= {f"step {step} extra": result.extra, f"step {step} loads": torch.stack(list(result.loads.values()))}
        if result.lessons is not None:
            results[f"step {step} lessons"] = result.lessons
        results |= {f"step {step} {name}": whole(p).clone() for name, p in engine.model.named_parameters()}
    return results | everything(engine.model, engine.optimizer)


def test_two_ranks_do_what_one_does(ranks: Callable[..., list[Any]]) -> None:
    """Into each mode and out of it: FSDP settles at first use what wants a gradient."""
    modes = ["warmup", "sparse", "dense", "warmup", "sparse"]
    assert_equal(ranks(2, _steps, modes)[0], ranks(1, _steps, modes)[0])


def _norms(mode: Mode) -> tuple[float, dict[str, float]]:
    """The norm that a step tells, and those of both groups after clipping."""
    config = read(compose([*SMALL, "train.compute=fp64", "train.clip=0.01", "attention.indexer.kl_loss=1e4"]))
    engine, groups = Engine(config, this_rank()), {}
    engine.initialise()
    engine.set_mode(mode)

    def note(*_: object) -> None:
        for name, part in (("index", engine.selector), ("trunk", engine.trunk)):
            taken = [p.grad.flatten() for p in part if p.grad is not None]
            groups[name] = torch.cat(taken).norm().item() if taken else 0.0

    engine.optimizer.register_step_pre_hook(note)
    step = engine.step(loader(8, depth=2).batch(0, ROWS), 1e-2, Clock(torch.device("cpu")))
    return step.grad_norm.item(), groups


@pytest.mark.parametrize(
    ("mode", "groups"),
    [
        pytest.param("dense", {"index": 0.0, "trunk": 0.01}, id="dense"),
        pytest.param("warmup", {"index": 0.01, "trunk": 0.0}, id="warm-up"),
        pytest.param("sparse", {"index": 0.01, "trunk": 0.01}, id="sparse"),
    ],
)
def test_what_chooses_is_clipped_apart(mode: Mode, groups: dict[str, float], ranks: Callable[..., list[Any]]) -> None:
    norm, found = ranks(1, _norms, mode)[0]
    assert norm > 0.02
    assert found == pytest.approx(groups, rel=1e-3)


def test_a_warmup_of_nothing_is_refused(tmp_path: Path) -> None:
    runs.write_text(tmp_path)
    job = runs.start(tmp_path, [*TINY, "train.phases=[{start: 3, attention: warmup}]", "run.dir=refused"])
    assert job.end() == 2
    assert "warmup from step 3" in job.printed()
    assert not (tmp_path / "refused").exists()
