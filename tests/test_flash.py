"""The flash core without a GPU: what it asks of a library, against the rule of visibility; its choice; its refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conf import schema
from conf.compose import compose
from conf.schema import Refused
from models import cost
from models.config import ModelConfig
from models.contract import Slot, Visibility, at_tokens
from models.cores import flash, plain
from models.model import Losses, Model
from models.sequence import Whole
from tests.test_cores import SCALE, close, same_gradients
from train import kernels
from train.config import read

HOPPER, AMPERE = (9, 0), (8, 0)


def by_document(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float, left: int | None) -> list[Tensor]:
    """What a library computes, of one document after the other: a query reads `left` entries before its own.

    The output, its log-sum-exp, and the probabilities [H, N, N].
    """
    place = torch.arange(len(q))
    before, piece = place[:, None] - place, torch.searchsorted(borders, place, right=True)
    seen = (piece[:, None] == piece) & (before >= 0) & (before <= (len(q) if left is None else left))
    scores = torch.einsum("ihd,jhd->hij", q, spread(k, q)) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1)
    return [torch.einsum("hij,jhe->ihe", weights, spread(v, q)), scores.logsumexp(-1), weights]


def spread(x: Tensor, q: Tensor) -> Tensor:
    """What heads share, for each."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def four_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Any]:
    """In the place of FlashAttention 4's, whose results a version may add to."""
    borders = options["cu_seqlens_q"]
    assert borders is options["cu_seqlens_k"] and options["causal"] and options["return_lse"]
    assert options["max_seqlen_q"] == options["max_seqlen_k"] >= borders.diff().max()
    return by_document(q, k, v, borders, options["softmax_scale"], options["window_size_left"])


def four_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, dlse: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """By hand: below an operator nothing is recorded. dlse: of the log-sum-exp."""
    weights, scale = four_forward(q, k, v, return_lse=True, **options)[2], options["softmax_scale"]
    mean = torch.einsum("ihe,ihe->hi", dout, out) - (0 if dlse is None else dlse)
    scores = weights * (torch.einsum("ihe,jhe->hij", dout, spread(v, q)) - mean[..., None]) * scale
    by_head = torch.einsum("hij,ihd->jhd", scores, q), torch.einsum("hij,ihe->jhe", weights, dout)
    of_entries = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in by_head)
    return torch.einsum("hij,jhd->ihd", scores, spread(k, q)), *of_entries


def two(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, same: Tensor, longest: int, longest_key: int, **options: Any
) -> Tensor:
    """In the place of FlashAttention 2's."""
    assert borders is same and longest == longest_key >= borders.diff().max() and options["causal"]
    left, right = options["window_size"]
    assert right == (-1 if left < 0 else 0)
    return by_document(q, k, v, borders, options["softmax_scale"], None if left < 0 else left)[0]


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Called with a GPU's compute capability and what is installed: as if this were that machine."""
    four = SimpleNamespace(interface=SimpleNamespace(_flash_attn_fwd=four_forward, _flash_attn_bwd=four_backward))

    def become(capability: tuple[int, int], *libraries: flash.Library) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setitem(sys.modules, "flash_attn.cute", four if flash.FOUR in libraries else None)
        two_or_none = SimpleNamespace(flash_attn_varlen_func=two) if flash.TWO in libraries else None
        monkeypatch.setitem(sys.modules, "flash_attn", two_or_none)
        flash.library.cache_clear()

    yield become
    flash.library.cache_clear()


@st.composite
def packings(draw: st.DrawFn) -> tuple[Whole, int | None]:
    """Rows of documents, with room for more, and a reach."""
    length, num_rows = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    begins = torch.tensor(draw(st.lists(row, min_size=num_rows, max_size=num_rows)))
    begins[:, 0] = False
    documents = int(begins.sum(1).max()) + 1 + draw(st.integers(0, 2))
    return packed(begins, documents), draw(st.none() | st.integers(1, length + 2))


def packed(begins: Tensor, documents: int) -> Whole:
    """begins: [B, S], whether a token begins another document."""
    places = torch.arange(begins.shape[1]).expand(begins.shape)
    position = places - torch.where(begins, places, 0).cummax(1).values
    return Whole(position, begins.cumsum(1), documents=documents)


def prepared(sequence: Whole, reach: int | None) -> Visibility:
    """As for the machine of now."""
    sequence = Whole(sequence.position, sequence.document, documents=sequence.documents)
    flash.prepare(sequence, [Slot("kv", (), reach=reach)])
    return Visibility.of(at_tokens(sequence, {}), sequence, reach)


@given(packings())
def test_borders_and_window_say_what_visibility_says(packing: tuple[Whole, int | None]) -> None:
    sequence, reach = packing
    assert sequence.documents is not None
    num_rows, length = sequence.position.shape
    borders, left = flash.borders(sequence.document, sequence.documents), flash.window(reach, length)
    assert borders.dtype == torch.int32 and len(borders) == num_rows * sequence.documents + 1
    assert borders[0] == 0 and borders[-1] == num_rows * length and (borders.diff() >= 0).all()
    place = torch.arange(num_rows * length)
    piece = torch.searchsorted(borders, place, right=True)
    before = place[:, None] - place
    seen = (piece[:, None] == piece) & (before >= 0) & (before <= (length if left is None else left))
    assert torch.equal(seen, torch.block_diag(*Visibility.of(at_tokens(sequence, {}), sequence, reach).mask()).bool())


