"""How much a save slows training: `python -m tests.measure_save [GB [SECONDS]]`, on a machine with nothing else to do.

Steps of about so many seconds, or one, of matrix products on two cores; a state of so many GB in 400 tensors, which
every step changes, is saved twice. (A model whose state is 1 GB has 83 M parameters; a step of 4,096 tokens is 2·10¹²
operations, some ten seconds of such cores.) Prints the slowest step during which a save ran, as a multiple of the
median of the other steps.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from train.checkpoint import Checkpoints

NUM_TENSORS, NUM_SAVES, QUIET_STEPS = 400, 2, 10  # quiet steps before each save and after the last


def main(gigabytes: float, seconds: float) -> None:
    """Run and print."""
    torch.set_num_threads(2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    size = int(gigabytes * 1e9 / 4 / NUM_TENSORS)
    state = {"model": {str(i): torch.randn(size) for i in range(NUM_TENSORS)}}
    a, b, c = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)

    def work(products: int) -> float:
        begun = time.perf_counter()
        for _ in range(products):
            torch.nn.functional.gelu(torch.mm(a, b, out=c))
        return time.perf_counter() - begun

    products = int(1000 * seconds / statistics.median(work(1000) for _ in range(5)))
    quiet: list[float] = []
    touched: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=1)
        checkpoints.reserve(state)
        saves = 0
        while len(quiet) < (NUM_SAVES + 1) * QUIET_STEPS:
            begun = time.perf_counter()
            busy = not checkpoints.idle
            work(products)
            releasing = time.perf_counter()
            checkpoints.release()
            waited = time.perf_counter() - releasing
            for tensor in state["model"].values():
                tensor[:1024].add_(1.0)
            saving = time.perf_counter()
            if not busy and saves < NUM_SAVES and len(quiet) == (saves + 1) * QUIET_STEPS:
                saves, busy = saves + 1, True
                checkpoints.save(saves, state)
            ended = time.perf_counter()
            (touched if busy else quiet).append(ended - begun)
            if ended - saving > 0.01 or waited > 0.001:
                print(f"save {saves}: begun in {ended - saving:.3f} s, or its copy waited for {waited:.3f} s")
        checkpoints.close()
    median = statistics.median(quiet)
    slow, usual, noise = max(touched) / median, statistics.median(touched) / median, max(quiet) / median
    print(
        f"median {median:.3f} s; of {len(touched)} steps with a save the slowest {slow:.2f} x, "
        f"the median {usual:.2f} x; of {len(quiet)} steps without the slowest {noise:.2f} x"
    )


if __name__ == "__main__":
    main(*[*map(float, sys.argv[1:]), 1.0, 1.0][:2])
