"""A config.json, read strictly: what Transformers has and we do not is refused, what nobody reads is told."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

from conf import schema
from conf.schema import Refused
from models import families
from models.config import ModelConfig
from models.families.common.names import Names

T = TypeVar("T")

INERT = frozenset(
    {
        # bookkeeping
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
        "model_type",
        "name_or_path",
        "transformers_version",
        # tokens
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "tokenizer_class",
        # how it is run
        "chunk_size_feed_forward",
        "ep_size",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "use_cache",
        # how the weights are stored: see stored.py
        "quantization_config",
        "expert_dtype",
        # losses of training
        "aux_loss_alpha",
        "router_aux_loss_coef",
        "seq_aux",
    }
)
"""Keys that change no logit."""

FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
}
"""Keys that Transformers has for more than one value, and we for this one alone."""


class Family(Protocol):
    """A file of models/families."""

    def config_from(self, published: Mapping[str, Any]) -> ModelConfig:
        """config.json to ours. Raises Refused for what cannot be represented."""
        ...

    def config_to(self, config: ModelConfig) -> dict[str, Any]:
        """Ours to config.json. Raises Refused where the family cannot hold the model."""
        ...

    def tensor_names(self, config: ModelConfig) -> Names:
        """Our tensors' names to Transformers'."""
        ...


def available() -> list[str]:
    """The families, by their model_type, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__) if not module.ispkg)


def family(model_type: object, where: str) -> Family:
    """The file of `model_type`. Raises Refused for one that does not exist."""
    if model_type not in available():
        raise Refused(schema.unknown_choice(f"{where}: model_type", model_type, available()))
    return cast(Family, importlib.import_module(f"models.families.{model_type}"))


def read(owner: type[T], published: Mapping[str, Any], fixed: Mapping[str, Any]) -> T:
    """`published` as the dataclass `owner`, whose fields and defaults are those of Transformers. fixed: besides FIXED.

    A key that Transformers does not read either is named on stderr. Raises Refused for a value that is not represented.
    """
    fixed = {**FIXED, **fixed}
    known = {field.name for field in dataclasses.fields(owner)}  # type: ignore[arg-type]
    for key, value in published.items():
        if key in fixed and value not in (None, fixed[key]):
            raise Refused(f"config.json's {key} is {value!r}, but only {fixed[key]!r} can be represented here.")
        if key not in known | fixed.keys() | INERT and not key.startswith("_"):
            print(f"config.json's {key} is a key that nothing reads.", file=sys.stderr)
    return schema.build(owner, {key: published[key] for key in published if key in known}, "config.json")


def text_config(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal config.json. Raises Refused where there is none."""
    text = published.get("text_config")
    if not isinstance(text, Mapping):
        raise Refused("config.json has no text_config, the language model's part of a multimodal one.")
    return text
