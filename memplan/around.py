"""A module whose forward runs inside the contexts that passes open around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeAlias

from torch import nn

Around: TypeAlias = Callable[[], AbstractContextManager[object]]


class Surrounded(nn.Module):
    """Another module, which computes something else in those contexts. All tensors are shared."""

    def __init__(self, original: nn.Module, around: tuple[Around, ...]) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.around = around
        self.training = original.training
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = original.__dict__[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns there."""
        with ExitStack() as stack:
            for one in self.around:
                stack.enter_context(one())
            return self.__dict__["original"](*args, **kwargs)


def surround(model: nn.Module, around: Iterable[Around]) -> nn.Module:
    """The model itself, if there is nothing around it."""
    around = tuple(around)
    return Surrounded(model, around) if around else model
