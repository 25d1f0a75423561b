"""The search: program, costs, recoveries and a budget in; a schedule out. No torch here."""

from memplan.planner.bound import bound_seconds
from memplan.planner.exact import prove
from memplan.planner.frontier import frontier
from memplan.planner.search import FREE_SLOWDOWN, MAX_SLOWDOWN, Solution, keep_all, solve

__all__ = [
    "FREE_SLOWDOWN",
    "MAX_SLOWDOWN",
    "Solution",
    "bound_seconds",
    "frontier",
    "keep_all",
    "prove",
    "solve",
]
