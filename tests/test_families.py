"""Published families: equal to Transformers' own implementation, translated both ways; what cannot be is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from conf.schema import Refused, build
from models.config import ModelConfig
from models.families.common import published
from models.families.common.names import Ours
from models.model import Model
from models.sequence import Whole
from models.shards import Shards
from models.weights import export_model, load_model, open_weights, save_model

TOLERANCE = 3e-5
"""Relative, in fp32: most differences are a tenth of it, the largest of any draw a quarter."""
SEEDS = range(20)


def common(draw: random.Random) -> dict[str, Any]:
    return {
        "vocab_size": draw.randint(5, 40),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": draw.choice([1, 2, 3, 4]),
        "tie_word_embeddings": draw.random() < 0.3,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
        "max_position_embeddings": 64,
        "rope_parameters": rope(draw),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def rope(draw: random.Random) -> dict[str, Any]:
    plain = {"rope_type": "default", "rope_theta": draw.choice([100.0, 1e4, 1e6])}
    if draw.random() < 0.5:
        return plain
    yarn = plain | {
        "rope_type": "yarn",
        "factor": draw.choice([1.0, 2.0, 40.0]),
        "original_max_position_embeddings": draw.choice([4, 16, 64]),
        "beta_fast": draw.choice([4.0, 32.0]),
        "truncate": draw.random() < 0.7,
    }
    correction = draw.choice(["none", "published", "both", "explicit"])
    if correction == "published":
        yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    if correction == "both":
        yarn |= {"mscale": 0.7, "mscale_all_dim": 1.3}
    if correction == "explicit":
        yarn |= {"attention_factor": 0.9}
    return yarn


def deepseek_v3(draw: random.Random) -> dict[str, Any]:
    config = common(draw)
    groups = draw.choice([1, 2, 3])
    kept = draw.randint(1, groups)
    in_group = draw.choice([2, 3])
    return config | {
        "hidden_size": draw.randint(5, 20),
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": draw.randint(4, 24),
        "moe_intermediate_size": draw.randint(4, 12),
        "first_k_dense_replace": draw.randint(0, config["num_hidden_layers"]),
        "n_shared_experts": draw.choice([0, 1, 2]),
        "n_routed_experts": groups * in_group,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw.randint(2, kept * in_group),
        "norm_topk_prob": draw.random() < 0.7,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "kv_lora_rank": draw.randint(4, 12),
        "q_lora_rank": draw.choice([None, draw.randint(4, 12)]),
        "qk_rope_head_dim": draw.choice([2, 4, 8]),
        "qk_nope_head_dim": draw.randint(2, 8),
        "v_head_dim": draw.randint(2, 8),
        "rope_interleave": draw.random() < 0.8,
        "attention_bias": draw.random() < 0.3,
    }


def grouped_query(draw: random.Random) -> dict[str, Any]:
    config = common(draw)
    heads = config["num_attention_heads"]
    experts = draw.randint(2, 5)
    return config | {
        "hidden_size": draw.randint(5, 20),
        "intermediate_size": draw.randint(4, 24),
        "num_key_value_heads": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": draw.choice([2, 4, 8]),
        "sliding_window": draw.choice([None, 1, 3, 7]),
        "num_local_experts": experts,
        "num_experts_per_tok": draw.randint(2, experts),
    }


def mixtral(draw: random.Random) -> dict[str, Any]:
    config = grouped_query(draw)
    if config["rope_parameters"]["rope_type"] == "default" and draw.random() < 0.5:
        return config | {"head_dim": None, "hidden_size": config["num_attention_heads"] * draw.choice([2, 4, 6])}
    return config


def qwen3_moe(draw: random.Random) -> dict[str, Any]:
    config = grouped_query(draw)
    return config | {
        "head_dim": max(4, config["head_dim"]),  # of two numbers, a norm multiplies rounding by much
        "moe_intermediate_size": draw.randint(4, 12),
        "use_sliding_window": config["sliding_window"] is not None,
        "norm_topk_prob": draw.random() < 0.6,
        "attention_bias": draw.random() < 0.4,
        "decoder_sparse_step": draw.choice([1, 1, 2]),
        "mlp_only_layers": draw.choice([[], [0], [1, 2]]),
    }


FAMILIES = {"deepseek_v3": deepseek_v3, "mixtral": mixtral, "qwen3_moe": qwen3_moe}


def reference(model_type: str, **values: Any) -> Any:
    """Transformers' model of a configuration, every parameter and every stored buffer perturbed."""
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
            else:  # a table of experts
                tensor.copy_(torch.rand(len(tensor), config.n_routed_experts).argsort(1)[:, : tensor.shape[1]])
    return model.eval()


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def assert_near(ours: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE, least: float = 0.0) -> None:
    """Relative to the norm of theirs, but no smaller than `least`."""
    error, scale = (ours - theirs).norm().item(), max(theirs.norm().item(), least)
    assert error <= tolerance * scale, f"{what}: {error:.3g} of {scale:.3g}"


