"""What is measured of a step is the same on every layout of ranks, and measuring changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.compose import compose
from tests.test_engine import BASE, ROWS, loader, this_rank
from tests.toy import everything
from train.config import read
from train.engines.torch import Engine, _by_position, position_edges
from train.meter import Clock

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")


def _watched(overrides: list[str]) -> tuple[dict[str, Any], dict[str, int], float, dict[str, float]]:
    """The line of the second step, each parameter's size, the gradient's norm, and the updates as measured outside."""
    engine = Engine(read(compose([*BASE, "train.compute=fp64", *overrides])), this_rank())
    engine.initialise()
    engine.step(loader().batch(0, ROWS), 1e-2, Clock(CPU))
    before = everything(engine.model, engine.optimizer)
    watch = engine.watch()
    result = engine.step(loader().batch(ROWS, ROWS), 1e-2, Clock(CPU), watch)
    after = everything(engine.model, engine.optimizer)
    sizes = {name: parameter.numel() for name, parameter in engine.model.named_parameters()}
    updates = {name: float((after[name] - before[name]).square().mean().sqrt()) for name in sizes}
    return watch.line(2, watch.table, result.loads), sizes, float(result.grad_norm), updates


def flat(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for name, item in pairs for key, number in flat(item, f"{path}/{name}").items()}
    return {path: float(value)}


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], dict[str, int], float, dict[str, float]]:
    from tests.ranks import runner

    found: tuple[dict[str, Any], dict[str, int], float, dict[str, float]]
    found = runner(tmp_path_factory.mktemp("expected"))(1, _watched, [])[0]
    return found


def test_numbers_are_what_they_say(expected: Any) -> None:
    line, sizes, norm, updates = expected
    assert line["parameters"].keys() == sizes.keys()
    squares = [line["parameters"][name]["grad_rms"] ** 2 * size for name, size in sizes.items()]
    assert math.sqrt(sum(squares)) == pytest.approx(norm, rel=1e-12)  # of the gradient before it is clipped
    assert {name: values["update_rms"] for name, values in line["parameters"].items()} == pytest.approx(updates)
    assert all(0 < values["rms"] <= values["max"] for values in line["parameters"].values())
    assert list(line["activations"]) == list(line["experts"]) == ["0", "1", "mtp 1"]
    assert all(0 < values["rms"] < values["max"] for values in line["activations"].values())
    of_each = [ROWS * 12 * 2] * 3  # two layers, and multi-token prediction's one
    assert [sum(loads) for loads in line["experts"].values()] == of_each


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        pytest.param(2, ["train.micro_batch=2"], id="2 ranks, accumulation"),
        pytest.param(4, ["parallel.replicate=2"], id="2 replicas of 2 ranks"),
        pytest.param(1, ["train.recompute=full"], id="recompute"),
    ],
)
def test_layouts_agree(ranks: RunRanks, expected: Any, world_size: int, overrides: list[str]) -> None:
    reference = flat(expected[0])
    for line, *_ in ranks(world_size, _watched, overrides):
        assert flat(line) == pytest.approx(reference, rel=1e-9)


def _told_before_the_update(overrides: list[str]) -> tuple[list[str], list[str]]:
    """What differs from the state before the step: when `before_update` is called, and in the end."""
    engine = Engine(read(compose([*BASE, *overrides])), this_rank())
    engine.initialise()
    engine.step(loader().batch(0, ROWS), 1e-2, Clock(CPU))

    def state() -> dict[str, Tensor]:
        buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
        return {**everything(engine.model, engine.optimizer), **buffers}

    start = state()
    found: list[dict[str, Tensor]] = []
    engine.before_update = lambda: found.append(state())
    engine.step(loader().batch(ROWS, ROWS), 1e-2, Clock(CPU))
    assert len(found) == 1

    def changed(now: dict[str, Tensor]) -> list[str]:
        return [name for name in start if not torch.equal(now[name], start[name])]

    return changed(found[0]), changed(state())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_copy_of_the_state_may_last_until_the_update(ranks: RunRanks, optimizer: str) -> None:
    for early, late in ranks(2, _told_before_the_update, [f"optimizer={optimizer}", "train.micro_batch=2"]):
        assert early == []
        assert len(late) > 20
        assert any("router.bias" in name for name in late)


@pytest.mark.parametrize(
    ("length", "edges"),
    [
        pytest.param(1, [0, 1], id="1"),
        pytest.param(2, [0, 1, 2], id="2"),
        pytest.param(8, [0, 1, 2, 4, 8], id="a power"),
        pytest.param(12, [0, 1, 2, 4, 8, 12], id="no power"),
    ],
)
def test_loss_by_position_adds_up(length: int, edges: list[int]) -> None:
    assert position_edges(length) == edges
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(3, length, dtype=torch.float64, generator=generator)
    position = torch.randint(0, length, (3, length), generator=generator).int()
    scored = torch.rand(3, length, generator=generator) < 0.7
    sums, counts = _by_position(losses, scored, position, edges)
    for i, (low, high) in enumerate(pairwise(edges)):
        there = scored & (position >= low) & (position < high)
        assert counts[i] == there.sum()
        assert float(sums[i]) == pytest.approx(float(losses[there].sum()), rel=1e-12)
    assert counts.sum() == scored.sum()
