"""What will compute a run's layers, found before its first step: each reads a row that takes no memory, and its core
notes what it is asked for."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from models.block import AttentionSublayer
from models.contract import Attention, Slot, Visibility
from models.mode import Mode
from models.model import Model
from models.moe.experts import Experts
from models.sequence import Whole


def told(model: Model, core: str, dtype: torch.dtype, phases: Iterable[tuple[Mode, int]]) -> list[str]:
    """One line for each way in which layers are computed, for people.

    model: on the meta device; its schemes' cores and modes change. core: as in train.core. dtype: of activations.
    phases: how attention is trained, on rows of how many tokens.
    """
    reasons = Counter(module.why_loop(dtype) for module in model.modules() if isinstance(module, Experts))
    lines = [
        f"experts ×{number}: " + (f"one after the other, as {why}" if why else "grouped GEMM")
        for why, number in reasons.items()
    ]
    kernels = importlib.import_module(f"models.cores.{core}")
    if not hasattr(kernels, "kernel"):  # one way for all
        return lines
    for mode, length in phases:
        for attention in model.trained_attentions():
            attention.mode = mode
        packed, whole = (_asked(model, kernels, length, documents) for documents in (2, 1))
        ways = Counter((type(layer).__module__.rpartition(".")[2], packed[layer], whole[layer]) for layer in packed)
        for (scheme, if_packed, if_whole), number in ways.items():
            way = if_packed if if_packed == if_whole else f"packed, {if_packed}; of one document, {if_whole}"
            lines.append(f"{scheme} ×{number}, {mode}, rows of {length} tokens: {way}")
    return lines


@torch.no_grad()
def _asked(model: Model, kernels: Any, length: int, documents: int) -> dict[Attention, str]:
    """By layer, in words, what computes its softmaxes over a row of so many documents. kernels: a core of several."""
    slots = [slot for attention in model.trained_attentions() for slot in attention.slots()]
    length = min(length, _telling(slots))
    row = torch.zeros(1, length, dtype=torch.int64, device="meta")
    sequence = Whole(row, row, documents=documents)
    sequence.prepared = dict.fromkeys(kernels.reaches(sequence, slots), "stands for one")
    found: dict[Attention, str] = {}
    carried: dict[str, Any] = {}
    for sublayer in (part for block in model.trained_blocks() for part in block.sublayers()):
        if isinstance(sublayer, AttentionSublayer):
            core = sublayer.attention.core = _Noting(kernels.kernel)
            x = torch.empty(1, length, model.config.width, device="meta")
            carried |= sublayer.apply_to(x, carried, sequence).provided
            if any(_chooses(slot, length) for slot in sublayer.attention.slots()):
                core.noted["what it chooses"] = "the gathered core"
            found[sublayer.attention] = ", ".join(f"{what} by {kernel}" for what, kernel in core.noted.items())
    return found


def _telling(slots: list[Slot]) -> int:
    """Tokens of a row that is read as every longer one is: it exceeds all windows, and holds more than is chosen.

    A longer row would take minutes: what chooses goes through it piece by piece, even where there is no memory.
    """
    exceeding = [slot.lead + slot.stride * slot.chosen for slot in slots if slot.chosen is not None]
    return max([1, *exceeding, *(slot.reach + 1 for slot in slots if slot.reach is not None)])


def _chooses(slot: Slot, length: int) -> bool:
    return slot.chosen is not None and slot.entries(length) > slot.chosen


class _Noting:
    """A core that computes nothing. noted: by what is read, what would compute it."""

    def __init__(self, kernel: Callable[..., str]) -> None:
        self.kernel = kernel
        self.noted: dict[str, str] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, *, lse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See models.cores."""
        tokens = "all tokens" if visibility.reach is None else f"the last {visibility.reach} tokens"
        what = tokens if visibility.aligned else "other entries"
        self.noted[what] = str(self.kernel(q, k, v, visibility, lse=lse))
        return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
