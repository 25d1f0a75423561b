"""Notes, while a forward is traced, which module and which line of the user's code is running."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from memplan.torch_internals import set_origin

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<")


@contextlib.contextmanager
def origins(module: nn.Module) -> Iterator[None]:
    """Inside, each node that is traced notes the module (by FQN) and line that it comes from."""
    names = {child: name for name, child in module.named_modules()}
    running: list[str] = []

    def enter(child: nn.Module, inputs: object) -> None:
        del inputs
        if child in names:
            running.append(names[child])
            set_origin(running, "")

    def leave(child: nn.Module, inputs: object, output: object) -> None:
        del inputs, output
        if child in names:
            running.pop()
            set_origin(running, "")

    handles = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        with _Lines(running):
            yield
    finally:
        for handle in handles:
            handle.remove()


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
            set_origin(self.running, _users_line())
        return func(*args, **(kwargs or {}))


def _users_line() -> str:
    """The innermost line that is outside of torch and memplan."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return f'File "{frame.f_code.co_filename}", line {frame.f_lineno}'
