"""The proven best schedule of a small program: same order of ops, each restored at most once.

The program is cut at every op (``windows``). Bytes while a restore runs become rows only for those
restores that were found to break the budget; the solution is the optimum once none does.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from memplan.ir.liveness import ScheduledStep
from memplan.ir.program import Costs, Program
from memplan.ir.schedule import Effect, Recovery, Restore, Schedule
from memplan.planner.account import follow, to_schedule
from memplan.planner.problem import Problem, inverts, make_problem
from memplan.planner.search import Solution
from memplan.planner.windows import Windows

_LOG = logging.getLogger("memplan")


@dataclass(frozen=True)
class Exact:
    """The proven result.

    Attributes:
        schedule: the best that was found within the budget, or None.
        seconds: its time; infinite if there is none.
        bound_seconds: no schedule of this kind takes less.
        is_proven: whether the schedule is the best, or it is proven that there is none.
    """

    schedule: Schedule | None
    seconds: float
    bound_seconds: float
    is_proven: bool


def solve_exactly(problem: Problem, target: int, time_limit_s: float) -> Exact:
    """The cheapest schedule within ``target`` non-resident bytes, or a bound on its time.

    Raises:
        MemplanError: if the extra ``exact`` is not installed.
    """
    deadline = time.monotonic() + time_limit_s
    windows = Windows(problem, target, range(problem.num_ops))
    windows.restore_once()
    base = sum(problem.op_seconds[op] for op in range(problem.num_ops))
    bound = 0.0
    counted: set[tuple[int, int]] = set()
    while True:
        left = deadline - time.monotonic()
        answer = windows.milp.minimise(max(left, 1.0), gap=1e-6)
        bound = max(bound, answer.bound)
        if math.isinf(answer.bound):
            return Exact(None, math.inf, math.inf, is_proven=True)
        if math.isinf(answer.objective):
            return Exact(None, math.inf, base + bound, is_proven=False)
        account = follow(problem, windows.calls(answer))
        if account.peak <= target:
            schedule = to_schedule(problem, account)
            return Exact(schedule, account.seconds, base + bound, is_proven=answer.is_optimal)
        broken = {
            (call.time - 1, call.op)
            for call, peak in zip(account.calls, account.peak_bytes.tolist(), strict=True)
            if peak > target and call.kind is Restore
        }
        if left <= 0 or broken <= counted:
            return Exact(None, math.inf, base + bound, is_proven=False)
        for window, op in sorted(broken - counted):
            windows.bound_restore(window, op)
        counted |= broken


def prove(
    program: Program,
    costs: Costs,
    recoveries: Sequence[Recovery],
    found: Solution,
    *,
    budget_bytes: int,
    time_limit_s: float,
    anchors: frozenset[int] = frozenset(),
) -> Solution:
    """The faster solution within a budget: the one of a search, or the one of ``solve_exactly``.

    The latter uses no recoveries that invert. Anchors are restored by exact ones alone.
    """
    recoveries = [
        one
        for one in recoveries
        if not inverts(program, one)
        and (one.exactness is Effect.EXACT or anchors.isdisjoint(one.values))
    ]
    problem = make_problem(program, recoveries, costs)
    exact = solve_exactly(problem, budget_bytes - program.resident_bytes, time_limit_s)
    _LOG.info(
        "exact solver: %s within %.0f s, at least %.6f s",
        "proven" if exact.is_proven else "not proven",
        time_limit_s,
        exact.bound_seconds,
    )
    if exact.schedule is None or (found.is_feasible and found.seconds <= exact.seconds):
        return found
    step = ScheduledStep(program, tuple(recoveries), costs, exact.schedule)
    return Solution(exact.schedule, step.peak_bytes, exact.seconds)
