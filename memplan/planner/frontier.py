"""The trade of memory for time: the best schedules known over the whole range of budgets."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.planner.improve import add_back
from memplan.planner.lowering import State, keep_everything
from memplan.planner.problem import make_problem
from memplan.planner.search import (
    MAX_SLOWDOWN,
    Solution,
    account,
    descend,
    effort_for,
    solution_of,
    within,
)
from memplan.program import Costs, Program
from memplan.schedule import Recovery
from memplan.timeline import floor_bytes


def frontier(
    program: Program,
    costs: Costs,
    recoveries: Sequence[Recovery],
    *,
    original_seconds: float | None = None,
    points: int = 20,
) -> list[Solution]:
    """Schedules from the smallest feasible peak to the unplanned one; none is worse than another.

    Args:
        program: the step.
        costs: of every op, the recoveries' included.
        recoveries: what passes offer.
        original_seconds: what slowdowns refer to; by default the program with everything kept.
        points: budgets to plan for, evenly spread; schedules that others beat are left out.
    """
    problem = make_problem(program, recoveries, costs)
    base = account(problem, keep_everything(problem))
    limit = MAX_SLOWDOWN * (base.seconds if original_seconds is None else original_seconds)
    floor = floor_bytes(program, recoveries, costs) - program.resident_bytes
    lowest = descend(problem, base, floor, limit)[-1]
    best = [lowest]
    for point in range(1, points):
        target = lowest.peak + (base.peak - lowest.peak) * point // max(points - 1, 1)
        found = within(problem, base, target, limit)
        # What fits into less fits here as well, and there is room to add back.
        carried = add_back(problem, best[-1], target, effort_for(problem))
        best.append(min([carried, *([found] if found else [])], key=_worth))
    return [solution_of(problem, state) for state in _undominated(best)]


def _worth(state: State) -> tuple[float, int]:
    return (state.seconds, state.peak)


def _undominated(states: Sequence[State]) -> list[State]:
    """Those that are faster than all of lower peaks, by ascending peak."""
    kept: list[State] = []
    for state in sorted(states, key=lambda state: (state.peak, state.seconds)):
        if not kept or state.seconds < kept[-1].seconds:
            kept.append(state)
    return kept
