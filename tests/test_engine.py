"""The engine: every layout of ranks, and every way of saving memory, does what one process does, in fp64."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.compose import compose
from data.loader import Loader
from data.source import Window
from models import mechanism
from models.ahead import Ahead
from models.model import Model
from models.moe.router import Router
from models.parameter import named_specs
from models.sequence import Whole
from parallel.apply import placement, shard
from parallel.box import local
from tests.runs import TINY
from tests.toy import everything, whole
from train.config import read
from train.engines.torch import Engine
from train.meter import Clock
from train.ranks import Ranks

RunRanks = Callable[..., list[Any]]
Results = dict[str, Tensor]

ROWS, LENGTH, STEPS, DEPTH = 8, 12, 3, 1
TOLERANCE = 1e-10  # of the norm of the difference to the norm
OPTIMIZERS = (["optimizer=adamw"], ["optimizer=muon", "optimizer.precision=float64"])
BASE = [
    *TINY, f"train.sequence_length={LENGTH}", f"train.batch_tokens={ROWS * LENGTH}", "train.micro_batch=8",
    "train.clip=0.1", "moe.balance_loss=0.1", "moe.z_loss=0.1", "moe.bias_rate=0.01", "attention.window=5",
    "+model.mtp={scheme:concat,depth:1,layer:{attention:${attention},feedforward:${moe}}}",
]  # fmt: skip


class Documents:
    """Windows of random tokens and borders: their numbers of scored targets differ, and so do the ranks' shares."""

    fingerprint, vocab = "documents", 64
    num_tokens = bytes_per_token = None
    unigram_entropy = 0.0

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        draw = np.random.default_rng([index, seed])
        length = sequence_length + lookahead
        borders = draw.choice(np.arange(1, length), size=draw.integers(0, length // 2), replace=False)
        return Window(draw.integers(0, 64, length), np.array([0, *sorted(borders)], np.int64))


def this_rank() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def loader(length: int = LENGTH, depth: int = DEPTH) -> Loader:
    return Loader(
        Documents(), sequence_length=length, depth=depth, rank=dist.get_rank(), world_size=dist.get_world_size()
    )


def starve(engine: Engine) -> None:
    """Keep every token from expert 0."""
    routers = [module for module in engine.model.modules() if isinstance(module, Router)]
    assert routers
    for router in routers:
        assert router.bias is not None
        router.bias[0] = -100.0


def _train(overrides: list[str], prepare: Callable[[Engine], None] = starve, steps: int = STEPS) -> Results:
    """Everything that a few steps compute, whole, by name."""
    config = read(compose(overrides))
    engine, data = Engine(config, this_rank()), loader(config.train.sequence_length)
    engine.initialise()
    prepare(engine)
    results: Results = {}
    step = 0

    def note_gradients(*_: object) -> None:
        for name, parameter in engine.model.named_parameters():
            assert parameter.grad is not None
            results[f"step {step} gradient of {name}"] = whole(parameter.grad).clone()

    engine.optimizer.register_step_pre_hook(note_gradients)
    for step in range(steps):
        result = engine.step(data.batch(step * ROWS, ROWS), 1e-2, Clock(torch.device("cpu")))
        told = {name: getattr(result, name) for name in ("loss", "extra", "grad_norm", "mtp_loss")}
        results |= {f"step {step} {name}": value for name, value in told.items() if value is not None}
        results |= {f"step {step} load of layer {layer}": load for layer, load in result.loads.items()}
    results |= everything(engine.model, engine.optimizer)
    results |= {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    evaluation = engine.evaluate(data.fixed(num_samples=12, batch_size=8))
    for name, value in evaluation._asdict().items():
        numbers = (
            [item or 0.0 for item in value] if isinstance(value, list) else value
        )  # no loss where nothing is scored
        results[f"evaluation {name}"] = torch.tensor(numbers)
    return results


def _train_both(overrides: list[str]) -> list[Results]:
    return [_train([*BASE, "train.compute=fp64", *optimizer, *overrides]) for optimizer in OPTIMIZERS]


def difference(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(torch.float64).tiny))


def assert_equal(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    differences = {name: difference(found[name], expected[name]) for name in found}
    assert not {name: value for name, value in differences.items() if not value <= TOLERANCE}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What one process computes."""
    from tests.ranks import runner

    return runner(tmp_path_factory.mktemp("expected"))(1, _train_both, [])[0]


def test_the_reference_shows_what_it_should(expected: list[Results]) -> None:
    for results in expected:
        loads = torch.stack([value for name, value in results.items() if name.startswith("step 0 load ")])
        assert loads.shape == (2 + DEPTH, 4)
        assert (loads[:, 0] == 0).all()
        assert (loads[:, 1:] > 0).all()
        assert results["step 0 grad_norm"] > 0.1  # the limit: clipping does something
        assert results["step 0 extra"] > 0
        assert all(value.dtype == torch.float64 for name, value in results.items() if "gradient of" in name)
    assert len({name for name in expected[0] if name.startswith("step 0 gradient")}) > 15
    for results in expected:
        assert all(results[f"step 0 gradient of mtp.{n}.join.projection.weight"].norm() > 1e-5 for n in range(DEPTH))


def _weighed(overrides: list[str]) -> tuple[list[Results], Results]:
    """Gradients with two weights, and those of multi-token prediction's loss by itself."""
    found: list[Results] = []
    for weight in (0.0, 0.25):
        engine = Engine(read(compose([*BASE, "train.compute=fp64", "train.clip=null", *overrides])), this_rank())
        engine.initialise()
        engine.mtp_weight = weight
        results: Results = {}

        def note(*_: object, engine: Engine = engine, results: Results = results) -> None:
            results |= {name: parameter.grad.clone() for name, parameter in engine.model.named_parameters()}  # type: ignore

        engine.optimizer.register_step_pre_hook(note)
        step = engine.step(loader(depth=2).batch(0, ROWS), 0.0, Clock(torch.device("cpu")))
        found.append(results)
    batch, model = loader(depth=2).batch(0, ROWS), engine.model
    model.zero_grad()
    sequence = Whole(batch.position, batch.document)
    losses = model(batch.ids, sequence, batch.targets[0], ahead=Ahead(batch.ahead, batch.targets[1:])).ahead
    means = torch.stack([loss / int((batch.targets[1 + d] >= 0).sum()) for d, loss in enumerate(losses)])
    assert step.mtp_loss is not None
    torch.testing.assert_close(step.mtp_loss, means.detach())
    means.mean().backward()
    return found, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def test_multi_token_prediction_is_weighed(ranks: RunRanks) -> None:
    (without, quarter), alone = ranks(
        1, _weighed, ["model.mtp.depth=2", "optimizer.weight_decay=0", "moe.bias_rate=0"]
    )[0]
    for name, gradient in alone.items():
        difference = quarter[name] - without[name] - 0.25 * gradient
        assert difference.norm() <= 1e-12 + 1e-9 * quarter[name].norm(), name


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        pytest.param(2, [], id="2 ranks"),
        pytest.param(4, [], id="4 ranks"),
        pytest.param(8, [], id="8 ranks, more than experts"),
        pytest.param(2, ["parallel.replicate=2"], id="2 replicas"),
        pytest.param(4, ["parallel.replicate=2"], id="2 replicas of 2 ranks"),
        pytest.param(1, ["train.micro_batch=3"], id="uneven accumulation"),
        pytest.param(1, ["train.recompute=full"], id="recompute"),
        pytest.param(
            2,
            ["train.recompute=full", "train.micro_batch=2", "parallel.reshard_after_forward=false"],
            id="2 ranks, recompute and accumulation",
        ),
        pytest.param(4, ["parallel.replicate=2", "train.micro_batch=1"], id="2 replicas of 2 ranks, accumulation"),
    ],
)
def test_layouts_equal_one_process(
    ranks: RunRanks, expected: list[Results], world_size: int, overrides: list[str]
) -> None:
    for of_rank in ranks(world_size, _train_both, overrides):
        for found, reference in zip(of_rank, expected, strict=True):
            assert_equal(found, reference)


def _held_of_experts(overrides: list[str]) -> tuple[int, int]:
    """Elements of the experts' matrices on this rank, and of all ranks."""
    config, world = read(compose([*BASE, *overrides])), this_rank()
    with torch.device("meta"):
        model = Model(config.model)
    shard(model, config.parallel.mesh(world.world_size, "cpu"), True)
    experts = [parameter for _, parameter, spec in named_specs(model) if spec.role in ("expert", "expert_output")]
    return sum(local(parameter).numel() for parameter in experts), sum(parameter.numel() for parameter in experts)


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        pytest.param([], 1, id="8 ranks, 4 experts"),
        pytest.param(["moe.experts=6"], 1, id="8 ranks, 6 experts"),
        pytest.param(["moe.experts=6", "parallel.replicate=2"], 2, id="2 replicas of 4 ranks, 6 experts"),
    ],
)
def test_every_rank_holds_its_share_of_the_experts(ranks: RunRanks, overrides: list[str], groups: int) -> None:
    for held, all_of_them in ranks(8, _held_of_experts, overrides):
        assert held == all_of_them * groups / 8


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [
        pytest.param((8, 28672, 4096), 8, 0, id="Mixtral, as many ranks as experts"),
        pytest.param((8, 28672, 4096), 64, 1, id="Mixtral, more"),
        pytest.param((128, 1536, 2048), 64, 0, id="several experts a rank"),
        pytest.param((50257, 768), 8, 0, id="a little padding"),
        pytest.param((576, 7168), 128, 1, id="much padding"),
        pytest.param((4, 100, 60), 8, 0, id="nothing is even"),
        pytest.param((3,), 8, 0, id="a vector"),
    ],
)
def test_what_is_cut(shape: tuple[int, ...], ranks: int, dim: int) -> None:
    with torch.device("meta"):
        assert placement(torch.empty(shape), ranks).dim == dim


