"""Checkpoints of several ranks: who writes, verifies and reads which part, however tensors are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from models.checkpoint import Chunk, Manifest
from train.checkpoint import Checkpoints, store
from train.checkpoint.plan import agree

Ranks = Callable[..., list[Any]]

CUTS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Replicate(), Shard(1)]),
    ((4,), [Replicate()]),
]


def _cut_and_cut_otherwise(folder: Path) -> None:
    whole = torch.arange(35.0).view(5, 7)
    cuts = [distribute_tensor(whole.clone(), init_device_mesh("cpu", mesh), where) for mesh, where in CUTS]
    checkpoints = Checkpoints(folder, keep=len(cuts))
    for step, saved in enumerate(cuts):
        checkpoints.save(step, {"model": {"a": saved}}, wait=True)
    for step, _ in enumerate(cuts):
        for tensor in cuts:
            tensor.to_local().zero_()
            checkpoints.load({"model": {"a": tensor}}, folder / f"step_{step:08d}")
            assert torch.equal(tensor.full_tensor(), whole)


def test_a_tensor_cut_in_any_way_is_loaded_cut_in_any_other(ranks: Ranks, tmp_path: Path) -> None:
    """Of odd sizes: ranks hold more or less of it, or nothing."""
    ranks(4, _cut_and_cut_otherwise, tmp_path / "checkpoints")


def _save_replicas(folder: Path) -> dict[str, int]:
    mesh = init_device_mesh("cpu", (2, 2))
    model = {str(i): distribute_tensor(torch.ones(1000 + i, 2), mesh, [Replicate(), Shard(0)]) for i in range(9)}
    Checkpoints(folder).save(1, {"model": model}, wait=True)
    dist.barrier()
    return {path.name: path.stat().st_size for path in folder.glob("*/rank_*.bin")}


def test_replicas_share_the_writing(ranks: Ranks, tmp_path: Path) -> None:
    """Nine tensors of which each of two ranks holds half, twice: five or four for each rank."""
    sizes = ranks(4, _save_replicas, tmp_path / "checkpoints")[0]
    assert sorted(sizes) == [f"rank_{rank}.bin" for rank in range(4)]
    assert sum(sizes.values()) == pytest.approx(9 * 1004 * 2 * 4, rel=0.02)  # and the gaps that align
    assert max(sizes.values()) < 1.3 * min(sizes.values())


def _plans(folder: Path) -> list[int]:
    """How many plans there were after each of some saves."""
    made = 0

    def counted(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        return agree(*arguments)

    pytest.MonkeyPatch().setattr(store, "agree", counted)
    checkpoints, counts = Checkpoints(folder), []
    mesh = init_device_mesh("cpu", (2,))
    for step, size in enumerate((10, 10, 10, 12, 12)):
        other = {"b": torch.ones(size if dist.get_rank() else 10)}  # which is rank 0's, and yet all plan anew
        checkpoints.save(step, {"a": distribute_tensor(torch.full((8,), float(step)), mesh, [Shard(0)]), **other})
        counts.append(made)
    checkpoints.close()
    return counts


def test_who_writes_what_is_agreed_on_once(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, _plans, tmp_path / "checkpoints") == [[1, 1, 1, 2, 2]] * 2


def _looked_at(folder: Path) -> tuple[int, list[str]]:
    """How many sizes this rank asks for while it loads, and the chunks that it verifies."""
    large = distribute_tensor(torch.ones(12_000_000), init_device_mesh("cpu", (2,)), [Shard(0)])
    checkpoints, sizes, seen = Checkpoints(folder), 0, list[str]()
    checkpoints.save(1, {"model": {"a": large}}, wait=True)

    def refuse_other_sizes(manifest: Manifest, folder: Path) -> None:
        nonlocal sizes
        sizes += len(manifest.files)

    def refuse_damage(folder: Path, chunks: list[Chunk]) -> None:
        seen.extend(f"{chunk.file} {chunk.begin}" for chunk in chunks)

    patch = pytest.MonkeyPatch()
    patch.setattr(Manifest, "refuse_other_sizes", refuse_other_sizes)
    patch.setattr(store, "refuse_damage", refuse_damage)
    checkpoints.load({"model": {"a": large}})
    return sizes, seen


def test_one_rank_asks_for_sizes_and_each_chunk_is_read_once(ranks: Ranks, tmp_path: Path) -> None:
    (sizes, one), (none, other) = ranks(2, _looked_at, tmp_path / "checkpoints")
    assert (sizes, none) == (4, 0)
    large = [f"rank_{rank}.bin {begin}" for rank in (0, 1) for begin in (0, 1 << 24)]
    assert sorted([*one, *other]) == sorted([*large, "plain.pt 0", "tensors.json 0"])
    assert len(one) == len(other)
