"""Restoration of modules' attributes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from memplan.torch_internals import is_fake, version_of

_DEPTH = 4
_FOLLOW = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Attributes of recurrent modules that follow their parameters."""


@dataclass(frozen=True)
class Held:
    """A container that an attribute holds, and its former members; the root is the module's own.

    Attributes:
        attribute: its name.
        container: a dict, list or set.
        members: its former members.
        is_object: whether it is the namespace of an object that the attribute holds.
    """

    attribute: str
    container: Any
    members: Any
    is_object: bool = False

    def has_changed(self) -> bool:
        """Tell whether its members have changed."""
        now, before = self.container, self.members
        if isinstance(now, dict):
            return now.keys() != before.keys() or any(
                not _same(now[key], before[key]) for key in now
            )
        if isinstance(now, set):
            return bool(now != before)
        return len(now) != len(before) or not all(map(_same, now, before))

    def restore(self) -> None:
        """Restore members that have changed; an unchanged container may not be writable."""
        if not self.has_changed():
            return
        if isinstance(self.container, list):
            self.container[:] = self.members
        elif isinstance(self.container, dict) and [*self.container] == [*self.members]:
            for key, member in self.members.items():
                if not _same(self.container[key], member):
                    self.container[key] = member
        else:
            self.container.clear()
            self.container.update(self.members)


@contextlib.contextmanager
def unchanged_attributes(module: nn.Module) -> Iterator[dict[str, bool]]:
    """Restore the attributes of a module and its children, and lists, dicts and sets in them.

    Those of objects in them, too. Yields the names of changed attributes, filled in at the end,
    each with whether it was set from nothing to a string or a flag: once, as it seems.
    """
    changed: dict[str, bool] = {}
    before = [
        (f"{name}." if name else "", list(containers("", child.__dict__, _DEPTH)))
        for name, child in modules_of(module)
    ]
    try:
        yield changed
    finally:
        for prefix, held in before:
            root = held[0]
            for attribute, is_once in _differing(root).items():
                if attribute not in _FOLLOW:
                    changed[prefix + attribute] = is_once
            for one in held[1:]:
                if one.attribute not in _FOLLOW and one.has_changed():
                    changed |= {prefix + name: is_once for name, is_once in _names(one).items()}
            for one in held:
                one.restore()


@contextlib.contextmanager
def unchanged_tensors(module: nn.Module) -> Iterator[None]:
    """Restore the content of tensors in the attributes of a module, except parameters."""
    held = [
        member
        for _, child in modules_of(module)
        for one in containers("", child.__dict__, _DEPTH)
        for member in (one.members.values() if isinstance(one.members, dict) else one.members)
    ]
    tensors = {
        id(tensor): (tensor, version_of(tensor), tensor.clone())
        for tensor in held
        if isinstance(tensor, torch.Tensor)
        and not isinstance(tensor, nn.Parameter)
        and not (is_fake(tensor) or tensor.is_meta or tensor.requires_grad)
        and not tensor.is_inference()
    }
    try:
        yield
    finally:
        for tensor, version, content in tensors.values():
            if version_of(tensor) != version:
                with torch.no_grad():
                    tensor.copy_(content)


def modules_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and its children by FQN, and the module that it stands for, if any."""
    yield from module.named_modules()
    original = module.__dict__.get("original")
    if isinstance(original, nn.Module):
        yield "", original


def containers(attribute: str, value: Any, depth: int = _DEPTH) -> Iterator[Held]:
    """A container and those in it, to a depth."""
    if depth and isinstance(value, dict | list | set):
        yield Held(attribute, value, _members(value))
        if isinstance(value, dict):
            for name, member in value.items():
                yield from containers(attribute or str(name), member, depth - 1)
                if depth == _DEPTH and has_own_attributes(member):
                    for held in containers(str(name), vars(member), depth - 1):
                        yield replace(held, is_object=held.container is vars(member))
        elif isinstance(value, list):
            for member in value:
                yield from containers(attribute, member, depth - 1)


def has_own_attributes(value: object) -> bool:
    """Tell whether it is a user's object that holds values, such as a configuration."""
    package = type(value).__module__.partition(".")[0]
    return (
        package not in ("torch", "builtins", "collections", "functools", "memplan")
        and not isinstance(value, torch.Tensor | nn.Module | type | FunctionType | ModuleType)
        and isinstance(getattr(value, "__dict__", None), dict)
    )


def _members(container: dict[Any, Any] | list[Any] | set[Any]) -> Any:
    """Its members in a plain container: one of the user's own may refuse to be copied."""
    if isinstance(container, dict):
        return dict(container)
    return list(container) if isinstance(container, list) else set(container)


def _names(held: Held) -> dict[str, bool]:
    """Names of the changes in a container, each with whether it was set once."""
    if held.attribute in ("_parameters", "_buffers", "_modules"):
        return _differing(held)
    if held.is_object:
        return {f"{held.attribute}.{key}": once for key, once in _differing(held).items()}
    return {held.attribute: False}


def _differing(held: Held) -> dict[str, bool]:
    """Keys whose members differ, each with whether it was set once."""
    keys = held.container.keys() | held.members.keys()
    pairs = {key: (held.members.get(key), held.container.get(key)) for key in sorted(keys, key=str)}
    return {
        str(key): before is None and isinstance(now, str | bool)
        for key, (before, now) in pairs.items()
        if not _same(before, now)
    }


def _same(one: object, other: object) -> bool:
    is_plain = isinstance(one, bool | int | float | str) and type(one) is type(other)
    return one is other or (is_plain and one == other)
