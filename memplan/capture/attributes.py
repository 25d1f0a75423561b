"""The attributes of modules, put back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memplan.torch_internals import is_fake, version_of

_DEPTH = 4
_FOLLOW = frozenset({"_flat_weights", "_flat_weight_refs"})
"""What recurrent modules keep beside their parameters; it follows them."""


@dataclass(frozen=True)
class _Held:
    """A container that an attribute holds, and what it held; for the root, the module's own."""

    attribute: str
    container: Any
    members: Any

    def has_changed(self) -> bool:
        now, before = self.container, self.members
        if isinstance(now, dict):
            return now.keys() != before.keys() or any(
                not _same(now[key], before[key]) for key in now
            )
        if isinstance(now, set):
            return bool(now != before)
        return len(now) != len(before) or not all(map(_same, now, before))

    def restore(self) -> None:
        """Put back what changed; a container that did not may be one that cannot be written."""
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
def unchanged_attributes(module: nn.Module) -> Iterator[set[str]]:
    """Restore the attributes of a module and its children, and lists, dicts and sets in them.

    Yields the set of names of those that were changed, filled at the end.
    """
    changed: set[str] = set()
    before = [
        (f"{name}." if name else "", child, list(_containers("", child.__dict__, _DEPTH)))
        for name, child in modules_of(module)
    ]
    try:
        yield changed
    finally:
        for prefix, child, held in before:
            root = held[0]
            for attribute in child.__dict__.keys() | root.members.keys():
                mine, theirs = root.members.get(attribute), child.__dict__.get(attribute)
                if not _same(mine, theirs) and attribute not in _FOLLOW:
                    changed.add(prefix + attribute)
            for one in held[1:]:
                if one.attribute not in _FOLLOW and one.has_changed():
                    names = {one.attribute}
                    if one.attribute in ("_parameters", "_buffers", "_modules"):
                        names = _differing(one)
                    changed.update(prefix + name for name in names)
            for one in held:
                one.restore()


@contextlib.contextmanager
def unchanged_tensors(module: nn.Module) -> Iterator[None]:
    """Restore the content of tensors in the attributes of a module, parameters apart."""
    held = [
        member
        for _, child in modules_of(module)
        for one in _containers("", child.__dict__, _DEPTH)
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
    """A module and its children by FQN; and the module that it stands for, if it does."""
    yield from module.named_modules()
    original = module.__dict__.get("original")
    if isinstance(original, nn.Module):
        yield "", original


def _containers(attribute: str, value: Any, depth: int) -> Iterator[_Held]:
    if depth and isinstance(value, dict | list | set):
        yield _Held(attribute, value, _members(value))
        if isinstance(value, dict):
            for name, member in value.items():
                yield from _containers(attribute or str(name), member, depth - 1)
        elif isinstance(value, list):
            for member in value:
                yield from _containers(attribute, member, depth - 1)


def _members(container: dict[Any, Any] | list[Any] | set[Any]) -> Any:
    """What it holds, as a plain container: one of the user's own may refuse to be copied."""
    if isinstance(container, dict):
        return dict(container)
    return list(container) if isinstance(container, list) else set(container)


def _differing(held: _Held) -> set[str]:
    keys = held.container.keys() | held.members.keys()
    return {str(key) for key in keys if not _same(held.container.get(key), held.members.get(key))}


def _same(one: object, other: object) -> bool:
    is_plain = isinstance(one, bool | int | float | str) and type(one) is type(other)
    return one is other or (is_plain and one == other)
