"""In-place draws of random numbers, in the order in which eager draws them.

A trace draws into a new tensor. Where the tensor that eager draws into is not contiguous, its
elements are drawn in another order than those of the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memplan.rng import draw
from memplan.torch_internals import (
    DispatchMode,
    OpOverload,
    annotated,
    annotation,
    writes_its_first_alone,
)

_KEY = "drawn in place"
_TENSOR = "tensor"
"""Placeholder for a tensor argument."""
_RRELU = torch.ops.aten.rrelu_with_noise.default
_MARK = torch.ops.aten.random_.default
"""Traced in place of the noted op: its result has the layout of the tensor drawn into."""


class DrawsInPlace(DispatchMode):
    """Mode that notes in-place draws, for ``draws_as_eager``."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the op; if it draws into its first argument, note how."""
        del types
        kwargs = kwargs or {}
        if func is _RRELU:  # whose result is contiguous, but not in a trace
            return func(args[0].contiguous(), *args[1:], **kwargs)
        is_drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not (is_drawn and writes_its_first_alone(func)):
            return func(*args, **kwargs)
        written, *others = args
        can_be_named = func._overloadname != "from"  # a keyword, in generated code
        if written.is_contiguous() and can_be_named:
            return func(*args, **kwargs)
        name, overload = func._schema.name.partition("::")[2], func._overloadname
        constants = tuple(_TENSOR if isinstance(one, torch.Tensor) else one for one in others)
        how = (name, overload, tuple(written.shape), written.stride(), constants)
        with annotated(_KEY, how):
            return func(*args, **kwargs) if _TENSOR in constants else _MARK(written)


def draws_as_eager(graph: fx.Graph) -> None:
    """Make noted in-place draws draw as the noted ops do."""
    for node in graph.nodes:
        how = annotation(node, _KEY)
        target = node.target
        if how is None or not isinstance(target, OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded not in target.tags:
            continue
        name, overload, shape, strides, constants = how
        value = node.meta["val"]
        tensors = (one for one in node.args[1:] if isinstance(one, fx.Node))
        given = tuple(next(tensors) if one == _TENSOR else one for one in constants)
        node.args = (
            (name, overload),
            (shape, strides, value.stride()),
            (value.dtype, value.device),
            *given,
        )
        node.kwargs = {}
        node.target = draw
