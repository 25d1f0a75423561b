"""The stages from a model to a step that runs: trace, price, rewrite, offer, select, emit.

Passes have changed the model itself before (``changing``). The stages up to the offers are in
``lower``; each returns a value that the next one takes.
"""

from __future__ import annotations

import logging
import warnings
from functools import partial

from memplan.capture.sample import Sample
from memplan.compiler.lower import LoweredStep, lower_each
from memplan.compiler.request import Request
from memplan.compiler.select import choose, exact_schedule, select
from memplan.emit.emit import emit
from memplan.errors import MemplanError
from memplan.planner.plan import Plan
from memplan.runtime import first_call
from memplan.runtime.drift import BuiltStep, DriftCheck, rounded
from memplan.runtime.step import PlannedStep, check_emitted
from memplan.transforms.apply import Changed

_LOG = logging.getLogger("memplan")


def build_step(changed: Changed, sample: Sample, request: Request) -> BuiltStep:
    """The step that runs as requested.

    Args:
        changed: the model, as passes changed it.
        sample: one batch.
        request: the request.

    Raises:
        CaptureError, InfeasibleBudget, PlanMismatch: each says what to do.
    """
    if request.options.device is not None:
        raise MemplanError(
            f"Options(device={request.options.device!r}) makes plans for reading: memplan.plan. "
            "What is to run is planned for the device that the model is on."
        )
    request = request.with_optimizer_of(changed.model)
    steps = lower_each(changed, sample, request)
    lowered, plan = select(steps, request)
    return emit_step(lowered, plan, request)


def emit_step(lowered: LoweredStep, chosen: Plan, request: Request) -> BuiltStep:
    """The step that runs a plan."""
    captured, recoveries = lowered.captured, lowered.recoveries
    in_backward = request.in_backward
    update = None if in_backward is None else in_backward.updating()
    emitted = emit(captured, recoveries, chosen.schedule, update)
    step = PlannedStep(
        captured,
        recoveries,
        lowered.costs,
        emitted,
        chosen,
        in_backward,
        compares=first_call.what_is_due(request.options.verify, chosen.effects),
    )
    check_emitted(step)
    for difference in captured.differences:
        if difference.is_warned_of:
            warnings.warn(difference.reason, stacklevel=6)
    _LOG.info("%s", chosen)
    if not rounded(recoveries, chosen.schedule):
        return BuiltStep(step)
    check = DriftCheck(
        again=lambda kept: emit_step(lowered, choose(lowered, request, kept), request),
        reference=partial(exact_schedule, lowered, chosen),
        is_fixed=request.plan is not None,
    )
    return BuiltStep(step, check)
