"""Memplan's own hooks around module calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from torch import nn

BeforeCall: TypeAlias = Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any]
"""Takes a module's name and arguments; returns new ones as ``(args, kwargs)``, or None."""

AfterCall: TypeAlias = Callable[[str, tuple[Any, ...], Mapping[str, Any], Any], Any]
"""Takes a module's name, arguments and output; returns another output, or None."""


class OwnHook:
    """A hook of memplan, not of the user's model."""


class _Hook(OwnHook):
    """Calls a function with a module's name, in the creating thread, until it is released."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        self.thread: int | None = threading.get_ident()

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        del module
        return self.function(self.name, *given) if threading.get_ident() == self.thread else None

    def let_go(self) -> None:
        """Release the hook; a call under way in another thread may still hold it."""
        self.thread = None


@contextmanager
def around_calls(
    modules: Mapping[str, nn.Module],
    *,
    before: BeforeCall | None = None,
    after: AfterCall | None = None,
    is_first: bool = False,
) -> Iterator[None]:
    """Context in which functions run around each call of some modules in this thread.

    Args:
        modules: the modules, by name.
        before: called before the module, after its existing hooks.
        after: called after the module.
        is_first: whether ``after`` is called before the module's existing hooks.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                hook = _Hook(before, name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                stack.callback(hook.let_go)
            if after is not None:
                hook = _Hook(after, name)
                handle = module.register_forward_hook(hook, with_kwargs=True, prepend=is_first)
                stack.callback(handle.remove)
                stack.callback(hook.let_go)
        yield
