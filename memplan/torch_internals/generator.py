"""The CPU's random generator, as ``torch.random`` uses it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

_SETTING = ("manual_seed", "seed", "set_state")


@contextlib.contextmanager
def watched_generator(watch: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Context in which torch sets its state by the method that ``watch`` returns.

    ``torch.default_generator`` itself is unchanged (torch 2.13-2.15).
    """
    random: Any = torch.random
    original = random.default_generator
    random.default_generator = _Watched(original, watch)
    try:
        yield
    finally:
        random.default_generator = original


def caller_of_random_functions() -> str:
    """The module that called them, asked for inside ``watch``; "" if none (torch 2.13-2.15)."""
    between = ("torch.random", "torch._compile", "torch._dynamo", "contextlib")
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(between):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


class _Watched:
    def __init__(
        self,
        generator: torch.Generator,
        watch: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self._generator, self._watch = generator, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._generator, name)
        return self._watch(found) if name in _SETTING else found
