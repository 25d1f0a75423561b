"""Which order a fused step runs in."""

from __future__ import annotations

from memplan.capture import Early, Traced, fuse, read
from memplan.planner import keep_all
from memplan.program import Costs, OpCost
from memplan.schedule import Catalog
from memplan.timeline import simulate


def fused(traced: Traced) -> Traced:
    """All gradients finished in the forward, in the order of the lowest peak.

    In captured order, unless running parts of the backward early needs less: a model with several
    losses whose gradients do not meet, such as local learning.

    Raises:
        CaptureError: if the module returns no loss.
    """
    orders = [fuse(traced, early) for early in (Early.NONE, Early.FINISHING, Early.ALL)]
    return min(orders, key=_peak_bytes)


def _peak_bytes(traced: Traced) -> int:
    """With everything kept, and without what kernels allocate inside."""
    program = read(traced).program
    costs = Costs({op.id: OpCost(0.0) for op in program.ops})
    schedule = keep_all(program, costs)
    return simulate(program, Catalog.of(program, ()), schedule, costs).peak_bytes
