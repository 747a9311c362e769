"""How fast a prepared corpus is read, on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bench:
    """Tokens a second that one core reads from a prepared corpus, in a run's order, as ready batches."""

    path: str = field(metadata={"help": "folder that `python -m data prepare` wrote"})
    sequence_length: int = field(default=2048, metadata={"help": "inputs a window"})
    num_samples: int = field(default=32, metadata={"help": "windows a batch"})
    depth: int = field(default=0, metadata={"help": "further targets an input"})
    seconds: float = field(default=5.0, metadata={"help": "how long to measure"})


def bench(request: Bench) -> str:
    """Raises Refused where the corpus cannot be read."""
    import torch

    from data.corpus import Config
    from data.course import Course, Leg
    from data.loader import Loader
    from data.mixture import Mixture

    torch.set_num_threads(1)
    source = Config(request.path).open()
    course = Course(Mixture({"": source}, {"": 1}), [Leg(request.sequence_length, 1 << 60)], seed=0)
    loader = Loader(course, sequence_length=request.sequence_length, depth=request.depth)
    loader.batch(0, request.num_samples)
    batches = 0
    began, began_cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < request.seconds:
        loader.batch(batches * request.num_samples, request.num_samples)
        batches += 1
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    tokens = batches * request.num_samples * request.sequence_length
    epochs = tokens / source.num_tokens
    return (
        f"{tokens / cpu / 1e6:.1f} M tokens a second and core, {tokens / wall / 1e6:.1f} M a second "
        f"({batches} batches of {request.num_samples} × {request.sequence_length}, {epochs:.1f} epochs, "
        f"in {wall:.1f} s of one thread)"
    )
