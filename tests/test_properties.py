"""The properties that every row of the table of schemes has, in float64 to 1e-9 unless said otherwise.

Each property is a test over a row; none knows which scheme it looks at.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import Refused
from models import cost
from models.block import state_of
from models.cache import Cache
from models.contract import NOTHING, Sequence, Slot, all_pairs
from models.cores import blockwise
from models.decode import advance
from models.loss import IGNORE
from models.model import Losses, Model
from models.parameter import ROLES, named_specs
from models.sequence import Whole
from parallel.recompute import recompute
from tests.graphs import GRAPHS
from tests.schemes import ROWS, VOCAB, Plan, Row, anchors, gqa, hca, layer, mla, packed, tokens
from tests.sharded import Form, in_shards
from tests.watch import Watch

TOLERANCE = 1e-9

MOST_HEADS = 6  # of any row

FORMS: list[Form] = ["gathered", "within reach", "pieces"]

every_row = pytest.mark.parametrize("row", ROWS)


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def logits_of(model: Model, ids: Tensor, sequence: Sequence) -> Tensor:
    logits = model(ids, sequence)
    assert isinstance(logits, Tensor)
    return logits


def losses_of(model: Model, ids: Tensor, sequence: Sequence, targets: Tensor) -> Losses:
    losses = model(ids, sequence, targets)
    assert isinstance(losses, Losses)
    return losses


def gradients(model: Model, objective: Tensor) -> dict[str, Tensor]:
    """By parameter name, and of the same objective each time; the model is left without gradients."""
    model.zero_grad()
    objective.backward()
    taken = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {name: torch.zeros(()) if gradient is None else gradient for name, gradient in taken.items()}


def close_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, gradient in theirs.items():
        difference = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1.0)
        assert difference <= tolerance, f"the gradient of {name} differs by {difference:.1e}"


def ragged(row: Row) -> Whole:
    """Two rows of documents: of one token, of every length around a block and a window, borders anywhere; padded."""
    lengths = row.lengths()
    return packed([[1, *lengths[1:], 1, 1], [3, *reversed(lengths[:-1]), 2]])


def targets_of(ids: Tensor, sequence: Sequence) -> Tensor:
    """Something to predict at every token, some left out."""
    return ((ids * 7 + 3) % VOCAB).masked_fill((sequence.document == NOTHING) | (ids == 0), IGNORE)


@every_row
def test_causal(row: Row) -> None:
    """Changing token t changes no output before t, and changes the output at t."""
    model, length = row.model_in(torch.float64), row.lengths()[-1]
    ids = tokens(1, length)
    changed = ids.repeat(length, 1)
    diagonal = torch.arange(length)
    changed[diagonal, diagonal] = (ids[0] + 1) % VOCAB
    with torch.no_grad():
        base = logits_of(model, ids, Whole.rows(1, length))[0]
        difference = (logits_of(model, changed, Whole.rows(length, length)) - base).abs().amax(-1)
    assert difference.tril(-1).max() <= TOLERANCE
    assert difference.diagonal().min() > 1e-6


@every_row
def test_length_invariant(row: Row) -> None:
    """A longer sequence leaves the prefix's outputs as they were."""
    model, lengths = row.model_in(torch.float64), row.lengths()
    ids = tokens(2, lengths[-1])
    with torch.no_grad():
        whole = logits_of(model, ids, Whole.rows(2, lengths[-1]))
        for length in lengths:
            close(logits_of(model, ids[:, :length], Whole.rows(2, length)), whole[:, :length])


