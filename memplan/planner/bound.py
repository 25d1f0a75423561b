"""A lower bound on the time of every schedule within a budget: the certificate of a plan.

Look at one moment, while a captured op runs. What later ops need must be alive then, or be made
again afterwards; so must what those restores need. The cheapest such choice whose bytes fit into
the budget is a closure-knapsack: no schedule of these ops in this order, with the cheapest recovery
of each value, takes less time. One moment, the unplanned peak, gives nearly the whole bound of
larger programs; in small ones, moments around it add to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from memplan.planner.lowering import keep_everything, lower
from memplan.planner.problem import Problem, make_problem
from memplan.planner.windows import Windows
from memplan.program import Costs, Program
from memplan.schedule import Recovery

_MOST_CELLS = 2000
"""Ops times moments of one bound; the program is small enough for some seconds then."""

_MOST_MOMENTS = 8


def least_seconds(problem: Problem, target: int, time_limit_s: float = 10.0) -> float:
    """No schedule within ``target`` non-resident bytes takes less; infinite if there is none.

    Raises:
        MemplanError: if the extra ``exact`` is not installed.
    """
    base = lower(problem, keep_everything(problem))
    if base.peak <= target:
        return base.seconds
    most = np.zeros(problem.num_ops, dtype=np.int64)
    for call, peak in zip(base.calls, base.peak_bytes.tolist(), strict=True):
        most[call.time] = max(most[call.time], peak)
    highest = int(most.argmax())
    over = np.flatnonzero(most > target)
    moments = max(1, min(_MOST_MOMENTS, _MOST_CELLS // problem.num_ops, len(over)))
    spread = {int(over[i]) for i in np.linspace(0, len(over) - 1, moments).astype(int)}
    choices = [[highest]] if moments == 1 else [[highest], sorted({highest, *spread})]
    least = 0.0
    for cuts in choices:
        milp = Windows(problem, target, cuts).milp
        least = max(least, milp.minimise(time_limit_s, gap=1e-3).bound)
        if math.isinf(least):
            break
    return base.seconds + least


def bound_seconds(
    program: Program,
    costs: Costs,
    recoveries: Sequence[Recovery],
    *,
    budget_bytes: int,
    time_limit_s: float = 10.0,
) -> float:
    """``least_seconds`` of a step within a budget, residents included."""
    problem = make_problem(program, recoveries, costs)
    return least_seconds(problem, budget_bytes - program.resident_bytes, time_limit_s)
