"""Checkpoints: what was saved is what is loaded, on any layout, whatever happened to the process or the disk."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from conf.schema import Refused
from models.parameter import Parametrization
from parallel.apply import placement
from tests.toy import Toy, everything, toy, train
from train.checkpoint import Checkpoints, SaveFailed
from train.optimizer.adamw import Config as AdamWConfig
from train.optimizer.muon import Config as MuonConfig

Ranks = Callable[..., list[Any]]
Config = AdamWConfig | MuonConfig


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(value: float, size: int = 1000) -> dict[str, Any]:
    tensors = {"a": torch.full((size,), float(value)), "b": torch.full((3, 5), value, dtype=torch.bfloat16)}
    return {"model": tensors, "progress": {"step": int(value), "seen": {}}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is saved is what is loaded.


class Run:
    """A sharded toy, its optimizer and its counters."""

    def __init__(self, config: Config) -> None:
        size = dist.get_world_size()
        mesh, cut = init_device_mesh("cpu", (size,)), partial(placement, ranks=size)
        self.model = cast(Toy, fully_shard(toy(torch.float32), mesh=mesh, shard_placement_fn=cut))
        self.optimizer: Optimizer = config.build(self.model, Parametrization())

    def state(self, plain: Any) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "rng": torch.get_rng_state(), "progress": plain}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


PLAIN = {"step": 3, "by_source": {"b": 1, 7: [1.5, math.inf]}, "python": random.Random(1).getstate(), "raw": b"\0\xff"}


def _save(folder: Path, config: Config, steps: int) -> dict[str, Tensor]:
    run = Run(config)
    checkpoints = Checkpoints(folder, facts={"ranks": dist.get_world_size()})
    train(run.model, run.optimizer, range(steps))
    expected = everything(run.model, run.optimizer)
    checkpoints.save(steps, run.state(PLAIN))
    checkpoints.release()
    train(run.model, run.optimizer, range(steps, steps + 1))  # the save must not see this
    checkpoints.close()
    return expected


def _load_and_save(folder: Path, config: Config) -> tuple[dict[str, Tensor], Any, Any, int]:
    torch.manual_seed(99)
    run = Run(config)
    train(run.model, run.optimizer, range(7, 8))  # nothing of this may stay
    checkpoints = Checkpoints(folder)
    loaded = checkpoints.load(run.state({"step": 0, "other": {}}))
    run.load(loaded.state)
    found = everything(run.model, run.optimizer)
    checkpoints.save(loaded.step + 1, run.state(loaded.state["progress"]), wait=True)
    return found, loaded.state["progress"], loaded.facts, int(loaded.state["rng"].sum())


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        pytest.param(AdamWConfig(learning_rate=0.01), 0, id="before the first step"),
        pytest.param(AdamWConfig(learning_rate=0.01), 3, id="adamw"),
        pytest.param(MuonConfig(learning_rate=0.01, precision="float32"), 3, id="muon"),
    ],
)
def test_state_survives_bit_for_bit_on_any_rank_count(ranks: Ranks, tmp_path: Path, config: Config, steps: int) -> None:
    folder = tmp_path / "checkpoints"
    expected = ranks(2, _save, folder, config, steps)[0]
    for world_size in (1, 4, 2):
        for found, progress, facts, _ in ranks(world_size, _load_and_save, folder, config):
            assert found.keys() == expected.keys()
            assert [name for name in found if not torch.equal(found[name], expected[name])] == []
            assert progress == PLAIN
            assert facts in ({"ranks": 2}, {})


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.tensor(3.5), id="a scalar"),
        pytest.param(torch.zeros(0, 4), id="no elements"),
        pytest.param(torch.arange(12).view(3, 4).T, id="not contiguous"),
        pytest.param(torch.tensor([True, False]), id="bool"),
        pytest.param(torch.tensor([1 + 2j]), id="complex"),
        pytest.param(torch.ones(3, dtype=torch.float8_e4m3fn), id="float8"),
        pytest.param(torch.tensor([math.nan, -0.0, math.inf]), id="nan and signed zero"),
    ],
)
def test_every_kind_of_tensor_survives(tmp_path: Path, tensor: Tensor) -> None:
    with_byte_before = {"pad": torch.ones(1, dtype=torch.uint8), "list": [tensor, (tensor, "text")]}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, with_byte_before, wait=True)
    empty = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    found = checkpoints.load({"pad": torch.zeros(1, dtype=torch.uint8), "list": [empty, (empty.clone(), "")]}).state
    for copy in (found["list"][0], found["list"][1][0]):
        assert bytes(copy.contiguous().view(-1).view(torch.uint8).tolist()) == bytes(
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )
    assert found["list"][1][1] == "text"


@pytest.mark.usefixtures("alone")
def test_weights_alone_are_read_from_another_run(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "run" / "checkpoints").save(5, state(5.0), wait=True)
    mine = Checkpoints(tmp_path / "mine" / "checkpoints")
    for where in ("run", "run/checkpoints", "run/checkpoints/step_00000005"):
        weights = {"model": state(0.0)["model"]}
        assert mine.load(weights, tmp_path / where).step == 5
        assert (weights["model"]["a"] == 5.0).all()
    assert mine.latest() is None


# One save after another.


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        pytest.param(2, None, [40, 50], id="newest two"),
        pytest.param(1, None, [50], id="newest"),
        pytest.param(1, 20, [20, 40, 50], id="newest and every twentieth"),
        pytest.param(9, None, [10, 20, 30, 40, 50], id="more than there are"),
    ],
)
def test_pruning(tmp_path: Path, keep: int, keep_every: int | None, left: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, keep, keep_every)
    for step in range(10, 60, 10):
        checkpoints.save(step, state(step))
    checkpoints.close()
    assert names(tmp_path) == [f"step_{step:08d}" for step in left]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("step", [pytest.param(2, id="pruned"), pytest.param(1, id="replaced")])
def test_of_a_link_to_a_checkpoint_the_link_goes(tmp_path: Path, step: int) -> None:
    """Where it leads, on a larger disk say, somebody keeps it; and the next start goes well."""
    first = Checkpoints(tmp_path / "checkpoints", keep=1)
    first.save(1, state(1.0), wait=True)
    elsewhere = (tmp_path / "checkpoints/step_00000001").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints/step_00000001").symlink_to(elsewhere)
    first.save(step, state(2.0), wait=True)
    first.close()
    assert names(tmp_path / "checkpoints") == [f"step_{step:08d}"]
    assert names(elsewhere)
    Checkpoints(tmp_path / "checkpoints").close()


@pytest.mark.usefixtures("alone")
def test_a_save_waits_for_the_one_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step, size=4_000_000))
    checkpoints.wait()
    assert "step 2 waits for that of step 1" in caplog.text
    for step in (1, 2):
        template = state(0.0, size=4_000_000)
        checkpoints.load(template, tmp_path / f"step_{step:08d}")
        assert (template["model"]["a"] == step).all()


@pytest.mark.usefixtures("alone")
def test_where_no_priority_may_be_lowered_it_is_told_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "setpriority", forbidden)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    checkpoints.release()
    checkpoints.close()
    assert names(tmp_path) == ["step_00000001"]
    assert "the priority of saving cannot be lowered (Operation not permitted)" in caplog.text


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("grace", "told"),
    [
        pytest.param(0.0, 1, id="longer than the grace"),
        pytest.param(100.0, 0, id="within the grace"),
        pytest.param(None, 0, id="no limit"),
    ],
)
def test_a_save_too_long_for_the_launcher_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, grace: float | None, told: int
) -> None:
    checkpoints = Checkpoints(tmp_path, grace=grace)
    for step in (1, 2):
        checkpoints.save(step, state(1.0), wait=True)
    assert caplog.text.count("a save asked for that way would be lost") == told


@pytest.mark.usefixtures("alone")
def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0), wait=True)
    checkpoints.save(1, state(2.0), wait=True)
    template = state(0.0)
    checkpoints.load(template)
    assert (template["model"]["a"] == 2.0).all()
    assert names(tmp_path) == ["step_00000001"]


# Bad checkpoints.


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = [
    pytest.param(lambda folder: flip(folder / "rank_0.bin", 2000), "rank_0.bin is damaged", id="flipped byte"),
    pytest.param(lambda folder: flip(folder / "plain.pt", -1), "plain.pt is damaged", id="flipped byte, plain values"),
    pytest.param(lambda folder: flip(folder / "tensors.json", 40), "tensors.json is damaged", id="flipped byte, table"),
    pytest.param(lambda folder: flip(folder / "manifest.json", 60), "manifest.json is damaged", id="flipped manifest"),
    pytest.param(lambda folder: os.truncate(folder / "rank_0.bin", 3000), "3000 bytes instead of", id="truncated"),
    pytest.param(lambda folder: os.truncate(folder / "manifest.json", 30), "manifest.json is damaged", id="cut"),
    pytest.param(lambda folder: os.truncate(folder / "manifest.json", 0), "manifest.json is damaged", id="no manifest"),
    pytest.param(lambda folder: (folder / "rank_0.bin").unlink(), "rank_0.bin cannot be read", id="missing file"),
    pytest.param(lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing", id="missing manifest"),
]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("damage", "named"), DAMAGE)
def test_a_bad_newest_is_set_aside(
    tmp_path: Path, damage: Callable[[Path], None], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step), wait=True)
    damage(tmp_path / "step_00000002")
    template = state(0.0)

    with pytest.raises(Refused, match=named):  # named explicitly: refused, and nothing happens
        checkpoints.load(template, tmp_path / "step_00000002")
    assert names(tmp_path) == ["step_00000001", "step_00000002"]

    loaded = checkpoints.load(template)
    assert (loaded.step, loaded.state["progress"]["step"]) == (1, 1)
    assert (template["model"]["a"] == 1.0).all()
    assert names(tmp_path) == ["step_00000001", "step_00000002.bad"]
    assert named in caplog.text
    assert checkpoints.latest() == tmp_path / "step_00000001"

    checkpoints.save(2, state(2.0), wait=True)
    damage(tmp_path / "step_00000002")
    checkpoints.load(template)
    assert names(tmp_path) == ["step_00000001", "step_00000002.bad", "step_00000002.bad1"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("damage", "named"), DAMAGE)
def test_none_left_is_refused_and_nothing_changes(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0), wait=True)
    damage(tmp_path / "step_00000001")
    template = state(0.0)
    for _ in range(2):
        with pytest.raises(Refused, match=named):
            checkpoints.load(template)
    assert names(tmp_path) == ["step_00000001"]
    assert not template["model"]["a"].any()


def _damaged_at(folder: Path, places: list[int]) -> list[str]:
    """Save twice, damage the newer one byte at a time; what each refusal to load it says, and what is loaded then."""
    large = distribute_tensor(torch.ones(12_000_000), init_device_mesh("cpu", (2,)), [Shard(0)])
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, {"model": {"a": large}}, wait=True)
    said = []
    for place in places:
        if dist.get_rank() == 0:
            flip(folder / "step_00000002" / "rank_1.bin", place)
        dist.barrier()
        with pytest.raises(Refused) as refused:
            checkpoints.load({"model": {"a": large}}, folder / "step_00000002")
        said.append(str(refused.value))
        if dist.get_rank() == 0 and place != places[-1]:
            flip(folder / "step_00000002" / "rank_1.bin", place)
        dist.barrier()
    return [*said, checkpoints.load({"model": {"a": large}}).path.name]


def test_ranks_agree_which_is_bad_wherever_the_byte_is(ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(2, _damaged_at, tmp_path, [0, (1 << 24) - 1, 1 << 24, -1])
    assert answers[0] == answers[1]
    *said, used = answers[0]
    begins = [0, 0, 1 << 24, 1 << 24]
    for sentence, begin in zip(said, begins, strict=True):
        assert f"rank_1.bin is damaged between bytes {begin} and" in sentence
    assert used == "step_00000001"


@pytest.mark.usefixtures("alone")
def test_no_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    with pytest.raises(Refused, match="no checkpoint at"):
        checkpoints.load(state(0.0))
    with pytest.raises(Refused, match="nowhere"):
        checkpoints.load(state(0.0), tmp_path / "nowhere")


# Checkpoints of something else.


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"a": torch.zeros(999)}, r"model.a is \[1000\].*\[999\]", id="another shape"),
        pytest.param({"a": torch.zeros(1000).double()}, r"float32.*\[1000\] of torch.float64", id="another dtype"),
        pytest.param({"c": torch.zeros(7)}, r"no model.c, which is \[7\]", id="missing there"),
        pytest.param({"b": None}, r"model.b \[3, 5\], which is unknown here", id="unknown here"),
        pytest.param({"a": 3}, r"no model.a", id="a number here, a tensor there"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0), wait=True)
    template = state(0.0)
    template["model"] |= change
    template["model"] = {name: value for name, value in template["model"].items() if value is not None}
    for optional in (None, "model.mtp"):
        with pytest.raises(Refused, match=named):
            checkpoints.load(template, optional=optional)
    assert not any(value.any() for value in template["model"].values() if isinstance(value, Tensor))
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("bad", "error", "named"),
    [
        pytest.param({"x": {"y": [1, {2}]}}, TypeError, "a set at x.y.1", id="a set"),
        pytest.param({"x": {"y": object()}}, TypeError, "an? object at x.y", id="an object"),
        pytest.param({"x": {"y": numpy.float64(1)}}, TypeError, "a float64 at x.y", id="a number of numpy"),
        pytest.param({"x.y": 1, "x": {"y": torch.zeros(1)}}, ValueError, "two values at x.y", id="one name twice"),
    ],
)
def test_what_cannot_be_saved_is_told_at_once(
    tmp_path: Path, bad: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        Checkpoints(tmp_path).save(1, bad)


# Disasters.


def _killed_while_saving(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state(1.0), wait=True)
    if dist.get_rank() == 0:
        pytest.MonkeyPatch().setattr(os, "fsync", lambda descriptor: time.sleep(1000))  # a save that does not end
    checkpoints.save(2, state(2.0))
    while not list(folder.glob(".step_00000002.partial/rank_0.bin")):
        time.sleep(0.001)
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(SaveFailed, match="step 2"):
        checkpoints.wait()


def _after_the_kill(folder: Path) -> tuple[list[str], int]:
    before = names(folder)
    dist.barrier()
    checkpoints = Checkpoints(folder)
    template = state(0.0)
    step = checkpoints.load(template).step
    assert (template["model"]["a"] == 1.0).all()
    return before, step


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_kill_while_saving_leaves_the_previous_one(ranks: Ranks, tmp_path: Path, world_size: int) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(pytest.fail.Exception, match="rank 0 ended with exit code -9"):
        ranks(world_size, _killed_while_saving, folder)
    for before, step in ranks(2, _after_the_kill, folder):
        assert before == [".step_00000002.partial", "step_00000001"]
        assert step == 1
    assert names(folder) == ["step_00000001"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("left", "kept"),
    [
        pytest.param([".step_00000001.partial"], [], id="killed while writing"),
        pytest.param([".step_00000001.pruned"], [], id="killed while pruning"),
        pytest.param([".step_00000001.replaced"], ["step_00000001"], id="killed between the two renames"),
        pytest.param([".step_00000001.replaced", "step_00000001"], ["step_00000001"], id="killed after them"),
        pytest.param(["step_00000001.bad", "notes"], ["notes", "step_00000001.bad"], id="others' things"),
    ],
)
def test_leftovers_are_cleaned_at_the_start(tmp_path: Path, left: list[str], kept: list[str]) -> None:
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    Checkpoints(tmp_path)
    assert names(tmp_path) == kept


def _full_disk(folder: Path, full_rank: int) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state(1.0), wait=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    large = {"model": {"a": distribute_tensor(torch.zeros(2_000_000), mesh, [Shard(0)])}}
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    checkpoints.save(2, large)
    with pytest.raises(SaveFailed, match=rf"step 2 was not .* \(rank {full_rank}: OSError: .*File too large"):
        checkpoints.save(3, state(3.0))
    dist.barrier()
    assert names(folder) == ["step_00000001"]
    checkpoints.save(4, state(4.0), wait=True)  # and the next one is none the worse
    template = state(0.0)
    assert checkpoints.load(template).step == 4


@pytest.mark.parametrize(("world_size", "full_rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk_is_told_and_the_last_one_kept(
    ranks: Ranks, tmp_path: Path, world_size: int, full_rank: int
) -> None:
    ranks(world_size, _full_disk, tmp_path / "checkpoints", full_rank)


@pytest.mark.usefixtures("alone")
def test_a_folder_that_has_gone_is_told(tmp_path: Path) -> None:
    """And not made again: without the rest of its run nobody could take it for one."""
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(SaveFailed, match="step 1 was not written"):
        checkpoints.save(1, state(1.0), wait=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()  # a file of that name
    with pytest.raises(SaveFailed, match="step 1 was not written"):
        checkpoints.save(1, state(1.0), wait=True)


@pytest.mark.usefixtures("alone")
def test_keep_below_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
