"""A lower bound on the time of every schedule within a budget: the certificate of a plan.

Consider one moment, while a captured op runs. What later ops need must be alive then, or be
restored afterwards; so must what those restores need. The cheapest such choice whose bytes fit into
the budget is a closure-knapsack: no schedule of these ops in this order takes less time. One
moment, the unplanned peak, gives nearly the whole bound of larger programs; more moments add to it,
and near the floor they add much.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from memplan.ir.program import Costs, Program
from memplan.ir.schedule import Recovery
from memplan.planner.account import account_of, keep_everything
from memplan.planner.problem import Problem, make_problem
from memplan.planner.windows import Windows

_LADDER = (1, 8, 32, 128)
"""Numbers of moments, tried while there is time: each gives a bound anew."""

_MOST_CELLS = 40_000
"""Ops times moments of one bound: more would not be solved in a minute."""


def least_seconds(problem: Problem, target: int, time_limit_s: float = 10.0) -> float:
    """A bound: no schedule within ``target`` non-resident bytes takes less; infinite if none is.

    Raises:
        MemplanError: if the extra ``exact`` is not installed.
    """
    base = account_of(problem, keep_everything(problem))
    if base.peak <= target:
        return base.seconds
    most = np.zeros(problem.num_ops, dtype=np.int64)
    for call, peak in zip(base.calls, base.peak_bytes.tolist(), strict=True):
        most[call.time] = max(most[call.time], peak)
    highest = int(most.argmax())
    over = np.flatnonzero(most > target)
    deadline = time.monotonic() + time_limit_s
    least = 0.0
    for moments in _LADDER:
        left = deadline - time.monotonic()
        if moments > 1 and (left <= 0 or moments * problem.num_ops > _MOST_CELLS):
            break
        spread = np.linspace(0, len(over) - 1, min(moments, len(over))).astype(int)
        others = {int(over[i]) for i in spread} if moments > 1 else set()
        milp = Windows(problem, target, sorted({highest, *others})).milp
        least = max(least, milp.minimise(max(left, 1.0), gap=1e-3).bound)
        if math.isinf(least) or moments >= len(over):
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
