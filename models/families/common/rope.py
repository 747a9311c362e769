"""Rotary parameters as Transformers writes them: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf import schema
from conf.schema import Refused
from models.rope import Rope, Yarn


@dataclass(frozen=True)
class _Default:
    rope_theta: float
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True)
class _Proportional(_Default):
    """partial_rotary_factor: here the share of the pairs that turn, the head's whole width being the denominator."""


@dataclass(frozen=True)
class _Yarn(_Default):
    """A null is as good as no value, as in Transformers."""

    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


KINDS: Mapping[str, type[_Default]] = {"default": _Default, "proportional": _Proportional, "yarn": _Yarn}


def rope_from(
    parameters: Mapping[str, Any] | None, theta: float, positions: int, pairing: str
) -> tuple[dict[str, Any], float]:
    """Our `rope` section, and what DeepSeek's models multiply the softmax scale by.

    theta: where `parameters` have none. positions: max_position_embeddings. Raises Refused for another kind of rope.
    """
    given = dict(parameters or {})
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    if kind not in KINDS:
        raise Refused(f"config.json's rope_type is '{kind}'; only {' and '.join(KINDS)} can be represented here.")
    read = schema.build(KINDS[kind], {"rope_theta": theta} | given, "config.json's rope_parameters")
    if isinstance(read, _Proportional):
        return {"base": read.rope_theta, "pairing": pairing, "proportion": read.partial_rotary_factor}, 1.0
    if read.partial_rotary_factor != 1:
        raise Refused("config.json's rope_parameters.partial_rotary_factor is not 1, the only value represented here.")
    rope = {"base": read.rope_theta, "pairing": pairing}
    if not isinstance(read, _Yarn):
        return rope, 1.0
    original = read.original_max_position_embeddings or positions
    if original < 1:
        raise Refused(f"config.json's original_max_position_embeddings is {original}, but at least 1 is needed.")
    factor = read.factor or positions / original
    yarn = {
        "factor": factor,
        "original_length": original,
        "beta_fast": read.beta_fast or 32.0,
        "beta_slow": read.beta_slow or 1.0,
        "magnitude": _magnitude(read, factor),
        "truncate": read.truncate,
    }
    return rope | {"yarn": yarn}, _attention_scale(factor, read.mscale_all_dim or 0.0) ** 2


def rope_to(rope: Rope | None, multiplier: float = 1.0) -> dict[str, Any]:
    """The inverse of `rope_from`. Raises Refused where there is none."""
    if rope is None:
        raise Refused("a layer without positions (rope: null)")
    if rope.proportion != 1:
        return {"rope_type": "proportional", "rope_theta": rope.base, "partial_rotary_factor": rope.proportion}
    if rope.yarn is None:
        return {"rope_type": "default", "rope_theta": rope.base}
    yarn = rope.yarn
    mscale_all_dim = _mscale(yarn.factor, math.sqrt(multiplier))
    return {
        "rope_type": "yarn",
        "rope_theta": rope.base,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "attention_factor": yarn.magnitude,
        "mscale": _mscale(yarn.factor, yarn.magnitude * math.sqrt(multiplier)),
        "mscale_all_dim": mscale_all_dim,
        "truncate": yarn.truncate,
    }


def positions_to(rope: Rope | None) -> dict[str, int]:
    """max_position_embeddings, where YaRN says so."""
    yarn: Yarn | None = rope.yarn if rope else None
    return {} if yarn is None else {"max_position_embeddings": round(yarn.factor * yarn.original_length)}


def _magnitude(yarn: _Yarn, factor: float) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _attention_scale(factor, yarn.mscale) / _attention_scale(factor, yarn.mscale_all_dim)
    return _attention_scale(factor, 1.0)


def _attention_scale(factor: float, mscale: float) -> float:
    """YaRN, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _mscale(factor: float, attention_scale: float) -> float:
    """The inverse of `_attention_scale`."""
    return 0.0 if factor <= 1 else (attention_scale - 1) / (0.1 * math.log(factor))
