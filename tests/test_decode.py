"""Decoding from the declared slots alone: what a cache holds, that it can be put aside, and that entries may go."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.cache import Cache
from models.contract import NOTHING, Pieces, Slot, State
from models.decode import advance
from models.sequence import Whole
from tests.schemes import (
    TABLE,
    Plan,
    Row,
    cca,
    csa,
    dsa,
    gla,
    gqa,
    gta,
    hca,
    layer,
    mla,
    per_head_latent,
    tied_kv,
    tokens,
    tpa,
)


def each_writer() -> Iterator[object]:
    """Every attention plan of the table that has a state of its own, once."""
    seen = []
    for name, row in TABLE.items():
        for depth, plan in enumerate(row.layers):
            if plan["reads"] is None and plan["attention"] not in seen:
                seen.append(plan["attention"])
                yield pytest.param(plan["attention"], id=f"{name}, layer {depth}" if len(row.layers) > 1 else name)


class Forgetful(Whole):
    """Whole rows of which nobody reads the entries at some positions. gone: [B, S]."""

    def __init__(self, rows: Whole, gone: Tensor) -> None:
        super().__init__(rows.position, rows.document)
        self.gone = gone

    def collect(self, slots: tuple[Slot, ...], state: State) -> Pieces:
        masked = {}
        for name, entries in state.items():
            document = entries.document.masked_fill(self.gone.gather(1, entries.position), NOTHING)
            masked[name] = [replace(entries, document=document)]
        return masked


@pytest.mark.parametrize("attention", list(each_writer()))
def test_dropping_entries_is_masking_them(attention: Plan) -> None:
    """Any entries of a cache may go: later tokens read the others as if those had been masked, and none had moved."""
    prompt, length, rows = 13, 19, 3
    model, ids = Row((layer(attention),)).model_in(torch.float64), tokens(rows, length)
    gone = torch.zeros(rows, length, dtype=torch.bool)
    gone[0, :prompt] = torch.rand(prompt) < 0.5
    gone[1, :prompt] = True
    with torch.no_grad():
        expected = model(ids, Forgetful(Whole.rows(rows, length), gone))
        untouched = model(ids, Whole.rows(rows, length))
    cache = Cache(model, rows, length)
    advance(model, cache, ids[:, :prompt])
    for store in cache.stores.values():
        if store.slot.kind == "entry":
            held = store.position != NOTHING
            which = gone.gather(1, store.position.clamp_min(0)) & held
            store.drop(which)
            assert torch.equal((store.position != NOTHING).sum(1), (held & ~which).sum(1))
    restored = Cache(model, rows, length)
    restored.load_state_dict(cache.state_dict())
    chunks = [ids[:, prompt : prompt + 2], *ids[:, prompt + 2 :].split(1, 1)]
    logits = torch.cat([advance(model, restored, chunk) for chunk in chunks], 1)
    torch.testing.assert_close(logits, expected[:, prompt:], rtol=1e-9, atol=1e-9)
    changed = (logits - untouched[:, prompt:]).abs().amax((1, 2)) > 1e-9
    assert changed.tolist() == [True, True, False]


def test_a_tail_cannot_be_dropped() -> None:
    cache = Cache(Row((layer(hca()),)).model_in(torch.float64), 1, 9)
    store = cache.stores[0, "open_block"]
    with pytest.raises(ValueError, match="open_block is a tail"):
        store.drop(store.position == NOTHING)


TPA_SIZES = (("head", 3), ("dim", 6))

# By hand: what the entries of a token are called and how large they are, and bytes after ten tokens, in bfloat16 but
# for the rows that blocks are summed from.
HELD = [
    pytest.param(gqa(), {"kv.key": (2, 6), "kv.value": (2, 6)}, (10 * 24 * 2, 0, 0), id="gqa: heads"),
    pytest.param(gqa(window=4), {"kv.key": (2, 6), "kv.value": (2, 6)}, (0, 4 * 24 * 2, 0), id="gqa: a window"),
    pytest.param(tied_kv(keeps="value"), {"kv.value": (2, 6)}, (10 * 12 * 2, 0, 0), id="tied_kv: values"),
    pytest.param(mla(), {"latent.latent": (10,), "latent.rope": (4,)}, (10 * 14 * 2, 0, 0), id="mla: a latent"),
    pytest.param(
        dsa(format="fp8"),
        {"latent.latent": (10,), "latent.rope": (4,), "index.key": (6,), "index.scale": (1,)},
        (10 * (14 * 2 + 6 + 4), 0, 0),
        id="dsa: a latent and an index key",
    ),
    pytest.param(gla(), {"latent.latent": (2, 5), "latent.rope": (4,)}, (10 * 14 * 2, 0, 0), id="gla: two latents"),
    pytest.param(
        per_head_latent(),
        {"latents.key": (2, 3), "latents.value": (2, 3), "latents.rope": (4,)},
        (10 * 16 * 2, 0, 0),
        id="per-head latent: two latents a head",
    ),
    pytest.param(gta(), {"tied.tied": (2, 8), "tied.rope": (4,)}, (10 * 20 * 2, 0, 0), id="gta: tied heads"),
    pytest.param(
        tpa(),
        {
            "factors.key_head": (2, 3),
            "factors.key_dim": (2, 6),
            "factors.value_head": (4, 3),
            "factors.value_dim": (4, 6),
        },
        (10 * 54 * 2, 0, 0),
        id="tpa: factors",
    ),
    pytest.param(
        cca(),
        {"kv.key": (2, 6), "kv.value": (2, 6), "delayed.value": (6,), "convolved.rows": (36,)},
        (10 * 24 * 2, 0, (6 + 2 * 36) * 2),
        id="cca: heads of the latent, and the rows before",
    ),
    pytest.param(
        hca(),
        {"window.kv": (6,), "blocks.kv": (6,), "open_block.value_gate": (12,)},
        (2 * 6 * 2, 5 * 6 * 2, 3 * 12 * 4),
        id="hca: blocks, a window and the open block",
    ),
    pytest.param(
        csa(),
        {
            "window.kv": (6,),
            "blocks.kv": (6,),
            "index.kv": (8,),
            "last_block.value_gate": (12,),
            "open_block.value_gate": (12,),
            "index_last_block.value_gate": (16,),
            "index_open_block.value_gate": (16,),
        },
        (2 * (6 + 8) * 2, 5 * 6 * 2, (7 + 3) * (12 + 16) * 4),
        id="csa: blocks and their index keys, a window and two blocks",
    ),
]


@pytest.mark.parametrize(("attention", "parts", "num_bytes"), HELD)
def test_a_cache_holds_what_is_compressed_and_a_reader_nothing(
    attention: Plan, parts: dict[str, tuple[int, ...]], num_bytes: tuple[int, int, int]
) -> None:
    """Of two layers of which the second reads the first, where the scheme can be read."""
    readers = [] if attention["scheme"] == "cca" else [layer(attention, reads=0)]
    cache = Cache(model := Row((layer(attention), *readers)).model_in(torch.float32, torch.bfloat16), 1, 10)
    advance(model, cache, tokens(1, 10))
    held = {
        f"{layer}.{slot}.{name}": tuple(part.shape[2:])
        for (layer, slot), store in cache.stores.items()
        for name, part in store.parts.items()
    }
    assert held == {f"0.{name}": shape for name, shape in parts.items()}
    assert cache.num_bytes() == dict(zip(("entries", "windows", "tails"), num_bytes, strict=True))


@pytest.mark.parametrize("attention", [pytest.param(dsa(format="fp8"), id="dsa"), pytest.param(csa(), id="csa")])
def test_a_cache_comes_back_from_a_file(attention: Plan) -> None:
    """Rows of different lengths, put aside within a block, taken up by another process's cache of the same size."""
    model, ids = Row((layer(attention), layer(cca(window=3)))).model_in(torch.float64), tokens(2, 15)
    cache = Cache(model, 2, 15)
    advance(model, cache, ids[:, :9], torch.tensor([9, 6]))
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    restored = Cache(model, 2, 15)
    restored.load_state_dict(torch.load(file, weights_only=True))

    def go_on(cache: Cache) -> Tensor:
        places = cache.length[:, None] + torch.arange(4)
        return advance(model, cache, ids.gather(1, places))

    assert torch.equal(go_on(cache), go_on(restored))
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in cache.state_dict().items())


@pytest.mark.parametrize(
    ("rows", "length", "attention"),
    [
        pytest.param(1, 9, gqa(), id="fewer rows"),
        pytest.param(2, 8, gqa(), id="fewer tokens"),
        pytest.param(2, 9, mla(), id="another scheme"),
    ],
)
def test_a_cache_of_another_shape_is_refused(rows: int, length: int, attention: Plan) -> None:
    cache = Cache(Row((layer(gqa()),)).model_in(torch.float64), 2, 9)
    other = Cache(Row((layer(attention),)).model_in(torch.float64), rows, length)
    with pytest.raises(ValueError, match="another model, number of rows or number of tokens"):
        cache.load_state_dict(other.state_dict())
