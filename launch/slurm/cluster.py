"""What is particular to one cluster: the configuration group `cluster`, and how a job asks SLURM for its share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Cluster:
    """tasks_per_node: ranks on a node, one for each of `gpus_per_node` where that is not 0.

    partition, account, qos, time, memory (of a node): as sbatch takes them; null for what the cluster does by itself.
    options: further ones of sbatch by name, such as constraint: h100; null for those without a value. setup: lines of
    bash before the ranks start, such as `module load cuda`. environment: variables of every rank. python: the
    interpreter on the nodes, null for the one that submits. grace: seconds before the time limit at which the run is
    asked to save. attempts: starts of one job, however they end. crashes: failed starts without a new checkpoint after
    which it is given up. wait: seconds that the others may live on once a rank has ended; of one that hangs, see
    docs/cluster.md.
    """

    tasks_per_node: int
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    memory: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    options: dict[str, str | int | None] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str | int | float] = field(default_factory=dict)
    python: str | None = None
    grace: int = 120
    attempts: int = 100
    crashes: int = 3
    wait: int = 45

    def __post_init__(self) -> None:
        for name in ("tasks_per_node", "cpus_per_task", "grace", "attempts", "crashes", "wait"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if self.gpus_per_node not in (0, self.tasks_per_node):
            raise ValueError(
                f"tasks_per_node ({self.tasks_per_node}) must equal gpus_per_node ({self.gpus_per_node}), "
                "because a rank uses one GPU"
            )
        for name in ("partition", "account", "qos", "memory"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
                raise ValueError(f"{name} ({value!r}) must be one word; null leaves it out")
        for option, value in self.options.items():
            if not re.fullmatch(r"[a-z][a-z-]*", option) or "\n" in str(value):
                raise ValueError(f"options holds {option!r}, which is no option of sbatch; write constraint: h100")
        for variable in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", variable):
                raise ValueError(f"environment holds {variable!r}, which is no name of a variable")
        limit = seconds(self.time)
        if limit is not None and self.grace >= limit:
            raise ValueError(f"grace ({self.grace} seconds) must be less than time ({self.time})")

    def directives(self, nodes: int) -> list[str]:
        """The options of sbatch, for a job on so many nodes."""
        wanted = {
            "nodes": nodes,
            "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.memory,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "signal": f"USR1@{self.grace}",
        }
        return [
            *(f"--{name}={value}" for name, value in wanted.items() if value is not None),
            *(f"--{name}" if value is None else f"--{name}={value}" for name, value in self.options.items()),
        ]


@dataclass(frozen=True)
class Submission:
    """nodes: how many nodes of `cluster` the job takes."""

    cluster: Cluster
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes ({self.nodes}) must be at least 1")

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.cluster.tasks_per_node


def seconds(time: str | None) -> int | None:
    """Of a time limit as SLURM writes it: minutes, 1:30:00 or 2-12 (days and hours). Raises ValueError."""
    if time is None or time.upper() in ("INFINITE", "UNLIMITED"):
        return None
    found = TIME.fullmatch(time)
    if found is None:
        raise ValueError(f"time ({time!r}) is no time limit; write hours:minutes:seconds or days-hours")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, rest = [*parts, 0, 0][:3]
        return ((24 * int(found["days"]) + hours) * 60 + minutes) * 60 + rest
    if len(parts) < 3:  # minutes, or minutes:seconds
        return 60 * parts[0] + (parts[1] if len(parts) == 2 else 0)
    return (60 * parts[0] + parts[1]) * 60 + parts[2]
