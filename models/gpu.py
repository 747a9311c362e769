"""GPUs, as their makers state them: what a cost is held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """device: how its driver's name begins. memory: bytes. flops: dense bf16 operations a second. bandwidth: bytes a
    second between memory and chip."""

    device: str
    memory: float
    flops: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """Operations for each byte read, above which computing takes longer than reading (roofline)."""
        return self.flops / self.bandwidth


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80e9, 312e12, 2.039e12),
    "b200": Gpu("NVIDIA B200", 180e9, 2250e12, 8.0e12),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80e9, 989e12, 3.35e12),
    "h200": Gpu("NVIDIA H200", 141e9, 989e12, 4.8e12),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 24e9, 165e12, 1.008e12),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 32e9, 209.5e12, 1.792e12),
}
