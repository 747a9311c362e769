"""Multi-token prediction in what is published: DeepSeek-V3 (arXiv 2412.19437) and its descendants keep its modules as
further layers; Transformers does not read them."""

from __future__ import annotations

from models.config import ModelConfig, resolve_mtp
from models.families.common.names import Copy, Names, Spelling, at_layer


def modules(config: ModelConfig) -> int:
    """`num_nextn_predict_layers`."""
    found = resolve_mtp(config)
    return 0 if found is None else found[0].modules


def with_further_layers(names: Names, config: ModelConfig, num_layers: int) -> Names:
    """`names`, and those of the modules: layer num_layers and on, each with copies of the embedding and the head."""
    further: dict[str, tuple[Spelling, ...]] = {}
    copies: dict[str, list[Copy]] = {"embed_tokens.weight": [], "shared_head.head.weight": []}
    for index in range(modules(config)):
        layer = str(num_layers + index)
        further |= block(names, f"mtp.{index}.block", layer)
        prefix = f"model.layers.{layer}"
        further |= {
            f"mtp.{index}.join.embedding_norm.gain": (f"{prefix}.enorm.weight",),
            f"mtp.{index}.join.hidden_norm.gain": (f"{prefix}.hnorm.weight",),
            f"mtp.{index}.join.projection.weight": (f"{prefix}.eh_proj.weight",),
            f"mtp.{index}.norm.gain": (f"{prefix}.shared_head.norm.weight",),
        }
        for name, found in copies.items():
            found.append(Copy(f"{prefix}.{name}"))
    embedding, head = copies.values()
    owner = "embedding.weight" if config.tied else "head.weight"
    rows = {**names, **further}
    rows["embedding.weight"] = (*rows["embedding.weight"], *embedding)
    return {**rows, owner: (*rows[owner], *head)}


def block(names: Names, ours: str, layer: str) -> Names:
    """The rows of a layer, of one block elsewhere in our model."""
    inside = "blocks.{layer}"
    return {
        name.replace(inside, ours): tuple(at_layer(spelling, layer) for spelling in row)
        for name, row in names.items()
        if name.startswith(f"{inside}.")
    }
