"""What a run is told: the root of the configuration, nothing but the sections that the owners define."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from conf import schema
from data.config import DataConfig
from models.config import ModelConfig, resolve, resolve_mtp, resolve_residual
from models.mode import Mode
from parallel.layout import ParallelConfig
from train.schedule import Schedule


@dataclass(frozen=True)
class RunSection:
    """dir: the run directory; the same command with the same directory resumes. wandb: "online" falls back to
    "offline" without a key. project, group, tags: of the wandb run; the group is the experiment's name, or whatever
    tells the runs of a sweep from others. threads: CPU threads of one rank, null for torch's choice. deterministic:
    refuse operations whose result depends on timing."""

    dir: str
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "keyhole"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    threads: int | None = None
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("dir is empty; name a directory")
        schema.at_least(1, self, "threads")


@dataclass(frozen=True)
class Phase:
    """A stretch of the run that starts at step `start` and lasts to the next one. What is null stays as it was.

    mixture: the weights of all sources of data.train, by name; 0 for one that pauses, but for a window
    that it may be owed. mtp_weight: see TrainSection.
    """

    start: int
    sequence_length: int | None = None
    batch_tokens: int | None = None
    learning_rate: float | None = None
    mixture: dict[str, float] | None = None
    attention: Mode | None = None
    mtp_weight: float | None = None

    def __post_init__(self) -> None:
        schema.at_least(1, self, "start", "sequence_length", "batch_tokens")
        schema.at_least(0, self, "learning_rate", "mtp_weight")


MTP_WEIGHT = 0.3
"""What DeepSeek-V3 begins with (arXiv 2412.19437, section 4.2); later, and in V4's decay, it is 0.1."""


@dataclass(frozen=True)
class Ramp:
    """The batch starts with `batch_tokens` and grows by `increment` tokens at a time, at even distances over the first
    `steps` steps or `tokens` tokens (one of the two), to train.batch_tokens. Within it no phase has a larger batch."""

    batch_tokens: int
    increment: int
    steps: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens, over which the batch grows")
        schema.at_least(1, self, "batch_tokens", "increment", "steps", "tokens")


@dataclass(frozen=True)
class Profile:
    """Steps `start` to `stop`, both included, are recorded: a trace and a table in the run directory's `profile`.
    all_ranks: of every rank, not of the first alone."""

    start: int
    stop: int
    all_ranks: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.stop:
            raise ValueError(f"start ({self.start}) must be at least 1, and stop ({self.stop}) not before it")


