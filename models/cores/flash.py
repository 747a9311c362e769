"""FlashAttention's own libraries: the tokens in hand, packed or not, within a window or to their start.

FlashAttention 4 (`flash_attn.cute`, flash-attn-4) on Hopper, FlashAttention 2 (arXiv 2307.08691, flash-attn) where that
is not installed, and on other GPUs from Ampere on. All rows of a batch lie one after the other in one, and `borders`
say where its documents begin. What the library lacks goes to the blockwise core, by a rule that `kernel` states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.schema import Refused
from models.contract import Sequence, Slot, Visibility
from models.cores import blockwise
from models.cores.fused import is_bounded, of_tokens

MERGED = "gradient of a softmax that is merged, with a sink or with other entries"


@dataclass(frozen=True)
class Library:
    """One that may be installed.

    distribution: its name for pip. load: import it. lacks: (key size, value size, whether query heads share KV heads,
    whether its softmax is merged) to what it has not, in words, or None where it serves. attend: (q [N, H, d],
    k [N, K, d], v [N, K, e], borders, longest, scale, window) to the output [N, H, e] and the log-sum-exp [H, N], which
    is None if it would have no gradient; a query reads `window` entries before its own, all of its document if None.
    """

    name: str
    distribution: str
    load: Callable[[], Any]
    lacks: Callable[[int, int, bool, bool], str | None]
    attend: Callable[..., tuple[Tensor, Tensor | None]]


class Prepared(NamedTuple):
    """Where the documents in hand begin, see `borders`, and what reads them."""

    borders: Tensor
    library: Library


def core(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, *, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See models.cores. 16-bit numbers alone."""
    prepared: Prepared | None = visibility.prepared
    if prepared is None or _lacking(prepared.library, q, k, v, lse) is not None:
        return blockwise.core(q, k, v, visibility, scale, lse=lse)
    rows = q.shape[:2]
    flat = (x.flatten(0, 1) for x in (q, k, v))
    reads = window(visibility.reach, rows[1])
    out, sums = prepared.library.attend(*flat, prepared.borders, rows[1], scale, reads)
    if not lse:
        return out.unflatten(0, rows), None
    assert sums is not None
    return out.unflatten(0, rows), sums.unflatten(1, rows).permute(1, 2, 0)


def kernel(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, lse: bool = False) -> str:
    """What computes this softmax, in words; lse: whether its log-sum-exp is asked for, to be merged."""
    if not visibility.aligned:
        return "the blockwise core (not the tokens in hand)"
    if visibility.prepared is None:
        return "the blockwise core (how many documents there are is not known)"
    serving = library()
    lacking = _lacking(serving, q, k, v, lse)
    return serving.name if lacking is None else f"the blockwise core ({serving.name} has no {lacking})"


