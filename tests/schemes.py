"""The table of schemes: one row for each variant that must have every property. A new scheme adds its row here.

A row is a model small enough to be run hundreds of times; its sizes differ, so that a dim taken for another one shows.
Nothing but a row's plan says what scheme it is: tests read the rest from the slots that the model declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch

from conf import schema
from models.config import ModelConfig
from models.contract import NOTHING, Slot
from models.model import Model
from models.sequence import Whole

VOCAB = 23

Plan = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """layers: the plans of the layers, in order of depth. model: further keys of the model's configuration."""

    layers: tuple[Plan, ...]
    model: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> ModelConfig:
        values = {"vocab": VOCAB, "width": 16, "layers": [{"of": list(self.layers)}], **self.model}
        return schema.build(ModelConfig, values, "row")

    def model_in(self, parameters: torch.dtype, compute: torch.dtype | None = None) -> Model:
        """The row's model, every parameter and router bias perturbed; computes in the parameters' dtype unless told."""
        model = Model(self.config(), compute or parameters).to(parameters)
        model.initialise(seed=1)
        perturb(model)
        return model

    @cached_property
    def slots(self) -> list[Slot]:
        """Of all attentions, in order of depth."""
        with torch.device("meta"):
            return [slot for attention in Model(self.config()).attentions() for slot in attention.slots()]

    def lengths(self) -> list[int]:
        """1, m−1, m, m+1, 2m+1, W, W+1, 3W for each stride m and window W of the row; a few where it has neither."""
        strides = {slot.stride for slot in self.slots if slot.stride > 1}
        windows = {slot.reach for slot in self.slots if slot.reach is not None}
        lengths = {1, 2, 9}
        lengths |= {length for m in strides for length in (m - 1, m, m + 1, 2 * m + 1)}
        lengths |= {length for w in windows for length in (w, w + 1, 3 * w)}
        return sorted(lengths)


@torch.no_grad()
def perturb(model: Model) -> None:
    """Move everything off its initial value, where zeros and ones hide mistakes; not the experts of a table."""
    generator = torch.Generator().manual_seed(2)
    for tensor in [*model.parameters(), *model.buffers()]:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.is_floating_point():
            tensor.add_((0.25 * noise).to(tensor.dtype))


