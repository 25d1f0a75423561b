"""Values of tensors that a forward asks for while it is captured: ``if mask.all():``, ``x[mask]``.

Where such a value, or the number of True entries of a mask, follows from inputs, buffers and
constants alone, it is computed, the capture follows that branch, and the step carries a
guard: the same computation on the inputs and buffers of every later call. A value that
depends on parameters or on random numbers changes from step to step, and cannot be captured.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memplan.capture.expressions import Computed, Evaluation, Expressions, Given
from memplan.capture.sizes import SIZED_BY_VALUES
from memplan.errors import CaptureError
from memplan.torch_internals import (
    DispatchMode,
    FunctionMode,
    OpOverload,
    as_if_traced,
    is_fake,
    storage_key,
)

_ASKING = frozenset(
    {
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "item",
        "tolist",
        "equal",
        "allclose",
        "__contains__",
    }
)
"""Functions that turn tensors into plain values."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One value that the forward asked for.

    Attributes:
        question: its computation.
        answer: the value.
        is_guard: whether it depends on inputs or buffers; else it is constant.
    """

    question: Computed
    answer: Any
    is_guard: bool

    def holds(self, inputs: Sequence[torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether these inputs and buffers give the same answer."""
        if not self.is_guard:
            return True
        found = Evaluation(inputs, buffers)(self.question)
        # As text, so that 0.0 is not -0.0, and NaN is NaN.
        return type(found) is type(self.answer) and repr(found) == repr(self.answer)


