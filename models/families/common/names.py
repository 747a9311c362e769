"""Tensors under two sets of names: ours and Transformers'.

A table has one row for each kind of tensor of ours, `{layer}` standing for the depth. Its value is a tuple of
spellings, the one that is written first. Transformers keeps a layer's experts in one tensor in memory and one by one
on disk: a spelling that is itself a tuple means one matrix an expert, `{expert}`, the rows of its names one below the
other; one that is `Flat`, that a stack's matrices lie one below the other in one. A `Share` is a depth's part of one
tensor for all depths, or one of several that lie fused in one. A `Copy` is the same tensor once more. TRAINING_ALONE is
a tensor that they do not hold, which starts at zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.schema import Refused


@dataclass(frozen=True)
class Share:
    """Of a tensor that holds parts of one size, one after another along `dim`, the part of that number, or where it is
    None, of the depth. transposed: theirs is, and `dim` is of ours."""

    name: str
    dim: int
    part: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Flat:
    """[stack, out, in] of ours as [stack · out, in]."""

    name: str


@dataclass(frozen=True)
class Copy:
    """Under another name too: written there, and where it is read, equal to what the others hold."""

    name: str


Spelling = str | tuple[str, ...] | Share | Flat | Copy
Names = Mapping[str, tuple[Spelling, ...]]

TRAINING_ALONE: Spelling = ()

IGNORED = "ignored"
"""The row of a table that is no tensor of ours: regular expressions for tensors of theirs that a language model leaves
unread."""

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
        self._shared: dict[str, Tensor] = {}
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
        if spelling == TRAINING_ALONE:
            return torch.zeros(shape)
        assert not isinstance(spelling, Copy)
        if isinstance(spelling, str):
            return self._theirs[spelling]
        if isinstance(spelling, Share):
            size = shape[spelling.dim]
            assert spelling.part is not None
            return self._whole(spelling, size).narrow(spelling.dim, spelling.part * size, size)
        if isinstance(spelling, Flat):
            flat = self._theirs[spelling.name]
            return flat.view(shape) if flat.shape == (shape[0] * shape[1], *shape[2:]) else flat
        return self._stack(spelling, shape[0])

    def _stack(self, parts: tuple[str, ...], experts: int) -> Tensor:
        """One matrix an expert, read one after another: a large layer's experts are not held twice."""
        uneven = Refused(f"{self._where} holds {_text(parts)} of shapes that differ from expert to expert.")
        stack: Tensor | None = None
        for expert in range(experts):
            matrices = [self._theirs[part.format(expert=expert)] for part in parts]
            try:
                matrix = torch.cat(matrices)
            except RuntimeError:
                raise uneven from None
            if stack is None:
                stack = matrix.new_empty(experts, *matrix.shape)
            if matrix.shape != stack.shape[1:]:
                raise uneven
            # a release may store each expert in another dtype
            stack = stack.to(torch.promote_types(stack.dtype, matrix.dtype))
            stack[expert] = matrix
        assert stack is not None
        return stack

    def _whole(self, share: Share, size: int) -> Tensor:
        """The tensor of all parts, read once. Raises Refused where it is not made of them."""
        if share.name not in self._shared:
            self._shared[share.name] = self._theirs[share.name]
        whole = self._shared[share.name]
        turned = whole.T if share.transposed else whole
        parts = _parts(share.name, self._sources.values())
        if turned.shape[share.dim : share.dim + 1] != (parts * size,):
            raise Refused(
                f"{self._where} holds {share.name} of shape {list(whole.shape)}, but its configuration means {parts} "
                f"parts of {size}; the two do not belong together."
            )
        return turned

    def _refuse_unread(self, names: Names) -> None:
        read = {name for ours, spelling in self._sources.items() for name in _expanded(spelling, self._shapes[ours])}
        ignored = [re.compile(pattern) for pattern in names.get(IGNORED, ()) if isinstance(pattern, str)]
        unread = [name for name in self._theirs if name not in read and not any(p.fullmatch(name) for p in ignored)]
        copies = self._copies(names)
        unread = [name for name in unread if name not in copies]
        if _HEAD not in self._shapes:
            unread = [name for name in unread if not (name in names[_HEAD] and self._is_embedding(name))]
        # Transformers writes matrices without numbers for a feed-forward of width 0
        unread = [name for name in unread if self._theirs[name].numel()]
        if unread:
            more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
            raise Refused(
                f"{self._where} holds {unread[0]}{more}, which nothing in a model of this configuration reads."
            )

    def _copies(self, names: Names) -> set[str]:
        """Those of theirs that are one of ours once more. Raises Refused for one that differs."""
        found = set()
        for name in self._shapes:
            for copy in _copies(name, names):
                if copy in self._theirs:
                    if not torch.equal(self._theirs[copy], self[name]):
                        raise Refused(
                            f"{self._where} holds {copy}, which differs from {_text(self._sources[name])}, but here "
                            "the two are one."
                        )
                    found.add(copy)
        return found

    def _is_embedding(self, name: str) -> bool:
        """A tied head may be stored once more."""
        return torch.equal(self._theirs[name], self[_EMBEDDING])


