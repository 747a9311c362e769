"""A real SLURM of two nodes on this machine: its own munged, slurmctld and two slurmd, in a folder, on free ports.

Every worker of the test run that needs one starts its own, so tests that run side by side do not see each other's jobs.
Both nodes have this machine's name and address; SLURMD_NODENAME tells them apart, and one folder that node n2 does not
see, where this process may arrange that.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_ports

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where Debian keeps daemons
APART = ["unshare", "--mount"]
WITH_THE_TESTS = ["setpriv", "--pdeathsig", "TERM"]  # a daemon ends with this process, however that ends

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
JobRequeue=1
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=1-0 State=UP
PartitionName=paid Nodes=n1,n2 AllowAccounts=lab State=UP
"""


def missing() -> bool:
    """Whether this machine lacks SLURM."""
    return any(shutil.which(daemon, path=PATH) is None for daemon in DAEMONS)


def can_hide() -> bool:
    """Whether a node can be kept from seeing a folder."""
    return subprocess.run([*APART, "true"], capture_output=True).returncode == 0


@dataclass(frozen=True)
class SlurmCluster:
    """folder: of its files. hidden: a folder that node n2 sees empty. daemons: its processes."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]]

    @property
    def hidden(self) -> Path:
        return self.folder / "hidden"

    @property
    def environment(self) -> dict[str, str]:
        """For commands that are to reach this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """A command of SLURM; what it prints."""
        done = self._ask(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: int) -> str:
        """PENDING, RUNNING, …; empty once SLURM has forgotten it or it has ended."""
        return self._ask("squeue", "--noheader", f"--jobs={job}", "--format=%T").stdout.strip()

    def ended(self, job: int) -> bool:
        return not self.state(job)

    def start_now(self, job: int) -> None:
        """Spare a requeued job the two minutes that SLURM lets pass, counted anew when the last node has let it go.

        Not all of them: a node refuses to start a job again in the second in which it ended.
        """
        self.wait(lambda: self.state(job) == "PENDING", f"job {job} to be requeued")
        restarts = self._restarts(job)
        time.sleep(2)

        def started() -> bool:
            # a short job may be requeued again by now, whose next start is not asked for here
            if self.state(job) != "PENDING" or self._restarts(job) != restarts:
                return True
            self._ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # refused where it has just started
            time.sleep(0.5)
            return False

        self.wait(started, f"job {job} to start")

    def _restarts(self, job: int) -> str:
        """How often it was requeued, as SLURM prints it; empty where SLURM has forgotten the job."""
        found = re.search(r"Restarts=(\d+)", self._ask("scontrol", "show", "job", str(job)).stdout)
        return found[1] if found else ""

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 240.0) -> None:
        """Until `condition` holds; fails naming `what` after `timeout` seconds.

        Asking is a small part of waiting: a command of SLURM would otherwise take from the jobs the core they run on.
        """
        deadline = time.monotonic() + timeout
        while True:
            began = time.monotonic()
            if condition():
                return
            now = time.monotonic()
            assert now < deadline, f"waited {timeout:.0f} s for {what}\n{self.log()}"
            time.sleep(min(max(0.02, 8 * (now - began)), 0.5))

    def log(self) -> str:
        """The last lines of the controller."""
        file = self.folder / "slurmctld.log"
        return "\n".join(file.read_text().splitlines()[-20:]) if file.exists() else ""

    def start(self) -> None:
        """Returns once both nodes take jobs."""
        for name in ("state", "munge", "hidden", *NODES):
            (self.folder / name).mkdir(mode=0o700)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        values = {
            "folder": self.folder,
            "host": socket.gethostname(),
            "user": pwd.getpwuid(os.getuid()).pw_name,
            **dict(zip(("controller", *NODES), free_ports(3), strict=True)),
        }
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = (f"--{option}={self.folder / 'munge' / name}" for option, name in files.items())
        self._daemon("munged", "--foreground", "--force", *munge)
        self.wait(lambda: (self.folder / "munge" / "socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D", "-N", "n1")
        hide = f"mount -t tmpfs none {self.hidden} && exec slurmd -D -N n2"
        self._daemon(*([*APART, "sh", "-c", hide] if can_hide() else ["slurmd", "-D", "-N", "n2"]))
        self.wait(self._takes_jobs, "the nodes")

    def stop(self) -> None:
        """End the jobs, then the daemons."""
        try:
            if self._takes_jobs():
                self.run("scancel", "--full", f"--user={os.getuid()}")
                self.run("scancel", "--full", "--signal=KILL", f"--user={os.getuid()}")
                self.wait(lambda: not self.run("squeue", "--noheader"), "jobs to end")
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
                try:
                    daemon.wait(60)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def _daemon(self, *command: str) -> None:
        output = (self.folder / "daemons.log").open("ab")
        environment = {**os.environ, **self.environment, "PATH": PATH}
        with output:
            command = (*WITH_THE_TESTS, *command)
            self.daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    def _takes_jobs(self) -> bool:
        listed = self._ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        states = listed.stdout.split()
        return len(states) == len(NODES) and not {"down", "down*", "unknown", "unknown*"} & set(states)

    def _ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