@dataclass(frozen=True)
class TrainSection:
    """batch_tokens: tokens of one step over all ranks. micro_batch: rows of one forward of one rank.

    compute: dtype of activations and matrix products; parameters and optimizer state are fp32, or fp64 with fp64, which
    is for comparing layouts. recompute: what the backward computes again (parallel/recompute.py); a number is the share
    of activations that a compiled model may keep. clip: gradient norm, null for none. init: a checkpoint, a run, or a
    directory of weights, ours or Transformers', whose weights (alone) this run starts from; of multi-token prediction,
    what only one of them has starts anew, or is left out; the log warns of what else differs. core: the softmax
    core (models/cores); the log says where a fast one cannot serve. approximate: another core for training alone,
    which reads less than all (models/cores/approximate); validation reads all. attention: how schemes with an indexer
    are trained. dense reads everything, and ends an approximation too; warmup trains the indexer alone, by a loss of
    its own; sparse reads what the indexer chooses, and trains everything.
    mtp_weight: factor on the loss of multi-token prediction, the mean over its depths; null for MTP_WEIGHT. The
    auxiliary losses of its modules are not weighed by it. An approximation leaves its attention as it is.
    """

    steps: int
    sequence_length: int
    batch_tokens: int
    micro_batch: int = 8
    seed: int = 0
    compute: Literal["fp32", "bf16", "fp64"] = "fp32"
    clip: float | None = 1.0
    recompute: Literal["none", "full", "attention", "feedforward", "experts"] | float = "none"
    compile: bool = False
    core: Literal["plain", "blockwise", "fused", "flash"] = "blockwise"
    approximate: dict[str, Any] | None = None
    init: str | None = None
    attention: Mode = "sparse"
    phases: list[Phase] = field(default_factory=list)
    ramp: Ramp | None = None
    profile: Profile | None = None
    mtp_weight: float | None = None

    def __post_init__(self) -> None:
        schema.at_least(1, self, "steps", "sequence_length", "batch_tokens", "micro_batch")
        schema.at_least(0, self, "mtp_weight")
        if self.init == "":
            raise ValueError("init is empty; name a checkpoint or a run, or null for none")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip ({self.clip}) must be above 0; null is for no clipping")
        if self.compile and self.compute == "fp32":
            raise ValueError(
                "compile needs compute: bf16, because PyTorch compiles the experts' grouped GEMM in no other"
            )
        if self.core == "flash" and self.compute != "bf16":
            raise ValueError(f"core: flash needs compute: bf16, because FlashAttention has no {self.compute} kernels")
        if self.ramp is not None and self.ramp.batch_tokens >= self.batch_tokens:
            raise ValueError(
                f"ramp.batch_tokens ({self.ramp.batch_tokens}) must be below batch_tokens ({self.batch_tokens}), "
                "to which it grows"
            )
        if isinstance(self.recompute, float):
            if not 0 < self.recompute < 1:
                raise ValueError(f"recompute ({self.recompute}) is a share of memory: a number between 0 and 1")
            if not self.compile:
                raise ValueError(
                    "recompute by a share of memory needs compile: true; else name what: full, attention, …"
                )
        modes = {self.attention, *(phase.attention for phase in self.phases)}
        if self.approximate is not None and "sparse" not in modes:
            raise ValueError("approximate is never used: no phase trains with attention: sparse; leave it null")
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases must start at increasing steps, not at {starts}")

    @property
    def first_mtp_weight(self) -> float:
        """Before any phase changes it."""
        return MTP_WEIGHT if self.mtp_weight is None else self.mtp_weight


@dataclass(frozen=True)
class CheckpointSection:
    """every: steps between checkpoints. keep: how many of the newest stay. keep_every: of these steps, all stay."""

    every: int = 100
    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        schema.at_least(1, self, "every", "keep", "keep_every")


@dataclass(frozen=True)
class EvaluateSection:
    """every: steps between validations, 0 for the end alone. samples: windows of one validation, null for all."""

    every: int = 100
    samples: int | None = 64

    def __post_init__(self) -> None:
        if self.every < 0 or (self.samples is not None and self.samples < 1):
            raise ValueError(
                f"every ({self.every}) must be at least 0, and samples ({self.samples}) at least 1 or null"
            )


@dataclass(frozen=True)
class LogSection:
    """every: steps between two lines of progress; metrics.jsonl has every step. statistics: steps between two lines of
    statistics.jsonl, 0 for none."""

    every: int = 1
    statistics: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.statistics < 0:
            raise ValueError(f"every ({self.every}) must be at least 1, and statistics ({self.statistics}) at least 0")


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

    def __post_init__(self) -> None:
        for index, phase in enumerate(self.train.phases):
            if phase.mixture is not None:
                self.data.check_weights(phase.mixture, f"train.phases[{index}].mixture")
        weighed = [w for w in (self.train.mtp_weight, *(p.mtp_weight for p in self.train.phases)) if w is not None]
        if weighed and self.model.mtp is None:
            raise ValueError("train.mtp_weight weighs the loss of model.mtp, which is null; leave it out, or give both")


def read(values: Mapping[str, Any]) -> Config:
    """Check a resolved configuration whole, down to every layer of the plan. Raises schema.Refused."""
    config = schema.build(Config, values, "")
    # here: it takes torch, whose import takes seconds, and most mistakes are refused by now
    from train import optimizer

    optimizer.read(config.optimizer)
    resolve(config.model)
    resolve_residual(config.model)
    resolve_mtp(config.model)
    if config.train.approximate is not None:
        from models.cores import approximate

        approximate.config_of(config.train.approximate)
    return config