def assert_same_gradients(ours: Model, theirs: Any, tolerance: float = TOLERANCE, floor: float = 0.0) -> None:
    """Theirs under our names, by the same translation that imports weights.

    floor: a gradient that is a smaller share of all gradients is judged as if it were that large.
    """
    model_type: str = theirs.config.model_type
    names = published.family(model_type, "").tensor_names(ours.config)
    gradients = {
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for name, tensor in theirs.state_dict(keep_vars=True).items()
    }
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    translated = Ours(gradients, shapes, names, model_type)
    norms = [gradient.norm() for gradient in gradients.values() if gradient.is_floating_point()]
    least = floor * torch.stack(norms).norm().item()
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert not translated[name].any(), f"{name} has no gradient"
        else:
            assert_near(parameter.grad, translated[name], name, tolerance, least)


def assert_equal(
    theirs: Any, draw: random.Random, folder: Path, tolerance: float = TOLERANCE, floor: float = 0.0
) -> None:
    """Logits, every gradient, and import and export of a reference, by way of `folder`."""
    model_type: str = theirs.config.model_type
    theirs.save_pretrained(folder / "hf", max_shard_size=draw.choice(["4KB", "1GB"]))
    ours = load_model(folder / "hf")

    ids = torch.randint(ours.config.vocab, (draw.randint(1, 2), draw.choice([9, 13, 22])))
    few = ids[:, : draw.choice([1, 2, 5])]
    expected = theirs(ids).logits
    logits = ours(ids, Whole.rows(*ids.shape))
    for found, wanted in ((logits, expected), (ours(few, Whole.rows(*few.shape)), theirs(few).logits)):
        assert isinstance(found, Tensor)
        assert_near(found, wanted, f"logits of {wanted.shape[1]} tokens", tolerance)
    assert isinstance(logits, Tensor)
    projection = torch.randn_like(expected)
    (expected * projection).sum().backward()
    (logits * projection).sum().backward()
    assert_same_gradients(ours, theirs, tolerance, floor)

    imported = open_weights(folder / "hf")
    save_model(folder / "ours", imported.config, imported.tensors)
    assert export_model(folder / "back", open_weights(folder / "ours")) == model_type
    before, after = Shards(folder / "hf"), Shards(folder / "back")
    assert set(after) == {name for name in before if before[name].numel()}
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert_near(loaded(folder / "back")(ids).logits, expected, "logits of the export", tolerance)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed:02}")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_transformers(model_type: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{model_type} {seed}")
    torch.manual_seed(seed)
    assert_equal(reference(model_type, **FAMILIES[model_type](draw)), draw, tmp_path)