def decide(
    flat: nn.Module, inputs: Sequence[torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> tuple[Decision, ...]:
    """Run a module without data, computing the values that it asks for as it goes.

    Its decisions name buffers as ``buffers`` does.

    Raises whatever torch does where a value depends on more than inputs and constants.
    """
    owners = Counter(
        storage_key(tensor) for tensor in (*inputs, *flat.parameters(), *flat.buffers())
    )
    known = Expressions()
    recorder = _Recorder(known, inputs, buffers)
    with as_if_traced(flat, inputs, known) as (state, copies):
        for index, (given, copy) in enumerate(zip(inputs, copies, strict=True)):
            if not is_fake(given):
                known.learn(copy, Given(index))
        names = {id(buffer): name for name, buffer in buffers.items()}
        for name, buffer in flat.named_buffers():
            if owners[storage_key(buffer)] == 1 and not is_fake(buffer):
                known.learn(state[name], Given(names[id(buffer)]))
        with recorder, _AskedByKernels(recorder):
            torch.func.functional_call(flat, state, tuple(copies), tie_weights=False)
    shared = Counter(map(storage_key, inputs))
    pairs = zip(inputs, copies, strict=True)
    if any(shared[storage_key(i)] > 1 and storage_key(copy) in known.written for i, copy in pairs):
        raise CaptureError(
            "the forward branches on values of tensors, and writes an input that shares memory "
            "with another; pass copies"
        )
    _check_steady(recorder, {names[id(b)]: state[name] for name, b in flat.named_buffers()})
    return tuple(recorder.decisions)


def _check_steady(recorder: _Recorder, buffers: Mapping[str, torch.Tensor]) -> None:
    """Refuse numbers that follow from a buffer that the forward writes: each call has others.

    Raises:
        CaptureError: naming the buffer.
    """
    written = recorder.known.written
    for name in sorted(recorder.numbers_read):
        if storage_key(buffers[name]) in written:
            raise CaptureError(
                f"the forward takes a number from buffer {name!r}, which it writes, so that it is "
                "another in each call (a momentum of None in batch norm); compute with the tensor "
                "itself, or give a number"
            )


class _Answering(FunctionMode, ABC):
    """Mode that answers questions, and gives results their size where it depends on values."""

    @abstractmethod
    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The answer to a question, or whatever torch does where there is none."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ASKING:
            return self.answer(func, args, kwargs)
        if name in SIZED_BY_VALUES:
            return SIZED_BY_VALUES[name](self.ask, func, *args, **kwargs)
        is_search = name in ("nonzero", "argwhere") or (name == "where" and len(args) == 1)
        if is_search and args and args[0].dim() > 0:
            places = self.places(args[0])
            as_tuple = name == "where" or kwargs.get("as_tuple", False)
            return places.unbind(1) if as_tuple else places
        if name in ("__getitem__", "__setitem__"):
            return func(args[0], self.without_masks(args[0], args[1]), *args[2:])
        return func(*args, **kwargs)

    def ask(self, question: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """The answer to a question about tensors."""
        return self.answer(question, tensors, {})

    def places(self, mask: torch.Tensor) -> torch.Tensor:
        """Places where a tensor is not zero, as (number, dimensions)."""
        number = self.ask(_count, mask)
        return torch.nonzero_static(mask, size=number)

    def without_masks(self, tensor: torch.Tensor, index: Any) -> Any:
        """An index with each boolean tensor replaced by the places where it is True."""
        items = index if isinstance(index, tuple) else (index,)
        if not any(_is_mask(item) for item in items):
            return index
        parts: list[Any] = []
        dim = 0
        for position, item in enumerate(items):
            if not _is_mask(item):
                parts.append(item)
                dim = _next_dim(tensor, items, position, dim)
            elif item.shape != tensor.shape[dim : dim + item.dim()]:
                return index  # torch says what is wrong with it
            else:
                parts += self.places(item).unbind(1)
                dim += item.dim()
        return tuple(parts)


def _next_dim(tensor: torch.Tensor, items: tuple[Any, ...], position: int, dim: int) -> int:
    """The dimension of the item of an index that follows this one, which is no mask."""
    item = items[position]
    if item is None or isinstance(item, bool):
        return dim
    if item is not Ellipsis:
        return dim + 1
    after = items[position + 1 :]
    taken = sum(int(one.dim()) if _is_mask(one) else int(one is not None) for one in after)
    return tensor.dim() - taken


def _is_mask(item: object) -> bool:
    return isinstance(item, torch.Tensor) and item.dtype == torch.bool and item.dim() > 0


def _count(mask: torch.Tensor) -> int:
    return int(mask.count_nonzero())


_ASKED_BY_KERNELS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class _AskedByKernels(DispatchMode):
    """Mode that answers torch's compiled code, too, if it asks for numbers: ``istft``, ``cov``."""

    def __init__(self, answering: _Answering) -> None:
        super().__init__()
        self.answering = answering

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func in _ASKED_BY_KERNELS:
            return self.answering.answer(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def replayed(decisions: Sequence[Decision]) -> Iterator[None]:
    """Context in which questions get their earlier answers, in the same order."""
    replay = _Replay(decisions)
    with replay, _AskedByKernels(replay):
        yield


class _Replay(_Answering):
    def __init__(self, decisions: Sequence[Decision]) -> None:
        super().__init__()
        self.decisions: Iterator[Decision] = iter(decisions)

    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The next answer."""
        del args, kwargs
        decision = next(self.decisions, None)
        if decision is None or _kind(decision.question.target) != _kind(func):
            raise CaptureError(
                "the forward asks for other values of tensors in one run than in another; what it "
                "does must follow from its inputs alone"
            )
        return decision.answer


def _kind(question: Callable[..., Any]) -> object:
    """A key, equal for questions that may stand for each other: ``bool(x)`` and ``x.item()``."""
    is_value = getattr(question, "__name__", "") in _ASKING or question in _ASKED_BY_KERNELS
    return "value" if is_value else question


class _Recorder(_Answering):
    """Mode that answers questions on the real inputs, and records them."""

    def __init__(
        self,
        known: Expressions,
        inputs: Sequence[torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.known = known
        self.inputs = inputs
        self.buffers = buffers
        self.decisions: list[Decision] = []
        self.numbers_read: set[str] = set()

    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The answer, computed."""
        question = self.known.expression(func, args, kwargs)
        if question is None:
            return func(*args, **kwargs)
        evaluation = Evaluation(self.inputs, self.buffers)
        answer = evaluation(question)
        if not isinstance(answer, bool):
            self.numbers_read |= {key for key in evaluation.read if isinstance(key, str)}
        self.decisions.append(Decision(question, answer, bool(evaluation.read)))
        return answer
