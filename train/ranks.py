"""Who this process is among the ranks, however it was started: alone, by torchrun, or as a task of srun."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from conf.schema import Refused
from train.config import RunSection

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """device: of this rank.

    What ranks tell each other here are small values of the host, over gloo, which never waits for the device. That is
    the default group's, which has NCCL beside it on GPUs: all of it is said by one thread, as every step is made, so a
    group of its own, at hundreds of ranks many more connections of each to each, would keep nothing apart.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> T:
        """Do something that may be refused on some ranks alone; if it is on any, it is on all, and nobody waits."""
        result: T | None = None
        refused: str | None = None
        try:
            result = action()
        except Refused as refusal:
            refused = str(refusal)
        answers: list[str | None] = [None] * self.world_size
        dist.all_gather_object(answers, refused)
        for sentence in answers:
            if sentence is not None:
                raise Refused(sentence)
        return cast(T, result)

    def on_first(self, action: Callable[[], object]) -> None:
        """Do something on rank 0 alone; if it is refused there, it is on all."""
        self.together(action if self.first else lambda: None)

    def any_of(self, mine: str | None) -> str:
        """What the first rank says that says anything, as one at least does. Collective."""
        said: list[str | None] = [None] * self.world_size
        dist.all_gather_object(said, mine)
        return next(filter(None, said))

    def total(self, *values: int) -> list[int]:
        """Sums over the ranks of whole numbers below 2^64, modulo 2^64. Collective; does not wait for the device."""
        sums = torch.tensor(values, dtype=torch.uint64).view(torch.int64)
        dist.all_reduce(sums)
        return cast(list[int], sums.view(torch.uint64).tolist())


def join(run: RunSection) -> Ranks:
    """Meet the other ranks. Raises Refused where there is no such device, or fewer cores than threads."""
    rank, world_size, local_rank = _identity()
    backend = "cpu:gloo,cuda:nccl" if run.device != "cpu" and torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=10)
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    return replace(ranks, device=ranks.together(lambda: _settle(run, local_rank)))


def leave() -> None:
    """Part from the other ranks; harmless if never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _identity() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine), from torchrun's variables or from srun's, which are translated."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    # a batch script has SLURM's variables too, but is no step: only tasks of srun are ranks
    if "SLURM_STEP_ID" in os.environ and int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1:
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_host(os.environ["SLURM_STEP_NODELIST"])
        os.environ.setdefault("MASTER_PORT", str(_port(os.environ["SLURM_JOB_ID"], os.environ["SLURM_STEP_ID"])))
        rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
        return rank, world_size, int(os.environ["SLURM_LOCALID"])
    return 0, 1, 0


def _first_host(nodes: str) -> str:
    """Of a list such as gpu[03-07]; on it runs the first task."""
    if "[" not in nodes:
        return nodes.partition(",")[0]
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise Refused(
            f"the first of the nodes {nodes} is not known, because scontrol cannot be run here; "
            "set MASTER_ADDR to its address."
        ) from None
    return listed.stdout.split()[0]


def _port(job: str, step: str) -> int:
    """Every task finds the same, other steps on these nodes most likely another; below what Linux gives to clients."""
    return 12000 + (101 * int(job) + int(step)) % 20000


def _settle(run: RunSection, local_rank: int) -> torch.device:
    """On this machine: with the threads and the device that were asked for."""
    if run.threads is not None:
        if run.threads > (cores := os.cpu_count() or 1):
            raise Refused(f"run.threads is {run.threads}, but this machine has {cores} cores; take so many at most.")
        torch.set_num_threads(run.threads)
    return _device(run, local_rank)


def _device(run: RunSection, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if run.device == "cuda" and not available:
        raise Refused("run.device is cuda, but PyTorch finds no GPU here; use run.device=cpu or another machine.")
    if run.device == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
