"""Tensors under two sets of names: ours and Transformers'.

A table has one row for each kind of tensor of ours, `{layer}` standing for the depth. Its value is a tuple of
spellings, the one that is written first. Transformers keeps a layer's experts in one tensor in memory and one by one
on disk: a spelling that is itself a tuple means one matrix an expert, `{expert}`, the rows of its names one below the
other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from conf.schema import Refused

Spelling = str | tuple[str, ...]
Names = Mapping[str, tuple[Spelling, ...]]

_OURS_LAYER = re.compile(r"(?<=^blocks\.)\d+(?=\.)")
_HEAD = "head.weight"
_EMBEDDING = "embedding.weight"


class Ours(Mapping[str, Tensor]):
    """Tensors with their names as read from `theirs`, one at a time, under our names.

    shapes: of each tensor that must be there. Raises Refused for one of ours that is missing, for one of theirs that
    nothing reads, and, when it is read, for a wrong shape.
    """

    def __init__(
        self, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], names: Names, where: str
    ) -> None:
        self._theirs, self._shapes, self._where = theirs, shapes, where
        self._sources = {name: _present(name, shape, theirs, names, where) for name, shape in shapes.items()}
        self._refuse_unread(names)

    def __getitem__(self, name: str) -> Tensor:
        spelling, shape = self._sources[name], self._shapes[name]
        tensor = self._read(spelling, shape)
        if tensor.shape != shape:
            raise Refused(
                f"{self._where} holds {_text(spelling)} of shape {list(tensor.shape)}, but its configuration means "
                f"{list(shape)}; the two do not belong together."
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _read(self, spelling: Spelling, shape: torch.Size) -> Tensor:
        if isinstance(spelling, str):
            return self._theirs[spelling]
        experts = [[self._theirs[part.format(expert=e)] for part in spelling] for e in range(shape[0])]
        try:
            return torch.stack([torch.cat(parts) for parts in experts])
        except RuntimeError:
            raise Refused(
                f"{self._where} holds {_text(spelling)} of shapes that differ from expert to expert."
            ) from None

    def _refuse_unread(self, names: Names) -> None:
        read = {name for ours, spelling in self._sources.items() for name in _expanded(spelling, self._shapes[ours])}
        unread = [name for name in self._theirs if name not in read]
        if _HEAD not in self._shapes:
            unread = [name for name in unread if not (name in names[_HEAD] and self._is_embedding(name))]
        # Transformers writes matrices without numbers for a feed-forward of width 0
        unread = [name for name in unread if self._theirs[name].numel()]
        if unread:
            more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
            raise Refused(
                f"{self._where} holds {unread[0]}{more}, which nothing in a model of this configuration reads."
            )

    def _is_embedding(self, name: str) -> bool:
        """A tied head may be stored once more."""
        return torch.equal(self._theirs[name], self[_EMBEDDING])


def to_theirs(ours: Mapping[str, Tensor], names: Names) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under the name that Transformers writes; a stack of experts one by one."""
    for name, tensor in ours.items():
        spelling = _spellings(name, names)[0]
        if isinstance(spelling, str):
            yield spelling, tensor
            continue
        for expert, rows in enumerate(tensor):
            for part, matrix in zip(spelling, rows.chunk(len(spelling)), strict=True):
                yield part.format(expert=expert), matrix


def _spellings(name: str, names: Names) -> list[Spelling]:
    found = _OURS_LAYER.search(name)
    layer = found.group() if found else ""
    row = names[_OURS_LAYER.sub("{layer}", name)]

    def at_layer(text: str) -> str:
        return text.replace("{layer}", layer)

    return [at_layer(s) if isinstance(s, str) else tuple(map(at_layer, s)) for s in row]


def _present(name: str, shape: torch.Size, theirs: Mapping[str, Tensor], names: Names, where: str) -> Spelling:
    spellings = _spellings(name, names)
    for spelling in spellings:
        if all(part in theirs for part in _expanded(spelling, shape)):
            return spelling
    missing = next(part for part in _expanded(spellings[0], shape) if part not in theirs)
    raise Refused(f"{where} lacks the tensor {missing}, which its configuration asks for.")


def _expanded(spelling: Spelling, shape: torch.Size) -> list[str]:
    if isinstance(spelling, str):
        return [spelling]
    return [part.format(expert=expert) for expert in range(shape[0]) for part in spelling]


def _text(spelling: Spelling) -> str:
    return spelling if isinstance(spelling, str) else " and ".join(spelling)


OUTER: Names = {
    _EMBEDDING: ("model.embed_tokens.weight",),
    "norm.gain": ("model.norm.weight",),
    _HEAD: ("lm_head.weight",),
    "blocks.{layer}.attention.norm.gain": ("model.layers.{layer}.input_layernorm.weight",),
    "blocks.{layer}.feedforward.norm.gain": ("model.layers.{layer}.post_attention_layernorm.weight",),
}
"""What Llama's descendants have in common outside attention and feed-forward."""


def prefixed(ours: str, theirs: str, rows: Mapping[str, str]) -> Names:
    """Rows `a: b` as `<ours>.a: (<theirs>.b,)`, all of one module at every depth."""
    return {f"blocks.{{layer}}.{ours}.{a}": (f"model.layers.{{layer}}.{theirs}.{b}",) for a, b in rows.items()}


GQA: Names = prefixed(
    "attention.attention",
    "self_attn",
    {
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}.items()
        for part in ("weight", "bias")
    }
    | {"query_norm.gain": "q_norm.weight", "key_norm.gain": "k_norm.weight"},
)

DENSE: Names = prefixed(
    "feedforward.feedforward",
    "mlp",
    {"gate.weight": "gate_proj.weight", "up.weight": "up_proj.weight", "down.weight": "down_proj.weight"},
)

_MLP, _FFN = "model.layers.{layer}.mlp", "blocks.{layer}.feedforward.feedforward"

EXPERTS: Names = {
    f"{_FFN}.router.logits.weight": (f"{_MLP}.gate.weight",),
    f"{_FFN}.experts.gate_up": (
        (f"{_MLP}.experts.{{expert}}.gate_proj.weight", f"{_MLP}.experts.{{expert}}.up_proj.weight"),
        f"{_MLP}.experts.gate_up_proj",
    ),
    f"{_FFN}.experts.down": ((f"{_MLP}.experts.{{expert}}.down_proj.weight",), f"{_MLP}.experts.down_proj"),
}
