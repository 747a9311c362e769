"""Through the cache: scoring token by token, and generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.cache import Cache
from models.model import Model


@torch.no_grad()
def advance(model: Model, cache: Cache, ids: Tensor, num_new: Tensor | None = None) -> Tensor:
    """Feed the next tokens, ids [B, S] of which row b uses the first num_new[b]. Returns their logits [B, S, V]."""
    if num_new is None:
        num_new = torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int64, device=ids.device)
    logits = model(ids, cache.extend(num_new, ids.shape[1]))
    assert isinstance(logits, Tensor)
    return logits


@torch.no_grad()
def score(model: Model, ids: Tensor, chunk: int = 1) -> tuple[Tensor, Cache]:
    """Logits [B, S, V] of ids [B, S], `chunk` tokens at a time through a cache; and the cache."""
    model.refuse_longer(ids.shape[1])
    cache = Cache(model, ids.shape[0], ids.shape[1], ids.device)
    return torch.cat([advance(model, cache, part) for part in ids.split(chunk, 1)], 1), cache


@torch.no_grad()
def generate(
    model: Model, prompt: Tensor, num_tokens: int, *, temperature: float = 0.0, seed: int = 0, stop: int | None = None
) -> Iterator[int]:
    """Token after token of a continuation of `prompt` [S]; greedy at temperature 0. Ends at `stop`, or `num_tokens`."""
    model.refuse_longer(len(prompt) + num_tokens)
    generator = torch.Generator(prompt.device).manual_seed(seed)
    cache = Cache(model, 1, len(prompt) + num_tokens, prompt.device)
    logits = advance(model, cache, prompt[None])[0, -1]
    for _ in range(num_tokens):
        if temperature:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == stop:
            return
        yield token
        logits = advance(model, cache, torch.tensor([[token]], device=prompt.device))[0, -1]
