"""How fast this machine trains a configuration: the engine's own steps on random tokens, without data and
checkpoints."""

from __future__ import annotations

import statistics
import time

import torch

from conf.compose import compose
from conf.schema import Refused
from data.batch import Batch
from launch.arguments import Parser
from train import config as run_config
from train.engines.torch import Engine
from train.meter import Clock, peak_flops, peak_memory, training_flops_per_token
from train.ranks import Ranks, join, leave


def main(arguments: list[str]) -> int:
    """`python -m launch speed [--steps N] [--documents N] [overrides]`: one line a case."""
    parser = Parser("python -m launch speed", description=__doc__)
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps; the first third is not counted")
    parser.add_argument("--documents", type=int, default=1, help="documents packed into each row, of uneven lengths")
    parser.add_argument("overrides", nargs="*", help="as for python -m train")
    options = parser.parse_args(arguments)
    config = run_config.read(compose(options.overrides))
    if options.steps < 2:
        raise Refused(f"--steps {options.steps} leaves none to count behind those that warm up; take 2 or more.")
    if not 1 <= options.documents <= config.train.sequence_length:
        length = config.train.sequence_length
        raise Refused(f"--documents {options.documents} do not fit in a row of {length} tokens; take 1 to {length}.")
    try:
        ranks = join(config.run)
        line = measure(config, ranks, options.steps, options.documents)
        if ranks.first:
            print(line)
    finally:
        leave()
    return 0


def measure(config: run_config.Config, ranks: Ranks, num_steps: int, documents: int) -> str:
    """Run the steps; returns the line."""
    torch.manual_seed(ranks.rank)
    engine = Engine(config, ranks)
    engine.initialise()
    length, rows = config.train.sequence_length, config.train.batch_tokens // config.train.sequence_length
    seconds: list[float] = []
    parts: dict[str, list[float]] = {}
    for step in range(num_steps):
        batch = random_batch(rows // ranks.world_size, length, config.model.vocab, documents, engine.model.mtp_depth)
        _synchronize(ranks.device)
        clock, began = Clock(ranks.device), time.perf_counter()
        loss = float(engine.step(batch, 3e-4, clock).loss)
        _synchronize(ranks.device)
        seconds.append(time.perf_counter() - began)
        if ranks.first and step in (0, num_steps - 1):
            print(f"step {step}  loss {loss:.4f}  {seconds[-1]:.3f} s", flush=True)
        if step >= num_steps // 3:
            for name, value in clock.seconds().items():
                parts.setdefault(name, []).append(value)
    median = statistics.median(seconds[num_steps // 3 :])
    rate = rows * length / median
    per_token = training_flops_per_token(engine.model, length)
    peak = peak_flops(ranks.device)
    usage = f", {rate * per_token / ranks.world_size / peak:.1%} of peak" if peak else ""
    spent = ", ".join(f"{name} {1000 * statistics.median(values):.1f} ms" for name, values in parts.items())
    return (
        f"sequence {length}, {rows} rows of {documents} document(s) over {ranks.world_size} rank(s): "
        f"{rate:,.0f} tokens/s, "
        f"{rate * per_token / 1e12:.1f} model TFLOP/s{usage}, {peak_memory(ranks.device) / 2**30:.1f} GiB; {spent}"
    )


def random_batch(rows: int, length: int, vocab: int, documents: int, depth: int = 0) -> Batch:
    """Uniform random tokens in `documents` documents a row, cut at random places. depth: of multi-token prediction,
    which is handed tokens across a border, as if there were none."""
    ids = torch.randint(0, vocab, (rows, length + 1 + depth))
    following = torch.stack([ids[:, 1 + d : length + 1 + d] for d in range(1 + depth)])
    cuts = torch.stack([torch.randperm(length - 1)[: documents - 1] + 1 for _ in range(rows)])
    starts = torch.zeros(rows, length, dtype=torch.int64).scatter(1, cuts, 1)
    document = starts.cumsum(1)
    tokens = torch.arange(length).expand(rows, length)
    position = tokens - torch.where(starts.bool(), tokens, 0).cummax(1).values
    return Batch(ids[:, :length], following, following[:depth], position, document, rows * length, documents, "random")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
