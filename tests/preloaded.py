"""What the server of tests/ranks.py has done before it forks, so that none of the processes has to: imported what is
slow to import or imported late, read the configuration once, built a model. Nothing here may start a thread.
"""

from __future__ import annotations

import gc
from importlib import import_module
from pkgutil import walk_packages

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
import torch.distributed.fsdp
import torch.distributed.tensor

import models
import train.run  # noqa: F401
from conf.compose import compose
from data.megatron import indexed_dataset
from models.model import Model
from tests.runs import TINY
from train.config import read

indexed_dataset()
for module in walk_packages(models.__path__, "models."):
    import_module(module.name)
with torch.device("meta"):
    Model(read(compose(TINY)).model)
gc.collect()
gc.freeze()  # a collection in a process would touch, and so copy, all of it
