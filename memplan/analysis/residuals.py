"""Residual branches of a forward: sums ``h + f(h)``, and the layers that end f."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Final

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from memplan.analysis.selecting import is_linear, watched
from memplan.torch_internals import FunctionMode

ADDITIONS: Final = frozenset(
    {
        torch.add,
        torch.Tensor.add,
        torch.Tensor.__add__,
        torch.Tensor.__radd__,
        torch.Tensor.__iadd__,
    }
)


class Residuals(FunctionMode):
    """Mode that watches what is computed from what, and notices sums of residual blocks.

    Subclasses handle these in ``added``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[tuple[int, ...]] = []
        self.call_of: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()

    def added(self, stream: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The sum of a stream and a block's change."""
        return stream + change

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.residual(args) if func in ADDITIONS and not kwargs else None
        result = func(*args, **kwargs) if found is None else self.added(*found)
        call = len(self.sources)
        known = (tensor for tensor in _tensors(args, kwargs) if tensor in self.call_of)
        given = tuple(self.call_of[tensor] for tensor in known)
        self.sources.append(given)
        for tensor in _tensors((result,), {}):
            self.call_of[tensor] = call
        return result

    def residual(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The stream and the change of a residual block's sum, or None."""
        if len(args) != 2 or not all(isinstance(one, torch.Tensor) for one in args):
            return None
        one, other = args
        if one.shape != other.shape or not one.is_floating_point() or one.dim() < 2:
            return None
        for stream, change in ((one, other), (other, one)):
            if self.is_computed_from(change, stream):
                return stream, change
        return None

    def is_computed_from(self, change: torch.Tensor, stream: torch.Tensor) -> bool:
        """Tell whether a stream goes into a change, by at least one call."""
        if change not in self.call_of or stream not in self.call_of:
            return False
        wanted = self.call_of[stream]
        stack, seen = [self.call_of[change]], set[int]()
        while stack:
            call = stack.pop()
            if call == wanted:
                return call != self.call_of[change]
            if call > wanted and call not in seen:
                seen.add(call)
                stack.extend(self.sources[call])
        return False


def last_layers(model: nn.Module, forward: Callable[[], None]) -> tuple[str, ...]:
    """FQNs of the linear layers that end residual branches, in the order of the forward."""
    begun: list[int] = []
    layers: list[str] = []
    found: dict[str, None] = {}

    class LastLayers(Residuals):
        def added(self, stream: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
            place = bisect_right(begun, self.call_of[change]) - 1
            if place >= 0 and begun[place] > self.call_of[stream]:
                found[layers[place]] = None
            return super().added(stream, change)

    mode = LastLayers()

    def note(name: str) -> None:
        if is_linear(model, name):
            begun.append(len(mode.sources))
            layers.append(name)

    with watched(model, note), mode:
        forward()
    return tuple(found)


def _tensors(args: object, kwargs: Mapping[str, object]) -> Iterator[torch.Tensor]:
    stack = [args, *kwargs.values()]
    while stack:
        one = stack.pop()
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, list | tuple):
            stack.extend(one)
