"""The judgements as one Markdown page: a table, then a paragraph a claim."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import starmap

from models.claims.claim import Claim, Judgement

WIDTH = 120

HEAD = """# Claims of the press, judged

What the press and the surveys of May 2026 say of these schemes, one by one. Every verdict follows from what the models
of `conf/model` hold when they are built, allocate for a cache, and compute; the ninth from the losses that are kept in
`docs/study/study.json`. The page is written by

    python -m models claims --out docs/claims.md

in seconds and without a GPU, and a test compares it with what the code says today. `python -m models claims 2 --json`
prints one claim with its numbers. GB are 10⁹ bytes, 128K are 131,072 tokens, 1M are 1,048,576. *Reproduced* and
*refuted* are meant of the claim as it stands; where it holds for one way of counting alone, that is said."""


def page(judged: Mapping[Claim, Judgement]) -> str:
    """All of it, with a newline at its end."""
    counts = Counter(judgement.verdict for judgement in judged.values())
    summary = ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
    rows = [("", "claim", "verdict", "measured")]
    rows += [(f"[{c.number}](#{c.number})", c.said, j.verdict, j.number) for c, j in judged.items()]
    parts = [HEAD, f"{len(judged)} claims: {summary}.", _table(rows), *starmap(section, judged.items())]
    return "\n\n".join(parts) + "\n"


def section(claim: Claim, judgement: Judgement) -> str:
    """One claim: what it says, what was measured, when it would hold, and the command."""
    holds = "Holds" if judgement.verdict == "true under an assumption" else "It would hold"
    parts = [f'<a id="{claim.number}"></a>\n\n## {claim.number}. {claim.said}']
    parts += [_filled(f"**{judgement.verdict.capitalize()}.** {judgement.paragraph}")]
    if judgement.table:
        parts.append(_table(judgement.table))
    if judgement.assumption:
        parts.append(_filled(f"{holds} if {judgement.assumption}."))
    if claim.shown_by:
        parts.append("\n".join(f"    python -m models {command}" for command in claim.shown_by))
    return "\n\n".join(parts)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