def tiny(model_type: str, **values: Any) -> Any:
    """A small reference with a layer of each kind, the sizes of its configuration as given."""
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    special: dict[str, dict[str, Any]] = {
        "deepseek_v3": {
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 6,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 6,
            "q_lora_rank": 5,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 3,
            "v_head_dim": 5,
        },
        "mixtral": {"num_local_experts": 3, "head_dim": 4},
        "qwen3_moe": {"moe_intermediate_size": 6, "num_local_experts": 3, "head_dim": 4, "mlp_only_layers": [0]},
    }
    return reference(model_type, **(sizes | special[model_type] | values))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_expert_a_token(model_type: str, tmp_path: Path) -> None:
    """Its weight is normalised to 1 in most: the router's gradient is what rounding leaves of nothing."""
    assert_equal(tiny(model_type, num_experts_per_tok=1), random.Random(1), tmp_path, 1e-4, 1e-2)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(model_type: str, **values: Any) -> Path:
        tiny(model_type, **values).save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    return save


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_in_one_tensor_are_read_too(model_type: str, tmp_path: Path) -> None:
    theirs = tiny(model_type)
    (tmp_path / "hf").mkdir()
    theirs.config.save_pretrained(tmp_path / "hf")
    save_file(theirs.state_dict(), tmp_path / "hf" / "model.safetensors")
    ids = torch.arange(7)[None]
    logits = load_model(tmp_path / "hf")(ids, Whole.rows(1, 7))
    assert isinstance(logits, Tensor)
    assert_near(logits, theirs(ids).logits, "logits")


def test_the_older_spelling_of_rotary_parameters(saved: Callable[..., Path]) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}
    folder = saved("deepseek_v3", rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **yarn})
    new = open_weights(folder).config
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **yarn}})
    )
    assert open_weights(folder).config == new


