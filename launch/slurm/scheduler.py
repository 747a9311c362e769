"""SLURM's own commands, and what they answer, in one sentence each."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Refused
from launch.slurm.cluster import Cluster

# what sbatch says, and what that means to whoever submits
REFUSALS = (
    (r"invalid partition", "partition {cluster.partition} does not exist; cluster.partition may be: {partitions}"),
    (
        r"invalid account|account.*not permitted",
        "account {account} may not use {partition}; "
        "set cluster.account to one of yours (`sacctmgr show associations user=$USER` lists them)",
    ),
    (
        r"invalid qos|qos.*not permitted",
        "qos {cluster.qos} may not be used; set cluster.qos to one of yours (`sacctmgr show qos` lists all)",
    ),
    (
        r"invalid generic resource",
        "SLURM knows of no GPUs here; set cluster.gpus_per_node=0, or take a cluster with GPUs",
    ),
    (
        r"invalid feature",
        "no node has what a --constraint in cluster.options asks for; `sinfo -o %f` shows what there is",
    ),
    (
        r"time limit",
        "cluster.time ({cluster.time}) is missing, or more than the partition allows; `sinfo` shows its limit",
    ),
    (
        r"node configuration is not available|more processors|node count",
        "no nodes of the partition have so much (nodes, tasks_per_node, cpus_per_task, gpus_per_node, memory); "
        "`sinfo -o '%P %D %c %m %G'` shows what they have",
    ),
    (r"unrecognized option", "sbatch does not know an option that cluster.options holds ({line})"),
)

SILENT = r"contact slurm controller|connect failure|configuration (source|file)"

REASONS = {
    "None": "SLURM has not said why yet",
    "BeginTime": "it was requeued, and SLURM lets two minutes pass before it starts again",
    "Priority": "jobs of higher priority are before it",
    "Resources": "it is next, as soon as enough nodes are free",
    "Dependency": "another job has to end first",
    "JobHeldUser": "its user holds it; `scontrol release` lets it go",
    "JobHeldAdmin": "an administrator holds it",
    "launch failed requeued held": "it could not be started and is held; `scontrol release` lets it go",
    "PartitionTimeLimit": "it asks for more time than its partition allows, so it will never start; submit it again",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows, so it will never start; submit it again",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is not active",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "Reservation": "its reservation has not begun",
    "Licenses": "a licence that it needs is in use",
}
GROUPS = (
    (r"QOS", "its quality of service is at a limit ({reason})"),
    (
        r"account not",
        "its account may not use its partition, so it will never start; cancel it and name another account",
    ),
    (r"Assoc|AccountingPolicy", "its account is at a limit ({reason})"),
    (r"nodes required for job are DOWN", "nodes that it needs are down, drained or reserved"),
)


class NoScheduler(Refused):
    """This machine has no SLURM, or it does not answer."""


@dataclass(frozen=True)
class Queued:
    """A job that SLURM holds. state: as squeue names it. script: what was submitted. nodes: where it runs."""

    number: int
    state: str
    reason: str
    nodes: str
    script: Path

    @property
    def waits_for(self) -> str:
        """Why it does not run, in words."""
        code = self.reason.strip("()").partition(",")[0]
        if code in REASONS:
            return REASONS[code]
        found = (words for pattern, words in GROUPS if re.search(pattern, self.reason))
        return next(found, "SLURM says {reason}").format(reason=self.reason)


def jobs() -> list[Queued] | None:
    """This user's jobs; None where there is no SLURM, or it does not answer."""
    try:
        listed = _run(["squeue", "--me", "--noheader", "--format=%i|%T|%r|%N|%o"])
    except FileNotFoundError:
        return None
    if listed.returncode:
        return None
    rows = (line.strip().split("|", 4) for line in listed.stdout.splitlines())
    return [
        Queued(int(row[0]), row[1], row[2], row[3], Path(row[4])) for row in rows if len(row) == 5 and row[0].isdigit()
    ]


def check(script: str, cluster: Cluster) -> str:
    """Ask SLURM whether it would take the job; returns its answer. Raises Refused where there is no SLURM or it would
    not."""
    return _sbatch(["--test-only"], cluster, script)


def submit(script: Path, cluster: Cluster) -> int:
    """Returns the job's number. Raises Refused."""
    return int(_sbatch(["--parsable", str(script)], cluster).partition(";")[0])


def _sbatch(arguments: list[str], cluster: Cluster, script: str | None = None) -> str:
    try:
        done = _run(["sbatch", *arguments], script)
    except FileNotFoundError:
        raise NoScheduler(
            "sbatch is not on this machine; submit from a login node of the cluster (--dry-run shows the script)."
        ) from None
    said = done.stdout.strip() or done.stderr.strip()
    if done.returncode == 0:
        return said
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
    if any(re.search(SILENT, line, re.IGNORECASE) for line in lines):
        raise NoScheduler(
            "SLURM does not answer on this machine; try again later, or from a login node of the cluster."
        )
    for pattern, sentence in REFUSALS:
        for line in lines:
            if re.search(pattern, line, re.IGNORECASE):
                raise Refused(f"{sentence.format(cluster=cluster, line=line, **_names(cluster))}.")
    raise Refused(f"SLURM does not take the job: {lines[-1] if lines else 'it does not say why'}.")


def _names(cluster: Cluster) -> dict[str, str]:
    """Of what was asked for, and of what there is."""
    listed = _run(["sinfo", "--noheader", "--format=%R"]).stdout.split()
    return {
        "account": cluster.account or "(none given)",
        "partition": f"partition {cluster.partition}" if cluster.partition else "the default partition",
        "partitions": ", ".join(sorted(set(listed))) or "none",
    }


def _run(command: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True)
