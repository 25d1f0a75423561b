"""``optimize``, ``plan``, ``frontier``: each reads as the main path.

capture -> Program + Costs -> passes offer recoveries -> planner chooses a Schedule -> emit ->
PlannedModule -> measure.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from functools import partial

from torch import nn

from memplan import verifying
from memplan.changing import changing
from memplan.choosing import best, choose, exact_schedule
from memplan.collector import paused_collector
from memplan.drift import Guard, rounded
from memplan.emit import emit
from memplan.errors import MemplanError
from memplan.fitting import fitted
from memplan.module import PlannedModule
from memplan.options import Options
from memplan.passing import Pass
from memplan.plan import Plan
from memplan.planner import frontier as find_frontier
from memplan.preparing import Prepared, prepare
from memplan.request import Request, make_request
from memplan.runtime import PlannedStep, check_emitted
from memplan.sample import Sample

_LOG = logging.getLogger("memplan")


def optimize(
    model: nn.Module,
    sample: object = None,
    *,
    budget: int | str | None = None,
    max_slowdown: float | None = None,
    passes: Iterable[Pass] = (),
    default_passes: bool = True,
    optimizer: object = None,
    plan: Plan | None = None,
    options: Options | None = None,
) -> PlannedModule:
    """Make a module that trains as ``model`` does, within a budget of memory.

    Args:
        model: the module; its output must hold the loss for the logits to be inside the plan
            (see ``WithLoss``). It stays usable, and shares its parameters with the result.
        sample: one batch. A mapping is keyword arguments, a tuple or list positional ones,
            anything else the one argument. Left out, planning happens at the first call.
        budget: hard bound on the peak of the whole step: "6GiB", 6_000_000_000, or "50%" of what
            the step needs above its resident bytes.
        max_slowdown: bound on predicted time over the unplanned step's; without a budget, the
            least memory within it. Neither: all savings that are free.
        passes: techniques to add to the EXACT defaults.
        default_passes: False leaves the defaults out.
        optimizer: whose state and update the budget then covers too: one over
            ``model.parameters()``, or a callable that makes one of them, found as
            ``planned.optimizer``. None: the step is forward and backward.
        plan: a saved plan to apply; excludes budget, max_slowdown and passes.
        options: the rest.

    Raises:
        UnitsError, CaptureError, InfeasibleBudget, PlanMismatch: each says what to do.
    """
    request = make_request(
        model,
        budget=budget,
        max_slowdown=max_slowdown,
        passes=passes,
        default_passes=default_passes,
        optimizer=optimizer,
        plan=plan,
        options=options,
    )
    batch = None if sample is None else Sample.of(sample)
    request = fitted(model, batch, request, make_plan)
    with changing(model, batch, request.passes, is_lasting=True) as changed:
        request = request.with_optimizer_of(changed.model).for_changed_model
        build = partial(build_step, request=request)
        planned = PlannedModule(
            model, build, request.options.cache_size, request.optimizer, changed
        )
        if batch is not None:
            planned.prepare(batch)
    return planned


def plan(
    model: nn.Module,
    sample: object,
    *,
    budget: int | str | None = None,
    max_slowdown: float | None = None,
    passes: Iterable[Pass] = (),
    default_passes: bool = True,
    optimizer: object = None,
    options: Options | None = None,
) -> Plan:
    """The plan that ``optimize`` would run, with the same arguments. Never runs the model."""
    request = make_request(
        model,
        budget=budget,
        max_slowdown=max_slowdown,
        passes=passes,
        default_passes=default_passes,
        optimizer=optimizer,
        plan=None,
        options=options,
    )
    return make_plan(model, Sample.of(sample), request)[1]


def frontier(
    model: nn.Module,
    sample: object,
    *,
    points: int = 20,
    passes: Iterable[Pass] = (),
    default_passes: bool = True,
    optimizer: object = None,
    options: Options | None = None,
) -> list[Plan]:
    """What each amount of memory costs in time: plans by ascending peak and falling slowdown.

    Budgets are spread evenly from the smallest feasible one to the captured step's peak. Other
    arguments are those of ``plan``. Never runs the model.

    Args:
        model: the module.
        sample: one batch.
        points: budgets to plan for; fewer plans come back where one serves several.
        passes: techniques to add to the EXACT defaults.
        default_passes: False leaves the defaults out.
        optimizer: whose state and update are part of the step.
        options: the rest.
    """
    if points < 2:
        raise MemplanError(f"a frontier has at least 2 points, got {points}")
    request = make_request(
        model,
        budget=None,
        max_slowdown=None,
        passes=passes,
        default_passes=default_passes,
        optimizer=optimizer,
        plan=None,
        options=options,
    )
    step = prepare(model, Sample.of(sample), request)
    solutions = find_frontier(
        step.captured.program,
        step.costs,
        step.recoveries,
        original_seconds=step.unplanned.seconds,
        points=points,
    )
    return [step.describe(one.schedule, budget_bytes=one.peak_bytes) for one in solutions]


def build_step(model: nn.Module, sample: Sample, request: Request) -> PlannedStep:
    """Capture, plan and emit one step."""
    if request.options.device is not None:
        raise MemplanError(
            f"Options(device={request.options.device!r}) makes plans for reading: memplan.plan. "
            "What is to run is planned for the device that the model is on."
        )
    return _emitted(*make_plan(model, sample, request), request)


def _emitted(prepared: Prepared, chosen: Plan, request: Request) -> PlannedStep:
    """The step that runs a plan."""
    captured, recoveries = prepared.captured, prepared.recoveries
    in_backward = request.in_backward
    update = None if in_backward is None else in_backward.updating()
    emitted = emit(captured, recoveries, chosen.schedule, update)
    guard = None
    if rounded(recoveries, chosen.schedule):
        guard = Guard(
            again=lambda anchors: _emitted(prepared, choose(prepared, request, anchors), request),
            reference=partial(exact_schedule, prepared, chosen),
            is_fixed=request.plan is not None,
        )
    step = PlannedStep(
        captured,
        recoveries,
        prepared.costs,
        emitted,
        chosen,
        in_backward,
        guard,
        compares=verifying.what_is_due(request.options.verify, chosen.effects),
    )
    check_emitted(step)
    for difference in captured.differences:
        if difference.is_warned_of:
            warnings.warn(difference.reason, stacklevel=6)
    _LOG.info("%s", chosen)
    return step


@paused_collector()
def make_plan(model: nn.Module, sample: Sample, request: Request) -> tuple[Prepared, Plan]:
    """Capture a step and choose how it runs."""
    request = fitted(model, sample, request, make_plan)
    return best(prepare(model, sample, request), request)