def to_theirs(ours: Mapping[str, Tensor], names: Names) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under the name that Transformers writes; a stack of experts one by one, parts together."""
    written = {name: _spellings(name, names)[0] for name in ours}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, spelling in written.items():
        if spelling == TRAINING_ALONE:
            continue
        tensor = ours[name]
        for copy in _copies(name, names):
            yield copy, tensor
        assert not isinstance(spelling, Copy)
        if isinstance(spelling, str):
            yield spelling, tensor
            continue
        if isinstance(spelling, Share):
            held = parts.setdefault(spelling.name, {})
            assert spelling.part is not None
            held[spelling.part] = tensor
            if len(held) == _parts(spelling.name, written.values()):
                whole = torch.cat([held[part] for part in sorted(held)], spelling.dim)
                yield spelling.name, whole.T if spelling.transposed else whole
                del parts[spelling.name]
            continue
        if isinstance(spelling, Flat):
            yield spelling.name, tensor.flatten(0, 1)
            continue
        for expert, rows in enumerate(tensor):
            for part, matrix in zip(spelling, rows.chunk(len(spelling)), strict=True):
                yield part.format(expert=expert), matrix


def _spellings(name: str, names: Names) -> list[Spelling]:
    found = _OURS_LAYER.search(name)
    layer = found.group() if found else ""
    row = names[_OURS_LAYER.sub("{layer}", name)]
    return [at_layer(spelling, layer) for spelling in row if not isinstance(spelling, Copy)]


def _copies(name: str, names: Names) -> list[str]:
    row = names.get(_OURS_LAYER.sub("{layer}", name), ())
    return [spelling.name for spelling in row if isinstance(spelling, Copy)]


def at_layer(spelling: Spelling, layer: str) -> Spelling:
    """With `{layer}` filled in."""
    if isinstance(spelling, Share):
        part = int(layer) if spelling.part is None else spelling.part
        spelling = replace(spelling, part=part)
    return renamed(spelling, lambda name: name.replace("{layer}", layer))


def renamed(spelling: Spelling, change: Callable[[str], str]) -> Spelling:
    """With each name changed."""
    if isinstance(spelling, str):
        return change(spelling)
    if isinstance(spelling, tuple):
        return tuple(map(change, spelling))
    return replace(spelling, name=change(spelling.name))


def first_name(spelling: Spelling) -> str:
    """Of theirs, the name that it begins with."""
    if isinstance(spelling, str):
        return spelling
    return spelling[0] if isinstance(spelling, tuple) else spelling.name


def holds_any(theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], names: Names) -> bool:
    """Whether any of the tensors of ours that `shapes` names is there."""
    spelled = ((spelling, shape) for name, shape in shapes.items() for spelling in _spellings(name, names))
    return any(part in theirs for spelling, shape in spelled for part in _expanded(spelling, shape))


def _parts(name: str, spellings: Iterable[Spelling]) -> int:
    """How many share the tensor of that name."""
    return sum(isinstance(spelling, Share) and spelling.name == name for spelling in spellings)


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
    if isinstance(spelling, Share | Flat | Copy):
        return [spelling.name]
    return [part.format(expert=expert) for expert in range(shape[0]) for part in spelling]


def _text(spelling: Spelling) -> str:
    if isinstance(spelling, Share | Flat | Copy):
        return spelling.name
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
