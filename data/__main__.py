"""python -m data: train a tokenizer, prepare text, look into and verify what was prepared, measure how fast."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
import types
import typing
from collections.abc import Callable
from importlib import import_module
from typing import Any

import yaml

from conf.schema import Refused, build

# command: module, settings, function from settings to a sentence
COMMANDS = {
    "prepare": ("data.prepare", "Prepare", "prepare"),
    "train-tokenizer": ("data.train_tokenizer", "TrainTokenizer", "train_tokenizer"),
    "inspect": ("data.inspect", "Inspect", "inspect"),
    "verify": ("data.verify", "Verify", "verify"),
    "bench": ("data.bench", "Bench", "bench"),
    "bench-prepare": ("data.bench_prepare", "BenchPrepare", "bench_prepare"),
}


def main(arguments: list[str]) -> int:
    """Run a command. 0 done, 1 failed, 2 refused with nothing changed, 75 interrupted (run it again)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _say(_run(arguments))
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(_sentence("interrupted.", interruption), file=sys.stderr)
        return 75
    except Exception as error:
        print(_sentence(f"failed: {str(error).rstrip('.') or type(error).__name__}.", error), file=sys.stderr)
        return 1
    return 0


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(what: str, error: BaseException) -> str:
    return " ".join([what, *getattr(error, "__notes__", [])])


def _run(arguments: list[str]) -> str:
    if not arguments or arguments[0] in ("-h", "--help"):
        return f"usage: python -m data {{{','.join(COMMANDS)}}} key=value …   (COMMAND --help says which keys)"
    command, *rest = arguments
    if command not in COMMANDS:
        raise Refused(f"'{command}' is no command of python -m data; choose one of {', '.join(COMMANDS)}.")
    module_name, owner_name, function_name = COMMANDS[command]
    module = import_module(module_name)
    owner: type = getattr(module, owner_name)
    if "-h" in rest or "--help" in rest:
        return _usage(command, owner)
    function: Callable[[Any], str] = getattr(module, function_name)
    return function(build(owner, _overrides(rest, owner), ""))


def _overrides(arguments: list[str], owner: type) -> dict[str, Any]:
    """`key=value` to a mapping. A key that holds text takes its value as it stands; any other is read as YAML.

    A word alone is the path of a command that has one; `--key` is `key=true`.
    """
    hints = typing.get_type_hints(owner)
    values: dict[str, Any] = {}
    for argument in arguments:
        if argument.startswith("--") and hints.get(argument[2:]) is bool:
            argument = f"{argument[2:]}=true"
        elif "=" not in argument and "path" in hints:
            argument = f"path={argument}"
        key, equals, text = argument.partition("=")
        if not equals:
            raise Refused(f"'{argument}' is not of the form key=value.")
        if key in values:
            raise Refused(f"{key} is given twice.")
        values[key] = text if _takes_text(hints.get(key)) and text != "null" else _yaml(key, text)
    return values


def _takes_text(hint: Any) -> bool:
    return hint is str or (isinstance(hint, types.UnionType) and str in typing.get_args(hint))


def _yaml(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise Refused(f"{key} is '{text}', which cannot be read as a value.") from None


def _usage(command: str, owner: type) -> str:
    lines = [f"usage: python -m data {command} key=value …", "", owner.__doc__ or "", ""]
    for f in dataclasses.fields(owner):
        if f.default is not dataclasses.MISSING:
            default = f"  [{'null' if f.default is None else f.default}]"
        else:
            default = "" if f.default_factory is dataclasses.MISSING else f"  [{f.default_factory()}]"
        lines.append(f"  {f.name + '=':18}{f.metadata['help']}{default}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
