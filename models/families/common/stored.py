"""Weights that a release stores in fewer bits, read as plain tensors; how each one is stored is seen by its own dtype.

FP8: `x.weight` in E4M3 beside `x.weight_scale_inv` or `x.scale`, one factor for each block of 128 × 128 (DeepSeek-V3,
arXiv 2412.19437, section 3.3; DeepSeek-V4, arXiv 2606.19348, whose factors are powers of two, in E8M0). FP4: `x.weight`
in int8, two numbers of E2M1 in a byte, beside `x.scale`, one factor for each 32 numbers of a row (DeepSeek-V4's routed
experts; the base models' are in FP8). The report does not say which of the two comes first: DeepSeek's code takes the
low half of the byte. INT4: `x.weight_packed`, eight numbers from -8 to 7 in an int32, beside `x.weight_scale`, one
factor for each 32 numbers of a row, and `x.weight_shape` (Kimi K2, stored by compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from conf.schema import Refused

SCALE_INV, PACKED, SCALE, SHAPE = "_scale_inv", "_packed", "_scale", "_shape"
WEIGHT, BESIDE = ".weight", ".scale"

BITS = 4

GROUP_FP4 = (1, 32)
"""Numbers of E2M1 that share a factor (OCP Microscaling Formats, version 1.0); config.json does not say it."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the three lower bits; the fourth is the sign."""

LOWERED = (torch.float8_e4m3fn, torch.int8)
"""FP8 and FP4."""

UNREAD = (torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8)
"""What no weight that is meant as it stands is stored in."""


def blocks(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Of a config.json: the block that shares a factor in FP8, (1, numbers of a row) in INT4, None where it says of no
    weight that it is stored in fewer bits. A multimodal one may say it in the language model's part (Kimi K2.6). Raises
    Refused for another way of storing them."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    found = [part["quantization_config"] for part in parts if part.get("quantization_config") is not None]
    stored = found[0] if found else None
    if stored is None:
        return None
    match stored:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if min(rows, columns) > 0:
            return rows, columns
        case {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": dict(groups)}:
            (weights,) = [group.get("weights") for group in groups.values()] if len(groups) == 1 else [None]
            match weights:
                case {"num_bits": 4, "type": "int", "symmetric": True, "group_size": int(size)} if size > 0:
                    return 1, size
    raise Refused(
        "config.json's quantization_config says that the weights are stored in a way that is not read here; "
        "FP8 in blocks and symmetric INT4 in groups are, others must be converted first."
    )


class Plain(Mapping[str, Tensor]):
    """`stored` with every weight as it is meant, made in fp32 when it is read; their factors do not show.

    block: see `blocks`. Reading raises Refused where a factor is missing, or does not belong to its weight.
    """

    def __init__(self, stored: Mapping[str, Tensor], block: tuple[int, int] | None) -> None:
        self._stored, self._block = stored, block
        self._packed = {name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)}
        self._factors = {name.removesuffix(SCALE_INV): name for name in stored if name.endswith(SCALE_INV)}
        for name in stored:
            weight = name.removesuffix(BESIDE) + WEIGHT
            if name.endswith(BESIDE) and weight in stored:
                self._factors.setdefault(weight, name)
        hidden = set(self._factors.values())
        hidden |= {name + suffix for name in self._packed for suffix in (PACKED, SCALE, SHAPE)}
        self._names = [name for name in stored if name not in hidden] + sorted(self._packed)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._packed:
            rows, columns = self._part(name, SHAPE).tolist()
            numbers = unpacked(self._part(name, PACKED))[:rows, :columns]
            return times_blocks(numbers.float(), self._part(name, SCALE), self._block_of(name), name)
        tensor = self._stored[name]
        if tensor.dtype in UNREAD or (tensor.dtype in LOWERED and name not in self._factors):
            raise Refused(
                f"{name} is stored in {_text(tensor.dtype)} without the factors that it is to be multiplied with; "
                "copy the directory again, or convert it first."
            )
        if name not in self._factors:
            return tensor
        factors = self._stored[self._factors[name]]
        if tensor.dtype == torch.int8:
            return times_blocks(e2m1(tensor), factors, GROUP_FP4, name)
        if tensor.dtype not in LOWERED:
            raise Refused(
                f"{name} is stored in {_text(tensor.dtype)} with factors beside it ({self._factors[name]}); FP8 "
                "(float8_e4m3fn) and FP4 (two numbers in an int8) are read, others must be converted first."
            )
        return times_blocks(tensor.float(), factors, self._block_of(name), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _part(self, name: str, suffix: str) -> Tensor:
        if name + suffix not in self._stored:
            raise Refused(f"{name} is stored as {name + PACKED}, but {name + suffix} is missing; copy it again.")
        return self._stored[name + suffix]

    def _block_of(self, name: str) -> tuple[int, int]:
        if self._block is None:
            raise Refused(
                f"{name} is stored in fewer bits, but config.json has no quantization_config that says how many of its "
                "numbers share a factor."
            )
        return self._block


def times_blocks(numbers: Tensor, factors: Tensor, block: tuple[int, int], name: str) -> Tensor:
    """numbers: [..., R, C]; factors: [..., ⌈R / rows⌉, ⌈C / columns⌉]. Raises Refused where the two do not belong
    together."""
    rows, columns = block
    if numbers.dim() < 2:
        raise Refused(f"{name} is stored in blocks, but it is no matrix: its shape is {list(numbers.shape)}.")
    wanted = [*numbers.shape[:-2], -(-numbers.shape[-2] // rows), -(-numbers.shape[-1] // columns)]
    if list(factors.shape) != wanted:
        raise Refused(f"{name} needs {wanted} factors for its blocks, but {list(factors.shape)} are stored with it.")
    if not factors.dtype.is_floating_point:
        raise Refused(f"{name} has factors in {_text(factors.dtype)}, which says nothing of what they mean.")
    factors = factors.float()
    if not factors.isfinite().all():
        raise Refused(f"{name} has a factor that is no finite number; copy the directory again.")
    spread = factors.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return numbers * spread[..., : numbers.shape[-2], : numbers.shape[-1]]


def unpacked(words: Tensor) -> Tensor:
    """int32 [R, C / 8] to int8 [R, C], the lowest bits first; stored with 8 added."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=words.device)
    nibbles = (words[..., None] >> shifts) & (2**BITS - 1)
    return (nibbles - 2 ** (BITS - 1)).flatten(-2).to(torch.int8)


def e2m1(pairs: Tensor) -> Tensor:
    """int8 [..., C / 2] to fp32 [..., C], of each byte the lower four bits first."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=pairs.device)
    codes = pairs.view(torch.uint8)
    return values[torch.stack((codes & 15, codes >> BITS), -1).flatten(-2).int()]


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
