"""From a mapping (YAML, Hydra) to the dataclass that owns it, checked.

Hydra accepts an unknown key behind `+` and text where a number belongs; a run must not. `build` reads a mapping into a
dataclass and refuses, in one sentence, a key that nobody reads (naming the nearest right one), a missing key, a wrong
type and a number that is not finite. Every floor of the house may import this file; it imports only the standard
library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_hints = functools.cache(typing.get_type_hints)  # evaluates the text of every annotation


class Refused(Exception):
    """Input that is refused before anything was changed: one sentence saying what is wrong, where, and what to do.

    Every command line turns it into that sentence on stderr and exit code 2.
    """


def build(owner: type[T], values: Mapping[str, Any], where: str) -> T:
    """Read `values` into the dataclass `owner`.

    `where` is the path of the mapping in the configuration (`model.layers[2].attention`), for messages.
    A field typed as a dataclass is built from a nested mapping, a list or dict of dataclasses from its items. A
    `ValueError` raised by `__post_init__` (an impossible combination) is refused with the path in front of it.

    Raises Refused.
    """
    if not isinstance(values, Mapping):
        raise Refused(f"{where or 'the configuration'} is {_show(values)}, but a mapping of keys is needed.")
    hints = _hints(owner)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(owner) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise Refused(unknown_key(_join(where, str(key)), str(key), list(fields)))
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _read(hints[name], values[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Refused(f"{_join(where, name)} is missing; {_type_name(hints[name])} is needed.")
    try:
        return owner(**arguments)
    except ValueError as error:
        sentence = f"{str(error).rstrip('.')}."
        raise Refused(f"{where}: {sentence}" if where else sentence) from None


def at_least(lowest: float, owner: object, *names: str) -> None:
    """For `__post_init__`: raises ValueError where one of these numbers of `owner` is below `lowest`; null is none."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} ({value}) must be at least {lowest}")


def fault(error: Exception) -> str:
    """Why a file cannot be read, in a phrase; where its YAML is broken, with the line. An error without words is told
    by what caused it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {getattr(error, 'problem', None)}"
    if not str(error) and isinstance(error.__cause__, Exception):
        return fault(error.__cause__)
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def unknown_key(path: str, key: str, known: Sequence[str]) -> str:
    """The sentence for a key that nobody reads, with the nearest key that somebody does."""
    return f"{path} is not a key that anything reads; {_nearest(key, known)}"


def unknown_choice(path: str, value: object, choices: Sequence[str]) -> str:
    """The sentence for a name that is none of `choices`, with the nearest one."""
    return (
        f"{path} is {_show(value)}, which does not exist; {_nearest(value if isinstance(value, str) else '', choices)}"
    )


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(sorted(known)) or 'nothing'}."


def _read(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_union(hint, value, where)
    if hint is Any:
        return value
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise Refused(unknown_choice(where, value, [str(choice) for choice in choices]))
        return value
    if origin in (list, tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise Refused(f"{where} is {_show(value)}, but a list is needed.")
        args = typing.get_args(hint)
        if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
            if len(value) != len(args):
                raise Refused(f"{where} has {len(value)} items, but {len(args)} are needed.")
            return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        items = [_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise Refused(f"{where} is {_show(value)}, but a mapping is needed.")
        _, item_hint = typing.get_args(hint)
        return {str(k): _read(item_hint, v, _join(where, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)  # type: ignore[arg-type]
    return _read_scalar(hint, value, where)


def _read_union(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    refusals = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _read(option, value, where)
        except Refused as refusal:
            refusals.append(refusal)
    raise (
        refusals[0] if len(refusals) == 1 else Refused(f"{where} is {_show(value)}, but {_type_name(hint)} is needed.")
    )


def _read_scalar(hint: Any, value: Any, where: str) -> Any:
    wrong_bool = isinstance(value, bool) and hint is not bool
    if hint is float and isinstance(value, int | str) and not wrong_bool:  # YAML 1.1 reads `1e-3` as text
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or wrong_bool:
        raise Refused(f"{where} is {_show(value)}, but {_type_name(hint)} is needed.")
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{where} is {value}, but a finite number is needed.")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if origin in (list, tuple, Sequence):
        return "a list"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "a mapping of keys"
    return names.get(hint, getattr(hint, "__name__", str(hint)))
