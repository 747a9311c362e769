"""The fast kernels of a GPU, by a rule that is stated here and never decided by a failure at run time.

Rows of one document, read to their start: PyTorch's scaled_dot_product_attention, cuDNN's kernel first (FlashAttention,
arXiv 2307.08691, otherwise). Packed documents and windows: FlexAttention (arXiv 2412.05496) with the block masks that
`prepare` made once for all layers. Everything else (cached or compressed entries; rows of one document that are read to
their start beside a sink): the blockwise core. `kernel` is this rule; train.kernels tells each run what comes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from models.contract import Sequence, Slot, Visibility
from models.cores import blockwise

KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""In this order. PyTorch's own materialised form is not among them: it would be quadratic in silence."""

KINDS = 128
"""Combinations of shapes and windows in one process, before compiling yet another is an error."""


class Kernel(StrEnum):
    """What computes one softmax, in words for people."""

    SDPA = "scaled_dot_product_attention"
    FLEX = "FlexAttention"
    OTHER_ENTRIES = "the blockwise core (not the tokens in hand)"
    MERGED = "the blockwise core (its softmax is merged, with a sink or with other entries)"
    UNPREPARED = "the blockwise core (no block mask was made)"


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled even where the model around it is not: as written, FlexAttention and its masks hold all scores.

    On first use, because torch.compile takes seconds to load. A model of many kinds of layers compiles it more often
    than PyTorch's limit of eight, beyond which it would run as written, in silence.
    """
    compiled = torch.compile(function)

    def call(*arguments: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=KINDS, fail_on_recompile_limit_hit=True):
            return compiled(*arguments, **options)

    return call


def core(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, *, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See models.cores."""
    chosen, mask = kernel(q, k, v, visibility, lse=lse), visibility.prepared
    grouped = k.shape[2] != q.shape[2]
    heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if chosen is Kernel.SDPA:
        with sdpa_kernel(KERNELS, set_priority=True):
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2), None
    if chosen is not Kernel.FLEX:
        return blockwise.core(q, k, v, visibility, scale, lse=lse)
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
    if not lse:
        return flex(*heads_first, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2), None
    wanted = AuxRequest(lse=True)  # `return_lse` warns once, and what was compiled before that is compiled again
    out, aux = flex(*heads_first, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=wanted)
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


def kernel(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, lse: bool = False) -> Kernel:
    """What computes this softmax; lse: whether its log-sum-exp is asked for, to be merged."""
    if not visibility.aligned:
        return Kernel.OTHER_ENTRIES
    if visibility.prepared is not None:
        return Kernel.FLEX
    if not visibility.single_document or is_bounded(visibility.reach, q.shape[1]):
        return Kernel.UNPREPARED
    return Kernel.MERGED if lse else Kernel.SDPA


def prepare(sequence: Sequence, slots: list[Slot]) -> None:
    """Make the block masks of these tokens, one for each reach that `reaches` names."""
    for reach in reaches(sequence, slots):
        sequence.prepared[reach] = _block_mask(sequence, reach)


def reaches(sequence: Sequence, slots: list[Slot]) -> set[int | None]:
    """Those that the layers declare where a causal kernel alone would read too much."""
    length = sequence.position.shape[1]
    return {reach for reach in of_tokens(slots) if sequence.documents != 1 or is_bounded(reach, length)}


def of_tokens(slots: list[Slot]) -> set[int | None]:
    """The reaches of entries that are the tokens in hand."""
    return {slot.reach for slot in slots if slot.kind == "entry" and slot.stride == 1 and slot.limit is None}


def is_bounded(reach: int | None, queries: int) -> bool:
    """Whether a window leaves anything out."""
    return reach is not None and reach < queries


def _block_mask(sequence: Sequence, reach: int | None) -> object:
    document = sequence.document

    def visible(row: Tensor, head: Tensor, query: Tensor, entry: Tensor) -> Tensor:
        seen = (query >= entry) & (document[row, query] == document[row, entry])
        return seen if reach is None else seen & (query - entry < reach)

    num_rows, length = document.shape
    return _compiled(create_block_mask)(visible, num_rows, None, length, length, device=str(document.device))
