"""Choice of the schedule that a captured step runs: as requested, saved, or searched for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from memplan.capture import Captured
from memplan.compiler.lower import LoweredStep
from memplan.compiler.request import Request
from memplan.errors import InfeasibleBudget, MemplanError, PlanMismatch
from memplan.gc_pause import paused_collector
from memplan.ir.schedule import Effect, Recovery, Schedule, check_schedule
from memplan.planner import FREE_SLOWDOWN, MAX_SLOWDOWN, bound_seconds, prove, solve
from memplan.planner.plan import Plan
from memplan.planner.summarize import fingerprint
from memplan.runtime.drift import rounded, unmeasured
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")


@paused_collector()
def select(steps: Iterable[LoweredStep], request: Request) -> tuple[LoweredStep, Plan]:
    """The best plan among several ways to run a step."""
    found: list[tuple[LoweredStep, Plan]] = []
    failures: list[InfeasibleBudget] = []
    for one in steps:
        try:
            found.append((one, choose(one, request)))
        except InfeasibleBudget as failure:
            failures.append(failure)
    if not found:
        raise min(failures, key=lambda failure: failure.smallest_budget_bytes)
    return min(found, key=partial(_rank, request))


def _rank(request: Request, found: tuple[LoweredStep, Plan]) -> tuple[bool, bool, float]:
    """A rank, lower if better: within its bounds, then fast where a budget holds, else small."""
    step, chosen = found
    budget_bytes = step.resolve(request.budget)
    is_over = budget_bytes is not None and chosen.peak_bytes > budget_bytes
    fastest = MAX_SLOWDOWN if budget_bytes is not None else FREE_SLOWDOWN
    is_slow = chosen.slowdown > (request.max_slowdown or fastest)
    is_small = budget_bytes is None or is_over
    return is_over, is_slow, chosen.peak_bytes if is_small else chosen.seconds


def choose(step: LoweredStep, request: Request, anchors: frozenset[int] = frozenset()) -> Plan:
    """The plan for a captured step; ``anchors`` are values that are not restored with rounding."""
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


def exact_schedule(step: LoweredStep, chosen: Plan) -> Schedule | None:
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
    step: LoweredStep, request: Request, anchors: frozenset[int]
) -> tuple[Schedule, int | None]:
    """The requested schedule, and the budget in bytes."""
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
            anchors=anchors,
        )
    if solution.is_feasible:
        return solution.schedule, budget_bytes
    if options.on_infeasible == "raise":
        smallest = step.describe(solution.schedule, budget_bytes=solution.peak_bytes)
        raise _infeasible(budget_bytes or 0, smallest, request.max_slowdown, len(anchors))
    return solution.schedule, solution.peak_bytes


def _slowdown_bound(step: LoweredStep, chosen: Plan, request: Request) -> float:
    """A bound: no plan within the same budget has a lower slowdown."""
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