def _held_between_micro_batches(overrides: list[str]) -> tuple[int, int]:
    """Bytes of this rank's gradients after the first of two micro-batches, and of all parameters whole."""
    engine = Engine(read(compose([*BASE, "train.compute=fp64", *overrides])), this_rank())
    engine.initialise()
    held: list[int] = []

    def measure(*_: object) -> None:
        gc.collect()
        tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
        held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))

    engine.model.register_forward_pre_hook(measure)
    engine.step(loader().batch(0, ROWS), 1e-2, Clock(torch.device("cpu")))
    whole_bytes = sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters())
    return held[1] - held[0], whole_bytes


@pytest.mark.parametrize(
    ("overrides", "share"),
    [pytest.param([], 0.7, id="sharded"), pytest.param(["parallel.replicate=2"], 1.2, id="replicated")],
)
def test_accumulated_gradients_are_cut_like_the_parameters(ranks: RunRanks, overrides: list[str], share: float) -> None:
    """Router weights and other parameters declared fp32 stay whole."""
    for held, whole_bytes in ranks(2, _held_between_micro_batches, ["train.micro_batch=2", *overrides]):
        assert 0.4 * whole_bytes < held < share * whole_bytes


def _train_compiled(overrides: list[str]) -> Results:
    """Captured whole, as for the default compiler, whose own work takes minutes on a CPU, and then run as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
        return _train([*BASE, "train.compute=fp64", "train.compile=true", *overrides])


def test_compiled_and_sharded_equals_one_process(ranks: RunRanks, expected: list[Results]) -> None:
    for found in ranks(2, _train_compiled, []):
        assert_equal(found, expected[0])


def _train_schemes(schemes: list[str]) -> dict[str, Results]:
    """With the sizes that each is shipped with, over windows that hold more than one compressed block; to the gradients
    after an update."""
    base = [value for value in BASE if not value.startswith(("attention.", "model.width", "+model."))]
    long = ["train.sequence_length=40", f"train.batch_tokens={ROWS * 40}", "train.compute=fp64"]
    return {scheme: _train([*base, *long, f"attention={scheme}"], steps=2) for scheme in schemes}


def test_every_scheme_under_fsdp_equals_one_process(ranks: RunRanks) -> None:
    schemes = mechanism.available("attention")
    expected = ranks(1, _train_schemes, schemes)[0]
    for found in ranks(2, _train_schemes, schemes):
        for scheme in schemes:
            assert_equal(found[scheme], expected[scheme])


SHIPPED = {
    "gemma4_e2b_tiny": "blocks.3.scale",
    "gemma4_26b_a4b_tiny": "blocks.5.scale",
    "deepseek_v4_flash_tiny": "nothing",
    "gpt2_tiny": "key.bias",
}
"""Models with what no attention scheme has: things made at the entry and read at every depth, shared states, norms
after a sublayer, experts beside a dense feed-forward, streams that are predicted from, learned positions. And what is
not compared: a number before a norm, or within a softmax, whose gradient is what rounding leaves of nothing."""


def _train_shipped(names: dict[str, str]) -> dict[str, Results]:
    base = [value for value in BASE if not value.startswith(("attention.", "moe.", "model.", "+model."))]
    found = {name: _train([*base, "train.compute=fp64", f"model={name}"], lambda engine: None, 2) for name in names}
    return {name: {key: found[name][key] for key in found[name] if names[name] not in key} for name in names}


def test_shipped_models_under_fsdp_equal_one_process(ranks: RunRanks) -> None:
    expected = ranks(1, _train_shipped, SHIPPED)[0]
    for found in ranks(2, _train_shipped, SHIPPED):
        for name in SHIPPED:
            assert_equal(found[name], expected[name])


def _dtypes(overrides: list[str]) -> tuple[dict[str, set[str]], float]:
    """By parameter declared fp32, the dtypes it was seen in: stored, in a forward, its gradient; and the last loss."""
    engine = Engine(read(compose([*BASE, *overrides])), this_rank())
    engine.initialise()
    seen: dict[str, set[str]] = {name: set() for name, _, spec in named_specs(engine.model) if spec.fp32}
    modules = dict(engine.model.named_modules())

    def watch(name: str) -> None:
        owner, _, attribute = name.rpartition(".")
        modules[owner].register_forward_pre_hook(
            lambda module, _: seen[name].add(str(getattr(module, attribute).dtype))
        )

    def note_gradients(*_: object) -> None:
        for name in seen:
            gradient = engine.model.get_parameter(name).grad
            assert gradient is not None
            seen[name].add(str(gradient.dtype))

    for name in seen:
        watch(name)
    engine.optimizer.register_step_pre_hook(note_gradients)
    loss = 0.0
    for step in range(STEPS):
        loss = float(engine.step(loader().batch(step * ROWS, ROWS), 1e-2, Clock(torch.device("cpu"))).loss)
    for name, parameter in engine.model.named_parameters():
        assert parameter.dtype == torch.float32, name
    return seen, loss


@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_lowers_no_parameter_that_is_declared_fp32(ranks: RunRanks, world_size: int) -> None:
    seen, loss = ranks(world_size, _dtypes, ["train.compute=bf16"])[0]
    _, precise = ranks(1, _dtypes, ["train.compute=fp32"])[0]
    assert seen
    assert set.union(*seen.values()) == {"torch.float32"}
    assert loss != precise
    assert loss == pytest.approx(precise, rel=5e-3)


def _finite(overrides: list[str]) -> list[bool]:
    engine = Engine(read(compose([*BASE, *overrides])), this_rank())
    engine.initialise()
    answers = [engine.is_finite()]
    if dist.get_rank() == dist.get_world_size() - 1:
        next(reversed(list(engine.optimizer.state.values())))["exp_avg"].fill_(float("nan"))
    return [*answers, engine.is_finite()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_agree_that_a_state_is_not_finite(ranks: RunRanks, world_size: int) -> None:
    assert ranks(world_size, _finite, []) == [[True, False]] * world_size
