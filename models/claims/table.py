"""Every claim in order, beside the function that judges it and the commands that show its numbers."""

from __future__ import annotations

from models.claims import caches, hardware, sharing, sizes, structure, study
from models.claims.claim import Claim

_SHARED = "cost gemma4_e2b gemma4_e4b --context 131072"
_MILLION = "--context 1000000,1048576"

CLAIMS = (
    Claim(
        1,
        "Gemma 4 E2B has 35 layers, of which the first 15 compute keys and values and 20 reuse them; E4B 24 + 18",
        sharing.layers_that_write,
        ("describe gemma4_e2b", "describe gemma4_e4b"),
    ),
    Claim(2, "E2B saves 2.7 GB at 128K in bf16", sharing.saving_of_e2b, (_SHARED,)),
    Claim(3, "E4B saves about 6 GB at 128K", sharing.saving_of_e4b, (_SHARED,)),
    Claim(4, "Sharing saves about 50 % of the cache", sharing.share_saved, (_SHARED,)),
    Claim(5, "E2B has 2.3 B effective parameters, 5.1 B with embeddings", sizes.gemma_e2b, (_SHARED,)),
    Claim(
        6,
        "26B-A4B, Laguna 33B-A3B, ZAYA1 8B, DeepSeek-V4-Pro 1.6T-A49B, V4-Flash 284B-A13B",
        sizes.names_of_models,
        ("cost gemma4_26b_a4b laguna_xs2 zaya1_8b deepseek_v4_pro deepseek_v4_flash --context 4096",),
    ),
    Claim(
        7,
        "At 1M tokens V4-Pro needs 27 % of V3.2's operations a token and 10 % of its cache, V4-Flash 10 % and 7 %",
        caches.deepseek_v4,
        (
            f"cost deepseek_v4_pro deepseek_v4_flash --baseline deepseek_v32 {_MILLION} --store packed --weights fp8",
            f"cost deepseek_v4_pro deepseek_v4_flash --baseline deepseek_v32 {_MILLION} --store bf16",
        ),
    ),
    Claim(
        8,
        "MLA cuts the cache by an order of magnitude, far more than GQA",
        caches.latents_against_heads,
        ("cost deepseek_v3 glm5_1 kimi_k2_6 mixtral_8x7b --context 131072",),
    ),
    Claim(
        9,
        '"Multi-head compression" gives 4–8× without a perplexity spike',
        study.ratio_of_compression,
    ),
    Claim(
        10,
        "mHC means multi-head compression, and works on heads, on K and V, or on the heads' outputs",
        structure.hyper_connections,
        ("describe deepseek_v4_flash",),
    ),
    Claim(
        11,
        "DeepSeek-V4 uses MLA, and the DSA selector on tokens",
        structure.mechanisms_of_v4,
        ("describe deepseek_v4_pro", "describe deepseek_v32"),
    ),
    Claim(
        12,
        "Sparse attention reduces memory",
        caches.sparse_attention,
        (
            "cost deepseek_v32 --baseline deepseek_v3 --context 131072 --store packed",
            "cost deepseek_v32 --baseline deepseek_v3 --context 131072 --store packed,latent=bf16",
        ),
    ),
    Claim(13, "The KV cache grows quadratically", caches.growth, ("cost deepseek_v3 laguna_xs2 --json",)),
    Claim(
        14,
        "ZAYA1 replaces softmax attention by convolutions; it is a mixture of experts in the attention",
        structure.convolutions,
        ("describe zaya1_8b", "cost zaya1_8b"),
    ),
    Claim(
        15,
        "Inference has become strictly memory-bound",
        hardware.memory_bound,
        ("cost mixtral_8x7b qwen3_30b_a3b laguna_xs2 deepseek_v3 --context 131072 --gpu 8xh100 --weights fp4",),
    ),
    Claim(
        16,
        "Laguna's budgeting of query heads shrinks the cache",
        structure.budgeted_heads,
        ("describe laguna_xs2",),
    ),
    Claim(
        17,
        "Whether mHC is used in production is unknown",
        structure.hyper_connections_in_production,
        ("describe deepseek_v4_pro",),
    ),
    Claim(
        18,
        "Windows of 1M and 10M tokens are not viable while the cache grows linearly",
        hardware.long_windows,
        (
            "cost deepseek_v32 deepseek_v4_pro deepseek_v4_flash --context 1048576,10485760 --store packed "
            "--gpu 8xh200 --weights fp4",
        ),
    ),
    Claim(
        19,
        "A 24 GB GPU will hold contexts that needed an A100 cluster",
        hardware.small_gpus,
        (f"cost {' '.join(hardware.SMALL)} --gpu rtx4090 --weights fp4",),
    ),
    Claim(
        20,
        "Compressing heads by their static or dynamic role cuts 30 % of memory at 1.35–2.82 times the speed",
        structure.roles_of_heads,
    ),
)
