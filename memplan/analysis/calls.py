"""Torch functions that a forward calls, each known by the module that calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from memplan.torch_internals import FunctionMode, TreeSpec, around_calls, flatten, version_of

Scope: TypeAlias = tuple[str, int]
"""FQN of a module, and the number of its call."""

Key: TypeAlias = tuple[str, int, int]
"""A function call: FQN of the module that makes it, the number of the module's call, and of the
function call in it. It is the same in every forward that runs the same code there."""

_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]

TensorRef: TypeAlias = tuple[int, int]
"""The call that made a tensor, and its place among the results; negative: it existed before."""


@dataclass(frozen=True)
class TensorArg:
    """A tensor among the leaves of a call's arguments.

    Attributes:
        place: among all leaves.
        tensor: its reference.
        name: its FQN, if it is a parameter or a buffer.
        shape: its shape.
        is_custom: whether it comes from a user's autograd function, which is no call.
    """

    place: int
    tensor: TensorRef
    name: str
    shape: torch.Size
    is_custom: bool


@dataclass(frozen=True)
class FunctionCall:
    """One call of a function.

    Attributes:
        key: its identity.
        scopes: the module calls that it is inside of, the innermost last.
        function: the function.
        given: the tensors among its arguments.
        constants: the other leaves of its arguments, as text.
        numbers: those of them that are numbers.
        results: the shapes of the tensors that it makes or writes, not of arguments that it
            returns unchanged.
    """

    key: Key
    scopes: tuple[Scope, ...]
    function: Callable[..., Any]
    given: tuple[TensorArg, ...]
    constants: tuple[str, ...]
    numbers: tuple[float, ...]
    results: tuple[torch.Size, ...]


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        scope: its identity.
        calls: numbers of the calls inside.
        given: the tensors among its arguments.
        results: the tensors among the leaves of its output.
        output: these leaves, with None for each tensor.
        spec: the structure of the output.
    """

    scope: Scope
    calls: range
    given: tuple[TensorArg, ...]
    results: tuple[TensorArg, ...]
    output: tuple[object, ...]
    spec: TreeSpec


class Scopes(FunctionMode):
    """Mode that knows, in this thread, the module that makes each call.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scopes: list[Scope] = []
        self._counts: list[int] = [0]
        self._times: dict[str, int] = {}
        self._is_aside = False

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_aside or _is_remark(func, args):
            return func(*args, **kwargs)
        return self.called(self._next_key(), func, args, kwargs)

    def called(
        self, key: Key, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call; for subclasses. Calls that it makes itself have no key."""
        del key
        return function(*args, **kwargs)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context in which calls have no key."""
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context to use instead of the mode itself."""
        modules = dict(self.model.named_modules())
        # first, so that calls by other passes' hooks count as the caller's
        with around_calls(modules, before=self._begin, after=self._end, is_first=True), self:
            yield

    def _next_key(self) -> Key:
        self._counts[-1] += 1
        name, times = self.scopes[-1] if self.scopes else ("", 0)
        return name, times, self._counts[-1]

    def began(self, scope: Scope, args: Any, kwargs: Any) -> None:
        """Handle the start of a module's call; for subclasses."""

    def ended(self, scope: Scope, output: Any) -> None:
        """Handle the end of a module's call; for subclasses."""

    def _begin(self, name: str, args: Any, kwargs: Any) -> None:
        self._times[name] = self._times.get(name, 0) + 1
        self.scopes.append((name, self._times[name]))
        self._counts.append(0)
        self.began(self.scopes[-1], args, kwargs)

    def _end(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        del name, args, kwargs
        self._counts.pop()
        self.ended(self.scopes.pop(), output)


class Record(Scopes):
    """Mode that notes every call, and what is computed from what.

    Attributes:
        calls: in order.
        modules: calls of modules, in the order in which they end.
        returned: the tensors that the model returns.
    """

    returned: tuple[TensorArg, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[FunctionCall] = []
        self.modules: list[ModuleCall] = []
        self._known: MutableMapping[torch.Tensor, TensorRef] = WeakTensorKeyDictionary()
        self._names = _names(model)
        self._open: list[tuple[int, tuple[TensorArg, ...]]] = []
        self._others = 0

    def called(
        self, key: Key, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        leaves, _ = flatten((args, kwargs))
        given = self._given(leaves)
        constants = tuple(repr(one) for one in leaves if not isinstance(one, torch.Tensor))
        before = {id(one): version_of(one) for one in leaves if isinstance(one, torch.Tensor)}
        result = function(*args, **kwargs)
        written = [
            one
            for one in leaves
            if isinstance(one, torch.Tensor) and before[id(one)] != version_of(one)
        ]
        made = [
            one
            for one in flatten(result)[0]
            if isinstance(one, torch.Tensor) and id(one) not in before
        ]
        results = list({id(one): one for one in (*made, *written)}.values())
        for place, tensor in enumerate(results):
            self._known[tensor] = len(self.calls), place
        shapes = tuple(one.shape for one in results)
        scopes, numbers = tuple(self.scopes), numbers_of(leaves)
        self.calls.append(FunctionCall(key, scopes, function, given, constants, numbers, shapes))
        return result

    def of(self, forward: Callable[[], Any]) -> Any:
        """Record a forward; return its output.

        It may be called from inside the model's own forward.
        """
        with self.watching():
            output = forward()
        self.returned = self._given(flatten(output)[0])
        return output

    def began(self, scope: Scope, args: Any, kwargs: Any) -> None:
        if not scope[0]:
            self._names = _names(self.model)  # others may stand in for the tensors now
        with self.aside():
            self._open.append((len(self.calls), self._given(flatten((args, kwargs))[0])))

    def ended(self, scope: Scope, output: Any) -> None:
        first, given = self._open.pop()
        with self.aside():
            leaves, spec = flatten(output)
            self.modules.append(
                ModuleCall(
                    scope=scope,
                    calls=range(first, len(self.calls)),
                    given=given,
                    results=self._given(leaves),
                    output=tuple(None if isinstance(x, torch.Tensor) else x for x in leaves),
                    spec=spec,
                )
            )

    def _given(self, leaves: Sequence[object]) -> tuple[TensorArg, ...]:
        return tuple(
            TensorArg(
                place,
                self._which(leaf),
                self._names.get(id(leaf), ""),
                leaf.shape,
                isinstance(leaf.grad_fn, torch.autograd.function.BackwardCFunction),
            )
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor)
        )

    def _which(self, tensor: torch.Tensor) -> TensorRef:
        if tensor not in self._known:
            self._others += 1
            self._known[tensor] = -self._others, 0
        return self._known[tensor]


def numbers_of(leaves: Iterable[object]) -> tuple[float, ...]:
    """The numbers among the leaves of arguments."""
    return tuple(one for one in leaves if isinstance(one, int | float))


def flops_of(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """Operations of one forward, by FQN of the called module; "" is the model."""
    counter = FlopCounterMode(display=False)
    with counter:
        forward()
    found: dict[str, int] = {}
    own = type(model).__name__
    for name, counts in counter.get_flop_counts().items():
        known = "" if name in ("Global", own) else name.removeprefix(f"{own}.")
        found[known] = max(found.get(known, 0), sum(counts.values()))
    return found


def _is_remark(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Tell whether a call reads an attribute that a part of the batch shares: device, dtype, ...

    Tensors without data have some of these as attributes of their own, which is no call.
    """
    if getattr(function, "__name__", "") != "__get__" or function == _SHAPE:
        return False
    return not isinstance(function(*args), torch.Tensor)


def _names(model: nn.Module) -> dict[int, str]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {id(tensor): name for name, tensor in named}
