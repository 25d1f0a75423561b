"""The CPU's random generator, as the functions of ``torch.random`` use it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_SETTING = ("manual_seed", "seed", "set_state")


@contextlib.contextmanager
def watched_generator(watch: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, whatever of torch's sets its state calls what ``watch`` makes of the method.

    ``torch.default_generator`` itself is as before (torch 2.13-2.15).
    """
    random: Any = torch.random
    original = random.default_generator
    random.default_generator = _Watched(original, watch)
    try:
        yield
    finally:
        random.default_generator = original


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
