"""Optimizers: each equals its plain definition, whole and sharded, and nobody's parameter is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from conf.schema import Refused
from models.parameter import Module, Parametrization, Spec, named_specs
from parallel.apply import placement
from tests.toy import Toy, everything, give, gradients, toy, train
from train.optimizer import clip_gradients, read
from train.optimizer.adamw import Config as AdamWConfig
from train.optimizer.groups import check_partition
from train.optimizer.muon import Config as MuonConfig
from train.optimizer.newton_schulz import STACK_ELEMENTS, orthogonal_updates, orthogonalise
from train.optimizer.whole import on_whole_matrices

Ranks = Callable[..., list[Any]]
Config = AdamWConfig | MuonConfig

ADAMW = AdamWConfig(learning_rate=0.01)
MUON = MuonConfig(learning_rate=0.01, precision="float64")
CONFIGS = [pytest.param(ADAMW, id="adamw"), pytest.param(MUON, id="muon")]


def reference_newton_schulz(G: Tensor) -> Tensor:
    """One matrix, as the paper writes it; its numbers typed by hand."""
    X = G / (G * G).sum().sqrt()
    if G.shape[0] > G.shape[1]:
        X = X.T
    for step in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return X.T if G.shape[0] > G.shape[1] else X


def independent_matrices(tensor: Tensor, spec: Spec) -> list[Tensor]:
    stacks = [tensor] if tensor.ndim == 2 else list(tensor)
    return [piece for matrix in stacks for piece in (matrix.split(spec.split) if spec.split else [matrix])]


def test_muon_equals_a_loop_over_matrices() -> None:
    model, reference = toy(), toy()
    optimizer = MUON.build(model, Parametrization())
    specs = {name: (parameter, spec) for name, parameter, spec in named_specs(reference)}
    matrices = {name for name, (_, spec) in specs.items() if Parametrization().is_matrix(spec)}
    assert matrices == {"wide", "wide_too", "tall", "short", "latent", "up", "down"}
    momenta = {name: torch.zeros_like(specs[name][0]) for name in matrices}
    adam = torch.optim.AdamW(
        [
            {"params": [specs["embedding"][0]], "weight_decay": 0.1},
            {"params": [specs["gain"][0], specs["sink"][0]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(3):
        rate = 0.01 / (step + 1)
        train(model, optimizer, range(step, step + 1))
        give(reference, gradients(step))
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        with torch.no_grad():
            for name in matrices:
                W, spec = specs[name]
                G = gradients(step)[name]
                momenta[name] = 0.95 * momenta[name] + G
                ahead = 0.95 * momenta[name] + G
                for w, u in zip(independent_matrices(W, spec), independent_matrices(ahead, spec), strict=True):
                    update = reference_newton_schulz(u)
                    w.copy_(w * (1 - rate * 0.1) - rate * 0.18 * math.sqrt(max(u.shape)) * update)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, specs[name][0], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        pytest.param((4, 32, 32), torch.float64, 2e-3, id="square"),
        pytest.param((3, 16, 64), torch.float64, 2e-3, id="wide"),
        pytest.param((3, 64, 16), torch.float64, 2e-3, id="tall"),
        pytest.param((2, 1, 16), torch.float64, 2e-3, id="one row"),
        pytest.param((3, 16, 64), torch.float32, 2e-3, id="float32"),
        pytest.param((3, 16, 64), torch.bfloat16, 5e-2, id="bfloat16"),
    ],
)
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_every_singular_value_becomes_one(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, scale: float
) -> None:
    U, _, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    spectrum = torch.logspace(0, -3, U.shape[-1], dtype=torch.float64)
    G = ((U * spectrum) @ V * scale).to(dtype)
    values = torch.linalg.svdvals(orthogonalise(G).double())
    assert (values - 1).abs().max() < tolerance


def test_a_gradient_of_zero_updates_nothing() -> None:
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


def test_updates_have_the_stated_size_however_they_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [torch.randn(5, 8, 4).double(), torch.randn(8, 4).double(), torch.randn(2, 3, 4, 8).double()]
    splits: list[tuple[int, ...]] = [(), (), (1, 3)]
    together = orthogonal_updates(matrices, splits, torch.float64)
    assert together[0].square().mean().sqrt() == pytest.approx(0.18, rel=2e-3)
    assert STACK_ELEMENTS > 5 * 8 * 4
    for most in (1, 32, 64, 100):
        monkeypatch.setattr("train.optimizer.newton_schulz.STACK_ELEMENTS", most)
        for one, other in zip(together, orthogonal_updates(matrices, splits, torch.float64), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_adamw_is_torchs_bit_for_bit() -> None:
    model, reference = toy(torch.float32), toy(torch.float32)
    optimizer = ADAMW.build(model, Parametrization())
    parameters = dict(reference.named_parameters())
    vectors = [parameters.pop("gain"), parameters.pop("sink")]
    theirs = torch.optim.AdamW(
        [{"params": list(parameters.values()), "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        give(reference, gradients(step))
        for group in theirs.param_groups:
            group["lr"] = 0.01 / (step + 1)
        theirs.step()
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("config", CONFIGS)
def test_a_parameter_without_gradient_stays(config: Config) -> None:
    model = toy()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = config.build(model, Parametrization())
    optimizer.step()
    give(model, gradients(0))
    for name in ("tall", "gain"):
        model.get_parameter(name).grad = None
    optimizer.step()
    stayed = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert stayed == {"tall", "gain"}


class Scaled(Parametrization):
    """Another parametrization, to see that the optimizer asks it."""

    def learning_rate_scale(self, spec: Spec) -> float:
        return 0.0 if spec.role in ("output", "gain") or spec.shape == (1, 6) else 1.0

    def adam_epsilon(self, spec: Spec) -> float:
        return 1e30 if spec.role == "embedding" else 1e-8

    def weight_decay(self, spec: Spec) -> bool:
        return False


@pytest.mark.parametrize("config", CONFIGS)
def test_the_parametrization_is_obeyed(config: Config) -> None:
    model = toy()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, config.build(model, Scaled()), range(2))
    stayed = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert stayed == {"embedding", "wide_too", "tall", "short", "gain"}


def layouts() -> list[Any]:
    return [
        pytest.param(1, "fsdp", id="1 rank"),
        pytest.param(2, "fsdp", id="2 ranks"),
        pytest.param(3, "fsdp", id="3 ranks"),
        pytest.param(2, "runs", id="2 ranks, stacks cut by rows"),
        pytest.param(4, "runs", id="4 ranks, stacks cut by columns"),
        pytest.param(4, "hsdp", id="2x2 ranks, replicated and sharded"),
        pytest.param(4, "tensor", id="2x2 ranks, cut by rows and columns"),
    ]


def shard(model: Toy, layout: str) -> Toy:
    """FSDP2 over all ranks, of first dims or as runs cut, HSDP over a square of them, or columns over one axis and rows
    over the other."""
    size = dist.get_world_size()
    if layout == "fsdp":
        return cast(Toy, fully_shard(model, mesh=init_device_mesh("cpu", (size,))))
    if layout == "runs":
        cut = partial(placement, ranks=size)
        return cast(Toy, fully_shard(model, mesh=init_device_mesh("cpu", (size,)), shard_placement_fn=cut))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    if layout == "hsdp":
        return cast(Toy, fully_shard(model, mesh=mesh))
    for name, parameter in list(model.named_parameters()):
        how: list[Placement] = [Shard(parameter.ndim - 1), Shard(0)] if parameter.ndim > 1 else [Replicate(), Shard(0)]
        setattr(model, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, how)))
    return model


def _sharded_run(layout: str, config: Config) -> tuple[dict[str, Tensor], Tensor]:
    model = shard(toy(), layout)
    optimizer = config.build(model, Parametrization())
    train(model, optimizer, range(3))
    give(model, gradients(3))
    norm = clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    return everything(model, optimizer), norm


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("world_size", "layout"), layouts())
def test_sharded_equals_whole(ranks: Ranks, world_size: int, layout: str, config: Config) -> None:
    model = toy()
    optimizer = config.build(model, Parametrization())
    train(model, optimizer, range(3))
    give(model, gradients(3))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    expected = everything(model, optimizer)
    for found, found_norm in ranks(world_size, _sharded_run, layout, config):
        torch.testing.assert_close(found_norm, norm, rtol=1e-12, atol=0.0)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-12), name


def test_bfloat16_travels_too(ranks: Ranks) -> None:
    exact, rounded = (
        ranks(2, _sharded_run, "fsdp", MUON),
        ranks(2, _sharded_run, "fsdp", replace(MUON, precision="bfloat16")),
    )
    for (one, _), (other, _) in zip(exact, rounded, strict=True):
        for name in ("wide", "tall", "latent", "up"):
            moved = (one[name] - toy().get_parameter(name)).norm()
            assert (one[name] - other[name]).norm() < 0.03 * moved, name


def _matrices_made_whole() -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    matrices = [distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]) for _ in range(8)]
    seen: list[int] = []

    def work(places: Any, whole: Any) -> Any:
        seen.extend(places)
        assert all(matrix.shape == (8, 8) for matrix in whole)
        return [matrix + place for place, matrix in zip(places, whole, strict=True)]

    results = on_whole_matrices([matrix.to_local() for matrix in matrices], matrices, work)
    for place, (result, matrix) in enumerate(zip(results, matrices, strict=True)):
        assert torch.equal(result, matrix.to_local() + place)
    return len(seen), sum(seen)


def test_each_matrix_is_worked_on_by_one_rank(ranks: Ranks) -> None:
    answers = ranks(2, _matrices_made_whole)
    assert [count for count, _ in answers] == [4, 4]
    assert sum(places for _, places in answers) == sum(range(8))


def _clip_mixed() -> tuple[Tensor, Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Shard(0)]))
    replicated = nn.Parameter(distribute_tensor(torch.zeros(1), mesh, [Replicate()]))
    plain = nn.Parameter(torch.zeros(1))
    sharded.grad = distribute_tensor(torch.tensor([1.0, 2.0, 4.0]), mesh, [Shard(0)])
    replicated.grad = distribute_tensor(torch.tensor([2.0]), mesh, [Replicate()])
    plain.grad = torch.tensor([-5.0])
    norm = clip_gradients([sharded, replicated, plain], 1.0)
    again = clip_gradients([sharded, replicated, plain], math.inf)
    return norm, again, sharded.grad.full_tensor()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_clipping_counts_each_element_once(ranks: Ranks, world_size: int) -> None:
    for norm, again, gradient in ranks(world_size, _clip_mixed):
        assert norm.item() == pytest.approx(math.sqrt(50.0), rel=1e-6)  # 1 + 4 + 16 + 4 + 25
        assert again.item() == pytest.approx(1.0, rel=1e-6)
        assert gradient[2].item() == pytest.approx(4.0 / math.sqrt(50.0), rel=1e-6)


def test_clipping_leaves_small_gradients_and_shows_what_is_not_finite() -> None:
    model = toy()
    give(model, gradients(0))
    gradient = model.get_parameter("gain").grad
    assert gradient is not None
    before = gradient.clone()
    clip_gradients(model.parameters(), 1e6)
    assert torch.equal(gradient, before)
    gradient[0] = math.inf
    assert not clip_gradients(model.parameters(), 1.0).isfinite()
    assert clip_gradients([], 1.0) == 0.0


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("taken", [0, 2], ids=["before the first step", "after two steps"])
def test_state_goes_by_name_into_a_fresh_optimizer(config: Config, taken: int) -> None:
    model = toy()
    optimizer = config.build(model, Parametrization())
    train(model, optimizer, range(taken))
    saved = deepcopy(get_optimizer_state_dict(model, optimizer))
    other = toy()
    other.load_state_dict(model.state_dict())
    fresh = config.build(other, Parametrization())
    set_optimizer_state_dict(other, fresh, saved)
    assert all(torch.equal(one, two) for one, two in _pairs(everything(model, optimizer), everything(other, fresh)))
    for _ in range(2):
        train(model, optimizer, range(taken, taken + 2))
        train(other, fresh, range(taken, taken + 2))
        assert all(torch.equal(one, two) for one, two in _pairs(everything(model, optimizer), everything(other, fresh)))


def _pairs(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    assert one.keys() == other.keys()
    return [(one[name], other[name]) for name in one]


def test_a_loaded_state_brings_no_numbers() -> None:
    model = toy()
    saved = get_optimizer_state_dict(model, ADAMW.build(model, Parametrization()))
    changed = AdamWConfig(learning_rate=0.5, weight_decay=0.3, beta2=0.99).build(model, Parametrization())
    set_optimizer_state_dict(model, changed, saved)
    assert {group["lr"] for group in changed.param_groups} == {0.5}
    assert {group["weight_decay"] for group in changed.param_groups} == {0.3, 0.0}
    assert {group["betas"] for group in changed.param_groups} == {(0.9, 0.99)}


class Undeclared(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(2))


class Flat(Module):
    def __init__(self) -> None:
        super().__init__()
        self.declare("vector", (4,), ("width",), "projection")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("model", "named"),
    [
        pytest.param(Undeclared, "extra was never declared", id="undeclared"),
        pytest.param(Flat, "vector has role projection", id="a matrix of one dim"),
    ],
)
def test_a_parameter_without_a_rule_is_refused(config: Config, model: type[nn.Module], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config.build(model(), Parametrization())


def test_groups_must_partition() -> None:
    model = toy()
    names, parameters = zip(*model.named_parameters(), strict=True)
    check_partition(model.named_parameters(), [{"params": parameters[:4]}, {"params": parameters[4:]}])
    with pytest.raises(ValueError, match=f"{names[3]} is in no group"):
        check_partition(model.named_parameters(), [{"params": parameters[:3]}, {"params": parameters[4:]}])
    with pytest.raises(ValueError, match=f"{names[3]} is taken 2 times"):
        check_partition(model.named_parameters(), [{"params": parameters[:4]}, {"params": parameters[3:]}])
    with pytest.raises(ValueError, match="the model does not have"):
        check_partition(model.named_parameters(), [{"params": [*parameters, nn.Parameter(torch.zeros(1))]}])


def test_tied_parameters_are_stepped_once() -> None:
    model = toy()
    model.register_parameter("wide_too", model.get_parameter("wide"))
    optimizer = ADAMW.build(model, Parametrization())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) == 9


@pytest.mark.parametrize(
    ("values", "named"),
    [
        pytest.param({"name": "muonn", "learning_rate": 1e-3}, "did you mean 'muon'", id="misspelt name"),
        pytest.param({"name": "groups", "learning_rate": 1e-3}, "adamw", id="a module that is no optimizer"),
        pytest.param({"learning_rate": 1e-3}, "name", id="no name"),
        pytest.param({"name": "adamw"}, "learning_rate", id="no learning rate"),
        pytest.param({"name": "adamw", "learning_rate": 1e-3, "momentum": 0.9}, "momentum", id="another's number"),
        pytest.param({"name": "adamw", "learning_rate": -1.0}, "learning_rate", id="negative rate"),
        pytest.param({"name": "adamw", "learning_rate": 1.0, "beta2": 1.0}, "beta2", id="beta of one"),
        pytest.param({"name": "muon", "learning_rate": 1.0, "momentum": 1.0}, "momentum", id="momentum of one"),
    ],
)
def test_bad_configurations_are_refused(values: dict[str, object], named: str) -> None:
    with pytest.raises(Refused, match=named):
        read(values)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "conf/optimizer").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_optimizers_build(path: Path) -> None:
    read(yaml.safe_load(path.read_text())).build(toy(), Parametrization())
