"""`generate`: a continuation of a text, printed as it is made."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from conf.schema import Refused
from models import decode
from models.commands.codec import codec_of
from models.commands.device import loaded


def run(arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation."""
    if arguments.tokens < 1:
        raise Refused(f"--tokens is {arguments.tokens}, but at least 1 is needed.")
    if not 0 <= arguments.temperature < math.inf:
        raise Refused(f"--temperature is {arguments.temperature}, but a number of at least 0 is needed.")
    model, device = loaded(arguments)
    codec = codec_of(Path(arguments.model), arguments.tokenizer, model.config.vocab)
    # a text of its own begins after the end of another
    ids = codec.encode(arguments.prompt) or ([] if codec.end is None else [codec.end])
    if not ids:
        raise Refused("--prompt is empty, and this tokenizer has no token to begin with; give at least one character.")
    if max(ids) >= model.config.vocab:
        raise Refused(f"the tokenizer gives the id {max(ids)}, beyond the model's vocabulary of {model.config.vocab}.")
    prompt = torch.tensor(ids, device=device)
    made = decode.generate(
        model, prompt, arguments.tokens, temperature=arguments.temperature, seed=arguments.seed, stop=codec.end
    )
    print(arguments.prompt, end="", flush=True)
    for text in codec.decode(made):
        print(text, end="", flush=True)
    print()
