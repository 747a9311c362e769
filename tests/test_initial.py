"""First values: of every part those of the whole, drawn where they are kept alone, and in little memory."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conf.compose import compose
from models import initial
from models.box import Box, whole
from models.initial import fill
from models.model import Model
from models.parameter import Parametrization, Spec, named_specs
from parallel.apply import shard
from parallel.box import box_of
from tests import runs
from tests.runs import MTP, TASK, TINY
from tests.test_engine import this_rank
from tests.watch import Watch
from train.config import read
from train.run import run

RunRanks = Callable[..., list[Any]]


def spec(*shape: int, **more: Any) -> Spec:
    return Spec(shape, ("any",) * len(shape), "projection", **more)


def filled(of: Spec, part: Box | None = None) -> Tensor:
    part = whole(torch.empty(of.shape)) if part is None else part
    fill(part, of, Parametrization(), 7, "name")
    return part.local


def _identity(tensor: Tensor) -> Tensor:
    return tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(spec(23, 7), id="a matrix"),
        pytest.param(spec(5, 6, 7), id="a stack"),
        pytest.param(spec(2, 3, 4, 5), id="a stack of stacks"),
        pytest.param(spec(3, 300), id="rows longer than a block"),
        pytest.param(spec(300), id="a vector"),
        pytest.param(spec(5, 6, 7, start=_identity), id="what has a start of its own"),
    ],
)
def test_a_part_is_filled_as_in_the_whole(of: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "BLOCK", 64)
    expected, draw = filled(of), random.Random(0)
    assert torch.equal(filled(of), expected)
    for _ in range(50):
        edges = [sorted(draw.choices(range(size + 1), k=2)) for size in of.shape]
        box = tuple(slice(*edge) for edge in edges)
        values = torch.empty([stop - begin for begin, stop in edges])
        assert torch.equal(filled(of, Box(tuple(begin for begin, _ in edges), values)), expected[box])


def test_blocks_are_drawn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "BLOCK", 64)
    values = filled(spec(64, 32, 16))
    assert len(values.view(-1, 64).unique(dim=0)) == 512
    assert values.std().item() == pytest.approx(0.02, rel=0.02)
    other = torch.empty(values.shape)
    fill(whole(other), spec(64, 32, 16), Parametrization(), 7, "another name")
    assert not (other == values).any()


def test_memory_is_that_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the parameter; and an index of its rows."""
    monkeypatch.setattr(initial, "BLOCK", 1024)
    of = spec(8, 128, 64)
    part = Box((0, 32, 0), torch.empty(8, 16, 64))
    with Watch() as watch:
        filled(of, part)
    assert watch.peak <= 3 * 4 * 1024 + 4 * 8 * 8 * 128


class Counting(Parametrization):
    """Counts what it draws."""

    drawn = 0

    def initialise(self, tensor: Tensor, spec: Spec, generator: torch.Generator) -> None:
        Counting.drawn += tensor.numel()
        super().initialise(tensor, spec, generator)


def _drawn_by_a_rank(overrides: list[str]) -> tuple[dict[str, bool], int, int]:
    """By parameter, whether this rank's part is that of the whole model; elements that it drew, and that it holds."""
    initial.BLOCK = 16
    config = read(compose([*TINY, *overrides]))
    expected, found = Model(config.model), Model(config.model)
    expected.initialise(3)
    shard(found, config.parallel.mesh(dist.get_world_size(), "cpu"), True)
    found.parametrization = Counting(**asdict(expected.parametrization))
    found.initialise(3, box_of)
    boxes = {name: box_of(parameter) for name, parameter in found.named_parameters()}
    parameters = expected.named_parameters()
    same = {name: torch.equal(boxes[name].local, parameter[boxes[name].slices()]) for name, parameter in parameters}
    return same, Counting.drawn, sum(box.local.numel() for box in boxes.values())


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        pytest.param(2, [], id="2 ranks"),
        pytest.param(3, ["moe.experts=5"], id="3 ranks, uneven"),
        pytest.param(4, ["parallel.replicate=2", "moe.experts=3"], id="2 replicas of 2 ranks"),
        pytest.param(8, [], id="8 ranks, more than experts"),
    ],
)
def test_a_rank_draws_what_it_holds(ranks: RunRanks, world_size: int, overrides: list[str]) -> None:
    for same, drawn, kept in ranks(world_size, _drawn_by_a_rank, overrides):
        assert all(same.values()), [name for name in same if not same[name]]
        assert kept <= drawn < 2 * kept


class Fan(Parametrization):
    """Another one, of fan-in."""

    def initialise(self, tensor: Tensor, spec: Spec, generator: torch.Generator) -> None:
        tensor.fill_(spec.shape[-1])


def test_a_model_has_any_parametrization() -> None:
    model = Model(read(compose(list(TINY))).model)
    model.parametrization = Fan()
    model.initialise(0)
    for name, parameter, spec in named_specs(model):
        assert spec.shape == parameter.shape
        assert spec.start is not None or (parameter == parameter.shape[-1]).all(), name


def _drawn_by_runs(folder: Path) -> tuple[list[int], int, int]:
    """Elements drawn by a run, by its resumption and by one that starts from its weights and adds multi-token
    prediction; how many the model has, and the addition."""
    os.chdir(folder)
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.model.Parametrization", Counting)
        for more in (
            ["run.dir=run", "train.steps=2"],
            ["run.dir=run", "train.steps=4"],
            ["run.dir=other", "train.steps=1", "train.init=run", MTP],
        ):
            Counting.drawn = 0
            config = read(compose([*TASK, *more]))
            assert run(config, this_rank()) == 0
            counts.append(Counting.drawn)
    names = {name: parameter.numel() for name, parameter in Model(config.model).named_parameters()}
    added = sum(size for name, size in names.items() if name.startswith("mtp."))
    return counts, sum(names.values()) - added, added


def test_nothing_is_drawn_that_a_checkpoint_brings(ranks: RunRanks, tmp_path: Path) -> None:
    runs.write_text(tmp_path)
    counts, size, added = ranks(1, _drawn_by_runs, tmp_path)[0]
    assert added > 0
    assert counts == [size, 0, added]
