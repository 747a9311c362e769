"""`import` and `export`: our directories and Transformers' directories."""

from __future__ import annotations

import argparse
from pathlib import Path

from conf.schema import Refused
from models.weights import THEIRS, export_model, open_weights, save_model


def run(arguments: argparse.Namespace) -> None:
    """Copy the weights over, and say so."""
    source, target = Path(arguments.source), Path(arguments.target)
    if target.exists():
        raise Refused(f"{target} exists already; name a new directory, or remove it first.")
    if arguments.export:
        family = export_model(target, open_weights(source), beside=source)
        print(f"{target} holds the model of {source} as {family}, for Transformers.")
        return
    if source.is_dir() and not (source / THEIRS).is_file():
        raise Refused(f"{source} has no {THEIRS}, so it is no Transformers directory.")
    weights = open_weights(source)
    save_model(target, weights.config, weights.tensors, beside=source)
    print(f"{target} holds the model of {source}.")
