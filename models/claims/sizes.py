"""Claims about how large models are."""

from __future__ import annotations

from models import cost
from models.claims.claim import Judgement
from models.claims.measure import changed, model, unshared


def gemma_e2b() -> Judgement:
    """Claim 5."""
    size = cost.parameters(model("gemma4_e2b"))
    scalars = len(model("gemma4_e2b").blocks)
    effective, total = size.active - scalars, size.total - scalars
    dead = cost.parameters(changed("gemma4_e2b", unshared)).total - size.total
    holds = (round(effective / 1e9, 1), round(total / 1e9, 1)) == (2.3, 5.1)
    rest = 5.1e9 - total - dead
    return Judgement(
        "reproduced" if holds else "true under an assumption" if round(effective / 1e9, 1) == 2.3 else "refuted",
        f"{effective:,} and {total:,}",
        f"The language model multiplies a token by {effective:,} parameters and holds {total:,}, the "
        f"{size.looked_up:,} of its per-layer embeddings among them (each layer's one scalar left out). The released "
        f"files hold {dead:,} more, keys and values of the sharing layers that nobody reads; "
        f"{rest / 1e9:.2f} B are still missing to 5.1 B.",
        "5.1 B counts the towers for images and sound, which are not part of the language model",
        {"effective": effective, "total": total, "dead": dead},
    )


NAMES = (
    ("gemma4_26b_a4b", "26B-A4B", 26e9, 4e9),
    ("laguna_xs2", "33B-A3B", 33e9, 3e9),
    ("zaya1_8b", "8B", 8e9, None),
    ("deepseek_v4_pro", "1.6T-A49B", 1600e9, 49e9),
    ("deepseek_v4_flash", "284B-A13B", 284e9, 13e9),
)
"""Model, what it is called, and the two numbers in that."""

NEAR = 0.05


def names_of_models() -> Judgement:
    """Claim 6: a name is right where it is within 5 % of the total and of the active parameters."""
    measured: dict[str, float] = {}
    wrong: list[str] = []
    rows: list[tuple[str, ...]] = [("named", "total", "active", "with the rows looked up", "within 5 %")]
    for name, called, total, active in NAMES:
        size = cost.parameters(model(name))
        near = _near(size.total, total) and (
            active is None or _near(size.active, active) or _near(size.active + size.looked_up, active)
        )
        if not near:
            wrong.append(called)
        counted = [_billions(n) for n in (size.total, size.active, size.active + size.looked_up)]
        rows.append((called, *counted, "yes" if near else "no"))
        measured |= {f"{name} total": size.total, f"{name} active": size.active, f"{name} looked up": size.looked_up}
    pro = measured["deepseek_v4_pro total"] + cost.parameters(model("deepseek_v4_pro")).mtp
    zaya = model("zaya1_8b")
    inner = measured["zaya1_8b total"] - cost.parameters_by_part(zaya)["embedding"]
    measured |= {"deepseek_v4_pro with prediction": pro, "zaya1_8b without embedding": inner}
    explained = wrong == ["8B"] and _near(inner, 8e9)
    return Judgement(
        "reproduced" if not wrong else "true under an assumption" if explained else "refuted",
        f"{len(NAMES) - len(wrong)} of {len(NAMES)} within 5 %",
        f"ZAYA1's 8 B leave out its embedding: {_billions(inner)} without it. DeepSeek-V4-Pro's 1.6T is "
        f"{_billions(pro)} with the module that predicts one token further, which generation does not use.",
        "" if not wrong else "ZAYA1's embedding is not counted",
        measured,
        tuple(rows),
    )


def _near(number: float, named: float) -> bool:
    return abs(number / named - 1) <= NEAR


def _billions(number: float) -> str:
    return f"{number / 1e9:,.2f} B"