def tokens(num_rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def packed(rows: list[list[int]]) -> Whole:
    """Documents of these lengths, one after another in each row; the shorter rows are padded. As a batch has them, in
    int32."""
    length = max(sum(row) for row in rows)
    position = torch.zeros(len(rows), length, dtype=torch.int32)
    document = torch.full((len(rows), length), NOTHING, dtype=torch.int32)
    for b, row in enumerate(rows):
        start = 0
        for index, size in enumerate(row):
            position[b, start : start + size] = torch.arange(size)
            document[b, start : start + size] = index
            start += size
    return Whole(position, document)


DENSE: Plan = {"scheme": "dense", "hidden": 20}

SOFTMAX: Plan = {
    "scheme": "moe",
    "experts": 5,
    "top_k": 2,
    "hidden": 8,
    "balance_loss": 0.3,
    "z_loss": 0.1,
}

SIGMOID: Plan = {
    "scheme": "moe",
    "experts": 6,
    "top_k": 3,
    "hidden": 8,
    "shared_hidden": 7,
    "router": {"affinity": "sigmoid", "bias": True, "groups": 3, "kept_groups": 2, "scaling": 2.5},
    "balance_loss": 0.3,
}

UNNORMALISED: Plan = {**SOFTMAX, "router": {"normalise": False, "bias": True}, "z_loss": 0.0}


HASHED: Plan = {
    "scheme": "moe",
    "experts": 5,
    "top_k": 2,
    "hidden": 8,
    "shared_hidden": 7,
    "clamp": 0.5,
    "router": {"affinity": "sqrt_softplus", "hash_vocab": VOCAB, "scaling": 1.5},
    "balance_loss": 0.3,
}

SQRT_SOFTPLUS: Plan = {**SIGMOID, "clamp": 0.5, "router": {"affinity": "sqrt_softplus", "bias": True}}


def gqa(**changes: Any) -> Plan:
    return {"scheme": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6, **changes}


def anchors(**changes: Any) -> Plan:
    return {**gqa(window=5, first=2, stride=3), "scheme": "anchors", **changes}


def tied_kv(**changes: Any) -> Plan:
    return {"scheme": "tied_kv", "heads": 4, "kv_heads": 2, "head_dim": 6, "scale": 1.0, **changes}


def mla(**changes: Any) -> Plan:
    sizes = {"heads": 3, "latent": 10, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
    return {"scheme": "mla", **sizes, **changes}


def dsa(top_k: int = 4, pairing: str = "half", format: str = "bf16", **changes: Any) -> Plan:
    indexer = {"heads": 5, "head_dim": 6, "top_k": top_k, "pairing": pairing, "format": format, "kl_loss": 0.7}
    return {**mla(query_latent=7), "scheme": "dsa", "indexer": indexer, **changes}


def gla(**changes: Any) -> Plan:
    return {**mla(), "scheme": "gla", "heads": 4, "latents": 2, "latent": 5, **changes}


def hca(**changes: Any) -> Plan:
    sizes = {"heads": 4, "head_dim": 6, "rope_dim": 4, "query_latent": 7, "output": GROUPED}
    return {"scheme": "hca", **sizes, "window": 5, "rate": 4, **changes}


def per_head_latent(**changes: Any) -> Plan:
    return {"scheme": "per_head_latent", "heads": 4, "kv_heads": 2, "head_dim": 6, "rank": 3, "rope_dim": 4, **changes}


def gta(**changes: Any) -> Plan:
    return {"scheme": "gta", "heads": 4, "kv_heads": 2, "head_dim": 8, **changes}


def tpa(**changes: Any) -> Plan:
    ranks = {"query_rank": 3, "key_rank": 2, "value_rank": 4}
    return {"scheme": "tpa", "heads": 3, "head_dim": 6, **ranks, **changes}


def cca(**changes: Any) -> Plan:
    return {"scheme": "cca", "heads": 4, "kv_heads": 2, "head_dim": 6, "rope_dim": 4, **changes}


def depth_moe(**changes: Any) -> Plan:
    # wide enough that a rounding of the router shows in the logits, and that no expert is left alone
    return {"scheme": "depth_moe", "experts": 3, "hidden": 24, "router_hidden": 32, **changes}


def swa(**changes: Any) -> Plan:
    plan = {**hca(), "scheme": "swa", **changes}
    return {key: value for key, value in plan.items() if key != "rate"}


def csa(top_k: int = 3, **changes: Any) -> Plan:
    indexer = {"heads": 5, "head_dim": 8, "top_k": top_k, "kl_loss": 0.7}
    return {**hca(), "scheme": "csa", "indexer": indexer, **changes}


def nsa(size: int = 4, top_k: int = 3, initial: int = 1, local: int = 1, **changes: Any) -> Plan:
    sizes = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "value_dim": 5,
        "hidden": 7,
        "block": 4,
        "stride": 2,
        "window": 7,
    }
    selection = {"size": size, "top_k": top_k, "initial": initial, "local": local}
    return {"scheme": "nsa", **sizes, "selection": selection, **changes}


def layer(
    attention: Plan, feedforward: Plan = DENSE, reads: int | str | None = None, injection: Plan | None = None
) -> Plan:
    return {"attention": attention, "feedforward": feedforward, "reads": reads, "injection": injection}


PLE: Plan = {"scheme": "ple", "hidden": 5}

PARALLEL: Plan = {
    "scheme": "parallel",
    "experts": 5,
    "top_k": 2,
    "hidden": 8,
    "shared_hidden": 7,
    "activation": "gelu_tanh",
    "balance_loss": 0.3,
    "z_loss": 0.1,
}

GEGLU: Plan = {**DENSE, "activation": "gelu_tanh"}

SANDWICH: Plan = {"post_norm": True, "block_scale": True, "embedding_scale": 4.0, "logit_cap": 3.0, "tied": True}

GROUPED: Plan = {"groups": 2, "rank": 5}

MHC: Plan = {"residual": {"scheme": "mhc", "streams": 3, "rounds": 4}}

GPT2: Plan = {"rope": None, "bias": True}

MLP: Plan = {"scheme": "mlp", "hidden": 20}

LEARNED: Plan = {"positions": 1100, "norm": "layer", "tied": True}

YARN: Plan = {"base": 100.0, "pairing": "interleaved", "yarn": {"factor": 4.0, "original_length": 6}}

TABLE: dict[str, Row] = {
    "gqa": Row((layer(gqa()),)),
    "mha": Row((layer(gqa(kv_heads=4)),)),
    "mqa": Row((layer(gqa(kv_heads=1, rope=None)),), {"tied": True}),
    "gqa window sink": Row((layer(gqa(window=5, sink=True)), layer(gqa(window=2)))),
    "gqa qk-norm bias grouped output": Row((layer(gqa(qk_norm=True, bias=True, output=GROUPED)),)),
    "gqa value-norm scale p-rope": Row(
        (layer(gqa(qk_norm=True, value_norm=True, scale=1.0, rope={"proportion": 0.4})),)
    ),
    "gqa gate": Row((layer(gqa(gate="head")), layer(gqa(heads=6, gate="head"), reads=-1))),
    "gqa gate by element": Row((layer(gqa(gate="element", qk_norm=True, rope_dim=4, rope=YARN)),)),
    "anchors": Row((layer(anchors()), layer(anchors(window=2), reads=-1))),
    "anchors beyond the window, shared": Row(
        (layer(anchors(window=2, first=5, stride=4)), layer(anchors(window=2, first=5, stride=4, heads=6), reads=0))
    ),
    "tied_kv gate": Row((layer(tied_kv(gate="head", rope_dim=2)),)),
    "tied_kv": Row((layer(tied_kv(sink=True)), layer(tied_kv(window=5, bias=True)))),
    "tied_kv values": Row((layer(tied_kv(keeps="value", window=5)), layer(tied_kv(keeps="value")))),
    "tied_kv shared": Row((layer(tied_kv()), layer(tied_kv(heads=6), reads=0))),
    "tied_kv values shared": Row((layer(tied_kv(keeps="value")), layer(tied_kv(keeps="value", heads=6), reads=0))),
    "ple": Row((layer(gqa(), injection=PLE), layer(gqa()), layer(mla(), SOFTMAX, injection=PLE))),
    "ple shared": Row(
        (layer(gqa(window=4), GEGLU, injection=PLE), layer(gqa(window=4), GEGLU, reads=0, injection=PLE)), SANDWICH
    ),
    "parallel experts": Row((layer(gqa(), PARALLEL), layer(tied_kv(), PARALLEL)), SANDWICH),
    "mla": Row((layer(mla()),)),
    "mla query-latent grouped output": Row(
        (layer(mla(heads=4, query_latent=7, bias=True, scale_multiplier=1.3, rope=YARN, output=GROUPED)),)
    ),
    "mla narrow latent rescaled": Row((layer(mla(latent=3, value_dim=8, query_latent=7, rescale=True)),)),
    "dsa": Row((layer(dsa()),)),
    "dsa interleaved yarn sink": Row((layer(dsa(top_k=3, pairing="interleaved", bias=True, rope=YARN, sink=True)),)),
    "dsa fp8 index": Row((layer(dsa(format="fp8")),)),
    "dsa all chosen rescaled": Row((layer(dsa(top_k=2000, rescale=True)),)),
    "hca 4 window 5": Row((layer(hca()),)),
    "hca 3 window 7": Row((layer(hca(rate=3, window=7, rope_dim=6)),)),
    "hca 8 window 2": Row((layer(hca(rate=8, window=2, output={"groups": 1, "rank": 5}, rope=YARN)),)),
    "hca 2 window 1": Row((layer(hca(rate=2, window=1, output={"groups": 4, "rank": 5})),)),
    "per-head latent": Row((layer(per_head_latent()),)),
    "per-head latent rotated sink": Row((layer(per_head_latent(rank=4, rope_dim=0, kv_heads=1, sink=True)),)),
    "per-head latent uncompressed": Row((layer(per_head_latent(rank=6, kv_heads=4)),)),
    "per-head latent shared": Row((layer(per_head_latent(output=GROUPED)), layer(per_head_latent(heads=2), reads=-1))),
    "gta": Row((layer(gta()), layer(gta(heads=6, output=GROUPED), reads=-1))),
    "gta one state sink": Row((layer(gta(kv_heads=1, head_dim=4, sink=True)),)),
    "tpa": Row((layer(tpa(output={"groups": 3, "rank": 2})), layer(tpa(query_rank=None), reads=-1))),
    "tpa kv-only sink": Row((layer(tpa(query_rank=None, key_rank=3, value_rank=2, sink=True)),)),
    "cca": Row((layer(cca(kv_heads=4)),)),
    "ccgqa window sink": Row((layer(cca(window=5, rope_dim=6, bias=True, sink=True)),)),
    "cca three taps": Row((layer(cca(kv_heads=1, channel_taps=3, head_taps=1, output=GROUPED)),)),
    "cca no convolution": Row((layer(cca(channel_taps=1, head_taps=1, rope_dim=0)),)),
    "cca depth moe affine": Row(
        (layer(cca(), depth_moe(first=True)), layer(cca(kv_heads=1)), layer(cca(), depth_moe())),
        {"residual": {"scheme": "affine"}, "tied": True},
    ),
    "gqa shared": Row((layer(gqa()), layer(gqa(heads=6), reads=-1), layer(gqa(qk_norm=True), reads=0))),
    "gqa window shared": Row(
        (layer(gqa(window=5)), layer(gqa(window=5, heads=2), reads=-1), layer(gqa(window=3), reads=0))
    ),
    "gla": Row((layer(gla()), layer(gla(query_latent=7, heads=2), reads=-1))),
    "gla a latent a head sink": Row((layer(gla(latents=4, latent=3, bias=True, sink=True, rescale=True)),)),
    "yoco": Row(
        (layer(gqa(window=5)), layer(gqa(qk_norm=True, bias=True), SOFTMAX, "alone"), layer(gqa(heads=6), reads=1))
    ),
    "writers alone": Row((layer(tied_kv(keeps="value"), reads="alone"), layer(hca(), reads="alone"))),
    "mla shared": Row((layer(mla()), layer(mla(query_latent=7), reads=-1))),
    "dsa shared": Row((layer(dsa()), layer(dsa(top_k=2), reads=-1))),
    "hca shared": Row((layer(hca()), layer(hca(heads=2, query_latent=9), reads=-1))),
    "gqa moe softmax": Row((layer(gqa(), SOFTMAX), layer(gqa(window=4), UNNORMALISED))),
    "mla moe sigmoid": Row((layer(mla(), SIGMOID),)),
    "mixed": Row(
        (
            layer(hca(), SOFTMAX),
            layer(gqa(window=6)),
            layer(dsa(), SIGMOID),
            layer(mla()),
            layer(gqa(window=6), reads=1),
        ),
        {"tied": True},
    ),
    "gqa moe hashed": Row((layer(gqa(), HASHED), layer(gqa(), SQRT_SOFTPLUS))),
    "swa": Row((layer(swa()), layer(swa(heads=2), reads=0))),
    "csa 4 top 3": Row((layer(csa()),)),
    "csa 3 top 2 window 7": Row((layer(csa(top_k=2, rate=3, window=7, rope_dim=6)),)),
    "csa 2 top 4 window 1": Row((layer(csa(top_k=4, rate=2, window=1, output={"groups": 4, "rank": 5}, rope=YARN)),)),
    "csa 5 all chosen": Row((layer(csa(top_k=300, rate=5, window=2)),)),
    "csa shared": Row((layer(csa()), layer(csa(top_k=2, heads=2, query_latent=9), reads=-1))),
    "nsa shared": Row((layer(nsa()), layer(nsa(top_k=4, local=2, heads=6), reads=-1))),
    "nsa window shorter than a block": Row(
        (layer(nsa(size=6, top_k=2, block=6, stride=3, window=5, kv_heads=4, output=GROUPED)),)
    ),
    "nsa all chosen": Row((layer(nsa(top_k=300, local=2, block=2, stride=2, kv_heads=1)),)),
    "v4": Row((layer(swa(), HASHED), layer(csa(), SQRT_SOFTPLUS), layer(hca(rate=8), SQRT_SOFTPLUS)), MHC),
    "mhc gqa": Row((layer(gqa(), SOFTMAX), layer(gqa(window=5))), MHC),
    "gpt2": Row(
        (layer(gqa(kv_heads=4, **GPT2), MLP), layer(gqa(kv_heads=4, scale=0.2, **GPT2), {**MLP, "activation": "gelu"})),
        LEARNED,
    ),
    "mhc mixed": Row((layer(hca(), SIGMOID), layer(mla()), layer(hca(heads=2), reads=0)), MHC),
}

ROWS = [pytest.param(row, id=name) for name, row in TABLE.items()]
