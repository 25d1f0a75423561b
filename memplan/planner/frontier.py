"""The trade of memory for time: the best schedules known over the whole range of budgets."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.ir.liveness import floor_bytes
from memplan.ir.program import Costs, Program
from memplan.ir.schedule import Recovery
from memplan.planner.account import Evaluated
from memplan.planner.improve import add_back
from memplan.planner.problem import Problem, make_problems
from memplan.planner.search import (
    MAX_SLOWDOWN,
    Solution,
    descend,
    effort_for,
    everything_kept,
    solution_of,
    within,
)


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
        recoveries: those that passes offer.
        original_seconds: what slowdowns refer to; by default the program with everything kept.
        points: budgets to plan for, evenly spread; schedules that others beat are left out.
    """
    families = make_problems(program, recoveries, costs)
    seconds = everything_kept(families[0][0]).seconds
    limit = MAX_SLOWDOWN * (seconds if original_seconds is None else original_seconds)
    floor = floor_bytes(program, recoveries, costs) - program.resident_bytes
    found = [one for family in families for one in _frontier(family, floor, limit, points)]
    return [solution_of(problem, state) for problem, state in _undominated(found)]


def _frontier(
    problems: Sequence[Problem], floor: int, limit: float, points: int
) -> list[tuple[Problem, Evaluated]]:
    base = everything_kept(problems[0])
    lowest = descend(problems[-1], base, floor, limit)[-1]
    best = [(problems[-1], lowest)]
    for point in range(1, points):
        target = lowest.peak + (base.peak - lowest.peak) * point // max(points - 1, 1)
        found = ((problem, within(problem, base, target, limit)) for problem in problems)
        first = next(((problem, state) for problem, state in found if state is not None), None)
        # A schedule that fits into less fits here as well, with room to add back.
        problem, state = best[-1]
        carried = (problem, add_back(problem, state, target, effort_for(problem)))
        best.append(min([carried, *([first] if first else [])], key=_worth))
    return best


def _worth(found: tuple[Problem, Evaluated]) -> tuple[float, int]:
    _, state = found
    return (state.seconds, state.peak)


def _undominated(found: Sequence[tuple[Problem, Evaluated]]) -> list[tuple[Problem, Evaluated]]:
    """The states that are faster than all of lower peaks, by ascending peak."""
    kept: list[tuple[Problem, Evaluated]] = []
    for problem, state in sorted(found, key=lambda one: (one[1].peak, one[1].seconds)):
        if not kept or state.seconds < kept[-1][1].seconds:
            kept.append((problem, state))
    return kept
