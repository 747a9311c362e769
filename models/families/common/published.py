"""A config.json, read strictly: a key that could change the model and that nobody reads is refused by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

from conf import schema
from conf.schema import Refused
from models import families
from models.config import ModelConfig
from models.families.common.names import Names

T = TypeVar("T")

INERT = frozenset(
    # bookkeeping
    "architectures auto_map dtype torch_dtype id2label label2id model_type name_or_path tokenizer_class "
    "transformers_version bos_token_id eos_token_id pad_token_id sep_token_id "
    # how it is run
    "chunk_size_feed_forward ep_size is_encoder_decoder output_attentions output_hidden_states output_router_logits "
    "pretraining_tp problem_type return_dict use_cache "
    # losses of training
    "aux_loss_alpha router_aux_loss_coef seq_aux".split()
)
"""Keys that change no logit."""

FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "quantization_config": None,
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
    """`published` as the dataclass `owner`, whose defaults are those of Transformers. fixed: in addition to FIXED."""
    fixed = {**FIXED, **fixed}
    values = {}
    for key, value in published.items():
        if key in fixed:
            if value not in (None, fixed[key]):
                raise Refused(f"config.json's {key} is {value!r}, but only {fixed[key]!r} can be represented here.")
        elif key not in INERT and not key.startswith("_"):
            values[key] = value
    return schema.build(owner, values, "config.json")
