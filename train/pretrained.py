"""Weights that a run starts from: those that no run made, in a directory of ours or of Transformers', and of what model
any are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import Refused
from models.config import ModelConfig
from models.families.common.plan import difference
from models.weights import Weights, open_config, open_weights
from parallel.box import box_of
from train.ranks import Ranks

log = logging.getLogger(__name__)

AHEAD = "mtp."
"""Before the names of multi-token prediction, which stands beside the model: it can be added to one, or dropped."""


def load(path: Path, weights: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill this rank's part of each of `weights`, the model's by name, in place, in the dtype that they have here.

    Collective. Raises Refused on every rank if the directory holds anything else on any.
    """
    stored = ranks.together(lambda: open_weights(path))
    names = ranks.together(lambda: _shared(path, stored.shapes(), {name: t.shape for name, t in weights.items()}))
    ranks.together(lambda: _fill(stored, {name: weights[name] for name in names}))


def tell_difference(path: Path, config: ModelConfig) -> None:
    """Warn where weights that fit are of a model that computes otherwise: a rotation's base, say, shows in no shape."""
    try:
        theirs = open_config(path)
    except Refused as refusal:
        log.warning("%s was not compared with this model: %s", path, refusal)
        return
    # nothing is drawn, and multi-token prediction that only one of them has is told of apart
    ahead = config.mtp if theirs.mtp is None or config.mtp is None else theirs.mtp
    if found := difference(dataclasses.replace(theirs, mtp=ahead, std=config.std), config):
        log.warning("%s is of a model whose %s as here", path, found)


def tell_other_tokenizer(path: Path, theirs: str | None, ours: str | None) -> None:
    """Warn where the weights were trained on ids that mean other text. None: there is no text, or it is not known."""
    if theirs is not None and ours is not None and theirs != ours:
        log.warning("%s was trained on ids of another tokenizer, which mean other text than data.train's", path)


def _shared(path: Path, there: Mapping[str, torch.Size], here: Mapping[str, torch.Size]) -> list[str]:
    """The names to be read. Raises Refused where two shapes differ, or where one side is without the other's tensor."""
    ahead = [any(name.startswith(AHEAD) for name in names) for names in (there, here)]
    if ahead == [False, True]:
        log.info("%s has no %s*, which starts as it was initialised", path, AHEAD)
    if ahead == [True, False]:
        log.info("%s has %s*, which this model is without and leaves out", path, AHEAD)
    compared = [name for name in {**here, **there} if all(ahead) or not name.startswith(AHEAD)]
    for name in compared:
        if there.get(name) != here.get(name):
            is_there, is_here = (list(names[name]) if name in names else "nothing" for names in (there, here))
            raise Refused(
                f"{path} does not fit this run: {name} is {is_there} there but {is_here} here; give the model that it"
                " is of, or other weights."
            )
    return compared


@torch.no_grad()
def _fill(stored: Weights, weights: Mapping[str, Tensor]) -> None:
    """One tensor at a time: no rank holds more than one whole."""
    for name, tensor in weights.items():
        box = box_of(tensor)
        box.local.copy_(stored.tensors[name][box.slices()])
