"""Releases that store weights in fewer bits: what is read is what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.schema import Refused
from models import shards
from models.families.common import stored
from models.weights import open_weights, save_model
from tests import draw_v4
from tests.test_families import edit_config, reference, tiny

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [4, 3]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 8}}},
}


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix of a layer, block by block by hand; the last blocks of a row or column are cut."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or "layers" not in name or not name.endswith(".weight") or "gate.weight" in name:
            result[name] = tensor
            continue
        rows, columns = -(-tensor.shape[0] // 4), -(-tensor.shape[1] // 3)
        scales = torch.zeros(rows, columns)
        for r in range(rows):
            for c in range(columns):
                here = slice(4 * r, 4 * r + 4), slice(3 * c, 3 * c + 3)
                scales[r, c] = tensor[here].abs().max() / 448
                tensor[here] /= scales[r, c]
        result |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    return result


def in_int4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of the experts, number by number by hand."""
    result = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            result[name] = tensor
            continue
        rows, columns = tensor.shape
        words, scales = [[0] * (columns // 8) for _ in range(rows)], torch.zeros(rows, columns // 8)
        for r in range(rows):
            for g in range(columns // 8):
                group = tensor[r, 8 * g : 8 * g + 8]
                scales[r, g] = group.abs().max() / 7
                for place, value in enumerate((group / scales[r, g]).round().int().tolist()):
                    words[r][g] |= (value + 8) << (4 * place)
        signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
        result |= {
            f"{name}_packed": torch.tensor(signed, dtype=torch.int32),
            f"{name}_scale": scales.bfloat16(),
            f"{name}_shape": torch.tensor([rows, columns]),
        }
    return result


@pytest.mark.parametrize(
    ("quantise", "config", "tolerance"),
    [pytest.param(in_fp8, FP8, 2**-4, id="fp8"), pytest.param(in_int4, INT4, 1 / 13, id="int4")],
)
def test_what_is_read_is_what_was_stored(
    quantise: Any, config: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    theirs = tiny("deepseek_v3", hidden_size=16, moe_intermediate_size=8)
    theirs.save_pretrained(tmp_path / "plain")
    exact = open_weights(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "hf")
    tensors = quantise({name: tensor.clone() for name, tensor in load_file(tmp_path / "hf/model.safetensors").items()})
    save_file(tensors, tmp_path / "hf/model.safetensors")
    edit_config(tmp_path / "hf", quantization_config=config)
    read = open_weights(tmp_path / "hf")
    assert set(read.tensors) == set(exact.tensors)
    near = [name for name in read.tensors if not torch.equal(read.tensors[name], exact.tensors[name])]
    assert any("experts" in name for name in near)
    for name in near:
        here, there = read.tensors[name], exact.tensors[name]
        assert here.dtype == torch.float32
        assert (here - there).norm() <= tolerance * there.norm(), name
    save_model(tmp_path / "ours", read.config, read.tensors)
    assert "quantization" not in (tmp_path / "ours/model.yaml").read_text()


def test_a_factor_for_each_block_is_asked_for() -> None:
    factors = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    found = stored.times_blocks(torch.ones(5, 4), factors, (4, 3), "x")
    assert found.tolist() == [[1.0, 1.0, 1.0, 10.0]] * 4 + [[100.0, 100.0, 100.0, 1000.0]]
    with pytest.raises(Refused, match="x needs"):
        stored.times_blocks(torch.ones(5, 7), factors, (4, 3), "x")


E4M3, E2M1 = (4, 3, 7), (2, 1, 1)
"""Bits of the exponent and of the mantissa, and the exponent that means 1."""


def number(code: int, kind: tuple[int, int, int]) -> float:
    """Bit by bit: sign, exponent, mantissa; with exponent 0 there is no leading one."""
    exponent_bits, mantissa_bits, one = kind
    exponent, mantissa = (code >> mantissa_bits) % 2**exponent_bits, code % 2**mantissa_bits / 2**mantissa_bits
    size = 2.0 ** (exponent - one) * (1 + mantissa) if exponent else 2.0 ** (1 - one) * mantissa
    return -size if code >> (exponent_bits + mantissa_bits) else size


def drawn(shape: torch.Size, kind: tuple[int, int, int], block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Any numbers with any factors from 2⁻⁸ to 2⁷: both as DeepSeek-V4 stores them, and what they mean."""
    rows, columns = shape
    codes = torch.randint(16 if kind == E2M1 else 256, shape)
    codes[codes & 127 == 127] = 0  # of E4M3, what is no number
    exponents = torch.randint(119, 135, (-(-rows // block[0]), -(-columns // block[1])))
    meant = [
        [number(code, kind) * 2.0 ** (int(exponents[r // block[0], c // block[1]]) - 127) for c, code in enumerate(row)]
        for r, row in enumerate(codes.tolist())
    ]
    held = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    if kind == E2M1:
        held = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8).view(torch.int8)
    return held, exponents.to(torch.uint8).view(torch.float8_e8m0fnu), torch.tensor(meant)


SIZES = {"vocab_size": 11, "hidden_size": 38, "num_attention_heads": 2, "num_experts_per_tok": 2}
"""No matrix but one is made of whole blocks."""

RELEASED = {"model.embed_tokens.": "embed.", "model.norm.": "norm.", "model.hc_head.hc_": "hc_head_", "model.": ""}
"""What DeepSeek's names begin with, by what Transformers' do."""


def as_released(name: str) -> str:
    start = next((start for start in RELEASED if name.startswith(start)), "")
    return (RELEASED.get(start, "") + name.removeprefix(start)).replace("attn.norm.", "attn.kv_norm.")


def stored_as(name: str) -> tuple[tuple[int, int, int], tuple[int, int]] | None:
    """Experts in FP4, but one in FP8 (all are in a base model) and one as it is; of the rest what releases lower."""
    if any(part in name for part in ("attn.w", "indexer.wq_b", "shared_experts", "experts.1.")):
        return E4M3, (4, 3)
    return (E2M1, (1, 32)) if ".experts." in name and "experts.2." not in name else None


def test_deepseek_v4_is_read_as_it_is_released(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several files, each tensor stored in its own way, the last blocks of rows and columns cut."""
    reference("deepseek_v4", **(draw_v4.TINY | SIZES)).save_pretrained(tmp_path / "meant")
    meant = {as_released(name): tensor for name, tensor in load_file(tmp_path / "meant/model.safetensors").items()}
    held = dict(meant)
    for name, tensor in meant.items():
        if (kind := stored_as(name)) is not None:
            held[name], held[name.removesuffix("weight") + "scale"], meant[name] = drawn(tensor.shape, *kind)
    assert {tensor.dtype for tensor in held.values()} >= {torch.int8, torch.float8_e4m3fn, torch.float32}
    (tmp_path / "held").mkdir()
    (tmp_path / "held/config.json").write_bytes((tmp_path / "meant/config.json").read_bytes())
    edit_config(tmp_path / "held", expert_dtype="fp4", quantization_config=FP8 | {"scale_fmt": "ue8m0"})
    shards.write(tmp_path / "held", held.items(), 2**14)
    shards.write(tmp_path / "meant", meant.items())
    read, exact = open_weights(tmp_path / "held"), open_weights(tmp_path / "meant")
    assert len(list((tmp_path / "held").glob("*.safetensors"))) > 2
    assert read.config == exact.config
    assert set(read.tensors) == set(exact.tensors)
    for name in read.tensors:
        torch.testing.assert_close(read.tensors[name], exact.tensors[name], rtol=0, atol=0, msg=name)
    assert "expert_dtype" not in capsys.readouterr().err


BYTES, FACTORS = torch.zeros(4, 19, dtype=torch.int8), torch.ones(4, 2)
EIGHT = torch.ones(4, 5).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        pytest.param({"x.weight": BYTES}, "x.weight is stored in int8 without", id="FP4 without factors"),
        pytest.param({"x.weight": EIGHT}, "x.weight is stored in float8_e4m3fn without", id="FP8 without factors"),
        pytest.param({"x.weight": BYTES, "x.scale": FACTORS[:, :1]}, "needs .4, 2. factors", id="too few factors"),
        pytest.param({"x.weight": EIGHT, "x.scale": FACTORS}, "needs .1, 2. factors", id="factors of FP4 for FP8"),
        pytest.param({"x.weight": EIGHT[0], "x.scale": FACTORS[0]}, "no matrix", id="a vector"),
        pytest.param({"x.weight": BYTES, "x.scale": FACTORS.to(torch.uint8)}, "factors in uint8", id="bare exponents"),
        pytest.param({"x.weight": BYTES, "x.scale": FACTORS / 0}, "no finite number", id="an infinite factor"),
        pytest.param({"x.weight": FACTORS, "x.scale": FACTORS}, "stored in float32 with", id="factors of fp32"),
        pytest.param({"x_packed": BYTES}, "x_shape is missing", id="INT4 without its shape"),
        pytest.param(
            {"x_packed": BYTES.int(), "x_shape": torch.tensor([4, 9])}, "x_scale is missing", id="INT4 without factors"
        ),
    ],
)
def test_a_weight_that_cannot_be_read_is_refused(held: dict[str, Tensor], words: str) -> None:
    tensors = stored.Plain(held, (4, 3))
    (name,) = tensors
    with pytest.raises(Refused, match=words):
        tensors[name]


def test_blocks_of_unknown_size_are_refused() -> None:
    with pytest.raises(Refused, match="no quantization_config"):
        stored.Plain({"x.weight": EIGHT, "x.scale": torch.ones(1, 2)}, None)["x.weight"]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"quant_method": "fp8"}, id="one factor for a matrix"),
        pytest.param({"quant_method": "gptq", "bits": 4}, id="another method"),
        pytest.param({**FP8, "weight_block_size": [0, 128]}, id="blocks of nothing"),
        pytest.param({**INT4, "config_groups": {}}, id="no groups"),
        pytest.param(
            {**INT4, "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "symmetric": False}}}},
            id="not symmetric",
        ),
    ],
)
def test_another_way_of_storing_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    tiny("deepseek_v3").save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(Refused, match="quantization_config"):
        open_weights(tmp_path)
