"""Claims about what models are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from models import cost
from models.claims.claim import Judgement
from models.claims.measure import LONG, allocated, built, changed, model, plans, shipped, with_attention
from models.contract import Slot
from models.parameter import named_specs

V4 = ("deepseek_v4_pro", "deepseek_v4_flash")


def hyper_connections() -> Judgement:
    """Claim 10: the same model with a plain residual, and what that does to the cache."""
    own = model("deepseek_v4_flash")
    plain = built(replace(shipped("deepseek_v4_flash"), residual={"scheme": "plain"}))
    held, without = (allocated(found, LONG)["total"] for found in (own, plain))
    parameters = [cost.parameters_by_part(found).get("residual", 0) for found in (own, plain)]
    attention = [cost.parameters_by_part(found)["attention"] for found in (own, plain)]
    same = held == without and attention[0] == attention[1]
    return Judgement(
        "refuted" if same else "reproduced",
        f"{held - without} of {held:,} B change",
        f"With a plain residual instead, V4-Flash's cache at 128K holds {without:,} B, as before, and its attention "
        f"{attention[1]:,} parameters, as before. What goes are {parameters[0] - parameters[1]:,} parameters "
        "around the sublayers: mHC are manifold-constrained hyper-connections (arXiv 2512.24880), several residual "
        "streams.",
        "",
        {"with": held, "without": without, "parameters": parameters[0] - parameters[1]},
    )


def mechanisms_of_v4() -> Judgement:
    """Claim 11."""
    used = {name: Counter(plan.attention["scheme"] for plan in plans(name)) for name in V4}
    earlier = {plan.attention["scheme"] for name in ("deepseek_v3", "deepseek_v32") for plan in plans(name)}
    common = earlier.intersection(*used.values())
    strides = [_chosen(name)[0].stride for name in (*V4, "deepseek_v32")]
    words = "; ".join(
        f"{called} {', '.join(f'{number} {scheme}' for scheme, number in sorted(used[name].items()))}"
        for name, called in zip(V4, ("Pro", "Flash"), strict=True)
    )
    holds = bool(common) or strides[0] == strides[2]
    return Judgement(
        "reproduced" if holds else "refuted",
        f"{len(common)} schemes in common; an entry chosen is {strides[0]} tokens, in V3.2 {strides[2]}",
        f"By layer, the plans hold: {words}. None of these is what V3 or V3.2 is made of "
        f"({', '.join(sorted(earlier))}): there is no latent that is expanded to heads. V4's indexer is V3.2's "
        f"idea on other things: what it scores, and chooses, are entries of {strides[0]} compressed tokens.",
        "",
        {"common": len(common), "tokens of what V4 chooses": strides[0], "tokens of what V3.2 chooses": strides[2]},
    )


def _chosen(name: str) -> list[Slot]:
    """The slots of which queries read a choice."""
    return [slot for attention in model(name).attentions() for slot in attention.slots() if slot.chosen is not None]


def convolutions() -> Judgement:
    """Claim 14."""
    attentions, feedforwards = model("zaya1_8b").attentions(), model("zaya1_8b").feedforwards()
    scoring = 0
    for attention in attentions:
        everything = [slot for slot in attention.slots() if slot.kind == "entry" and slot.reach is None]
        further = attention.flops(1, 2 * LONG).scores - attention.flops(1, LONG).scores
        scoring += bool(everything) and further > 0
    experts = [_by_role(modules, "expert", "expert_output") for modules in (attentions, feedforwards)]
    filters = _by_role(attentions, "convolution")
    holds = scoring == 0 or experts[0] > 0
    return Judgement(
        "reproduced" if holds else "refuted",
        f"{scoring} of {len(attentions)} layers keep softmax; {experts[0]} expert parameters in attention",
        f"In {scoring} of {len(attentions)} layers a query is scored against every entry before it, through the "
        f"softmax core of every other scheme here. The convolutions are {filters:,} parameters that mix neighbours "
        f"before that. The experts' {experts[1]:,} parameters all stand in the feed-forward.",
        "",
        {"scoring": scoring, "layers": len(attentions), "in attention": experts[0], "in feed-forward": experts[1]},
    )


def _by_role(modules: Sequence[nn.Module], *roles: str) -> int:
    specs = [(parameter, spec) for module in modules for _, parameter, spec in named_specs(module)]
    return sum(parameter.numel() for parameter, spec in specs if spec.role in roles)


def budgeted_heads() -> Judgement:
    """Claim 16: as many query heads in the full layers as in the others."""
    most = max(plan.attention["heads"] for plan in plans("laguna_xs2"))
    even, own = changed("laguna_xs2", with_attention(heads=most)), model("laguna_xs2")
    held = [allocated(found, LONG)["total"] for found in (even, own)]
    scores = [cost.flops(found, 1, LONG).scores for found in (even, own)]
    return Judgement(
        "reproduced" if held[1] < held[0] else "refuted",
        f"{held[0] - held[1]} of {held[0]:,} B change",
        f"With {most} query heads in every layer the cache at 128K holds {held[0]:,} B, as with the budget, whose "
        f"KV heads are the same. What the budget saves are score operations: {scores[1] / 1e9:.1f} G a decode step "
        f"at 128K, not {scores[0] / 1e9:.1f} G, {100 * (1 - scores[1] / scores[0]):.0f} % less.",
        "KV heads were budgeted, too",
        {"even": held[0], "budgeted": held[1], "even scores": scores[0], "budgeted scores": scores[1]},
    )


def hyper_connections_in_production() -> Judgement:
    """Claim 17: in the released configurations, which the shipped models are tested to be."""
    found = {}
    for name in V4:
        sublayers = model(name).residuals()
        found[name] = (sum(any(True for _ in residual.parameters()) for residual in sublayers), len(sublayers))
    used = all(learned == all_of_them for learned, all_of_them in found.values())
    (pro, pro_all), (flash, flash_all) = found.values()
    parameters = cost.parameters_by_part(model(V4[0]))["residual"]
    return Judgement(
        "refuted" if used else "reproduced",
        f"{pro} of {pro_all} sublayers of V4-Pro, {flash} of {flash_all} of V4-Flash",
        f"The released DeepSeek-V4-Pro writes {pro} of its {pro_all} sublayers back through hyper-connections, "
        f"{parameters:,} parameters of them, and V4-Flash {flash} of {flash_all}.",
        "",
        {"pro": pro, "pro sublayers": pro_all, "flash": flash, "flash sublayers": flash_all},
    )


def roles_of_heads() -> Judgement:
    """Claim 20."""
    return Judgement(
        "untestable here",
        "–",
        "Published for video diffusion (arXiv 2605.09681): heads are told apart by how much they look at the "
        "running chunk of frames, which no language model has. Nothing here could reproduce or refute its speed.",
    )
