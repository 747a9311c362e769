"""The state that a test's process starts from."""

from __future__ import annotations

import random

import numpy
import torch


def settle() -> None:
    """One thread, one seed, float32, and uninitialised memory that reads as NaN (integers: as their maximum)."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    # PyTorch fills `torch.empty` and its kin in its deterministic mode alone.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    random.seed(0)
    numpy.random.seed(0)
    # torch.manual_seed would keep the stack of every call for a GPU that is never used
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
