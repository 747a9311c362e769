"""`claims`: what the press says, judged by what the models here measure."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from conf.schema import Refused
from models.claims.document import page, section
from models.claims.table import CLAIMS


def run(arguments: argparse.Namespace) -> None:
    """Print the claims that are asked for, or write the whole page."""
    wanted = arguments.number or [claim.number for claim in CLAIMS]
    if unknown := set(wanted) - {claim.number for claim in CLAIMS}:
        raise Refused(f"there is no claim {min(unknown)}; they are numbered from 1 to {len(CLAIMS)}.")
    if arguments.out is not None and (arguments.number or arguments.json):
        raise Refused("--out writes the whole page; leave the numbers and --json out.")
    judged = {claim: claim.judge() for claim in CLAIMS if claim.number in wanted}
    if arguments.out is not None:
        Path(arguments.out).write_text(page(judged))
    elif arguments.json:
        found = {c.number: {"claim": c.said, **dataclasses.asdict(judged[c])} for c in judged}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(section(*one) for one in judged.items()) if arguments.number else page(judged), end="")
        print(end="\n" if arguments.number else "")
