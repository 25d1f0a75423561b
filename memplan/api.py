"""``optimize``, ``plan``, ``frontier``: each reads as the main path.

capture -> Program + Costs -> passes offer recoveries -> planner chooses a Schedule -> emit ->
PlannedModule -> measure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from torch import nn

from memplan.capture import Captured
from memplan.changing import changing
from memplan.collector import paused_collector
from memplan.describing import fingerprint
from memplan.drift import Guard, rounded, unmeasured
from memplan.emit import emit
from memplan.errors import InfeasibleBudget, MemplanError, PlanMismatch
from memplan.fitting import fitted
from memplan.module import PlannedModule
from memplan.options import Options
from memplan.passing import Pass
from memplan.plan import Plan
from memplan.planner import FREE_SLOWDOWN, MAX_SLOWDOWN, bound_seconds, prove, solve
from memplan.planner import frontier as find_frontier
from memplan.preparing import Prepared, prepare
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
            again=lambda anchors: _emitted(prepared, _chosen(prepared, request, anchors), request),
            reference=partial(_exact_schedule, prepared, chosen),
            is_fixed=request.plan is not None,
        )
    step = PlannedStep(captured, recoveries, prepared.costs, emitted, chosen, in_backward, guard)
    check_emitted(step)
    _LOG.info("%s", chosen)
    return step


@paused_collector()
def make_plan(model: nn.Module, sample: Sample, request: Request) -> tuple[Prepared, Plan]:
    """Capture a step and choose how it runs."""
    request = fitted(model, sample, request, make_plan)
    return _best(prepare(model, sample, request), request)


def _best(step: Prepared, request: Request) -> tuple[Prepared, Plan]:
    """The better plan of those with and without the rewrites of optional passes."""
    steps = [step]
    if step.without_optional is not None and request.plan is None:
        steps.append(step.without_optional())
    found: list[tuple[Prepared, Plan]] = []
    failures: list[InfeasibleBudget] = []
    for one in steps:
        try:
            found.append((one, _chosen(one, request)))
        except InfeasibleBudget as failure:
            failures.append(failure)
    if not found:
        raise min(failures, key=lambda failure: failure.smallest_budget_bytes)
    return min(found, key=partial(_rank, request))


def _rank(request: Request, found: tuple[Prepared, Plan]) -> tuple[bool, bool, float]:
    """Lower for a better plan: within its bounds, then fast where a budget holds, else small."""
    step, chosen = found
    budget_bytes = step.resolve(request.budget)
    is_over = budget_bytes is not None and chosen.peak_bytes > budget_bytes
    fastest = MAX_SLOWDOWN if budget_bytes is not None else FREE_SLOWDOWN
    is_slow = chosen.slowdown > (request.max_slowdown or fastest)
    is_small = budget_bytes is None or is_over
    return is_over, is_slow, chosen.peak_bytes if is_small else chosen.seconds


def _chosen(step: Prepared, request: Request, anchors: frozenset[int] = frozenset()) -> Plan:
    """The plan for a captured step; ``anchors`` are values that no later one gives back."""
    captured, recoveries = step.captured, step.recoveries
    if request.plan is not None:
        schedule, budget_bytes = _saved(request.plan, captured, recoveries)
    else:
        schedule, budget_bytes = _solved(step, request, anchors)
    check_schedule(captured.program, recoveries, schedule)
    chosen = step.describe(schedule, budget_bytes=budget_bytes)
    if inexact := rounded(recoveries, schedule):
        chosen = replace(chosen, notes=(*chosen.notes, unmeasured(inexact)))
    if budget_bytes is not None and chosen.peak_bytes > budget_bytes:
        raise PlanMismatch(
            f"the saved plan needs {chosen.peak_bytes} bytes here, more than its budget of "
            f"{budget_bytes}: kernels differ between machines. Plan this one with memplan.plan."
        )
    if request.options.with_bound:
        chosen = replace(chosen, slowdown_bound=_slowdown_bound(step, chosen, request))
    return chosen


def _exact_schedule(step: Prepared, chosen: Plan) -> Schedule | None:
    """A schedule of exact recoveries within a plan's budget; without one, of least peak."""
    solution = solve(
        step.captured.program,
        step.costs,
        [one for one in step.recoveries if one.exactness is Effect.EXACT],
        budget_bytes=chosen.peak_bytes if chosen.budget_bytes is None else chosen.budget_bytes,
    )
    is_allowed = solution.is_feasible or chosen.budget_bytes is None
    return solution.schedule if is_allowed else None


def _solved(
    step: Prepared, request: Request, anchors: frozenset[int]
) -> tuple[Schedule, int | None]:
    """The schedule that was asked for, and the budget in bytes."""
    program, costs, options = step.captured.program, step.costs, request.options
    budget_bytes = step.resolve(request.budget)
    _LOG.debug("planning %d ops", len(program.ops))
    solution = solve(
        program,
        costs,
        step.recoveries,
        budget_bytes=budget_bytes,
        max_slowdown=request.max_slowdown,
        original_seconds=step.unplanned.seconds,
        anchors=anchors,
    )
    if options.solver == "exact":
        if budget_bytes is None:
            raise MemplanError('Options(solver="exact") needs a budget')
        solution = prove(
            program,
            costs,
            step.recoveries,
            solution,
            budget_bytes=budget_bytes,
            time_limit_s=options.solver_limit_s,
        )
    if solution.is_feasible:
        return solution.schedule, budget_bytes
    if options.on_infeasible == "raise":
        smallest = step.describe(solution.schedule, budget_bytes=solution.peak_bytes)
        raise _infeasible(budget_bytes or 0, smallest, request.max_slowdown, len(anchors))
    return solution.schedule, solution.peak_bytes


def _slowdown_bound(step: Prepared, chosen: Plan, request: Request) -> float:
    """No plan within the same budget has a lower slowdown."""
    budget_bytes = chosen.budget_bytes
    seconds = bound_seconds(
        step.captured.program,
        step.costs,
        step.recoveries,
        budget_bytes=chosen.peak_bytes if budget_bytes is None else budget_bytes,
        time_limit_s=request.options.solver_limit_s,
    )
    return seconds / step.unplanned.seconds


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


def _infeasible(
    budget_bytes: int, smallest: Plan, max_slowdown: float | None, num_anchors: int
) -> InfeasibleBudget:
    slowdown = MAX_SLOWDOWN if max_slowdown is None else max_slowdown
    largest = ", ".join(
        f"{format_bytes(value.nbytes)} {value.category} of {value.module or 'the root module'}"
        for value in smallest.live[:4]
    )
    drift = (
        f"{num_anchors} values are kept, because their copies would drift by more than the "
        "tolerance: a larger tolerance needs less memory."
        if num_anchors
        else ""
    )
    return InfeasibleBudget(
        f"budget {format_bytes(budget_bytes)} ({budget_bytes} bytes) is too small for this step: "
        f"the smallest that memplan can keep, at no more than {slowdown:g}x the time, is "
        f"{smallest.peak_bytes} bytes ({format_bytes(smallest.peak_bytes)}, of which "
        f"{format_bytes(smallest.resident_bytes)} are resident). Its peak is at "
        f"{smallest.peak_op}, where {largest} are alive. Raise the budget, make the batch "
        f'smaller, or pass Options(on_infeasible="smallest"). {smallest.advice}{drift}'.strip(),
        smallest.peak_bytes,
    )
