"""The optimizer's part of a captured step."""

from __future__ import annotations

from dataclasses import replace

from memplan.capture import Captured, update_parameter
from memplan.ir.program import Op, Phase, Role, Value
from memplan.optimizer.cost import UpdateCost


def with_update(captured: Captured, update: UpdateCost) -> Captured:
    """The step with the optimizer's state among its residents, and its update as the last op.

    It has no such op if parameters are updated in the backward.
    """
    program = captured.program
    state = Value(len(program.values), update.state_bytes, Role.OPTIMIZER_STATE, name=update.name)
    ops = program.ops
    if not any(node.target is update_parameter for node in captured.calls.values()):
        step = Op(
            id=len(ops),
            target=f"{update.name}.step",
            operands=tuple(v.id for v in program.values if v.role is Role.GRADIENT),
            results=(),
            phase=Phase.OPTIMIZER,
            mutates=tuple(v.id for v in program.values if v.role is Role.PARAMETER),
            signature=f"{update.name}.step()",
        )
        ops = (*ops, step)
    return replace(captured, program=replace(program, ops=ops, values=(*program.values, state)))
