"""Python state that a forward reads: plain values in attributes of modules.

A capture bakes them in, so each is compared before the step runs again.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from memplan.capture.module_state import has_own_attributes
from memplan.torch_internals import is_fake

_PLAIN = (enum.Enum, bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_BY_IDENTITY = (torch.Tensor, nn.Module, FunctionType, BuiltinFunctionType, type)
_DEPTH = 4
_OWN = frozenset(dir(nn.Module())) - {"forward"}
"""Attributes of every module; the signature of a call covers those that matter."""
_LARGEST_ARRAY_BYTES = 1 << 16
"""Larger numpy arrays are told apart by identity, not by content."""
_HEAP_TYPE = 1 << 9
"""Flag of a class that Python code made, whose lookup can be replaced."""


class _Unknown(enum.Enum):
    """Stand-ins for a value."""

    ABSENT = enum.auto()
    MUTABLE = enum.auto()


_ABSENT, _MUTABLE = _Unknown.ABSENT, _Unknown.MUTABLE


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute that a forward has read, and its content.

    Attributes:
        owner: the module, or the object that an attribute of it holds.
        path: its place, for people.
        name: its own name.
        content: its content, to be compared; ``_ABSENT`` where its class decides it.
        value: its value, if that cannot change; else ``_MUTABLE``.
    """

    owner: weakref.ref[Any]
    path: str
    name: str
    content: Hashable
    value: object

    def holds(self) -> bool:
        """Tell whether it holds the same now."""
        owner = self.owner()
        if owner is None:
            return False
        own: dict[str, object] = object.__getattribute__(owner, "__dict__")  # no one else's lookup
        if own.get(self.name, _ABSENT) is self.value:  # nearly always, and much faster
            return True
        return _content(_value(owner, self.name), _DEPTH) == self.content


class Reads:
    """Attributes read so far, of a module and of the objects that its attributes hold."""

    def __init__(self, module: nn.Module) -> None:
        self.owners: dict[int, tuple[Any, str]] = {}
        self.read: dict[tuple[int, str], None] = {}
        for name, child in module.named_modules():
            self.owners[id(child)] = child, name
            self._watch_inside(name, child)

    def _watch_inside(self, path: str, owner: object, depth: int = 2) -> None:
        for attribute, value in vars(owner).items():
            if _can_be_watched(value) and id(value) not in self.owners:
                inside = f"{path}.{attribute}".strip(".")
                self.owners[id(value)] = value, inside
                if depth > 1:
                    self._watch_inside(inside, value, depth - 1)

    def classes(self) -> set[type]:
        """Classes of all that is watched; modules have the lookup of ``nn.Module``."""
        found = {type(owner) for owner, _ in self.owners.values()}
        return {one for one in found if not issubclass(one, nn.Module)} | {nn.Module}

    def note(self, owner: object, name: str) -> None:
        """Note a read of an attribute."""
        if id(owner) in self.owners and name not in _OWN:
            self.read[id(owner), name] = None

    def attributes(self, changed: Collection[str]) -> tuple[Attribute, ...]:
        """The attributes read, except those that the forward changes itself."""
        found = []
        for key, name in self.read:
            owner, path = self.owners[key]
            whole = f"{path}.{name}".strip(".")
            if whole in changed or path in changed:
                continue
            value = _value(owner, name)
            is_own = value is _ABSENT or name in vars(owner)
            kept = value if is_own and _is_immutable(value) else _MUTABLE
            content = _content(value, _DEPTH)
            found.append(Attribute(weakref.ref(owner), whole, name, content, kept))
        return tuple(found)


@contextlib.contextmanager
def noting(reads: Reads) -> Iterator[None]:
    """Note the attributes that this thread reads inside."""
    reader = threading.get_ident()

    def noted(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def look_up(self: Any, name: str) -> Any:
            if threading.get_ident() == reader:
                reads.note(self, name)
            return original(self, name)

        return look_up

    classes: set[Any] = reads.classes()
    own = {one: vars(one).get("__getattribute__") for one in classes}
    for one in own:
        one.__getattribute__ = noted(one.__getattribute__)
    try:
        yield
    finally:
        for one, original in own.items():
            if original is None:
                del one.__getattribute__
            else:
                one.__getattribute__ = original


def attributes_of(tensor: torch.Tensor) -> Hashable:
    """A key, equal for tensors with the same attributes by the user; empty for nearly all."""
    own = () if is_fake(tensor) else vars(tensor).items()
    return tuple((name, _content(value, _DEPTH)) for name, value in sorted(own))


def with_attributes_of(given: torch.Tensor, stand_in: torch.Tensor) -> torch.Tensor:
    """The stand-in for a tensor, with the attributes that the user put on the tensor."""
    if not is_fake(given):
        vars(stand_in).update(vars(given))
    return stand_in


def _can_be_watched(value: object) -> bool:
    kind = type(value)
    return (
        has_own_attributes(value)
        and bool(kind.__flags__ & _HEAP_TYPE)
        and kind.__weakrefoffset__ != 0
        and not isinstance(value, nn.Module)
    )


def _value(owner: object, name: str) -> object:
    """The value that an object holds under a name; a module's, without running any code."""
    if not isinstance(owner, nn.Module):
        return getattr(owner, name, _ABSENT)
    own = vars(owner)
    if name in own:
        return own[name]
    found = next((vars(one)[name] for one in type(owner).__mro__ if name in vars(one)), _ABSENT)
    is_code = inspect.isroutine(found) or inspect.isdatadescriptor(found)
    return _ABSENT if is_code or inspect.ismethoddescriptor(found) else found


def _is_immutable(value: object) -> bool:
    """Tell whether an object never changes, and keeps nothing large alive."""
    if isinstance(value, tuple):
        return all(map(_is_immutable, value))
    kinds = (*_PLAIN, float, complex, FunctionType, BuiltinFunctionType)
    return isinstance(value, kinds)


def _content(value: object, depth: int) -> Hashable:
    """A key, equal for what a capture cannot tell apart; for unknown kinds, one per object."""
    kind = type(value)
    if isinstance(value, _PLAIN):
        return kind, value
    if isinstance(value, float | complex):
        return kind, repr(value)  # so that 0.0 is not -0.0, and NaN is NaN
    if isinstance(value, np.ndarray | np.generic) and value.nbytes <= _LARGEST_ARRAY_BYTES:
        return kind, value.dtype, value.shape, value.tobytes()
    members = _members(value) if depth else None
    if members is None or isinstance(value, _BY_IDENTITY):
        return _Same(value)
    contents = (_content(member, depth - 1) for member in members)
    return kind, (frozenset if isinstance(value, set | frozenset) else tuple)(contents)


def _members(value: object) -> Iterable[object] | None:
    """The members of a container, keys with values; None if it is none."""
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        return tuple(value.items())
    return value if isinstance(value, list | tuple | set | frozenset) else None


class _Same:
    """A key, equal for one and the same object as long as it is alive."""

    __slots__ = ("_number", "_of")

    def __init__(self, value: object) -> None:
        self._number = id(value)
        can_be_left = type(value).__weakrefoffset__ != 0
        self._of: Callable[[], object] = weakref.ref(value) if can_be_left else lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (one := self._of()) is not None and one is other._of()

    def __hash__(self) -> int:
        return hash(self._number)
