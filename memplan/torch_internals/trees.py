"""Nested containers of tensors, dataclasses included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch.utils._pytree as pytree

TreeSpec: TypeAlias = pytree.TreeSpec


class _Record:
    """An instance of a dataclass that torch does not know, as a container of its fields."""

    def __init__(self, instance: object) -> None:
        self.kind = type(instance)
        self.fields = {f.name: _as_tree(getattr(instance, f.name)) for f in fields(instance)}  # type: ignore[arg-type]


def _is_record(value: object) -> bool:
    is_instance = is_dataclass(value) and not isinstance(value, type)
    return is_instance and type(value) not in pytree.SUPPORTED_NODES


def _as_tree(tree: object) -> object:
    return pytree.tree_map(
        lambda leaf: _Record(leaf) if _is_record(leaf) else leaf, tree, is_leaf=_is_record
    )


def _rebuild(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> object:
    kind, names = context
    instance: Any = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(instance, name, value)
    return instance


pytree.register_pytree_node(
    _Record,
    lambda record: (list(record.fields.values()), (record.kind, tuple(record.fields))),
    _rebuild,
    serialized_type_name="memplan.record",
)


def flatten(tree: object) -> tuple[list[Any], TreeSpec]:
    """Leaves of nested containers, dataclasses included, and their structure (torch 2.13-2.15)."""
    return pytree.tree_flatten(_as_tree(tree))


def unflatten(leaves: Sequence[object], spec: TreeSpec) -> Any:
    """Inverse of ``flatten``."""
    return pytree.tree_unflatten(leaves, spec)


def map_leaves(change: Callable[[object], object], tree: Any) -> Any:
    """The same containers around changed leaves; dataclasses are leaves here (torch 2.13-2.15)."""
    return pytree.tree_map(change, tree)


def leaves_of(tree: object) -> list[Any]:
    """Leaves of nested containers; dataclasses are leaves here (torch 2.13-2.15)."""
    return pytree.tree_leaves(tree)
