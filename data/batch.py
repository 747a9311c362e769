"""What one rank feeds its model in one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # a target that is not scored; what torch's cross-entropy ignores by default


@dataclass(frozen=True)
class Batch:
    """Windows of packed documents, already shifted: nothing downstream moves a label.

    ids:             [B, S] int64, inputs.
    targets:         [1 + depth, B, S] int64: the token 1 + d after each input, or IGNORE where that token lies in
                     another document or is not to be scored.
    ahead:           [depth, B, S] int64: the token 1 + d after each input, scored or not, or IGNORE where that token
                     lies in another document: what multi-token prediction is handed.
    position:        [B, S] int32, from 0 within each document piece; a window's first token is at 0.
    document:        [B, S] int32, index of the document piece within its row: 0, 1, 2, …
    scored:          number of targets at distance 1 that are not IGNORE.
    documents:       the most document pieces of a row.
    digest:          which samples it holds and what is in them, 16 hexadecimal digits. The shares of a global batch
                     have digests that add up, modulo 2^64, to the same sum for any number of ranks.
    """

    ids: Tensor
    targets: Tensor
    ahead: Tensor
    position: Tensor
    document: Tensor
    scored: int
    documents: int
    digest: str

    def count(self) -> int:
        """Scored targets at distance 1, known on the host without waiting for a device."""
        return self.scored

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """This batch on `device`. A non-blocking copy to a GPU goes through pinned memory, else it would block."""
        device = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            if non_blocking and device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(
            ids=move(self.ids),
            targets=move(self.targets),
            ahead=move(self.ahead),
            position=move(self.position),
            document=move(self.document),
            scored=self.scored,
            documents=self.documents,
            digest=self.digest,
        )
