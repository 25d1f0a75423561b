"""Calls of ops: their targets and arguments, for emission and measurement alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from memplan.capture.captured import Captured, OpCall, tensors_of
from memplan.ir.program import Op


def call_of(captured: Captured, op: Op, stashed: Sequence[Any] = ()) -> OpCall:
    """The call of a captured op, or of one that a pass adds.

    Args:
        captured: the step of the op.
        op: the op.
        stashed: a stand-in for each of its ``stashed_operands``.
    """
    if op.variant_of is not None:
        call = captured.lowerings[op.target](captured, op, stashed)
        if call.items is not None:
            return call
        in_order = {id: position for position, id in enumerate(op.results)}
        return replace(call, items=in_order if len(op.results) > 1 else {})
    source = source_of_call(captured, op)
    assert callable(source.target)
    return OpCall(
        source.target,
        tuple(source.args),
        dict(source.kwargs),
        source.meta.get("in_place", {}),
        items_of(captured, op),
    )


def source_of_call(captured: Captured, op: Op) -> fx.Node:
    """The node of a captured op, or of the one that an added op belongs to."""
    return captured.calls[op.id if op.variant_of is None else op.variant_of]


def stashed_operands(captured: Captured, op: Op) -> tuple[int, ...]:
    """The operands of an op that a recovery stashed."""
    return tuple(id for id in op.operands if id >= len(captured.program.values))


def items_of(captured: Captured, op: Op) -> dict[int, int]:
    """Positions of those results of an op that are items of what its captured op returns."""
    source = source_of_call(captured, op)
    bases = {id: captured.bases[id] for id in op.results if id in captured.bases}
    return {
        id: int(str(base.args[1]))
        for id, base in bases.items()
        if base.target is getitem and base.args[0] is source
    }


def first_tensor(node: fx.Node) -> torch.Tensor:
    """The first tensor among an op's results, as recorded."""
    return tensors_of(node.meta["val"])[0]
