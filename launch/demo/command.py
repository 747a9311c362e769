"""`python -m launch demo`: real text, three arms on two ranks each, one killed and resumed, and their comparison."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from data import manifest
from launch.arguments import Parser
from launch.demo.arm import RANKS, Arm, ArmFailed, Interruption
from launch.demo.story import failures, tell, took
from launch.report import command as report

ARMS = ("gqa", "mla", "hca")
KILLED = "mla"


def main(arguments: list[str]) -> int:
    """Returns 0 if every arm has learnt, else 1. Raises Refused before anything is trained."""
    parser = Parser("python -m launch demo", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="of the runs and their report [runs/demo]")
    parser.add_argument("overrides", nargs="*", help="settings for every arm, as for python -m train")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGHUP, signal.default_int_handler)  # a closed terminal: the arm in hand saves and ends
    began = time.monotonic()

    overrides = (*options.overrides, *_device())
    arms = [Arm(name, options.dir / name, overrides) for name in ARMS]
    configs = {arm.name: arm.config() for arm in arms}
    corpus = Path(configs[KILLED].data.train.get("path", ""))
    here = ["the text"] if (corpus / manifest.NAME).exists() else []
    here += [arm.name for arm in arms if arm.is_finished()]
    code = _prepare(corpus)
    if code:
        return code
    for config in configs.values():  # a corpus that cannot be read is refused here, not by each rank
        config.data.open_train()
        config.data.open_validation()

    options.dir.mkdir(parents=True, exist_ok=True)
    file = options.dir / "interruption.json"
    try:
        for arm in arms:
            _head(f"train {arm.name}: {RANKS} ranks, {configs[arm.name].train.steps} steps")
            if arm.name == KILLED and Interruption.load(file) is None:
                _kill(arm, configs[arm.name].checkpoint.every, file)
            arm.train()
    except ArmFailed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1

    _head("compare")
    out = options.dir / "report"
    comparison = report.write([arm.directory for arm in arms], out)
    killed = next(arm for arm in arms if arm.name == KILLED)
    print(tell(comparison, killed, Interruption.load(file), out, took(time.monotonic() - began, here)))
    wrong = failures(comparison)
    for sentence in wrong:
        print(f"failed: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def _kill(arm: Arm, every: int, file: Path) -> None:
    interruption = arm.train_and_kill(every)
    if interruption is not None:
        interruption.save(file)
        _head(f"killed {arm.name} with SIGKILL at step {interruption.step}; now the same command again")


def _prepare(corpus: Path) -> int:
    """The running Python's own standard library as a corpus, unless it is there. Returns an exit code."""
    if (corpus / manifest.NAME).exists():
        return 0
    _head("prepare text: the source of this Python's standard library")
    return subprocess.run([sys.executable, "-m", "data", "prepare", "source=stdlib", f"out={corpus}"]).returncode


def _device() -> list[str]:
    """Two ranks need two GPUs, as two ranks of NCCL cannot share one; otherwise the processor serves."""
    gpus = torch.cuda.device_count()
    return ["run.device=cpu"] if 0 < gpus < RANKS else []


def _head(text: str) -> None:
    print(f"\n== {text}", flush=True)
