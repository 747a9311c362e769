"""Claims about what is cached, and what it costs to read."""

from __future__ import annotations

from models import cost
from models.claims.claim import Judgement
from models.claims.measure import BF16, LONG, MILLION, PACKED, allocated, attention, model, shipped
from models.config import resolve
from models.storage import Storage

V3, V32, PRO, FLASH = "deepseek_v3", "deepseek_v32", "deepseek_v4_pro", "deepseek_v4_flash"

STEP = 1_000_000
"""Tokens at which the publisher counts the operations of a decode step."""


def deepseek_v4() -> Judgement:
    """Claim 7."""
    rounded: dict[str, tuple[int, int]] = {}
    measured: dict[str, float] = {}
    rows: list[tuple[str, ...]] = [
        ("percent of V3.2's", "cache, packed", "cache, bf16", "operations, in bf16's", "operations, plain")
    ]
    base = model(V32)
    for name, called in ((PRO, "V4-Pro"), (FLASH, "V4-Flash")):
        percent = {}
        for how, store in (("packed", PACKED), ("bf16", BF16)):
            ours, theirs = (cost.kv_bytes(found, MILLION, store) for found in (model(name), base))
            percent[how] = 100 * (ours["entries"] + ours["windows"]) / (theirs["entries"] + theirs["windows"])
        ours_weighted, theirs_weighted = (cost.weighted(found, 1, STEP, PACKED, "fp8") for found in (model(name), base))
        percent["weighted"] = 100 * ours_weighted.total / theirs_weighted.total
        percent["plain"] = 100 * cost.flops(model(name), 1, STEP).total / cost.flops(base, 1, STEP).total
        rounded[called] = (round(percent["weighted"]), round(percent["packed"]))
        rows.append((called, *(f"{percent[how]:.2f}" for how in ("packed", "bf16", "weighted", "plain"))))
        measured |= {f"{name} {how}": value for how, value in percent.items()}
    holds = rounded == {"V4-Pro": (27, 10), "V4-Flash": (10, 7)}
    return Judgement(
        "true under an assumption" if holds else "refuted",
        "; ".join(f"{row[0]} {row[3]} % of operations, {row[1]} % of cache" for row in rows[1:]),
        "Both figures come out to the digit, for the formats that the publisher's kernels use. In bf16 on both "
        "sides, and each operation counted once, they are the other two columns: the 10 % of Flash's operations in "
        "particular need the selection to run in fp4.",
        "entries are stored in fp8, V4's index keys in fp4 and V3.2's in fp8, weights are in fp8, and an operation "
        "counts by its format",
        measured,
        tuple(rows),
    )


def latents_against_heads() -> Judgement:
    """Claim 8."""
    own, gqa, measured = {}, {}, {}
    for name in (V3, "glm5_1", "kimi_k2_6"):
        heads = resolve(shipped(name))[0].attention
        latent = BF16.bytes(model(name).attentions()[0].slots()[0])
        expanded = 2 * heads.heads * (heads.nope_dim + heads.rope_dim + heads.value_dim)
        own[name], gqa[name] = expanded / latent, _plain_heads(128, 8) / latent
        measured[f"{name} against its heads"] = own[name]
    latent = BF16.bytes(model(V3).attentions()[0].slots()[0])
    few = _plain_heads(16, 2)
    measured |= {"against GQA-8": gqa[V3], "latent": latent, "GQA-2": few}
    holds = min(own.values()) >= 10
    return Judgement(
        "refuted" if not holds else "reproduced" if min(gqa.values()) >= 10 else "true under an assumption",
        f"{min(own.values()):.0f}–{max(own.values()):.0f}× against its own heads, {gqa[V3]:.1f}× against GQA-8",
        f"A layer leaves {latent:,.0f} B a token. The heads that it expands to would be {own[V3]:.0f}, "
        f"{own['glm5_1']:.0f} and {own['kimi_k2_6']:.0f} times as large (DeepSeek-V3, GLM-5.1, Kimi K2.6). Eight "
        f"KV heads of 128, the usual alternative, are {_plain_heads(128, 8):,.0f} B, {gqa[V3]:.1f} times as much; "
        f"and a model of 16 heads needs no latent to be smaller: two KV heads are {few:,.0f} B.",
        "it is compared with multi-head attention of as many heads as it expands to",
        measured,
    )


def _plain_heads(heads: int, kv_heads: int) -> float:
    """Bytes that grouped attention of 128 dims a head leaves for each token."""
    plan = {"scheme": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": 128}
    return BF16.bytes(attention(heads * 128, plan).slots()[0])


def sparse_attention() -> Judgement:
    """Claim 12."""
    formats = {"bf16 latents": Storage("packed", {"latent": "bf16"}), "fp8": PACKED, "all bf16": BF16}
    added = {
        how: 100 * (cost.kv_bytes_per_token(model(V32), store) / cost.kv_bytes_per_token(model(V3), store) - 1)
        for how, store in formats.items()
    }
    reads = [cost.flops(model(name), 1, LONG).total for name in (V32, V3)]
    sparse = next(a for a in model(PRO).attentions() if any(slot.chosen for slot in a.slots()))
    window, *grown = [slot for slot in sparse.slots() if slot.kind == "entry"]
    kept = sum(PACKED.bytes(slot) / slot.stride for slot in grown)
    whole = PACKED.bytes(window)
    selects_without_saving = min(added.values()) > 0
    compresses = kept < whole
    return Judgement(
        "reproduced" if not selects_without_saving else "true under an assumption" if compresses else "refuted",
        f"DSA +{added['bf16 latents']:.0f} % to +{added['fp8']:.0f} %; CSA −{100 * (1 - kept / whole):.0f} %",
        f"DeepSeek-V3.2's sparse attention keeps every latent and adds an index key: {added['bf16 latents']:.1f} % "
        f"more cache than V3 with latents in bf16, {added['fp8']:.1f} % with both packed, {added['all bf16']:.1f} "
        f"% with both in bf16. It saves operations, {100 * (1 - reads[0] / reads[1]):.0f} % of a decode step at "
        f"128K. A sparse layer of V4 leaves {kept:.0f} B a token where an entry for each token would be "
        f"{whole:.0f} B, because {grown[0].stride} tokens share an entry; "
        f"{PACKED.bytes(grown[-1]) / grown[-1].stride:.0f} B of these are what it selects with.",
        "what is selected from is compressed, too: selecting alone only adds to the cache",
        {**added, "kept": kept, "whole": whole},
    )


def growth() -> Judgement:
    """Claim 13."""
    contexts = [2**n for n in range(12, 19)]
    kinds = [allocated(model("laguna_xs2"), n) for n in contexts]
    full = cost.growth_exponent(model(V3))
    windows = cost.exponent(contexts, [held["windows"] for held in kinds])
    entries = cost.exponent(contexts, [held["entries"] for held in kinds])
    scores = cost.exponent(contexts, [cost.flops(model(V3), n, n).scores for n in contexts])
    return Judgement(
        "reproduced" if round(full, 2) == 2 else "refuted",
        f"tokens^{full:.2f}; scores tokens^{scores:.2f}",
        f"Fitted to what is allocated from 4K to 256K: DeepSeek-V3's cache grows as tokens^{full:.3f}, Laguna's full "
        f"layers as tokens^{entries:.3f}, and its windows as tokens^{abs(windows):.3f}. The operations of "
        f"scoring a prompt are what grows as tokens^{scores:.3f}.",
        "one means the operations of a prompt's scores",
        {"full": full, "windows": windows, "entries": entries, "scores": scores},
    )
