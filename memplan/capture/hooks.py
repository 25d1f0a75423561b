"""Hooks of modules: they run while the module is traced, and never again.

Those that change nothing and keep nothing may; all others are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from memplan.capture.attributes import Held, containers
from memplan.errors import CaptureError
from memplan.torch_internals import OwnHook, flatten, hooks_of, version_of

_DEPTH = 2
_FORWARD = ("_forward_hooks", "_forward_pre_hooks")


@contextlib.contextmanager
def harmless_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, hooks run; what they are found to do that a planned step would not is refused.

    Raises:
        CaptureError: inside, naming the module and the hook.
    """
    before: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    for name, child in module.named_modules():
        where = f"module {name!r}" if name else "the module"
        where = f"{where} ({type(child).__name__})"
        for kind, hooks in hooks_of(child).items():
            own = {key: hook for key, hook in hooks.items() if not isinstance(hook, OwnHook)}
            if own and kind not in _FORWARD:
                raise CaptureError(
                    f"{where} has hooks of its backward, which a captured step would not run. "
                    "Remove them, or leave this module unplanned."
                )
            before.append((hooks, dict(own)))
            hooks.update({key: _Watched(hook, where) for key, hook in own.items()})
    try:
        yield
    finally:
        for hooks, own in before:
            hooks.update({key: hook for key, hook in own.items() if key in hooks})


class _Watched:
    """A hook that is refused where it does more than look."""

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
    """What a hook can write: what it closes over, names of its module, what it is bound to."""
    if isinstance(hook, partial):
        yield from (("argument", value) for value in (*hook.args, *hook.keywords.values()))
        yield from _seen_by(hook.func)
        return
    bound = getattr(hook, "__self__", None if hasattr(hook, "__code__") else hook)
    if bound is not None and not isinstance(bound, nn.Module):
        yield "object", bound
    function = getattr(hook, "__func__", hook)
    code = getattr(function, "__code__", None)
    if code is None:
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            yield name, cell.cell_contents
    yield from (
        (name, function.__globals__[name]) for name in code.co_names if name in function.__globals__
    )


def _held(attribute: str, value: Any) -> Iterator[Held]:
    if isinstance(value, dict | list | set):
        yield from containers(attribute, value, _DEPTH)
    elif not isinstance(value, nn.Module | torch.Tensor | type) and "__dict__" in dir(value):
        yield from containers(attribute, vars(value), _DEPTH)


def _versions(args: Any, kwargs: Any) -> list[tuple[int, int]]:
    leaves = flatten((args[1:], kwargs))[0]
    return [(id(one), version_of(one)) for one in leaves if isinstance(one, torch.Tensor)]


def _name(hook: Callable[..., Any]) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))
