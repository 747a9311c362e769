"""Where a command computes, and in what."""

from __future__ import annotations

import argparse

import torch

from conf.schema import Refused
from models.model import Model
from models.weights import load_model


def loaded(arguments: argparse.Namespace) -> tuple[Model, torch.device]:
    """The model that a command names, on the device it asks for. Raises Refused."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise Refused(f"--device is '{name}', which this machine does not have.") from None
    model = load_model(arguments.model, dtype=getattr(torch, arguments.dtype), device=device)
    return model.requires_grad_(False).eval(), device
