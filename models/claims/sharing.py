"""Claims about layers that read another layer's keys and values (Gemma 4 E2B and E4B)."""

from __future__ import annotations

from models import cost
from models.cache import Cache
from models.claims.claim import Judgement, Verdict
from models.claims.measure import LONG, allocated, changed, model, unshared
from models.commands.cost_tables import size

E2B, E4B = "gemma4_e2b", "gemma4_e4b"


def layers_that_write() -> Judgement:
    """Claim 1."""
    writers, readers, first = {}, {}, []
    for name in (E2B, E4B):
        stored = {layer for layer, _ in Cache(model(name), 1, LONG, "meta").stores}
        writers[name] = len(stored)
        readers[name] = len(model(name).attentions()) - writers[name]
        first.append(stored == set(range(len(stored))))
    holds = all(first) and (writers[E2B], readers[E2B], writers[E4B], readers[E4B]) == (15, 20, 24, 18)
    return Judgement(
        "reproduced" if holds else "refuted",
        f"{writers[E2B]} + {readers[E2B]} and {writers[E4B]} + {readers[E4B]}",
        f"A decode cache of E2B allocates the first {writers[E2B]} layers, and the other {readers[E2B]} have no "
        f"slot of their own; of E4B it allocates {writers[E4B]}, and {readers[E4B]} read those.",
        measured={"e2b": writers[E2B], "e2b readers": readers[E2B], "e4b": writers[E4B], "e4b readers": readers[E4B]},
    )


def saving_of_e2b() -> Judgement:
    """Claim 2."""
    return _saving(E2B, 2.7, digits=1)


def saving_of_e4b() -> Judgement:
    """Claim 3."""
    return _saving(E4B, 6, digits=0)


def _saving(name: str, claimed: float, digits: int) -> Judgement:
    """At 128K in bf16, by three counts: as allocated; without windows; and as if every sharing layer were the smallest
    one that shares, which keeps all tokens."""
    shared, alone = model(name), changed(name, unshared)
    windowed = allocated(alone, LONG)["total"] - allocated(shared, LONG)["total"]
    naive = cost.kv_bytes(shared, LONG, naive=True, shared=False)["total"]
    naive -= cost.kv_bytes(shared, LONG, naive=True)["total"]
    entries = [cost.AS_DECLARED.bytes(slot) for a in shared.attentions() if not a.writes for slot in a.slots()]
    recipe = len(entries) * min(entries) * LONG
    verdict: Verdict = "refuted"
    assumption = f"every sharing layer kept all {LONG:,} tokens, as no engine with windows does"
    if round(windowed / 1e9, digits) == claimed:
        verdict, assumption = "reproduced", ""
    elif round(naive / 1e9, digits) == claimed:
        verdict = "true under an assumption"
    elif round(recipe / 1e9, digits) == claimed:
        verdict = "true under an assumption"
        assumption += f", and all {len(entries)} had the {min(entries):,.0f} bytes a token of the sliding ones"
    return Judgement(
        verdict,
        f"{windowed:,} B",
        f"The cache that is allocated shrinks by {windowed:,} B ({size(windowed)}), because most sharing layers keep a "
        f"window. Without windows it would be {naive:,.0f} B, and counting every sharing layer as a sliding one that "
        f"keeps everything gives {recipe:,.0f} B. What a decode step reads does not shrink at all: each reader still "
        f"reads ({size(cost.read_bytes_per_step(shared, LONG))} with and "
        f"{size(cost.read_bytes_per_step(alone, LONG))} without sharing).",
        assumption,
        {"windowed": windowed, "naive": naive, "recipe": recipe},
    )


def share_saved() -> Judgement:
    """Claim 4."""
    saved = {}
    for name in (E2B, E4B):
        with_windows = [allocated(found, LONG)["total"] for found in (changed(name, unshared), model(name))]
        without = [cost.kv_bytes(model(name), LONG, naive=True, shared=shared)["total"] for shared in (False, True)]
        saved[name] = [100 * (1 - shared / alone) for alone, shared in (with_windows, without)]
    holds = all(abs(percent - 50) <= 10 for percents in saved.values() for percent in percents)
    return Judgement(
        "reproduced" if holds else "refuted",
        f"{saved[E2B][0]:.1f} % and {saved[E4B][0]:.1f} %",
        f"E2B saves {saved[E2B][0]:.1f} %, E4B {saved[E4B][0]:.1f} %, each within ten points of a half. The share "
        f"is the same whether windows are kept or not ({saved[E2B][1]:.1f} and {saved[E4B][1]:.1f} %): it is the "
        "one figure about sharing that does not depend on how bytes are counted.",
        measured={"e2b": saved[E2B][0], "e4b": saved[E4B][0], "e2b naive": saved[E2B][1], "e4b naive": saved[E4B][1]},
    )
