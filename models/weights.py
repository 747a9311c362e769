"""Weights at rest, wherever they come from: our directories, Transformers' directories, runs and their checkpoints.

Ours is `model.yaml`, the ModelConfig as a mapping, beside safetensors under our names. A run holds `config.yaml`, whose
section `model` is the same mapping, and `checkpoints/step_NNNNNNNN/`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from conf import schema
from conf.schema import Refused
from models import checkpoint, cost, shards
from models.config import ModelConfig
from models.families.common import published, stored
from models.families.common.names import Ours, holds_any, to_theirs
from models.linear import full_precision
from models.model import Model
from models.parameter import named_specs

OURS, THEIRS, RUN = "model.yaml", "config.json", "config.yaml"
CHECKPOINT = checkpoint.TABLE
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files that travel with the weights."""


@dataclass(frozen=True)
class Weights:
    """config, and the tensors by our names, read one at a time."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]

    def shapes(self) -> dict[str, torch.Size]:
        """Of every tensor, by its name, as the configuration means it; one of another shape is refused when read."""
        return _shapes(self.config)


def open_weights(path: str | Path) -> Weights:
    """What `path` holds. Raises Refused, in one sentence, for what is missing, corrupt, or of another architecture."""
    path = Path(path)
    return _TENSORS[_kind(path)](path)


def open_config(path: str | Path) -> ModelConfig:
    """The configuration alone. Raises Refused as open_weights."""
    path = Path(path)
    return _CONFIG[_kind(path)](path)


def is_weights_alone(path: Path) -> bool:
    """Whether `path` is a directory of weights, ours or Transformers', and no run or checkpoint of one."""
    return path.is_dir() and any((path / name).is_file() for name in (OURS, THEIRS))


def _kind(path: Path) -> str:
    if not path.is_dir():
        raise Refused(f"{path} is no directory; name one with {OURS}, {THEIRS} or {RUN}, or a checkpoint of a run.")
    for name in _TENSORS:
        if (path / name).is_file():
            return name
    raise Refused(f"{path} holds no model: there is neither {OURS}, {THEIRS} nor {RUN} in it, and it is no checkpoint.")


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """The model of `path` as it generates, without multi-token prediction, computing in `dtype`; what is declared fp32
    stays so. Raises Refused as open_weights."""
    weights = open_weights(path)
    with torch.device("meta"):
        model = Model(dataclasses.replace(weights.config, mtp=None), dtype)
    # buffers (a router's selection bias) and what is declared fp32 are not lowered
    lowered = {name for name, _, spec in named_specs(model) if not spec.fp32}

    def kept_as(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return dtype if name in lowered else full_precision(dtype)

    tensors = ((name, weights.tensors[name]) for name in model.state_dict())
    state = {name: tensor.to(device, kept_as(name, tensor)) for name, tensor in tensors}
    model.load_state_dict(state, assign=True)
    return model


def save_model(
    target: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor], beside: Path | None = None
) -> None:
    """Write our directory format. beside: where tokenizer files are taken from. Raises Refused if target exists."""
    with shards.written_aside(Path(target)) as folder:
        (folder / OURS).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        shards.write(folder, tensors.items())
        _take_along(beside, folder)


def export_model(target: str | Path, weights: Weights, beside: Path | None = None) -> str:
    """Write a Transformers directory; returns the family's name. Raises Refused where no family can hold the model."""
    name, config = _published(weights.config)
    names = published.family(name, THEIRS).tensor_names(weights.config)
    with shards.written_aside(Path(target)) as folder:
        dtype = str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")
        (folder / THEIRS).write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True) + "\n")
        shards.write(folder, to_theirs(weights.tensors, names))
        _take_along(beside, folder)
    return name


