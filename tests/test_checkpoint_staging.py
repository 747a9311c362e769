"""The copy that a save takes beside training: whole when it is to be, whoever makes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from train.checkpoint.staging import PIECE, SMALL, Staging


@pytest.fixture
def staging() -> Iterator[Staging]:
    staging = Staging()
    yield staging
    staging.close()


TENSORS = [
    pytest.param(torch.randn(7), id="small"),
    pytest.param(torch.randn(()), id="scalar"),
    pytest.param(torch.empty(0, 3), id="empty"),
    pytest.param(torch.randint(0, 255, (SMALL + 1,), dtype=torch.uint8), id="one piece"),
    pytest.param(torch.randint(0, 255, (2 * PIECE + 5,), dtype=torch.uint8), id="three pieces"),
    pytest.param(torch.randn(300, 200).t(), id="not contiguous"),
]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_copy_is_whole_once_it_arrives(staging: Staging, tensor: Tensor) -> None:
    copy = staging.begin({"a": tensor})["a"]
    staging.arrive()
    assert torch.equal(copy, tensor)


@pytest.mark.parametrize("tensor", TENSORS)
def test_who_may_not_wait_makes_the_copy(staging: Staging, tensor: Tensor) -> None:
    """A machine may give a thread of low priority nothing for seconds: here, all the while."""
    starved = threading.Event()
    staging._thread.submit(starved.wait)
    copy, expected = staging.begin({"a": tensor})["a"], tensor.clone()
    try:
        staging.release()
        tensor.zero_()
        released = copy.clone()
    finally:
        starved.set()
    staging.arrive()
    assert torch.equal(released, expected) and torch.equal(copy, expected)
