"""Weights that a release stores in fewer bits, read as plain tensors.

FP8: `x.weight` in E4M3 beside `x.weight_scale_inv`, one factor for each block of 128 × 128 (DeepSeek-V3, arXiv
2412.19437, section 3.3). INT4: `x.weight_packed`, eight numbers from -8 to 7 in an int32, beside `x.weight_scale`, one
factor for each 32 numbers of a row, and `x.weight_shape` (Kimi K2, stored by compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from conf.schema import Refused

SCALE_INV, PACKED, SCALE, SHAPE = "_scale_inv", "_packed", "_scale", "_shape"

BITS = 4


def blocks(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Of a config.json: the block that shares a factor in FP8, (1, numbers of a row) in INT4, None where weights are
    stored as they are. Raises Refused for another way of storing them."""
    stored = config.get("quantization_config")
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
    """`stored` with every weight as it is meant, made in fp32 when it is read; their factors do not show."""

    def __init__(self, stored: Mapping[str, Tensor], block: tuple[int, int]) -> None:
        self._stored, self._block = stored, block
        scaled = {name.removesuffix(SCALE_INV) for name in stored if name.endswith(SCALE_INV)}
        packed = {name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)}
        hidden = {name + SCALE_INV for name in scaled}
        hidden |= {name + suffix for name in packed for suffix in (PACKED, SCALE, SHAPE)}
        self._packed, self._scaled = packed, scaled
        self._names = [name for name in stored if name not in hidden] + sorted(packed)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._packed:
            rows, columns = self._stored[name + SHAPE].tolist()
            numbers = unpacked(self._stored[name + PACKED])[:rows, :columns]
            return times_blocks(numbers.float(), self._stored[name + SCALE], self._block, name)
        if name in self._scaled:
            return times_blocks(self._stored[name].float(), self._stored[name + SCALE_INV], self._block, name)
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def times_blocks(numbers: Tensor, factors: Tensor, block: tuple[int, int], name: str) -> Tensor:
    """numbers: [R, C]; factors: [⌈R / rows⌉, ⌈C / columns⌉]. Raises Refused where the two do not belong together."""
    wanted = [-(-size // step) for size, step in zip(numbers.shape, block, strict=True)]
    if list(factors.shape) != wanted:
        raise Refused(f"{name} needs {wanted} factors for its blocks, but {list(factors.shape)} are stored with it.")
    spread = factors.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return numbers * spread[: numbers.shape[0], : numbers.shape[1]]


def unpacked(words: Tensor) -> Tensor:
    """int32 [R, C / 8] to int8 [R, C], the lowest bits first; stored with 8 added."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=words.device)
    nibbles = (words[..., None] >> shifts) & (2**BITS - 1)
    return (nibbles - 2 ** (BITS - 1)).flatten(-2).to(torch.int8)
