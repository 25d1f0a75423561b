"""Hooks of modules, which run while the module is traced and never again.

Those that change and keep nothing are allowed; all others are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from memplan.capture.module_state import Held, containers, has_own_attributes
from memplan.errors import CaptureError
from memplan.torch_internals import OwnHook, flatten, hooks_of, version_of

_DEPTH = 2
_FORWARD = ("_forward_hooks", "_forward_pre_hooks")


@contextlib.contextmanager
def harmless_hooks(module: nn.Module) -> Iterator[None]:
    """Context in which hooks run, and doing what a planned step would not is refused.

    Raises:
        CaptureError: inside, naming the module and the hook.
    """
    before: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    try:
        for name, child in module.named_modules():
            where = f"module {name!r}" if name else "the module"
            for kind, hooks in hooks_of(child).items():
                own = {key: hook for key, hook in hooks.items() if not isinstance(hook, OwnHook)}
                before.append((hooks, own))
                hooks.update(_watched(own, kind, f"{where} ({type(child).__name__})"))
        yield
    finally:
        for hooks, own in before:
            hooks.update({key: hook for key, hook in own.items() if key in hooks})


def _watched(
    own: Mapping[int, Callable[..., Any]], kind: str, where: str
) -> Mapping[int, Callable[..., Any]]:
    if own and kind not in _FORWARD:
        raise CaptureError(
            f"{where} has hooks of its backward, which a captured step would not run. Remove them, "
            "or leave this module unplanned."
        )
    return {key: _WatchedHook(hook, where) for key, hook in own.items()}


class _WatchedHook:
    """A hook that is refused if it does more than look."""

    def __init__(self, hook: Callable[..., Any], where: str) -> None:
        self.hook = hook
        self.where = where

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        kept = [
            held for attribute, value in _seen_by(self.hook) for held in _held(attribute, value)
        ]
        given = _versions(args, kwargs)
        result = self.hook(*args, **kwargs)
        what = ""
        if any(held.has_changed() for held in kept):
            what = "keeps something"
        elif not (result is None or result is args[-1]) or _versions(args, kwargs) != given:
            what = "changes what the module is given or returns"
        if what:
            for held in kept:
                held.restore()
            raise CaptureError(
                f"{self.where} has hooks, and {_name(self.hook)} {what}, which a planned step "
                "would not do again. Remove it, or leave this module unplanned."
            )


def _seen_by(hook: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Names and values that a hook can write: closure, bound object, defaults, globals."""
    if isinstance(hook, partial):
        yield from (("argument", value) for value in (*hook.args, *hook.keywords.values()))
        yield from _seen_by(hook.func)
        return
    if isinstance(hook, MethodType):
        yield from () if isinstance(hook.__self__, nn.Module) else [("object", hook.__self__)]
        hook = hook.__func__
    if not isinstance(hook, FunctionType):
        yield "object", hook
        return
    for name, cell in zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            yield name, cell.cell_contents
    yield from (("argument", value) for value in hook.__defaults__ or ())
    yield from (hook.__kwdefaults__ or {}).items()
    known = hook.__globals__
    yield from ((name, known[name]) for name in hook.__code__.co_names if name in known)


def _held(attribute: str, value: Any) -> Iterator[Held]:
    if isinstance(value, dict | list | set):
        yield from containers(attribute, value, _DEPTH)
    elif has_own_attributes(value):
        yield from containers(attribute, vars(value), _DEPTH)


def _versions(args: Any, kwargs: Any) -> list[tuple[int, int]]:
    leaves = flatten((args[1:], kwargs))[0]
    return [(id(one), version_of(one)) for one in leaves if isinstance(one, torch.Tensor)]


def _name(hook: Callable[..., Any]) -> str:
    is_named = isinstance(hook, FunctionType | MethodType)
    return hook.__qualname__ if is_named else type(hook).__name__
