"""The module and the line of the user's code that are running."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from memplan.torch_internals import FunctionMode, set_origin

_MEMPLAN = Path(__file__).parent.parent
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(_MEMPLAN), "<")
_CALL_THE_MODULE = (str(_MEMPLAN / "capture" / "flat.py"), str(_MEMPLAN / "profiler" / "step.py"))


@contextlib.contextmanager
def origins(module: nn.Module) -> Iterator[None]:
    """Context in which each traced node notes the module (by FQN) and line that it comes from."""

    def changed(names: Sequence[str]) -> None:
        set_origin(names, "")

    with running(module, changed) as names, _Lines(names):
        yield


@contextlib.contextmanager
def running(
    module: nn.Module, changed: Callable[[Sequence[str]], None] = lambda names: None
) -> Iterator[Sequence[str]]:
    """The FQNs of the modules whose forward runs now, the innermost last.

    ``changed`` is called with them after each change.
    """
    with _running({child: name for name, child in module.named_modules()}, changed) as names:
        yield names


class Known:
    """Modules seen so far, by weak references.

    Attributes:
        roots: those that are part of no other, with their names: "" for the first, the class
            for others.
        fqns: all, with their names.
    """

    def __init__(self) -> None:
        self.roots: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.fqns: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def learn(self, root: nn.Module) -> None:
        """Add a module that is part of no other; earlier roots may be part of it.

        Modules that share their children, as a planned one and its original, share a name.
        """
        known = {id(other._modules): name for other, name in self.fqns.items()}
        if id(root._modules) in known:
            self.fqns[root] = known[id(root._modules)]
            return
        parts = {id(child._modules) for child in root.modules()}
        for other in [other for other in self.roots if id(other._modules) in parts]:
            self.roots.pop(other)
        prefix = self.roots[root] = type(root).__name__ if self.roots else ""
        names = {id(child._modules): name for name, child in root.named_modules(prefix=prefix)}
        for child in [*root.modules(), *self.fqns]:
            if id(child._modules) in names:
                self.fqns[child] = names[id(child._modules)]

    def running(self) -> str:
        """The name of the innermost module with a method running now, called or not; or ""."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            names = frame.f_code.co_varnames
            owner = frame.f_locals.get(names[0]) if frame.f_code.co_argcount else None
            if isinstance(owner, nn.Module) and owner in self.fqns:
                return self.fqns[owner]
            frame = frame.f_back
        return ""


@contextlib.contextmanager
def running_anywhere(known: Known) -> Iterator[None]:
    """Learn the modules that are called inside."""
    with _running(known.fqns, lambda names: None, known.learn):
        yield


@contextlib.contextmanager
def _running(
    fqns: MutableMapping[nn.Module, str],
    changed: Callable[[Sequence[str]], None],
    learn: Callable[[nn.Module], None] | None = None,
) -> Iterator[Sequence[str]]:
    names: list[str] = []

    def is_traced() -> bool:
        """Tell whether Dynamo traces these hooks, which it can do without."""
        return learn is not None and torch.compiler.is_compiling()

    def enter(child: nn.Module, inputs: object) -> None:
        del inputs
        if is_traced():
            return
        if learn is not None and not names and child not in fqns:
            learn(child)
        if child in fqns:
            names.append(fqns[child])
            changed(names)

    def leave(child: nn.Module, inputs: object, output: object) -> None:
        del inputs, output
        if not is_traced() and child in fqns:
            names.pop()
            changed(names)

    handles = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


class _Lines(FunctionMode):
    """Mode in which each call of a torch function notes the line that it comes from."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()
        self.running = running

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running:
            set_origin(self.running, _traceback_line())
        return func(*args, **kwargs)


def _traceback_line() -> str:
    place = users_line()
    return "" if place is None else f'File "{place[0]}", line {place[1]}'


def users_place(error: BaseException) -> str:
    """The place in the user's code of an error, as " at file.py:line", or ""."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def users_line() -> tuple[str, int] | None:
    """File and number of the innermost line that is outside torch and memplan.

    None if a module of torch's own was called by memplan, and no line is the user's.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        if frame.f_back is None or frame.f_code.co_filename in _CALL_THE_MODULE:
            return None
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
