"""`list`: what there is to choose from."""

from __future__ import annotations

import argparse
import textwrap

from conf import schema
from models import catalog, cost, mechanism
from models.config import ModelConfig
from models.families.common import published


def run(arguments: argparse.Namespace) -> None:
    """Print the models of conf/model with their sizes, then the schemes and the families."""
    print("models" + " " * 19 + "total  active  layers")
    for name in catalog.names():
        model = cost.meta(schema.build(ModelConfig, catalog.section(name, {}), f"model {name}"))
        size, about = cost.parameters(model), textwrap.shorten(catalog.description(name), 72, placeholder=" …")
        print(f"  {name:20} {count(size.total):>7} {count(size.active):>7} {len(model.blocks):7}  {about}")
        if wanted := catalog.open_sections(name):
            print(f"{'':47}(its {', '.join(wanted)} can be chosen; sizes with the defaults)")
    print("\nschemes")
    for folder in ("attention", "feedforward", "injection", "residual", "mtp"):
        print(f"  {folder:12} {' '.join(mechanism.available(folder))}")
    print("\nchoices for open sections")
    for group in catalog.SECTIONS:
        print(f"  {group:12} {' '.join(catalog.names(group))}")
    print(f"\nTransformers' model types for import and export\n  {' '.join(published.available())}")


def count(number: float) -> str:
    """As people write model sizes: 671.0B, 36.6B, 1.2M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
