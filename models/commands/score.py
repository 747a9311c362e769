"""`score`: the logits of given tokens, all at once or token by token through the cache."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.schema import Refused, fault
from models import decode
from models.commands.device import loaded
from models.model import Model
from models.sequence import Whole

TOKENS_AT_ONCE = 8192


def run(arguments: argparse.Namespace) -> None:
    """Write the logits; with --decode, print what the cache held as JSON."""
    ids, out = read_ids(Path(arguments.tokens)), Path(arguments.out)
    if out.is_dir() or not out.parent.is_dir():
        raise Refused(f"--out is {out}, which is no file in a directory that exists.")
    model, device = loaded(arguments)
    vocab = model.config.vocab
    if ids.min() < 0 or ids.max() >= vocab:
        wrong = ids[(ids < 0) | (ids >= vocab)][0]
        raise Refused(f"{arguments.tokens} holds the token id {wrong}, but the model's vocabulary is 0 to {vocab - 1}.")
    tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
    aside = out.with_name(f".{out.name}.unfinished")
    try:
        held = write(aside, model, tokens, through_cache=arguments.decode)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    if arguments.decode:
        rows, length = tokens.shape
        measured = {"rows": rows, "tokens": length, "dtype": arguments.dtype, "cache_bytes": held}
        print(json.dumps(measured))
    else:
        print(f"{out} holds the logits {[*tokens.shape, vocab]}.")


def read_ids(path: Path) -> np.ndarray[Any, Any]:
    """Integer ids [B, S] of a .npy file. Raises Refused."""
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise Refused(f"{path} is missing; --tokens names a .npy file of int64 ids [B, S].") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read ({fault(error)}); --tokens names a .npy file.") from None
    except (ValueError, EOFError):  # in words about pickles
        raise Refused(f"{path} is no whole .npy file; --tokens names one, as numpy.save writes int64 ids.") from None
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        kind = ids.dtype if isinstance(ids, np.ndarray) else "several arrays"
        raise Refused(f"{path} holds {kind}, but int64 ids [B, S] are needed.")
    if ids.ndim != 2 or not ids.size:
        raise Refused(f"{path} holds ids of shape {list(ids.shape)}, but [B, S] with at least one token is needed.")
    return ids


@torch.no_grad()
def write(path: Path, model: Model, ids: Tensor, *, through_cache: bool) -> dict[str, int]:
    """Logits of ids [B, S] to `path`, some rows at a time; the bytes of all rows' caches, and their total."""
    held: dict[str, int] = {}
    kind = np.dtype(np.float64 if model.compute_dtype == torch.float64 else np.float32)
    header = {"descr": kind.str, "fortran_order": False, "shape": (*ids.shape, model.config.vocab)}
    # written, not mapped: on a full disk a mapped file ends the process
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
            logits, cache = _logits(model, rows, through_cache)
            file.write(logits.cpu().numpy().astype(kind, copy=False).data)
            for name, number in cache.items():
                held[name] = held.get(name, 0) + number
    return held | {"total": sum(held.values())}


def _logits(model: Model, ids: Tensor, through_cache: bool) -> tuple[Tensor, dict[str, int]]:
    if through_cache:
        logits, cache = decode.score(model, ids)
        return logits.contiguous(), cache.num_bytes()
    whole = model(ids, Whole.rows(len(ids), ids.shape[1], ids.device))
    assert isinstance(whole, Tensor)
    return whole.contiguous(), {}
