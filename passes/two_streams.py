"""Two streams in the place of one: plain residual networks made reversible.

A stack of residual blocks ``h' = h + f(h)`` cannot be undone. With the residual added to the
stream before the last, ``h'' = h + f(h')``, it can: that is the pairing of Gomez et al., "The
Reversible Residual Network", 2017, https://arxiv.org/abs/1707.04585, in which each block changes
one of two streams by a function of the other. Between the two lies
``h'' = alpha h' + beta h + f(h')`` (compare Zhao et al., "Dr2Net", 2024,
https://arxiv.org/abs/2401.04105, and Liao et al., "Make Pre-trained Model Reversible", 2023,
https://arxiv.org/abs/2306.00477): alpha 1 and beta 0 is the network as it was trained, alpha 0 and
beta 1 the reversible one. Undoing a block divides by beta, so that a small one loses bits:
``invert_couplings`` measures how many, and keeps streams where it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from memplan.passing import Effect, Pass

_NAME = "make_reversible"
_SUMS: Final = frozenset(
    {
        torch.add,
        torch.Tensor.add,
        torch.Tensor.__add__,
        torch.Tensor.__radd__,
        torch.Tensor.__iadd__,
    }
)


def make_reversible(alpha: float = 0.0, beta: float = 1.0) -> Pass:
    """Add each residual to the stream before the last, so that ``invert_couplings`` can undo it.

    Acts on every sum ``h + f(h)`` of tensors of one shape whose ``h`` is such a sum itself, in
    training and in evaluation; a block that changes the shape starts anew. Parameters keep their
    names.

    Args:
        alpha: what the last stream is multiplied by. 1, with beta 0, is the model as it is.
        beta: what the stream before it is multiplied by. 0 cannot be undone.

    Returns:
        A pass of effect ``APPROXIMATE``: it is another model.
    """
    return Pass(
        _NAME,
        Effect.APPROXIMATE,
        {"alpha": alpha, "beta": beta},
        around=partial(_TwoStreams, alpha, beta),
    )


class _TwoStreams(TorchFunctionMode):
    """Watches what is computed from what, and makes the sums of residual blocks others."""

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.sources: list[tuple[int, ...]] = []
        self.call_of: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()
        self.stream_before: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        found = self.residual(args) if func in _SUMS and not kwargs else None
        result = func(*args, **kwargs) if found is None else self.paired(*found)
        call = len(self.sources)
        known = (tensor for tensor in _tensors(args, kwargs) if tensor in self.call_of)
        given = tuple(self.call_of[tensor] for tensor in known)
        self.sources.append(given)
        for tensor in _tensors((result,), {}):
            self.call_of[tensor] = call
        return result

    def residual(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The stream and the change of a sum that is a residual block's."""
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

    def paired(self, stream: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """``alpha * stream + beta * the one before + change``."""
        before = self.stream_before.pop(stream, None)
        if before is None:
            total = stream + change
        else:
            terms = [(self.alpha, stream), (self.beta, before)]
            scaled = [one if factor == 1 else one * factor for factor, one in terms if factor]
            total = sum(scaled, start=change)
        self.stream_before[total] = stream
        return total


def _tensors(args: object, kwargs: Mapping[str, object]) -> Iterator[torch.Tensor]:
    stack = [args, *kwargs.values()]
    while stack:
        one = stack.pop()
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, list | tuple):
            stack.extend(one)
