"""The order that a fused step runs in."""

from __future__ import annotations

from dataclasses import replace

from memplan.capture import Traced, fuse, needs_one, orders, read
from memplan.ir.liveness import ScheduledStep
from memplan.ir.program import Costs, OpCost
from memplan.planner import keep_all


def fused(traced: Traced, rewritten: Traced) -> Traced:
    """A step with all gradients finished in the forward, in the order of the lowest peak.

    That is the captured order, unless running parts of the backward early needs less, as in a model
    with several losses whose gradients do not meet (local learning).

    Args:
        traced: the step as it was captured.
        rewritten: the step as passes rewrote it.

    Raises:
        CaptureError: if the module returns no loss.
    """
    why = needs_one(traced)
    found = [fuse(rewritten, early) for early in orders(rewritten)]
    return replace(min(found, key=_peak_bytes), needs_one=why)


def _peak_bytes(traced: Traced) -> int:
    """The peak with everything kept, and without kernels' workspace."""
    program = read(traced).program
    costs = Costs({op.id: OpCost(0.0) for op in program.ops})
    return ScheduledStep(program, (), costs, keep_all(program, costs)).peak_bytes
