"""Sums of gradients that autograd computes outside a planned step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import fx

from memplan.capture import Captured
from memplan.torch_internals import (
    exchanges_gradients,
    has_gradient_hooks,
    is_backward,
    received_from_one_node,
    received_from_several_nodes,
)


def summed(captured: Captured) -> tuple[int, ...]:
    """Positions of parameters whose gradient is a sum, mostly over several uses."""
    return tuple(
        position
        for position, node in captured.gradients
        if captured.primals[position].kind == "parameter" and any(map(_is_sum, (node, *node.args)))
    )


def _is_sum(value: object) -> bool:
    is_added = isinstance(value, fx.Node) and value.target is torch.ops.aten.add.Tensor
    return is_added and isinstance(value, fx.Node) and all(map(is_backward, value.all_input_nodes))


def warn_of_other_order(summed: Sequence[torch.Tensor]) -> None:
    """Warn that gradients are summed in another order than eager's.

    That is so for a weight that is used several times in one call, and in another call of the
    same backward as well.
    """
    shared = {*map(id, summed)} & received_from_several_nodes() if summed else ()
    if shared:
        warnings.warn(
            f"{len(shared)} parameters are used more than once in a planned call, and in another "
            "call of the same backward, too: their gradients are added up in another order than "
            "the untouched module's, and may differ by rounding. One backward for each call, or "
            "one call for both, has the same bits.",
            stacklevel=2,
        )


def existing_gradients(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradient that each parameter's new one is added to; None where autograd adds it.

    Autograd adds it where it does more than that: for ``torch.autograd.grad``, hooks, gradients
    that also arrive from elsewhere, and processes that exchange gradients.
    """
    if not parameters:
        return []
    alone = frozenset[int]() if exchanges_gradients() else received_from_one_node()
    is_left = [id(p) not in alone or has_gradient_hooks(p) for p in parameters]
    left = sum(
        p.grad is not None and is_left for p, is_left in zip(parameters, is_left, strict=True)
    )
    if left:
        warnings.warn(
            f"{left} new gradients are kept beside those that are there, because autograd does "
            "more than add them (hooks, torch.autograd.grad, a parameter used elsewhere, several "
            "processes); the peak may be above the plan's",
            stacklevel=2,
        )
    return [None if left else p.grad for p, left in zip(parameters, is_left, strict=True)]