LENGTH = 12
SEVERAL = torch.zeros(2, LENGTH, dtype=torch.bool).index_put(
    (torch.tensor([1, 1]), torch.tensor([4, 11])), torch.tensor(True)
)
CASES = [
    pytest.param(Whole.rows(2, LENGTH), None, id="one document"),
    pytest.param(Whole.rows(2, LENGTH), 1, id="itself alone"),
    pytest.param(Whole.rows(2, LENGTH), 5, id="window"),
    pytest.param(Whole.rows(2, LENGTH), 30, id="window longer than all"),
    pytest.param(packed(SEVERAL, 3), None, id="packed"),
    pytest.param(packed(SEVERAL, 3), 3, id="packed window"),
]
HEADS = [
    pytest.param(4, 72, 64, id="mha of two sizes"),
    pytest.param(2, 8, 8, id="gqa"),
    pytest.param(1, 8, 8, id="mqa"),
]


def leaves(
    heads: tuple[int, int], key: int, value: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v."""
    shapes = (heads[0], key), (heads[1], key), (heads[1], value)
    q, k, v = (torch.randn(2, LENGTH, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, k, v


def joint(out: Tensor, lse: Tensor | None) -> Tensor:
    """Both, so that gradients go through both."""
    assert lse is not None
    return torch.cat((out, lse[..., None]), -1)


@pytest.mark.parametrize(("kv_heads", "key", "value"), HEADS)
@pytest.mark.parametrize(("sequence", "reach"), CASES)
def test_flash_is_plain(
    sequence: Whole, reach: int | None, kv_heads: int, key: int, value: int, machine: Machine
) -> None:
    machine(HOPPER, flash.FOUR)
    visibility = prepared(sequence, reach)
    inputs = leaves((4, kv_heads), key, value)
    assert flash.kernel(*inputs, visibility, lse=True) == "FlashAttention 4"
    out, lse = flash.core(*inputs, visibility, SCALE)
    wanted, wanted_lse = plain.core(*inputs, visibility, SCALE, lse=True)
    assert lse is None
    close(out, wanted)
    same_gradients(out, wanted, inputs)
    both, wanted_both = joint(*flash.core(*inputs, visibility, SCALE, lse=True)), joint(wanted, wanted_lse)
    close(both, wanted_both)
    same_gradients(both, wanted_both, inputs)
    same_gradients(both[..., -1], wanted_both[..., -1], inputs[:2])
    if key == value:
        machine(AMPERE, flash.TWO)
        visibility = prepared(sequence, reach)
        assert flash.kernel(*inputs, visibility) == "FlashAttention 2"
        out = flash.core(*inputs, visibility, SCALE)[0]
        close(out, wanted)
        same_gradients(out, wanted, inputs)


def test_flash_compiles_to_one_graph(machine: Machine) -> None:
    machine(HOPPER, flash.FOUR)
    compiled = torch.compile(flash.core, fullgraph=True, backend="aot_eager")
    inputs = leaves((4, 2), 8, 8, torch.float32)
    for documents in (3, 5, 8):
        visibility = prepared(packed(SEVERAL, documents), 3)
        got, wanted = (joint(*core(*inputs, visibility, SCALE, lse=True)) for core in (compiled, plain.core))
        close(got, wanted, 1e-5)
        same_gradients(got, wanted, inputs, 1e-5)


LAYERS = [
    {"scheme": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "sink": True},
    {"scheme": "mla", "heads": 2, "latent": 16, "nope_dim": 64, "rope_dim": 8, "value_dim": 64},
    {"scheme": "hca", "heads": 4, "head_dim": 8, "rope_dim": 4, "query_latent": 16, "window": 5, "rate": 4,
     "output": {"groups": 2, "rank": 16}},
]  # fmt: skip


def test_a_compiled_model_has_the_gradients_of_the_plain_one(machine: Machine) -> None:
    """Its windows, and what is merged with them."""
    machine(HOPPER, flash.FOUR)
    plan = [{"attention": layer, "feedforward": {"scheme": "dense", "hidden": 16}} for layer in LAYERS]
    config = schema.build(ModelConfig, {"vocab": 32, "width": 16, "layers": [{"of": plan, "repeat": 1}]}, "model")
    ids, gradients = torch.randint(32, (2, LENGTH)), []
    for core in (flash, plain):
        model, sequence = Model(config, torch.float32), packed(SEVERAL, 3)
        model.initialise(0)
        for attention in model.attentions():
            attention.core = core.core
        if core is flash:
            flash.prepare(sequence, [slot for attention in model.attentions() for slot in attention.slots()])
            for block in model.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        losses = model(ids, sequence, ids.roll(-1, 1))
        assert isinstance(losses, Losses)
        losses.cross_entropy.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    close(gradients[0], gradients[1], 1e-5)


@pytest.mark.parametrize(
    ("library", "kv_heads", "sizes", "merged", "lacking"),
    [
        pytest.param(flash.FOUR, 4, (192, 128), True, None, id="4 mla"),
        pytest.param(flash.FOUR, 4, (128, 96), True, "heads of 128 and 96 numbers", id="4 two sizes"),
        pytest.param(flash.FOUR, 2, (96, 64), False, "heads of 96 and 64 numbers that share", id="4 shared, two sizes"),
        pytest.param(flash.FOUR, 1, (576, 512), False, "heads of 576 and 512 numbers", id="4 latent"),
        pytest.param(flash.FOUR, 4, (12, 12), False, "heads of 12 and 12 numbers", id="4 odd size"),
        pytest.param(flash.TWO, 2, (256, 256), False, None, id="2 largest"),
        pytest.param(flash.TWO, 2, (128, 128), True, "gradient of a softmax that is merged", id="2 merged"),
        pytest.param(flash.TWO, 4, (192, 128), False, "heads of 192 and 128 numbers", id="2 mla"),
    ],
)
def test_what_a_library_lacks_is_computed_blockwise(
    library: flash.Library, kv_heads: int, sizes: tuple[int, int], merged: bool, lacking: str | None, machine: Machine
) -> None:
    machine(HOPPER, library)
    visibility, inputs = prepared(Whole.rows(2, LENGTH), None), leaves((4, kv_heads), *sizes)
    said = flash.kernel(*inputs, visibility, lse=merged)
    assert said == library.name if lacking is None else said.startswith(f"the blockwise core ({library.name} has no ")
    assert (lacking or "") in said
    got, wanted = (core(*inputs, visibility, SCALE, lse=merged)[0] for core in (flash.core, plain.core))
    close(got, wanted)


OTHERS = "other entries by the blockwise core (not the tokens in hand)"
LACKS = "the blockwise core (FlashAttention 2 has no"


@pytest.mark.parametrize(
    ("library", "overrides", "wanted"),
    [
        (flash.FOUR, ["attention=gqa"], "all tokens by FlashAttention 4"),
        (flash.FOUR, ["attention=gqa", "+attention.sink=true"], "all tokens by FlashAttention 4"),
        (
            flash.FOUR,
            ["attention=mla", "attention.nope_dim=128", "attention.rope_dim=64", "attention.value_dim=128"],
            "all tokens by FlashAttention 4",
        ),
        (
            flash.FOUR,
            ["attention=mla"],
            "all tokens by the blockwise core (FlashAttention 4 has no heads of 48 and 32 numbers)",
        ),
        (flash.FOUR, ["attention=hca"], f"the last 32 tokens by FlashAttention 4, {OTHERS}"),
        (flash.FOUR, ["attention=csa"], "the last 32 tokens by FlashAttention 4, what it chooses by the gathered core"),
        (flash.TWO, ["attention=gqa"], "all tokens by FlashAttention 2"),
        (flash.TWO, ["attention=gqa", "+attention.sink=true"], f"all tokens by {LACKS} {flash.MERGED})"),
    ],
    ids=lambda value: value.name if isinstance(value, flash.Library) else None,
)
def test_the_flash_core_says_what_serves_each_layer(
    library: flash.Library, overrides: list[str], wanted: str, machine: Machine
) -> None:
    machine(HOPPER, library)
    config = read(compose(["run.dir=unused", "train.core=flash", "train.compute=bf16", *overrides]))
    lines = kernels.told(cost.meta(config.model), config.train.core, torch.bfloat16, [("sparse", 256)])
    scheme = overrides[0].partition("=")[2]
    assert lines[1:] == [f"{scheme} ×4, sparse, rows of 256 tokens: {wanted}"]


@pytest.mark.parametrize(
    ("capability", "libraries", "found"),
    [
        (HOPPER, [flash.FOUR, flash.TWO], flash.FOUR),
        (HOPPER, [flash.TWO], flash.TWO),
        (AMPERE, [flash.FOUR, flash.TWO], flash.TWO),
        (HOPPER, [], r"cannot import flash-attn-4 \(.*\) or flash-attn \(.*\); install flash-attn-4 or flash-attn "),
        (AMPERE, [flash.FOUR], r"cannot import flash-attn \(.*\); install flash-attn "),
        ((7, 0), [flash.TWO], "no kernels for GPUs of compute capability 7.0"),
    ],
    ids=lambda value: value.name if isinstance(value, flash.Library) else None,
)
def test_the_library_goes_by_the_gpu_and_what_is_installed(
    capability: tuple[int, int], libraries: list[flash.Library], found: flash.Library | str, machine: Machine
) -> None:
    machine(capability, *libraries)
    if isinstance(found, str):
        with pytest.raises(Refused, match=found):
            flash.check(torch.device("cuda"))
    else:
        flash.check(torch.device("cuda"))
        assert flash.library() is found
