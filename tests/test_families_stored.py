"""Releases that store weights in fewer bits: what is read is what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.schema import Refused
from models.families.common import stored
from models.weights import open_weights, save_model
from tests.test_families import edit_config, tiny

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
