"""The state of a run, a nest of mappings, taken apart into tensors and the rest, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

Tree = Mapping[str, Any]

# Exactly these: a subclass (numpy's float64 is a float) would need its own code to be read back.
PLAIN = (type(None), bool, int, float, str, bytes)


def take_apart(tree: Tree) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of `tree`, and its largest subtrees without any, each by its path joined with dots.

    Raises TypeError for a value that cannot be saved, ValueError for two values of one path.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for path, value in _leaves(tree, ""):
        if path in tensors or path in plain:
            raise ValueError(f"the state holds two values at {path}; rename one of them")
        if isinstance(value, Tensor):
            tensors[path] = value
        else:
            plain[path] = _as_plain(value, path)
    return tensors, plain


def put_together(tree: Tree, plain: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with its own tensors, and with the subtrees of `plain` in place of its own."""

    def filled(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return value
        if not _holds_tensor(value):
            return plain[path]
        if isinstance(value, Mapping):
            return {key: filled(child, _join(path, key)) for key, child in value.items()}
        return type(value)(filled(child, _join(path, place)) for place, child in enumerate(value))

    return {key: filled(child, str(key)) for key, child in tree.items()}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if path and (isinstance(value, Tensor) or not _holds_tensor(value)):
        yield path, value
        return
    for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(child, _join(path, key))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _as_plain(value: Any, path: str) -> Any:
    """`value` in Python's own types; what could not be read back without running code from the file is refused."""
    if isinstance(value, Mapping):
        return {_as_plain(key, path): _as_plain(child, _join(path, key)) for key, child in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_as_plain(child, _join(path, place)) for place, child in enumerate(value))
    if type(value) in PLAIN:
        return value
    raise TypeError(f"the state holds a {type(value).__name__} at {path}; save numbers, texts, lists and mappings")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