def _published(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    reasons = []
    for name in published.available():
        try:
            return name, published.family(name, THEIRS).config_to(config)
        except Refused as refusal:
            reasons.append(f"{name}: {refusal}")
    raise Refused(f"no published family can hold this model ({'; '.join(reasons)}).")


def _take_along(beside: Path | None, folder: Path) -> None:
    for name in TOKENIZER:
        if beside is not None and (beside / name).is_file():
            (folder / name).write_bytes((beside / name).read_bytes())


def _our_config(path: Path) -> ModelConfig:
    return schema.build(ModelConfig, _mapping(path / OURS, yaml.safe_load), str(path / OURS))


def _ours(path: Path) -> Weights:
    config, tensors = _our_config(path), shards.Shards(path)
    _refuse_other({name: tensors.shape(name) for name in tensors}, _shapes(config), str(path))
    return Weights(config, tensors)


def _their_family(path: Path) -> tuple[published.Family, ModelConfig]:
    values = _mapping(path / THEIRS, json.loads)
    family = published.family(values.get("model_type"), str(path / THEIRS))
    return family, family.config_from(values)


def _theirs(path: Path) -> Weights:
    family, config = _their_family(path)
    tensors = stored.Plain(shards.Shards(path), stored.blocks(_mapping(path / THEIRS, json.loads)))
    names, shapes = family.tensor_names(config), _shapes(config)
    if config.mtp is not None:
        plain = dataclasses.replace(config, mtp=None)
        own = _shapes(plain)
        further = {name: shape for name, shape in shapes.items() if name not in own}
        if not holds_any(tensors, further, names):  # Transformers saves config.json's word for them, but not them
            config, names, shapes = plain, family.tensor_names(plain), own
    return Weights(config, Ours(tensors, shapes, names, str(path)))


def _run(path: Path) -> Weights:
    config, refusals = _run_config(path), []
    for step in checkpoint.complete(path / "checkpoints"):
        try:
            weights = _read_checkpoint(step, config)
        except Refused as refusal:
            refusals.append(refusal)
            continue
        for passed_over in refusals:
            print(f"{passed_over} {step.name} is used instead.", file=sys.stderr)
        return weights
    raise refusals[0] if refusals else Refused(f"{path} has no checkpoint yet; let the run save one first.")


def _run_config(path: Path) -> ModelConfig:
    section = _mapping(path / RUN, yaml.safe_load).get("model")
    if not isinstance(section, Mapping):
        raise Refused(f"{path / RUN} has no section `model`, so it is not the configuration of a run.")
    return schema.build(ModelConfig, section, f"{path / RUN}: model")


def run_of(checkpoint: Path) -> Path:
    """The run that a checkpoint is of."""
    return checkpoint.absolute().parent.parent


def _read_checkpoint(path: Path, config: ModelConfig) -> Weights:
    tensors = checkpoint.Checkpoint(path)
    _refuse_other({name: tensors.shape(name) for name in tensors}, _shapes(config), str(path))
    return Weights(config, tensors)


_TENSORS: Mapping[str, Callable[[Path], Weights]] = {
    OURS: _ours,
    THEIRS: _theirs,
    CHECKPOINT: lambda path: _read_checkpoint(path, _run_config(run_of(path))),
    RUN: _run,
}

_CONFIG: Mapping[str, Callable[[Path], ModelConfig]] = {
    OURS: _our_config,
    THEIRS: lambda path: _their_family(path)[1],
    CHECKPOINT: lambda path: _run_config(run_of(path)),
    RUN: _run_config,
}


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in cost.meta(config).state_dict().items()}


def _refuse_other(held: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], where: str) -> None:
    for name in [*wanted, *held]:
        if held.get(name) != wanted.get(name):
            has, means = (list(shapes[name]) if name in shapes else "nothing" for shapes in (held, wanted))
            raise Refused(
                f"{where} is of another architecture than its configuration: as {name} it holds {has}, "
                f"but the configuration means {means}."
            )


def _mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    try:
        values = parse(path.read_text())
    except FileNotFoundError:
        raise Refused(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise Refused(f"{path} cannot be read ({schema.fault(error)}).") from None
    if not isinstance(values, Mapping):
        raise Refused(f"{path} holds no mapping of keys.")
    return values
