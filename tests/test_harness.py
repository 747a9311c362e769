"""The harness itself: silence is loud here, so it must be shown to make noise."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import skips

Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.empty(3), id="empty"),
        pytest.param(lambda: torch.empty_like(torch.ones(3)), id="empty_like"),
        pytest.param(lambda: torch.ones(1).new_empty(3), id="new_empty"),
        pytest.param(lambda: torch.empty_strided((3,), (1,)), id="empty_strided"),
        pytest.param(lambda: torch.ones(1).resize_(3)[1:], id="resize"),
        pytest.param(lambda: torch.nn.Parameter(torch.empty(3, dtype=torch.bfloat16)), id="bfloat16 parameter"),
        pytest.param(lambda: torch.nn.Linear(3, 3, device="meta").to_empty(device="cpu").weight, id="to_empty"),
    ],
)
def test_uninitialised_memory_is_nan(make: Callable[[], torch.Tensor]) -> None:
    assert make().isnan().all()


def test_a_test_starts_from_one_thread_and_one_seed() -> None:
    assert torch.get_num_threads() == 1
    assert torch.initial_seed() == 0


def _sum_of_ranks(tensor: torch.Tensor) -> tuple[int, torch.Tensor, bool]:
    total = tensor * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), total, bool(torch.empty(2).isnan().all())


def test_ranks_meet_and_answer_in_order(ranks: Ranks) -> None:
    for world_size, factor in ((1, 1.0), (3, 6.0)):
        answers = ranks(world_size, _sum_of_ranks, torch.tensor([1.0, 2.0]))
        assert [rank for rank, _, _ in answers] == list(range(world_size))
        for _, total, loud in answers:
            assert total.tolist() == [factor, 2 * factor]
            assert loud


def _one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def _one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def _all_hang() -> None:
    time.sleep(1000)


@pytest.mark.parametrize(
    ("function", "timeout", "words"),
    [
        pytest.param(_one_raises, 300.0, ["rank 1:", "ValueError: the reason"], id="raises"),
        pytest.param(_one_dies, 300.0, ["rank 1 ended with exit code 9"], id="dies"),
        pytest.param(_all_hang, 10.0, ["rank 0 was still running", "rank 1 was", "in _all_hang"], id="hangs"),
    ],
)
def test_a_failed_rank_is_named_and_nothing_waits(
    ranks: Ranks, function: Callable[[], None], timeout: float, words: list[str]
) -> None:
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception) as failure:
        ranks(2, function, timeout=timeout)
    assert time.monotonic() - start < 150
    for word in words:
        assert word in str(failure.value)


LISTED = "# a comment\n\ncpu: needs CUDA\ncuda: needs two GPUs\ncpu: needs: a colon\n"


@pytest.mark.parametrize(
    ("machine", "seen", "whole", "wrong"),
    [
        pytest.param("cpu", ["needs CUDA", "needs: a colon"], True, 0, id="as listed"),
        pytest.param("cuda", ["needs two GPUs"], True, 0, id="as listed, on the other machine"),
        pytest.param("cpu", ["needs CUDA", "needs: a colon", "too slow"], False, 1, id="not listed"),
        pytest.param("cuda", ["needs two GPUs", "needs CUDA"], True, 1, id="listed for the other machine"),
        pytest.param("cpu", ["needs CUDA"], True, 1, id="no longer happens"),
        pytest.param("cpu", ["needs CUDA"], False, 0, id="a part of the suite"),
    ],
)
def test_skips_are_compared_with_the_list(machine: str, seen: list[str], whole: bool, wrong: int) -> None:
    sentences = skips.differences(Counter(seen), skips.expected(LISTED, {machine}), {machine}, whole=whole)
    assert len(sentences) == wrong


@pytest.mark.parametrize("line", ["tpu: why", "cpu", "cpu:  ", "because"])
def test_an_unreadable_line_of_the_list_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        skips.expected(f"cpu: fine\n{line}\n", {"cpu"})
