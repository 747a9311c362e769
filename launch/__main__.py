"""`python -m launch COMMAND`: what is about more than one run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib import import_module

from conf.schema import Refused, unknown_choice

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75

# command: the module whose `main` takes the arguments and returns the exit code; what it does
COMMANDS = {
    "demo": ("launch.demo.command", "pretrain small arms with different KV compression, kill and resume one, compare"),
    "report": ("launch.report.command", "compare runs: tables, plots and one page"),
    "submit": ("launch.slurm.submit", "check a run, freeze it into its directory, and hand it to SLURM"),
    "status": ("launch.slurm.status", "what runs, what waits and for what, what ended and why"),
    "study": ("launch.study.command", "train every arm of a study with every seed, and say what differs beyond noise"),
    "speed": ("launch.speed", "how fast this machine trains a configuration, without data and checkpoints"),
}


def main(arguments: list[str]) -> int:
    """Run a command. Returns the exit code: 0 done, 1 failed, 2 refused, 75 interrupted (run it again)."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return DONE
        command, *rest = arguments
        if command not in COMMANDS:
            raise Refused(unknown_choice("the command", command, list(COMMANDS)))
        run: Callable[[list[str]], int] = import_module(COMMANDS[command][0]).main
        return run(rest)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"failed: {where}{error.strerror or error}.", file=sys.stderr)
        return FAILED


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:8} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m launch COMMAND ...   (COMMAND --help says more)", "", *lines])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
