"""The numbers of a run that a comparison shows: one table says what each is called, means, and is computed from.

Every quantity is a function of what the run wrote and of the model that its configuration builds; None where that does
not say. Nothing here knows an attention scheme.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from conf.schema import Refused
from data.config import DataConfig, headline
from launch.report.record import Record
from models import cost
from models.cache import Cache
from models.model import Model


@dataclass(frozen=True)
class Quantity:
    """key: in report.json. heading, unit, meaning: for people. kind: how it is printed. of: its value for a run.

    absent: why a run may not have it.
    """

    key: str
    heading: str
    unit: str
    meaning: str
    kind: Literal["count", "compact", "bytes", "loss", "ratio", "percent", "seconds", "megabytes"]
    of: Callable[[Record], float | None]
    absent: str = ""


@dataclass(frozen=True)
class Footprint:
    """Measured bytes of one sequence's cache in bf16: for each further token, and of windows and tails once full."""

    per_token: float
    windows: float
    tails: float


@lru_cache
def footprint(model: Model) -> Footprint:
    """Allocate the decode cache of a model in bf16 at two lengths and weigh it.

    Both lengths fill every window and limit, and differ by a multiple of every stride, so that the difference is the
    growth alone.
    """
    slots = [slot for slot in cost.written_slots(model) if slot.kind == "entry"]
    stride = math.lcm(*(slot.stride for slot in slots)) if slots else 1
    filled = max((slot.lead + (slot.reach or slot.stride * (slot.limit or 1)) for slot in slots), default=1)
    shorter = stride * math.ceil(filled / stride)
    before, after = (Cache(model, 1, tokens).num_bytes() for tokens in (shorter, shorter + stride))
    return Footprint((after["entries"] - before["entries"]) / stride, after["windows"], after["tails"])


def train_loss(record: Record) -> float | None:
    """Mean over the last twentieth of the steps, because the loss of one batch says little."""
    last = record.steps[-math.ceil(len(record.steps) / 20) :] if record.steps else []
    return statistics.fmean(line["loss"] for line in last) if last else None


def unigram_entropy(record: Record) -> float | None:
    """Nats per scored token of the held-out split, for a predictor that knows only how frequent each token is."""
    data = record.config.data
    return _unigram_entropy(json.dumps([data.train, data.validation])) if data.validation else None


@lru_cache
def _unigram_entropy(sources: str) -> float | None:
    try:
        probes = DataConfig(*json.loads(sources)).open_validation()
        return probes[headline(probes)].source.unigram_entropy
    except (Refused, OSError):
        return None


def load_balance(line: dict[str, list[float]]) -> float | None:
    """Mean over the layers of the busiest expert's load ÷ the mean load, of one step's line."""
    return statistics.fmean(line["load"]) if line.get("load") else None


def seconds_of_steps(record: Record) -> float | None:
    """Data, compute and optimizer of every step, and saves; validation and start-up are not in the metrics."""
    named = [line for line in (*record.steps, *record.saves)]
    spent = [value for line in named for key, value in line.items() if key.startswith("seconds_")]
    return math.fsum(spent) if spent else None


def _entropy_ratio(record: Record) -> float | None:
    loss, entropy = _last(record, "val_loss"), unigram_entropy(record)
    return loss / entropy if loss is not None and entropy else None


def _last(record: Record, key: str) -> float | None:
    return next((line[key] for line in reversed(record.validations) if line.get(key) is not None), None)


def _over_steps(record: Record, key: str, summary: Callable[[list[float]], float]) -> float | None:
    values = [line[key] for line in record.steps if line.get(key) is not None]
    return summary(values) if values else None


def _final_load(record: Record) -> float | None:
    last = record.steps[-math.ceil(len(record.steps) / 20) :] if record.steps else []
    loads = [value for value in map(load_balance, last) if value is not None]
    return statistics.fmean(loads) if loads else None


NO_STEP, NOT_VALIDATED = "it has no step yet", "it has not been validated"

# fmt: off
QUANTITIES = (
    Quantity("parameters_total", "parameters", "", "all parameters of the model", "compact",
             lambda r: cost.parameters(r.model).total),
    Quantity("parameters_active", "active", "", "parameters that one token touches: chosen experts and the head, not "
             "the embedding's lookup", "compact", lambda r: cost.parameters(r.model).active),
    Quantity("kv_declared", "KV/token declared", "B", "bytes by which the decode cache grows with a token, as "
             "the schemes declare it", "bytes", lambda r: cost.kv_bytes_per_token(r.model)),
    Quantity("kv_measured", "KV/token measured", "B", "the same, weighed: the cache is allocated in bf16 at two "
             "lengths, this is the difference", "bytes", lambda r: footprint(r.model).per_token),
    Quantity("kv_windows", "windows", "B", "cache of a sequence that does not grow: sliding windows, full", "bytes",
             lambda r: footprint(r.model).windows),
    Quantity("kv_tails", "tails", "B", "cache of a sequence that does not grow: rows of blocks that are still open",
             "bytes", lambda r: footprint(r.model).tails),
    Quantity("train_loss", "train loss", "nats/token", "cross-entropy, mean over the last twentieth of the steps",
             "loss", train_loss, NO_STEP),
    Quantity("val_loss", "held-out loss", "nats/token", "cross-entropy of the last validation, on the first text, or "
             "the first source where none is text", "loss", lambda r: _last(r, "val_loss"), NOT_VALIDATED),
    Quantity("val_bpb", "held-out bits/byte", "", "the same in bits per byte of text; only where data is text",
             "loss", lambda r: _last(r, "val_bpb"), "it takes a validation on text"),
    Quantity("entropy_ratio", "÷ unigram entropy", "", "held-out loss ÷ the entropy of the held-out token frequencies: "
             "below 1, the model knows more than how frequent each token is", "ratio", _entropy_ratio,
             "it takes a validation, on data that can be read from here"),
    Quantity("val_accuracy", "accuracy", "", "share of held-out tokens that the model ranks first; for associative "
             "recall, the recall", "percent", lambda r: _last(r, "val_accuracy"), NOT_VALIDATED),
    Quantity("tokens_per_second", "tokens/s", "", "of all ranks together, median over the steps", "count",
             lambda r: _over_steps(r, "tokens_per_second", statistics.median), NO_STEP),
    Quantity("mfu", "MFU", "", "share of the GPUs' peak that the model's own operations use, median over the steps",
             "percent", lambda r: _over_steps(r, "mfu", statistics.median), "the peak of its device is not listed"),
    Quantity("peak_memory", "peak memory", "MB", "of the first rank: allocated on its GPU, or resident in its process",
             "megabytes", lambda r: _over_steps(r, "peak_memory", max), NO_STEP),
    Quantity("load", "expert load", "max/mean", "the busiest expert's load ÷ the mean, over the layers, multi-token "
             "prediction's too, and the last twentieth of the steps; 1 is even", "ratio", _final_load,
             "it takes a step of a model with experts"),
    Quantity("steps", "steps", "", "optimizer steps", "count", lambda r: float(r.last_step)),
    Quantity("tokens", "tokens", "", "consumed in training", "compact", lambda r: float(r.tokens)),
    Quantity("seconds", "time", "s", "of all steps and saves; start-up and validation are not in it", "seconds",
             seconds_of_steps, NO_STEP),
)
# fmt: on
