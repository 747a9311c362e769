"""Lighthouse attention against its description, entry by entry; how far its selection leaks; and in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.compose import compose
from conf.schema import Refused
from models import cost
from models.contract import NOTHING, Entries, Visibility
from models.cores import approximate, plain
from models.cores.approximate.lighthouse import Config as Lighthouse
from models.mode import Mode
from models.sequence import Whole
from tests import runs, schemes
from tests.runs import TINY
from tests.schemes import Plan, Row, layer, packed
from tests.test_engine import BASE, ROWS, loader, this_rank
from train.config import Phase, TrainSection, read
from train.engines.torch import Engine
from train.meter import Clock

SCALE = 0.4


def tokens_of(sequence: Whole, heads: int = 2, kv_heads: int = 2) -> list[Tensor]:
    """q, k and v [B, S, heads, size] in fp64."""
    shape = sequence.position.shape
    sizes = ((heads, 6), (kv_heads, 6), (kv_heads, 5))
    return [torch.randn(*shape, *size, dtype=torch.float64, requires_grad=True) for size in sizes]


def visible(sequence: Whole, reach: int | None = None) -> Visibility:
    return Visibility.of(Entries({}, sequence.position, sequence.document, aligned=True), sequence, reach)


def by_entry(core: Lighthouse, q: Tensor, k: Tensor, v: Tensor, document: list[int]) -> Tensor:
    """One head of one row: q, k [S, d], v [S, e]."""
    length = len(q)
    padded = length + -length % core.factor ** (core.levels - 1)
    documents = document + [NOTHING] * (padded - length)

    def covered(level: int, i: int) -> range:
        return range(i * core.factor**level, (i + 1) * core.factor**level)

    def owner(level: int, i: int) -> int:
        inside = {documents[t] for t in covered(level, i)}
        return inside.pop() if len(inside) == 1 else NOTHING

    def score(level: int, i: int) -> float:
        if owner(level, i) == NOTHING:
            return -math.inf
        return max(float((q[t].norm() + k[t].norm()).detach()) for t in covered(level, i))

    kept = [(core.levels - 1, i) for i in range(padded // core.factor ** (core.levels - 1))]
    for level in range(core.levels - 1):
        parents = range(padded // core.factor ** (level + 1))
        best = sorted(parents, key=lambda i: (-score(level + 1, i), i))[: core.keep]
        kept += [(level, i * core.factor + child) for i in best for child in range(core.factor)]
    kept = [(level, i) for level, i in kept if owner(level, i) != NOTHING]

    def mean(x: Tensor, level: int, i: int) -> Tensor:
        return torch.stack([x[t] for t in covered(level, i)]).mean(0)

    out = [torch.zeros_like(v[0]) for _ in range(length)]
    for level, i in kept:
        last = covered(level, i)[-1]
        readable = [
            (mean(k, *other), mean(v, *other))
            for other in kept
            if covered(*other)[-1] <= last and owner(*other) == owner(level, i)
        ]
        weights = (torch.stack([key for key, _ in readable]) @ mean(q, level, i) * SCALE).softmax(0)
        value = weights @ torch.stack([value for _, value in readable])
        for t in range(last, last + core.factor**level):
            if t < length and documents[t] == owner(level, i):
                out[t] = out[t] + value
    return torch.stack(out)


@pytest.mark.parametrize(
    ("core", "sequence"),
    [
        pytest.param(Lighthouse(levels=3, factor=2, keep=2), Whole.rows(2, 16), id="whole blocks"),
        pytest.param(Lighthouse(levels=2, factor=3, keep=1), Whole.rows(1, 14), id="a block still open"),
        pytest.param(Lighthouse(levels=3, factor=2, keep=99), Whole.rows(1, 9), id="everything kept"),
        pytest.param(Lighthouse(levels=3, factor=2, keep=2), packed([[1, 7, 10], [5, 2]]), id="packed and padded"),
        pytest.param(Lighthouse(levels=3, factor=2, keep=1), Whole.rows(1, 3), id="shorter than a block"),
    ],
)
def test_lighthouse_is_its_description(core: Lighthouse, sequence: Whole) -> None:
    q, k, v = tokens_of(sequence, heads=4, kv_heads=2)
    ours, _ = core.core(q, k, v, visible(sequence), SCALE)
    rows = []
    for b, document in enumerate(sequence.document.tolist()):
        rows.append(
            torch.stack([by_entry(core, q[b, :, h], k[b, :, h // 2], v[b, :, h // 2], document) for h in range(4)], 1)
        )
    theirs = torch.stack(rows)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad((y * seed).sum(), [q, k, v]) for y in (ours, theirs))
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def leak(core: Lighthouse, length: int, trials: int = 40) -> float:
    """Share of the outputs before a token that change when that token does."""
    sequence, changed = Whole.rows(1, length), 0.0
    for trial in range(trials):
        torch.manual_seed(trial)
        q, k, v = tokens_of(sequence)
        before, _ = core.core(q, k, v, visible(sequence), SCALE)
        t = length // 2
        with torch.no_grad():
            q[:, t], k[:, t], v[:, t] = (torch.randn_like(x[:, t]) for x in (q, k, v))
        after, _ = core.core(q, k, v, visible(sequence), SCALE)
        changed += float((before - after)[:, :t].abs().amax((0, 2, 3)).gt(1e-12).double().mean())
    return changed / trials


@pytest.mark.parametrize(("keep", "share"), [(2, 0.027), (4, 0.088), (8, 0.161), (16, 0.161), (32, 0.0)])
def test_only_the_selection_leaks(keep: int, share: float) -> None:
    """Where everything is kept, nothing before a token feels it; where less is, the selection tells. The numbers of
    docs/numbers.md."""
    assert leak(Lighthouse(levels=3, factor=2, keep=keep), 64) == pytest.approx(share, abs=0.01 if share else 0)


@pytest.mark.parametrize(
    ("reach", "lse"), [pytest.param(4, False, id="a window"), pytest.param(None, True, id="a softmax to be merged")]
)
def test_what_is_no_plain_attention_is_refused(reach: int | None, lse: bool) -> None:
    sequence = Whole.rows(1, 8)
    with pytest.raises(ValueError, match="choose another core"):
        q, k, v = tokens_of(sequence)
        Lighthouse().core(q, k, v, visible(sequence, reach), SCALE, lse=lse)


@pytest.mark.parametrize("settings", [{"levels": 1}, {"factor": 1}, {"keep": 0}], ids=["levels", "factor", "keep"])
def test_a_pyramid_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Lighthouse(**settings)


def test_padding_sees_nothing() -> None:
    sequence = packed([[4], [9]])
    q, k, v = tokens_of(sequence)
    out, _ = Lighthouse(keep=1).core(q, k, v, visible(sequence), SCALE)
    dense, _ = plain.core(q, k, v, visible(sequence), SCALE)
    assert not out[0, 4:].any() and not dense[0, 4:].any()


GLOBAL = [*(word for word in BASE if not word.startswith("attention.window")), "moe.bias_rate=0.0"]
LIGHT = "train.approximate={scheme: lighthouse, levels: 2, keep: 1}"


def _first_steps() -> dict[str, tuple[float, float]]:
    """Loss and gradient norm of a first step, and a validation before it, by how it is trained."""
    found = {}
    ways: list[tuple[str, list[str], Mode]] = [
        ("exact", [], "sparse"),
        ("light", [LIGHT], "sparse"),
        ("dense", [LIGHT], "dense"),
    ]
    for name, overrides, mode in ways:
        engine = Engine(read(compose([*GLOBAL, "train.compute=fp64", *overrides])), this_rank())
        engine.initialise()
        engine.set_mode(mode)
        if name == "light":  # a training step before the validation
            engine.step(loader().batch(0, ROWS), 0.0, Clock(torch.device("cpu")))
        found[f"{name} validation"] = engine.evaluate([loader().batch(0, ROWS)])[:2]
        step = engine.step(loader().batch(0, ROWS), 1e-2, Clock(torch.device("cpu")))
        found[name] = (step.loss.item(), step.grad_norm.item())
    return found


def test_training_alone_is_approximate_until_it_is_dense(ranks: Callable[..., list[Any]]) -> None:
    found = ranks(1, _first_steps)[0]
    assert found["light"] != found["exact"] == found["dense"]
    assert found["light validation"] == found["exact validation"] == found["dense validation"]


def test_a_run_with_a_dense_second_stage(tmp_path: Path) -> None:
    """As a phase, and from its weights in a run of its own; without it the run itself goes no further."""
    runs.write_text(tmp_path)
    short = [*TINY, "train.steps=6", "evaluate.every=3"]
    phase = "train.phases=[{start: 3, attention: dense}]"
    printed = runs.train(tmp_path, [*short, LIGHT, phase, "run.dir=light"])
    assert "softmax core: blockwise, lighthouse in training" in printed
    losses = [record["loss"] for record in runs.records(tmp_path / "light")]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    runs.train(tmp_path, [*short, "train.steps=2", "train.init=light", "run.dir=second"])
    job = runs.start(tmp_path, [*short, phase, "run.dir=light"])
    assert job.end() == 2
    assert "train.approximate" in job.printed()


def test_an_approximation_that_no_phase_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="never used"):
        TrainSection(
            steps=9,
            sequence_length=8,
            batch_tokens=8,
            attention="dense",
            phases=[Phase(start=3, attention="warmup")],
            approximate={"scheme": "lighthouse"},
        )


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(schemes.gqa(), id="gqa"),
        pytest.param(schemes.tied_kv(keeps="value"), id="tied_kv"),
        pytest.param(schemes.mla(), id="mla"),
        pytest.param(schemes.gla(), id="gla"),
        pytest.param(schemes.gta(), id="gta"),
        pytest.param(schemes.tpa(), id="tpa"),
        pytest.param(schemes.cca(), id="cca"),
        pytest.param(schemes.per_head_latent(), id="per-head latent"),
    ],
)
def test_every_plain_scheme_is_trained_with_it(plan: Plan) -> None:
    """In a layer beside one that stays dense: documents, padding, a finite gradient of everything."""
    model = Row((layer(plan), layer(plan))).model_in(torch.float64)
    for attention, core in approximate.cores({"scheme": "lighthouse", "keep": 2, "dense": [0]}, model.attentions()):
        attention.core = core
    ids, sequence = schemes.tokens(2, 18), packed([[1, 7, 10], [5, 2]])
    losses: Any = model(ids, sequence, ids)
    (losses.cross_entropy + losses.extra).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert [attention.core.__module__.rpartition(".")[2] for attention in model.attentions()] == [
        "blockwise",
        "lighthouse",
    ]


@pytest.mark.parametrize(
    ("plan", "settings", "words"),
    [
        pytest.param(schemes.gqa(window=5), {}, "layer 1 has a window", id="a window"),
        pytest.param(schemes.gqa(sink=True), {}, "or a sink", id="a sink"),
        pytest.param(schemes.hca(), {}, "compressed blocks", id="hca"),
        pytest.param(schemes.csa(), {}, "an indexer", id="csa"),
        pytest.param(schemes.dsa(), {}, "add it to train.approximate.dense", id="dsa"),
        pytest.param(schemes.swa(), {"dense": [0]}, "layer 1", id="swa"),
        pytest.param(schemes.gqa(), {"dense": [0, -1]}, "nothing is left", id="every layer dense"),
        pytest.param(schemes.gqa(), {"dense": [2]}, "names layer 2, but the model has 2", id="a layer beyond"),
        pytest.param(schemes.gqa(), {"top_k": 4}, "top_k is not a key", id="another key"),
        pytest.param(schemes.gqa(), {"scheme": "lightouse"}, "did you mean 'lighthouse'", id="misspelt"),
        pytest.param(schemes.gqa(), {"keep": 0}, "keep", id="nothing kept"),
    ],
)
def test_what_it_cannot_train_is_refused(plan: Plan, settings: dict[str, Any], words: str) -> None:
    model = cost.meta(Row((layer(schemes.gqa()), layer(plan))).config())
    with pytest.raises(Refused, match=words):
        approximate.cores({"scheme": "lighthouse", **settings}, model.attentions())