@every_row
def test_packed_is_separate(row: Row) -> None:
    """Documents in a row give the outputs and gradients that each gives alone.

    The losses that balance experts are left out: they are means over a row, whatever documents it holds.
    """
    model, sequence = row.model_in(torch.float64), ragged(row)
    ids = tokens(*sequence.position.shape)
    weights = torch.randn(*ids.shape, VOCAB, dtype=torch.float64)
    together = logits_of(model, ids, sequence)
    real = sequence.document != NOTHING
    packed_gradients = gradients(model, (together * weights)[real].sum())
    separate = torch.zeros_like(together)
    for b, document in {(b, int(d)) for b, row_documents in enumerate(sequence.document) for d in row_documents}:
        places = sequence.document[b] == document
        if document != NOTHING:
            alone = logits_of(model, ids[b : b + 1, places], Whole.rows(1, int(places.sum())))
            separate = separate.index_put((torch.tensor(b), places.nonzero().squeeze(1)), alone[0])
    close(together[real], separate[real])
    close_gradients(packed_gradients, gradients(model, (separate * weights).sum()))


@pytest.mark.parametrize("form", FORMS)
@every_row
def test_sharded_is_whole(row: Row, form: Form) -> None:
    """Outputs, losses and gradients of three uneven shards, the second shorter than a window or a block."""
    model, sequence = row.model_in(torch.float64), ragged(row)
    ids, length = tokens(*sequence.position.shape), sequence.position.shape[1]
    targets = targets_of(ids, sequence)
    cuts = [length // 2, length // 2 + 2]

    def run(part: Sequence, span: slice) -> tuple[Tensor, Tensor]:
        losses = losses_of(model, ids[:, span], part, targets[:, span])
        return logits_of(model, ids[:, span], part).detach(), losses.cross_entropy + losses.extra

    outputs, objectives = zip(*in_shards(sequence, cuts, form, run), strict=True)
    whole, objective = run(sequence, slice(None))
    real = sequence.document != NOTHING
    close(torch.cat(outputs, 1)[real], whole[real])
    total = torch.stack(objectives).sum()
    close(total, objective)
    close_gradients(gradients(model, total), gradients(model, objective))


@every_row
def test_cached_is_full(row: Row) -> None:
    """Prefill in chunks, then token by token, rows of different lengths; a cache saved, restored and appended to."""
    model, lengths = row.model_in(torch.float64), row.lengths()
    longest = lengths[-1]
    ids = tokens(3, longest)
    with torch.no_grad():
        whole = logits_of(model, ids, Whole.rows(3, longest))
    cache = Cache(model, 3, longest)
    for step, chunk in enumerate(_chunks(lengths)):
        # the rows take turns in lagging behind
        num_new = torch.tensor([chunk, (chunk + step) // 2, chunk * (step % 2)]).clamp(max=chunk)
        num_new = torch.minimum(num_new, longest - cache.length)
        _check_step(model, cache, ids, num_new, whole)
        saved = cache.state_dict()
        restored = Cache(model, 3, longest)
        restored.load_state_dict(saved)
        cache = restored
    assert cache.length.tolist() == [longest] * 3


def _chunks(lengths: list[int]) -> Iterator[int]:
    yield from (length for length in lengths if 1 < length <= lengths[-1] // 3)
    yield from [1] * 4
    yield from [max(1, lengths[-1] // 3)] * 9
    yield from [1] * lengths[-1]


def _check_step(model: Model, cache: Cache, ids: Tensor, num_new: Tensor, whole: Tensor) -> None:
    width = int(num_new.max())
    if width == 0:
        return
    start = cache.length
    offset = torch.arange(width)
    place = (start[:, None] + offset).clamp(max=ids.shape[1] - 1)
    logits = advance(model, cache, ids.gather(1, place), num_new)
    given = offset < num_new[:, None]
    close(logits[given], whole.gather(1, place[..., None].expand(-1, -1, VOCAB))[given])


@every_row
def test_declared_bytes_are_measured(row: Row) -> None:
    """What the slots declare is what the cache allocates in bfloat16, kind by kind; and a full cache holds no less."""
    model = row.model_in(torch.float32, torch.bfloat16)
    for length in row.lengths():
        declared = cost.kv_bytes(model, length)
        cache = Cache(model, 2, length)
        measured = cache.num_bytes()
        assert {kind: 2 * declared[kind] for kind in measured} == measured
        assert declared["total"] == sum(measured.values()) / 2
        advance(model, cache, tokens(2, length))
        assert cache.num_bytes() == measured
        full = [store for store in cache.stores.values() if store.slot.kind == "entry"]
        assert all((store.position != NOTHING).all() for store in full), "declared places that nothing fills"
    strides = {slot.stride for slot in cost.written_slots(model)}
    period = torch.tensor(sorted(strides)).prod().item() * 100
    growth = cost.kv_bytes(model, int(2 * period))["total"] - cost.kv_bytes(model, int(period))["total"]
    assert growth == pytest.approx(cost.kv_bytes_per_token(model) * period, rel=1e-12)


@every_row
def test_a_cache_grows_linearly_or_not_at_all(row: Row) -> None:
    """Allocated, from 4,096 tokens on: with exponent 1 where anything is read back to the start, 0 where nothing is."""
    endless = any(slot.grows for slot in row.slots)
    with torch.device("meta"):
        assert cost.growth_exponent(Model(row.config())) == pytest.approx(float(endless), abs=0.02)


@every_row
def test_declared_flops_are_measured(row: Row) -> None:
    """Against PyTorch's counter on the plain core: the whole sequence, and one step of decode."""
    model = row.model_in(torch.float64)
    length = 4 * max(slot.stride for slot in row.slots) * max(slot.stride for slot in row.slots)
    length = max(length, 24)
    ids = tokens(1, length)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, Whole.rows(1, length))
    assert counter.get_total_flops() == cost.flops(model, length, length, all_pairs).total
    cache = Cache(model, 1, length)
    advance(model, cache, ids[:, :-1])
    with FlopCounterMode(display=False) as counter:
        advance(model, cache, ids[:, -1:])
    assert counter.get_total_flops() == _flops_of_a_step(model, length)


def _flops_of_a_step(model: Model, length: int) -> float:
    """A ring is read as it was before the step, beside the new token; what is out of reach is masked. A ring is as long
    as its writer's window: a reader with a shorter one masks more."""
    sublayers = model.attention_sublayers()
    kept = {sublayer.layer: {slot.name: slot for slot in sublayer.attention.slots()} for sublayer in sublayers}
    total = cost.flops(model, 1, length, lambda slot, queries, context: 0.0).total
    for sublayer in sublayers:

        def in_cache(slot: Slot, queries: int, context: int, of: int = sublayer.writer) -> float:
            ring = kept[of][slot.name]
            entries = ring.entries(context) if slot.chosen is None else min(ring.entries(context), slot.chosen)
            return float(entries + (0 if ring.reach is None else 1))

        without = sublayer.attention.flops(1, length, lambda slot, queries, context: 0.0)
        total += sublayer.attention.flops(1, length, in_cache).total - without.total
    return total


@every_row
def test_a_step_of_decode_expands_nothing(row: Row) -> None:
    """No tensor over the cached entries is wider than an entry, what KV heads share given to each, or than one score a
    head."""
    model, length = row.model_in(torch.float32), 499
    cache = Cache(model, 1, length)
    ids = tokens(1, length)
    advance(model, cache, ids[:, :-1])
    with Watch() as watch:
        advance(model, cache, ids[:, -1:])
    for slot in row.slots:
        if slot.grows:
            beside = [other for other in row.slots if other.entries(length) == slot.entries(length)]
            widest = max(MOST_HEADS, *map(_given_to_each_head, beside))
            over_entries = [shape for shape in watch.shapes if slot.entries(length) in shape]
            assert over_entries
            assert all(torch.Size(shape).numel() <= widest * slot.entries(length) for shape in over_entries)


def _given_to_each_head(slot: Slot) -> int:
    """Numbers of an entry, counting what KV heads share once for each of them."""
    heads = max(dict(part.dims).get("kv_heads", 1) for part in slot.parts)
    return sum(part.numbers * (1 if "kv_heads" in dict(part.dims) else heads) for part in slot.parts)


@every_row
def test_declared_parameters_are_measured(row: Row) -> None:
    """On meta as built; active are those that one token reads: of the experts, those that get a gradient from it. A
    router may send a token past all experts: of a few tokens the one counts that reads most."""
    model = row.model_in(torch.float64)
    declared = cost.parameters(model)
    assert declared == cost.parameters(cost.meta(row.config()))
    assert declared.total == sum(parameter.numel() for parameter in model.parameters())
    idle = min(_idle(model, torch.tensor([[token]])) for token in range(4))
    assert declared.total - declared.active == idle


def _idle(model: Model, ids: Tensor) -> int:
    """Parameters that one token has no part in."""
    cross_entropy = losses_of(model, ids, Whole.rows(1, 1), ids).cross_entropy
    taken = gradients(model, cross_entropy)
    idle = 0
    for name, parameter, spec in named_specs(model):
        if spec.role == "embedding" and (name != "embedding.weight" or model.head is not None):
            idle += parameter.numel()
        if spec.role in ("expert", "expert_output"):
            of_expert = taken[name].flatten(1).norm(dim=1)
            idle += int((of_expert == 0).sum()) * taken[name][0].numel()
    return idle


@every_row
def test_memory_is_linear(row: Row) -> None:
    """Forward and backward: twice the length, less than 2.2 times the peak; and nothing is [S, S] or [S, S/m]."""
    model = row.model_in(torch.float32)
    strides = {slot.stride for slot in row.slots}
    peaks = []
    for length in (blockwise.BLOCK * 2 + 9, blockwise.BLOCK * 4 + 18):
        ids = tokens(1, length)
        with Watch() as watch:
            losses = losses_of(model, ids, Whole.rows(1, length), ids)
            (losses.cross_entropy + losses.extra).backward()
        model.zero_grad()
        peaks.append(watch.peak)
        for shape in watch.shapes:
            for stride in strides:
                others = list(shape)
                if length in others:
                    others.remove(length)
                    assert not any(length // stride <= size <= length for size in others), f"{shape} at {length} tokens"
    assert peaks[1] < 2.2 * peaks[0]


@every_row
def test_initialised_and_trained(row: Row) -> None:
    """Each parameter has a role and is filled; each one gets a gradient."""
    model = Model(row.config(), torch.float64).double()
    specs = list(named_specs(model))
    assert all(spec.role in ROLES for _, _, spec in specs)
    model.initialise(seed=0)
    assert all(tensor.isfinite().all() for tensor in [*model.parameters(), *model.buffers()])
    again = Model(row.config(), torch.float64).double()
    again.initialise(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    sequence = ragged(row)
    ids = tokens(*sequence.position.shape)
    model = row.model_in(torch.float64)
    losses = losses_of(model, ids, sequence, targets_of(ids, sequence))
    for name, gradient in gradients(model, losses.cross_entropy + losses.extra).items():
        assert gradient.isfinite().all(), name
        assert gradient.norm() > 0, f"{name} gets no gradient"


@every_row
def test_precise(row: Row) -> None:
    """bfloat16 is near float32, and what is declared fp32 is computed so: a change that bfloat16 cannot hold counts."""
    model = row.model_in(torch.float32)
    ids = tokens(4, row.lengths()[-1])
    sequence = Whole.rows(*ids.shape)
    with torch.no_grad():
        exact = logits_of(model, ids, sequence)
        model.compute_dtype = torch.bfloat16
        base = logits_of(model, ids, sequence)
        # token by token, and not the worst: one that stands near a routing tie goes to another expert under bfloat16
        assert ((base - exact).norm(dim=-1) / exact.norm(dim=-1)).quantile(0.75) < 0.05
        precise = {name: parameter for name, parameter, spec in named_specs(model) if spec.fp32}
        for parameter in precise.values():
            parameter.copy_(parameter.bfloat16())
        base = _all_of(model, ids, sequence)
        for name, parameter in precise.items():
            held = parameter.bfloat16()
            parameter.mul_(1 + 0.9 * 2**-9)
            assert torch.equal(parameter.bfloat16(), held)
            changed = _all_of(model, ids, sequence)
            assert not torch.equal(base, changed), f"{name} is computed in bfloat16"
            parameter.copy_(held)


@torch.enable_grad()
def _all_of(model: Model, ids: Tensor, sequence: Sequence) -> Tensor:
    """Logits and auxiliary losses: an indexer's weights may all grow by one factor and no logit changes."""
    extra = losses_of(model, ids, sequence, ids).extra
    return torch.cat((logits_of(model, ids, sequence).flatten(), extra[None])).detach()


@pytest.mark.parametrize(("row", "backend"), GRAPHS)
def test_compiled(row: Row, backend: str) -> None:
    """The whole model as one graph; where a mechanism is new to the table, so is its backward.

    Tracing costs seconds a layer, so not every row: each mechanism, each kind of reading and each kind of value of each
    of their options is in one of these.
    """
    model, sequence = row.model_in(torch.float32, torch.bfloat16), ragged(row)
    ids = tokens(*sequence.position.shape)
    targets = targets_of(ids, sequence)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    eager = losses_of(model, ids, sequence, targets)
    graph = losses_of(compiled, ids, sequence, targets)  # type: ignore[arg-type]
    close(graph.cross_entropy, eager.cross_entropy, 1e-5)
    close_gradients(
        gradients(model, graph.cross_entropy + graph.extra), gradients(model, eager.cross_entropy + eager.extra), 1e-5
    )


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pytest.param(gqa(window=3), gqa(window=5), id="a longer window"),
        pytest.param(gqa(window=3), gqa(), id="no window"),
        pytest.param(gqa(kv_heads=2), gqa(kv_heads=1), id="other heads"),
        pytest.param(anchors(first=2), anchors(first=1), id="fewer first tokens"),
        pytest.param(anchors(stride=3), anchors(stride=6), id="another stride"),
        pytest.param(mla(latent=10), mla(latent=8), id="another latent"),
        pytest.param(hca(rate=4), hca(rate=3), id="another rate"),
        pytest.param(mla(), gqa(), id="another scheme"),
    ],
)
def test_a_reader_that_its_writer_cannot_serve_is_refused(writer: Plan, reader: Plan) -> None:
    with pytest.raises(Refused, match="layer 0"):
        Model(Row((layer(writer), layer(reader, reads=0))).config())


@every_row
def test_recomputed_is_kept(row: Row) -> None:
    """Running each block again in the backward changes no gradient, bit for bit."""
    model, sequence = row.model_in(torch.float64), ragged(row)
    ids = tokens(*sequence.position.shape)
    kept = losses_of(model, ids, sequence, targets_of(ids, sequence))
    expected = gradients(model, kept.cross_entropy + kept.extra)
    recompute(model, "full")
    again = losses_of(model, ids, sequence, targets_of(ids, sequence))
    close_gradients(gradients(model, again.cross_entropy + again.extra), expected, 0.0)


@every_row
def test_only_what_is_read_later_is_carried(row: Row) -> None:
    """A stage border sends what the stream carries: a state from its writer to its last reader."""
    model, sequence = row.model_in(torch.float64), ragged(row)
    writers = [sublayer.writer for sublayer in model.attention_sublayers()]
    stream = model.enter(tokens(*sequence.position.shape), sequence)
    with torch.no_grad():
        for depth, block in enumerate(model.blocks):
            stream, _ = block(stream, sequence.at(depth))
            states = {name for name in stream.carried if name.startswith("state")}
            assert states == set(map(state_of, set(writers[depth + 1 :]) & set(writers[: depth + 1])))
