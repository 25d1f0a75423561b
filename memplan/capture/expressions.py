"""Expressions of tensors without data in inputs, buffers and constants, and their values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from memplan.torch_internals import (
    DispatchMode,
    OpOverload,
    is_fake,
    storage_key,
    without_autocast,
    without_modes,
    writes_its_first_alone,
)


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor that exists before the step: of the sample by position, a buffer by name."""

    key: int | str


@dataclass(frozen=True, eq=False, slots=True)
class Computed:
    """A function's result, or item ``index`` of it; its arguments hold further expressions."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None = None


class Expressions(DispatchMode):
    """Mode that notes how tensors follow from the inputs and constants, where they do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []  # so that no storage's key is reused
        self.known: dict[int, dict[Hashable, Given | Computed]] = {}
        self.written: set[int] = set()

    def learn(self, tensor: torch.Tensor, expression: Given | Computed) -> None:
        """Note a tensor's expression."""
        self.kept.append(tensor)
        self.known.setdefault(storage_key(tensor), {})[_place(tensor)] = expression

    def look_up(self, value: object) -> object:
        """A tensor's expression, or None. Other values, real tensors too, are their own."""
        if not isinstance(value, torch.Tensor) or not is_fake(value):
            return value
        return self.known.get(storage_key(value), {}).get(_place(value))

    def expression(
        self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Computed | None:
        """A call as an expression, or None if an operand is unknown."""
        is_known = True

        def look_up(value: object) -> object:
            nonlocal is_known
            found = self.look_up(value)
            is_known = is_known and not (found is None and value is not None)
            return found

        known_args, known_kwargs = _map(look_up, (tuple(args), dict(kwargs)))
        return Computed(target, known_args, known_kwargs) if is_known else None

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        expression = None
        if torch.Tag.nondeterministic_seeded not in func.tags:
            target = partial(_on_a_copy, func) if func._schema.is_mutable else func
            expression = self.expression(target, args, kwargs)
        if func._schema.is_mutable:
            if not writes_its_first_alone(func):
                _map(self.forget, (args, dict(kwargs)))
                return result
            self.forget(args[0])
        if expression is not None and isinstance(result, torch.Tensor):
            self.learn(result, expression)
        elif expression is not None and isinstance(result, tuple | list):
            for index, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self.learn(item, replace(expression, index=index))
        return result

    def forget(self, value: object) -> None:
        """Forget what is known of a tensor's storage."""
        if isinstance(value, torch.Tensor):
            self.known.pop(storage_key(value), None)
            self.written.add(storage_key(value))


def _on_a_copy(func: OpOverload, written: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The result of an in-place op on a copy of its first argument."""
    return func(written.clone(), *args, **kwargs)


class Evaluation:
    """Evaluates expressions on inputs and buffers, each part once."""

    def __init__(self, inputs: Sequence[torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
        self.inputs = inputs
        self.buffers = buffers
        self.results: dict[int, Any] = {}
        self.read: set[int | str] = set()

    def __call__(self, question: Computed) -> Any:
        """The value of an expression."""
        with without_modes(), without_autocast(), torch.no_grad():
            return self.value(question)

    def value(self, part: object) -> Any:
        """The value of a part of an expression; anything else is itself."""
        if isinstance(part, Given):
            key = part.key
            self.read.add(key)
            return self.buffers[key] if isinstance(key, str) else self.inputs[key]
        if not isinstance(part, Computed):
            return part
        # Items of one result share its arguments, not the expression.
        number = id(part.args)
        if number not in self.results:
            args, kwargs = _map(self.value, (part.args, dict(part.kwargs)))
            self.results[number] = part.target(*args, **kwargs)
        result = self.results[number]
        return result if part.index is None else result[part.index]


def _place(tensor: torch.Tensor) -> Hashable:
    """A key, equal for tensors that are the same part of one storage."""
    layout = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
    return layout, tensor.is_conj(), tensor.is_neg()


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to the leaves of nested tuples, lists and dicts."""
    if isinstance(tree, tuple | list):
        return type(tree)([_map(function, item) for item in tree])
    if isinstance(tree, dict):
        return {key: _map(function, item) for key, item in tree.items()}
    return function(tree)
