"""``optimize``, ``plan``, ``profile``, ``compare``: each reads as the main path.

capture -> Program + Costs -> passes offer recoveries -> planner chooses a Schedule -> emit ->
PlannedModule -> measure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

from torch import nn

from memplan.capture import (
    Captured,
    Traced,
    rewrite,
    trace,
    update_in_backward,
)
from memplan.collector import paused_collector
from memplan.describing import describe_original, describe_plan, fingerprint
from memplan.emit import emit
from memplan.errors import InfeasibleBudget, MemplanError, PlanMismatch
from memplan.module import PlannedModule
from memplan.options import Options
from memplan.passing import Pass
from memplan.plan import PassRecord, Plan
from memplan.planner import MAX_SLOWDOWN, solve
from memplan.pricing import Pricing, offers
from memplan.request import Request, make_request
from memplan.runtime import PlannedStep, check_emitted
from memplan.sample import Sample
from memplan.schedule import Effect, Recovery, Schedule, check_schedule
from memplan.units import format_bytes

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
    build = partial(build_step, request=request)
    planned = PlannedModule(model, build, request.options.cache_size, request.optimizer)
    if sample is not None:
        planned.prepare(Sample.of(sample))
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


def build_step(model: nn.Module, sample: Sample, request: Request) -> PlannedStep:
    """Capture, plan and emit one step."""
    if request.options.device is not None:
        raise MemplanError(
            f"Options(device={request.options.device!r}) makes plans for reading: memplan.plan. "
            "What is to run is planned for the device that the model is on."
        )
    captured, chosen, recoveries = make_plan(model, sample, request)
    in_backward = request.in_backward
    update = None if in_backward is None else in_backward.updating()
    emitted = emit(captured, recoveries, chosen.schedule, update)
    step = PlannedStep(captured, recoveries, emitted, chosen, in_backward)
    check_emitted(step)
    _LOG.info("%s", chosen)
    return step


@paused_collector()
def make_plan(
    model: nn.Module, sample: Sample, request: Request
) -> tuple[Captured, Plan, tuple[Recovery, ...]]:
    """Capture a step and choose how it runs."""
    _LOG.debug("capturing %s", type(model).__name__)
    pricing = Pricing.of(model, sample, request.options)
    is_cuda = pricing.device is not None and pricing.device.is_cuda
    traced = trace(model, sample, request.options.differentiable_outputs, is_cuda)
    traced = pricing.as_run(traced)
    if request.optimizer is not None:
        in_backward = request.in_backward is not None
        pricing = pricing.with_optimizer(model, traced, request.optimizer, in_backward=in_backward)
    original, original_costs = pricing.price(pricing.read(traced))
    unplanned = describe_original(original.program, original_costs)
    rewritten = pricing.read(_rewritten(traced, request))
    recoveries = offers(rewritten, request.passes)
    captured, costs = pricing.price(rewritten, recoveries)
    records = tuple(PassRecord(p.name, p.arguments, p.effect) for p in request.passes)
    is_rounded = any(difference.is_certain for difference in captured.differences)
    describe = partial(
        describe_plan,
        captured.program,
        recoveries,
        costs,
        original=unplanned,
        passes=records,
        captured_effect=Effect.ROUNDING if is_rounded else Effect.EXACT,
        notes=[difference.reason for difference in captured.differences],
    )
    if request.plan is not None:
        schedule, budget_bytes = _saved(request.plan, captured, recoveries)
    else:
        budget_bytes = None
        if request.budget is not None:
            resident_bytes = captured.program.resident_bytes
            budget_bytes = request.budget.resolve(resident_bytes, unplanned.peak_bytes)
        _LOG.debug("planning %d ops", len(captured.program.ops))
        solution = solve(
            captured.program,
            costs,
            recoveries,
            budget_bytes=budget_bytes,
            max_slowdown=request.max_slowdown,
            original_seconds=unplanned.seconds,
        )
        schedule = solution.schedule
        if not solution.is_feasible:
            smallest = describe(schedule, budget_bytes=solution.peak_bytes)
            if request.options.on_infeasible == "raise":
                raise _infeasible(budget_bytes or 0, smallest, request.max_slowdown)
            budget_bytes = solution.peak_bytes
    check_schedule(captured.program, recoveries, schedule)
    chosen = describe(schedule, budget_bytes=budget_bytes)
    if budget_bytes is not None and chosen.peak_bytes > budget_bytes:
        raise PlanMismatch(
            f"the saved plan needs {chosen.peak_bytes} bytes here, more than its budget of "
            f"{budget_bytes}: kernels differ between machines. Plan this one with memplan.plan."
        )
    return captured, chosen, recoveries


def _rewritten(traced: Traced, request: Request) -> Traced:
    """What the passes make of a trace."""
    rewrites = [one.rewrite_joint for one in request.passes if one.rewrite_joint is not None]
    rewritten = rewrite(traced, rewrites)
    return rewritten if request.in_backward is None else update_in_backward(rewritten)


def _saved(
    saved: Plan, captured: Captured, recoveries: tuple[Recovery, ...]
) -> tuple[Schedule, int | None]:
    """The schedule of a saved plan, if it was made for this step."""
    if saved.fingerprint != fingerprint(captured.program, recoveries):
        raise PlanMismatch(
            "the saved plan was made for another step: another model, other shapes or modes, "
            "other passes, or another release of torch. Plan this one with memplan.plan."
        )
    return saved.schedule, saved.budget_bytes


def _infeasible(budget_bytes: int, smallest: Plan, max_slowdown: float | None) -> InfeasibleBudget:
    slowdown = MAX_SLOWDOWN if max_slowdown is None else max_slowdown
    largest = ", ".join(
        f"{format_bytes(value.nbytes)} {value.category} of {value.module or 'the root module'}"
        for value in smallest.live[:4]
    )
    return InfeasibleBudget(
        f"budget {format_bytes(budget_bytes)} ({budget_bytes} bytes) is too small for this step: "
        f"the smallest that memplan can keep, at no more than {slowdown:g}x the time, is "
        f"{smallest.peak_bytes} bytes ({format_bytes(smallest.peak_bytes)}, of which "
        f"{format_bytes(smallest.resident_bytes)} are resident). Its peak is at "
        f"{smallest.peak_op}, where {largest} are alive. Raise the budget, make the batch "
        f'smaller, or pass Options(on_infeasible="smallest"). {smallest.advice}'.strip(),
        smallest.peak_bytes,
    )