@pytest.mark.parametrize(
    ("model_type", "change", "named"),
    [
        pytest.param("deepseek_v3", {"hidden_act": "gelu"}, "hidden_act", id="activation"),
        pytest.param("mixtral", {"attention_dropout": 0.1}, "attention_dropout", id="attention dropout"),
        pytest.param("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise", id="router jitter"),
        pytest.param("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads", id="KV heads of a latent"),
        pytest.param("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func", id="affinity"),
        pytest.param("deepseek_v3", {"topk_method": "greedy"}, "topk_method", id="selection"),
        pytest.param("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config", id="fp8"),
        pytest.param("deepseek_v3", {"num_experts_per_tok": 3}, "kept groups", id="too many experts chosen"),
        pytest.param("qwen3_moe", {"num_key_value_heads": 3}, "kv_heads", id="impossible heads"),
        pytest.param("qwen3_moe", {"num_attention_heads": 0}, "num_attention_heads", id="no heads"),
        pytest.param(
            "mixtral", {"rope_parameters": {"rope_theta": 1.0}}, "base", id="a rope that does not turn slower"
        ),
        pytest.param(
            "mixtral",
            {"max_position_embeddings": 0, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "original_max_position_embeddings",
            id="YaRN from no length",
        ),
        pytest.param("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step", id="sparse step 0"),
        pytest.param("qwen3_moe", {"hidden_size": "8"}, "hidden_size", id="text for a number"),
        pytest.param("mixtral", {"model_type": "llama"}, "model_type", id="unknown family"),
        pytest.param("mixtral", {"model_type": "common"}, "model_type", id="no family of that name"),
        pytest.param(
            "mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type", id="linear rope"
        ),
        pytest.param(
            "mixtral",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
            id="partial rotation",
        ),
    ],
)
def test_a_configuration_that_cannot_be_represented_is_refused_by_name(
    model_type: str, change: dict[str, Any], named: str, saved: Callable[..., Path]
) -> None:
    folder = saved(model_type)
    edit_config(folder, **change)
    with pytest.raises(Refused, match=named):
        open_weights(folder)


def _rename(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.extra.weight"] = tensors.pop("model.norm.weight")


def test_a_key_that_transformers_does_not_read_either_is_told(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("mixtral")
    edit_config(folder, sliding_windw=2, use_cache=False)
    capsys.readouterr()
    open_weights(folder)
    assert capsys.readouterr().err == "config.json's sliding_windw is a key that nothing reads.\n"


DAMAGE = [
    pytest.param(lambda t: t.update(extra=torch.ones(1)), "extra, which nothing", id="a tensor too many"),
    pytest.param(lambda t: t.pop("model.norm.weight"), "model.norm.weight", id="a tensor too few"),
    pytest.param(_rename, "lacks the tensor model.norm.weight", id="a tensor renamed"),
    pytest.param(
        lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"),
        "experts.2.up_proj",
        id="an expert's matrix too few",
    ),
    pytest.param(
        lambda t: t.update({"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(6, 9)}),
        "differ from expert to expert",
        id="an expert of another width",
    ),
    pytest.param(
        lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.ones(5)}),
        "e_score_correction_bias of shape",
        id="another number of experts",
    ),
    pytest.param(
        lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(8, 16)}),
        "lacks the tensor model.layers.2",
        id="multi-token prediction",
    ),
]


@pytest.mark.parametrize(("change", "named"), DAMAGE)
def test_every_tensor_is_read_and_every_one_of_ours_filled(
    change: Callable[[dict[str, Tensor]], object], named: str, saved: Callable[..., Path]
) -> None:
    folder = saved("deepseek_v3")
    edit_tensors(folder, change)
    with pytest.raises(Refused, match=named):
        load_model(folder)


def test_a_tied_head_may_be_stored_twice_but_not_differ(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral", tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(folder)
    edit_tensors(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(Refused, match=r"lm_head\.weight"):
        load_model(folder)


ATTENTION = {"scheme": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4}
EXPERTS = {"scheme": "moe", "experts": 4, "top_k": 2, "hidden": 8, "router": {"affinity": "softmax"}}


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        pytest.param(
            [{"attention": ATTENTION | {"rope": None}, "feedforward": EXPERTS}], "without positions", id="no rope"
        ),
        pytest.param(
            [{"attention": ATTENTION, "feedforward": EXPERTS | {"shared_hidden": 8}}],
            "shared_hidden",
            id="shared experts",
        ),
        pytest.param(
            [{"attention": ATTENTION | {"window": w}, "feedforward": EXPERTS} for w in (None, 5)],
            r"layer\.1\.attention\.window is 5, not None",
            id="a window in one layer",
        ),
        pytest.param(
            [
                {"attention": ATTENTION, "feedforward": EXPERTS},
                {"attention": ATTENTION, "feedforward": EXPERTS, "reads": -1},
            ],
            "layer 1 reads another layer's state",
            id="a shared state",
        ),
    ],
)
def test_what_a_family_cannot_hold_is_not_exported(layers: list[dict[str, Any]], reason: str, tmp_path: Path) -> None:
    config = build(ModelConfig, {"vocab": 9, "width": 8, "layers": [{"of": layers}]}, "model")
    model = Model(config)
    model.initialise(0)
    save_model(tmp_path / "ours", config, model.state_dict())
    with pytest.raises(Refused, match=reason):
        export_model(tmp_path / "hf", open_weights(tmp_path / "ours"))
    assert not (tmp_path / "hf").exists()


def test_losses_of_training_do_not_stop_an_export(tmp_path: Path) -> None:
    experts = EXPERTS | {"balance_loss": 0.01, "z_loss": 0.001}
    layers = [{"of": [{"attention": ATTENTION, "feedforward": experts}]}]
    config = build(ModelConfig, {"vocab": 9, "width": 8, "layers": layers}, "model")
    model = Model(config)
    model.initialise(0)
    save_model(tmp_path / "ours", config, model.state_dict())
    assert export_model(tmp_path / "hf", open_weights(tmp_path / "ours")) == "mixtral"
    ids = torch.arange(8)[None]
    logits = model(ids, Whole.rows(1, 8))
    assert isinstance(logits, Tensor)
    assert_near(logits, loaded(tmp_path / "hf")(ids).logits, "logits")
