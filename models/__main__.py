"""python -m models: list, describe and cost models; import, export, score and run their weights."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import NoReturn

from conf.schema import Refused

DTYPES = ("float32", "bfloat16", "float64")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message}; `{self.prog} --help` says what there is.")


def parser() -> Parser:
    top = Parser(prog="python -m models", description=__doc__.partition(": ")[2] if __doc__ else None)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, module: str, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        added.set_defaults(module=module)
        return added

    models = "a name of conf/model, or a directory with a model or a run; its open sections follow, attention=mla"
    stored = (
        "of cache entries: fp32, bf16, fp8, fp4, declared, or packed as the schemes' authors do; then of the slots and "
        "parts that `describe` names, packed,index=fp8,latent.rope=bf16 [%(default)s]"
    )
    held = "our directory, a Transformers directory, a run, or a checkpoint of a run"

    command("list", "overview", "the families, schemes and models that there are")

    p = command("describe", "describe", "a layer-by-layer picture of a model and of what its tokens leave in the cache")
    p.add_argument("model", nargs="+", metavar="NAME", help=models)
    p.add_argument("--json", action="store_true", help="every layer with its slots, for a serving engine")

    p = command("cost", "cost", "parameters, cache bytes and operations, computed from what the schemes declare")
    p.add_argument("model", nargs="+", metavar="NAME", help=models)
    p.add_argument("--baseline", metavar="NAME", help="give percents of this model; quote it where it has choices")
    p.add_argument("--context", default="4096,131072,1048576", metavar="N,N", help="tokens of context [%(default)s]")
    p.add_argument("--store", default="declared", metavar="FORMATS", help=stored)
    p.add_argument("--gpu", metavar="GPU", help="what fits beside the weights on one, h100, or several, 8xh200")
    p.add_argument(
        "--weights",
        default="bf16",
        metavar="FORMAT",
        help="of the weights, for --gpu and for operations in bf16's: fp32, bf16, fp8 or fp4 [%(default)s]",
    )
    p.add_argument("--json", action="store_true", help="one object, by name")

    p = command("claims", "claims", "what the press says of these schemes, judged by what the models here measure")
    p.add_argument("number", nargs="*", type=int, metavar="N", help="of a claim [all]")
    p.add_argument("--out", metavar="FILE", help="the page is written there, as docs/claims.md")
    p.add_argument("--json", action="store_true", help="one object, by number, with what was measured")

    p = command("import", "transfer", "a Transformers checkpoint to our format")
    p.add_argument("--from", dest="source", required=True, metavar="HF_DIR", help="config.json and safetensors")
    p.add_argument("--to", dest="target", required=True, metavar="DIR", help="a directory that does not exist yet")
    p.set_defaults(export=False)

    p = command("export", "transfer", "our weights to a Transformers checkpoint")
    p.add_argument("--from", dest="source", required=True, metavar="DIR_OR_RUN", help=held)
    p.add_argument("--to", dest="target", required=True, metavar="HF_DIR", help="a directory that does not exist yet")
    p.set_defaults(export=True)

    p = command("score", "score", "the logits of given tokens")
    p.add_argument("--model", required=True, metavar="DIR", help=held)
    p.add_argument("--tokens", required=True, metavar="IDS.npy", help="int64 ids [B, S]")
    p.add_argument("--out", required=True, metavar="LOGITS.npy", help="written: logits [B, S, V]")
    p.add_argument("--decode", action="store_true", help="token by token through the cache; its measured bytes as JSON")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of computation [%(default)s]")
    p.add_argument("--device", help="[cuda where there is one, else cpu]")

    p = command("generate", "generate", "a continuation of a text, through the cache")
    p.add_argument("--model", required=True, metavar="DIR_OR_RUN", help=held)
    p.add_argument("--prompt", required=True, metavar="TEXT", help="how the text begins")
    p.add_argument("--tokens", type=int, default=200, metavar="N", help="at most so many further tokens [%(default)s]")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest [%(default)s]")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw [%(default)s]")
    p.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json [found beside the model]")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of computation [%(default)s]")
    p.add_argument("--device", help="[cuda where there is one, else cpu]")
    return top


def main(arguments: list[str]) -> int:
    """0 done, 1 failed, 2 refused with nothing changed."""
    try:
        parsed = parser().parse_args(arguments)
        import_module(f"models.commands.{parsed.module}").run(parsed)
        sys.stdout.flush()
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 1
    except (OSError, MemoryError) as error:
        why = str(error) or "no memory is left"
        print(f"failed: {why}; nothing unfinished was left behind.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
