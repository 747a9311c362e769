"""The state of a run, a nest of mappings, taken apart into tensors and the rest, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

Tree = Mapping[str, Any]

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
            _check_plain(value, path)
            plain[path] = value
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


def _check_plain(value: Any, path: str) -> None:
    """Refuse at the save what could not be read back without running code from the file."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            _check_plain(key, path)
            _check_plain(child, _join(path, key))
    elif isinstance(value, list | tuple):
        for place, child in enumerate(value):
            _check_plain(child, _join(path, place))
    elif not isinstance(value, PLAIN):
        raise TypeError(f"the state holds a {type(value).__name__} at {path}; save numbers, texts, lists and mappings")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
