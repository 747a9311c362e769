"""What happened in the demonstration, whether every arm has learnt, and what to type next."""

from __future__ import annotations

import sys
from pathlib import Path

from conf.compose import overrides
from launch.demo.arm import RANKS, Arm, Interruption
from launch.demo.processes import typed
from launch.report import tables
from launch.report.command import PAGE
from launch.report.compare import Comparison
from launch.report.show import spread

LEARNT = 0.75
"""Of the held-out text's unigram entropy: a held-out loss below it needs more than the frequency of each byte."""


def failures(comparison: Comparison) -> list[str]:
    """A sentence for each arm that has not learnt."""
    ratios = {arm.name: arm.quantities["entropy_ratio"] for arm in comparison.arms}
    return [
        f"{name} has not learnt: its held-out loss is {spread(ratio, 'ratio')} × the unigram entropy, above {LEARNT}."
        for name, ratio in ratios.items()
        if ratio is None or not ratio.mean <= LEARNT
    ]


def tell(comparison: Comparison, killed: Arm, interruption: Interruption | None, out: Path, time: str) -> str:
    """The last lines, for someone who sees this for the first time. time: how long it took, in a sentence."""
    names = ", ".join(arm.name for arm in comparison.arms)
    tokens = comparison.arms[0].records[0].tokens
    ratios = ", ".join(f"{a.name} {spread(a.quantities['entropy_ratio'], 'ratio')}" for a in comparison.arms)
    directories = [str(arm.records[0].directory) for arm in comparison.arms]
    mine = str(killed.directory.with_name("mine"))
    change = ["train", "experiment=demo", "attention=mla", "attention.latent=8", *overrides({"run.dir": mine})]
    compare = ["launch", "report", *directories, mine, "--out", "runs/report"]
    generate = ["models", "generate", "--model", directories[0], "--prompt", "def "]
    lines = [
        tables.plain(tables.numbers(comparison)),
        *(f"- {note}" for note in comparison.notes),
        "",
        "What happened",
        f"  {names}: one model with three attention schemes; {RANKS} ranks trained each on the same",
        f"  {tokens:,} tokens in the same order.",
        *(f"  {line}" for line in _of_the_kill(killed, interruption)),
        f"  Held-out loss ÷ unigram entropy: {ratios}; at most {LEARNT} counts as learnt.",
        f"  {time}",
        "",
        "What to type next",
        f"  train with a smaller latent:  {_typed(change)}",
        f"  compare it with the others:   {_typed(compare)}",
        f"  let an arm write:             {_typed(generate)}",
        f"  see what can be changed:      {_typed(['train', '--show', 'experiment=demo'])}",
        "",
        "Where to look, in a browser",
        f"  {out / PAGE}; beside it report.md, report.json and the plots",
    ]
    return "\n".join(lines)


def took(seconds: float, here: list[str]) -> str:
    """here: what had been made before."""
    if not here:
        return f"It took {seconds:.0f} s."
    *others, last = here
    parts = f"{', '.join(others)} and {last} were" if others else f"{last} was"
    return f"It took {seconds:.0f} s, because {parts} there already."


def _of_the_kill(arm: Arm, interruption: Interruption | None) -> list[str]:
    if interruption is None:
        return [f"{arm.name} came to its end before it could be killed."]
    killed = f"{arm.name} was killed with SIGKILL at step {interruption.step};"
    resumed, record = arm.resumed_from(), arm.record()
    if resumed is None or record is None:
        return [f"{killed} it began anew."]
    now = {line["step"]: line["loss"] for line in record.steps}
    twice = [step for step in interruption.losses if step > resumed and step in now]
    apart = max((abs(now[step] - interruption.losses[step]) for step in twice), default=0.0)
    same = "the same losses to the last bit" if apart == 0 else f"losses at most {apart:.2g} apart"
    return [
        f"{killed} the same command resumed it from step {resumed},",
        f"and the {len(twice)} steps that were trained twice gave {same}.",
    ]


def _typed(module_and_arguments: list[str]) -> str:
    return typed([sys.executable, "-m", *module_and_arguments])