def _lacking(serving: Library, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> str | None:
    return serving.lacks(q.shape[3], v.shape[3], q.shape[2] != k.shape[2], lse)


def prepare(sequence: Sequence, slots: list[Slot]) -> None:
    """Find the borders of these tokens' documents, which are the same for every reach."""
    if wanted := reaches(sequence, slots):
        assert sequence.documents is not None
        made = Prepared(borders(sequence.document, sequence.documents), library())
        sequence.prepared.update(dict.fromkeys(wanted, made))


def reaches(sequence: Sequence, slots: list[Slot]) -> set[int | None]:
    """All that the layers declare of tokens, where it is known how many documents there are at most."""
    return set() if sequence.documents is None else of_tokens(slots)


def borders(document: Tensor, documents: int) -> Tensor:
    """Where documents begin in the rows [B, S] laid one after the other, and their end: [B * documents + 1] int32.

    documents: no row has more; where one has fewer, the rest are empty. So nobody has to wait for the device's count.
    """
    num_rows, length = document.shape
    begins = torch.nn.functional.pad(document[:, 1:] != document[:, :-1], (1, 0))
    number = begins.cumsum(1)
    wanted = torch.arange(documents, device=document.device).expand(num_rows, documents).contiguous()
    first = torch.arange(0, num_rows * length, length, device=document.device)
    found = torch.searchsorted(number, wanted) + first[:, None]
    return torch.nn.functional.pad(found.flatten(), (0, 1), value=num_rows * length).to(torch.int32)


def window(reach: int | None, length: int) -> int | None:
    """How many entries before its own a query reads in rows of this length; None: all of its document."""
    return reach - 1 if reach is not None and is_bounded(reach, length) else None


def check(device: torch.device) -> None:
    """Raises Refused where no library can compute on this device."""
    if device.type != "cuda":
        raise Refused(
            f"train.core is flash, but this run computes on {device.type}, for which there is no FlashAttention; "
            "take train.core=blockwise, or a machine with a GPU."
        )
    library()


@functools.cache
def library() -> Library:
    """What computes on this machine's GPUs. Raises Refused where nothing that could is installed."""
    major, minor = torch.cuda.get_device_capability()
    candidates = [TWO] if major >= 8 else []
    if major == 9:
        candidates.insert(0, FOUR)
    if not candidates:
        raise Refused(
            f"train.core is flash, but FlashAttention has no kernels for GPUs of compute capability {major}.{minor}; "
            "take train.core=fused."
        )
    missing = []
    for candidate in candidates:
        try:
            candidate.load()
            return candidate
        except ImportError as error:
            missing.append(f"{candidate.distribution} ({error})")
    raise Refused(
        f"train.core is flash, but this Python cannot import {' or '.join(missing)}; "
        f"install {' or '.join(candidate.distribution for candidate in candidates)} with pip, or take train.core=fused."
    )


def _load_four() -> Any:
    from flash_attn.cute import interface

    return interface


def _four_lacks(key: int, value: int, shared: bool, merged: bool) -> str | None:
    """What compiles for compute capability 9.0, forward and backward: less than the library's own checks let pass."""
    sizes = f"heads of {key} and {value} numbers"
    if key % 8 or not 8 <= value <= key <= 256 or value not in (key, 64, 128):
        return sizes
    return f"{sizes} that share keys and values" if shared and key != value else None


def _settings(borders: Tensor, longest: int, scale: float, window: int | None) -> dict[str, Any]:
    """What forward and backward are told alike."""
    lengths = {f"cu_seqlens_{of}": borders for of in "qk"} | {f"max_seqlen_{of}": longest for of in "qk"}
    return {**lengths, "softmax_scale": scale, "causal": True, "window_size_left": window}


@torch.library.custom_op("keyhole::flash_four", mutates_args=())
def _four(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """An operator of its own, because the compiler cannot look into the library's. Its results are contiguous."""
    out, lse, *_ = _load_four()._flash_attn_fwd(q, k, v, **_settings(borders, longest, scale, window), return_lse=True)
    return out.contiguous(), lse.contiguous()


@_four.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    shape = *q.shape[:2], v.shape[2]
    return q.new_empty(shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("keyhole::flash_four_backward", mutates_args=())
def _four_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    borders: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad, *_ = _load_four()._flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        lse,
        **_settings(borders, longest, scale, window),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dlse=grad_lse,
    )
    return q_grad.contiguous(), k_grad.contiguous(), v_grad.contiguous()


@_four_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, borders)
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad = torch.zeros_like(saved[3]) if grad is None else grad
    return *_four_backward(grad, grad_lse, *saved, *ctx.settings), None, None, None, None


_four.register_autograd(_pull, setup_context=_keep)


def _load_two() -> Any:
    import flash_attn

    return flash_attn.flash_attn_varlen_func


def _two_lacks(key: int, value: int, shared: bool, merged: bool) -> str | None:
    if key != value or key > 256:
        return f"heads of {key} and {value} numbers"
    return MERGED if merged else None


def _two(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, None]:
    """The compiler traces it: its kernels are operators already."""
    out = _load_two()(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out, None


FOUR = Library("FlashAttention 4", "flash-attn-4", _load_four, _four_lacks, _four)
TWO = Library("FlashAttention 2", "flash-attn", _load_two, _two_lacks, _two)
