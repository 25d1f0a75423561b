"""Which module and which line of the user's code is running."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from memplan.torch_internals import set_origin

_MEMPLAN = Path(__file__).parent.parent
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(_MEMPLAN), "<")
_CALL_THE_MODULE = (str(_MEMPLAN / "capture" / "flat.py"), str(_MEMPLAN / "profiler" / "step.py"))


@contextlib.contextmanager
def origins(module: nn.Module) -> Iterator[None]:
    """Inside, each node that is traced notes the module (by FQN) and line that it comes from."""

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


@contextlib.contextmanager
def running_anywhere(roots: MutableMapping[nn.Module, str]) -> Iterator[Sequence[str]]:
    """The same for all modules that are called inside; roots and their names are added.

    The first root's name is "", others go by their class.
    """
    with _running(WeakKeyDictionary(), lambda names: None, roots) as names:
        yield names


@contextlib.contextmanager
def _running(
    fqns: MutableMapping[nn.Module, str],
    changed: Callable[[Sequence[str]], None],
    roots: MutableMapping[nn.Module, str] | None = None,
) -> Iterator[Sequence[str]]:
    names: list[str] = []

    def enter(child: nn.Module, inputs: object) -> None:
        del inputs
        if roots is not None and not names and child not in fqns:
            roots[child] = type(child).__name__ if roots else ""
            fqns.update(_named(child, roots[child]))
        if child in fqns:
            names.append(fqns[child])
            changed(names)

    def leave(child: nn.Module, inputs: object, output: object) -> None:
        del inputs, output
        if child in fqns:
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


def _named(root: nn.Module, prefix: str) -> dict[nn.Module, str]:
    return {child: name for name, child in root.named_modules(prefix=prefix)}


class _Lines(TorchFunctionMode):
    """Inside, each call of a torch function notes the line that it comes from."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()
        self.running = running

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if self.running:
            set_origin(self.running, _traceback_line())
        return func(*args, **(kwargs or {}))


def _traceback_line() -> str:
    place = users_line()
    return "" if place is None else f'File "{place[0]}", line {place[1]}'


def users_place(error: BaseException) -> str:
    """Where in the user's code something was raised, as " at file.py:line", or ""."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def users_line() -> tuple[str, int] | None:
    """File and number of the innermost line that is outside of torch and memplan.

    None if a module of torch's own was called by memplan, and no line is the user's.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        if frame.f_back is None or frame.f_code.co_filename in _CALL_THE_MODULE:
            return None
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
