"""Claims about what GPUs hold, and what they wait for."""

from __future__ import annotations

from dataclasses import replace

from models import cost
from models.claims.claim import Judgement
from models.claims.measure import BF16, LONG, MILLION, PACKED, changed, fits, model
from models.commands.cost_tables import size
from models.config import resolve
from models.contract import BYTES
from models.gpu import GPUS
from models.model import Model
from models.storage import Storage

H100, NODE = GPUS["h100"], 8 * GPUS["h200"].memory


def memory_bound() -> Judgement:
    """Claim 15."""
    asked: list[tuple[str, str, Storage]] = [
        ("mixtral_8x7b", "Mixtral, GQA", BF16),
        ("qwen3_30b_a3b", "Qwen3, GQA", BF16),
        ("laguna_xs2", "Laguna, GQA", BF16),
        ("deepseek_v3", "DeepSeek-V3, MLA, bf16", BF16),
        ("deepseek_v3", "DeepSeek-V3, MLA, packed in fp8", PACKED),
    ]
    measured: dict[str, float] = {}
    rows: list[tuple[str, ...]] = [("model", "operations a byte read", "of the H100's ridge")]
    for name, called, store in asked:
        measured[called] = found = cost.flop_per_byte(model(name), LONG, store)
        rows.append((called, f"{found:.1f}", f"{100 * found / H100.ridge:.0f} %"))
    below = [called for called, found in measured.items() if found <= H100.ridge]
    latent, packed = list(measured.values())[-2:]
    return Judgement(
        "reproduced" if len(below) == len(measured) else "refuted" if not below else "true under an assumption",
        f"{min(measured.values()):.0f} to {packed:.0f} operations a byte; the ridge is at {H100.ridge:.0f}",
        f"Reading the cache at 128K in a decode step, an H100 (dense bf16 peak ÷ bandwidth: {H100.ridge:.1f}) "
        "waits for memory with grouped queries. Absorbed latents that 128 heads share sit at the ridge: "
        f"{latent:.0f} operations a byte in bf16, and {packed:.0f} once they are stored in fp8, where computing "
        "takes longer than reading.",
        "few query heads read each KV head, as in GQA",
        measured,
        tuple(rows),
    )


def long_windows() -> Judgement:
    """Claim 18."""
    heads = {"scheme": "gqa", "heads": 128, "kv_heads": 8, "head_dim": 128}
    asked: list[tuple[str, Model, Storage]] = [
        ("GQA-8 × 128, 61 layers, bf16", changed("deepseek_v3", lambda layer: replace(layer, attention=heads)), BF16),
        ("DeepSeek-V3, bf16", model("deepseek_v3"), BF16),
        ("DeepSeek-V3.2, packed", model("deepseek_v32"), PACKED),
        ("DeepSeek-V4-Pro, packed", model("deepseek_v4_pro"), PACKED),
        ("DeepSeek-V4-Flash, packed", model("deepseek_v4_flash"), PACKED),
    ]
    measured: dict[str, float] = {}
    rows: list[tuple[str, ...]] = [
        ("cache", "1M", "10M", "10M in an H100", "10M in 8 × H200", "longest beside 4-bit weights, 8 × H200")
    ]
    viable = 0
    for called, of, store in asked:
        one, ten = (cost.kv_bytes(of, n * MILLION, store)["total"] for n in (1, 10))
        longest = fits(of, NODE, BYTES["fp4"], store)
        linear = round(cost.exponent([MILLION, 10 * MILLION], [one, ten]), 2) == 1
        viable += linear and longest >= 10 * MILLION
        inside = ["yes" if ten <= memory else "no" for memory in (H100.memory, NODE)]
        rows.append((called, size(one), size(ten), *inside, f"{longest / 1e6:.1f} M tokens"))
        measured |= {f"{called} 1M": one, f"{called} 10M": ten, f"{called} longest": longest}
    return Judgement(
        "reproduced" if not viable else "refuted" if viable == len(asked) else "true under an assumption",
        f"10M tokens are {rows[-1][2]} (V4-Flash) to {rows[1][2]} (GQA-8)",
        f"All of these caches grow linearly, and {viable} of {len(asked)} hold 10M tokens of one session beside 4-bit "
        f"weights in a node of 8 H200 ({size(NODE)}); an H100 has {size(H100.memory)}. What decides is the slope. "
        "Whether a model is any good at such lengths is another question.",
        "the slope is that of eight KV heads of 128 in bf16",
        measured,
        tuple(rows),
    )


SMALL = ("gemma4_e2b", "gemma4_e4b", "zaya1_8b", "laguna_xs2", "gemma4_26b_a4b", "gemma4_31b", "qwen3_30b_a3b")


def small_gpus() -> Judgement:
    """Claim 19: the context that 24 GB hold beside 4-bit weights, against what 8 A100 hold of the same layers and heads
    as plain multi-head attention, each query head with keys and values of its own, beside bf16 weights."""
    card, cluster = GPUS["rtx4090"].memory, 8 * GPUS["a100"].memory
    measured: dict[str, float] = {}
    reached: list[str] = []
    rows: list[tuple[str, ...]] = [("model", "24 GB, bf16 weights", "24 GB, 4-bit weights", "plain heads, 8 × A100")]
    for name in SMALL:
        of, heads = model(name), [layer.attention for layer in resolve(model(name).config)]
        plain = sum(2 * BYTES["bf16"] * one.heads * one.head_dim for one in heads)
        needed = int((cluster - BYTES["bf16"] * cost.parameters(of).total) / plain)
        held = [fits(of, card, BYTES[weights], BF16) for weights in ("bf16", "fp4")]
        rows.append((name, *(f"{n:,}" if n else "weights do not fit" for n in held), f"{needed:,}"))
        measured |= {f"{name} bf16": held[0], f"{name} fp4": held[1], f"{name} needed": needed}
        if held[1] >= needed:
            reached.append(name)
    return Judgement(
        "reproduced" if len(reached) == len(SMALL) else "refuted" if not reached else "true under an assumption",
        f"{len(reached)} of {len(SMALL)} models",
        f"One RTX 4090 (24 GB) holds for {', '.join(reached) or 'none'} what the same layers and heads would need "
        "8 A100 (640 GB) for, if each query head kept keys and values of its own, for all tokens, in every layer. "
        "Activations are not counted, and no model was trained for such lengths: the caches fit, that is all.",
        f"the model is one of {', '.join(reached) or 'none'}",
        measured,
        tuple(rows),
    )
