"""Inversion of sums and products: one operand from the result and the other operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from memplan.capture import InPlace, OpCall, source_of_call
from memplan.passes.reversible.fixed_point import add_on_grid

if TYPE_CHECKING:
    from memplan.capture import Captured
    from memplan.ir.program import Op

aten = torch.ops.aten


def call_of_undo(captured: Captured, op: Op, stashed: Sequence[Any]) -> OpCall:
    """The call that restores the operand that is the op's result, up to rounding.

    It can write over the result of the captured op: ``a + alpha * b``, ``a - alpha * b`` or
    ``a * number``.
    """
    del stashed
    source = source_of_call(captured, op)
    operands = [arg for arg in source.args[:2] if isinstance(arg, fx.Node)]
    position = [captured.storage[arg] for arg in operands].index(op.results[0])
    other = source.args[1 - position]
    if source.target is add_on_grid:
        return _over(source, aten.sub.Tensor, aten.sub.out, source, other)
    if source.target is aten.mul.Tensor:
        return _over(source, aten.div.Tensor, aten.div.out, source, source.args[1])
    alpha = {"alpha": source.kwargs["alpha"]} if source.kwargs.get("alpha", 1) != 1 else {}
    assert not (alpha and position), f"{source} scales the operand that is wanted"
    if source.target is aten.add.Tensor:
        return _over(source, aten.sub.Tensor, aten.sub.out, source, other, **alpha)
    assert source.target is aten.sub.Tensor, f"{source.target} cannot be undone"
    if position == 0:
        return _over(source, aten.add.Tensor, aten.add.out, source, other, **alpha)
    return _over(source, aten.sub.Tensor, aten.sub.out, other, source)


def _over(source: fx.Node, target: Any, out: Any, *args: Any, **kwargs: Any) -> OpCall:
    """A call that can write its result over ``source``."""
    return OpCall(target, args, kwargs, {args.index(source): InPlace(out, "out")})
