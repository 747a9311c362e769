"""What a run is told: the root of the configuration, nothing but the sections that the owners define."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from conf import schema
from data.config import DataConfig
from models import config as model_config
from models.config import ModelConfig
from parallel.layout import ParallelConfig
from train import optimizer
from train.schedule import Schedule


@dataclass(frozen=True)
class RunSection:
    """dir: the run directory; the same command with the same directory resumes. wandb: "online" falls back to "offline"
    without a key. threads: CPU threads of one rank, null for torch's choice. deterministic: refuse operations whose result
    depends on timing."""

    dir: str
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "keyhole"
    threads: int | None = None
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Phase:
    """A stretch of the run that starts at step `start` and lasts to the next one. What is null stays as it was."""

    start: int
    sequence_length: int | None = None
    batch_tokens: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class TrainSection:
    """batch_tokens: tokens of one step over all ranks. micro_batch: rows of one forward of one rank.

    compute: dtype of activations and matrix products; parameters and optimizer state are fp32. clip: gradient norm, null
    for none. init: a checkpoint or run whose weights (alone) this run starts from. core: the softmax core.
    """

    steps: int
    sequence_length: int
    batch_tokens: int
    micro_batch: int = 8
    seed: int = 0
    compute: Literal["fp32", "bf16"] = "fp32"
    clip: float | None = 1.0
    recompute: Literal["none", "full"] = "none"
    compile: bool = False
    core: Literal["plain", "blockwise", "fused"] = "blockwise"
    init: str | None = None
    phases: list[Phase] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "batch_tokens", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)) or (starts and starts[0] < 1):
            raise ValueError(f"phases must start at increasing steps from 1 on, not at {starts}")


@dataclass(frozen=True)
class CheckpointSection:
    """every: steps between checkpoints. keep: how many of the newest stay. keep_every: of these steps, all stay."""

    every: int = 100
    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("every and keep must be at least 1")


@dataclass(frozen=True)
class EvaluateSection:
    """every: steps between validations, 0 for the end alone. samples: windows of one validation, null for all."""

    every: int = 100
    samples: int | None = 64


@dataclass(frozen=True)
class LogSection:
    """every: steps between two lines of progress; metrics.jsonl has every step."""

    every: int = 1


@dataclass(frozen=True)
class Config:
    """A run."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    optimizer: dict[str, Any]
    schedule: Schedule
    train: TrainSection
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    log: LogSection = field(default_factory=LogSection)
    engine: Literal["torch"] = "torch"


def read(values: Mapping[str, Any]) -> Config:
    """Check a resolved configuration whole, down to every layer of the plan. Raises schema.Refused."""
    config = schema.build(Config, values, "")
    model_config.resolve(config.model)
    optimizer.read(config.optimizer)
    return config
