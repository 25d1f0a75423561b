"""Have one operand of a sum or a product back from its result and the other operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from memplan.grid import add_on_grid

aten = torch.ops.aten

Undo = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A target, the same writing where ``out`` says, and their arguments; the first is the result."""


def undo(node: fx.Node, position: int) -> Undo:
    """The call that gives ``node.args[position]`` back, up to rounding.

    Args:
        node: ``a + alpha * b``, ``a - alpha * b`` or ``a * number`` of a graph.
        position: of the operand that is wanted.
    """
    if node.target is add_on_grid:
        return aten.sub.Tensor, aten.sub.out, (node, node.args[1 - position]), {}
    if node.target is aten.mul.Tensor:
        return aten.div.Tensor, aten.div.out, (node, node.args[1]), {}
    alpha = {"alpha": node.kwargs["alpha"]} if node.kwargs.get("alpha", 1) != 1 else {}
    assert not (alpha and position), f"{node} scales the operand that is wanted"
    other = node.args[1 - position]
    if node.target is aten.add.Tensor:
        return aten.sub.Tensor, aten.sub.out, (node, other), alpha
    assert node.target is aten.sub.Tensor, f"{node.target} cannot be undone"
    if position == 0:
        return aten.add.Tensor, aten.add.out, (node, other), alpha
    return aten.sub.Tensor, aten.sub.out, (other, node), {}
